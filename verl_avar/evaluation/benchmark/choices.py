"""Which option an answer names: by its letter, A to J, or by its text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from verl_avar.evaluation.benchmark.values import same_value
from verl_avar.evaluation.scoring import plain, read_number, same_answer

LETTERS = "ABCDEFGHIJ"
# "Option B", "the correct choice is: B", "答案是B", "故选 C"
_LED = (
    r"(?:(?:the\s+)?(?:correct\s+|final\s+|best\s+)*(?:option|choice|answer|letter)(?:\s+is)?\s*:?\s*"
    r"|[故应所以因此则,\s]*(?:正确)?(?:答案|选项|选择|选)(?:应该|应)?(?:是|为|选)?\s*:?\s*)?"
)
_WHOLE = re.compile(_LED + r"[(\[【{<]?([A-J])[)\]】}>]?[.:]?\s*(?:选项|option)?", re.IGNORECASE)
_LEADING = re.compile(
    _LED + r"(?:[(\[【{]([A-J])[)\]】}][.:]?|([A-J])(?:[):.](?!\d)|,|\s+[-–—]|(?=\s*(?i:because|since|因为)|\s+\())"
    r"|([B-HJ])\s+(?![-=<>+*/^≈]))\s*(.*)"
)
_REASON = re.compile(r"\b(?:because|since|as|for|while|whereas)\b|因为|由于", re.IGNORECASE)
_BRACKETED = re.compile(r"[(\[【]([A-J])[)\]】]|(?<![A-Za-z∠△])([A-J])\)")
_CHOSEN = re.compile(
    r"(?:\b(?:options?|choices?|choose|select|pick|answer(?:\s+is)?)\s*:?|答案[是为]?|选项?)\s*([A-J])(?![A-Za-z0-9'’])"
)
# A capital that stands alone, but no article ("A cat"), no pronoun, no angle and no side of an equation.
_BARE = re.compile(
    r"(?<![A-Za-z0-9'’\\∠△])(?<![=<>])(?<![=<>]\s)(?:([B-HJ])(?!\s*[=<>])|(A)(?!\s+[a-z]|\s*[=<>])|(A)(?=\s+(?:is|and|or|because|since)\b))"
    r"(?![A-Za-z0-9'’])"
)
_NOT = re.compile(
    r"(?:\b(?:not|isn't|cannot be|neither|nor|rather than|instead of|except|unlike|excluding|eliminates?|rules? out)\b"
    r"|不是|不选|排除|并非)\s*(?:the\s+)?(?:options?|choices?|选项?)?\s*[(\[]?((?-i:[A-J]))\b[)\]]?"
    r"|(?:(?:option|choice|选项)\s*)?[(\[]?(?<![A-Za-z])((?-i:[A-J]))[)\]]?\s*"
    r"(?:(?:is|are|was|seems|can)\s*(?:wrong|incorrect|false|impossible|not\b|n't\b|excluded)|不正确|不对|错误)[^.,;。]*",
    re.IGNORECASE,
)
# What takes back an option's text after it: "not the red ball", "longer than 5 cm".
_DENIES = re.compile(
    r"(?:\b(?:not|no|never|neither|nor|than|at least|at most|over|under|above|below|without)|n't|不是|并非|超过|不到)"
    r"\s*(?:the\s+|an?\s+)?$"
)


def read_choice(text: str, choices: Sequence[str]) -> tuple[str | None, str | None]:
    """(letter, problem) of one statement of an answer; choices: the options' texts, none where an image holds them.

    A letter with another option's text counts as the letter, with the problem contradiction.
    """
    text = plain(text).replace("**", "").replace("。", ". ").replace("、", ",").strip()
    if whole := _WHOLE.fullmatch(text):
        return whole[1].upper(), None
    if letter := _same(text, choices):
        return letter, None
    text = _NOT.sub(" ", text).strip()
    if leading := _LEADING.match(text):
        letter, rest = leading[1] or leading[2] or leading[3], leading[4].strip()
        if _others(rest, letter):
            return None, "several_answers"
        meant = _same(rest, choices) if rest else None
        own = ord(letter) - ord("A") < len(choices) and same_answer(rest, choices[ord(letter) - ord("A")])
        return letter, "contradiction" if meant and meant != letter and not own else None
    for pattern in (_BRACKETED, _CHOSEN):
        if found := _letters(pattern, _REASON.split(text)[0]) or _letters(pattern, text):
            return (found.pop(), None) if len(found) == 1 else (None, "several_answers")
    found = _contained(text, choices) or _letters(_BARE, text)
    if len(found) == 1:
        return found.pop(), None
    return None, "several_answers" if found else "no_answer"


def _letters(pattern: re.Pattern, text: str) -> set[str]:
    return {next(group for group in match.groups() if group) for match in pattern.finditer(text)}


def _others(rest: str, letter: str) -> bool:
    """Whether what follows a letter, up to its reason, names another: "and (B)", "or B", ", B", "A. B"."""
    rest = _REASON.split(rest)[0]
    if re.fullmatch(r"[(\[]?[A-J][)\]]?", rest):
        return True
    listed = re.findall(r"(?:^|\b(?:and|or)\b|[,/&])\s*[(\[]?([A-J])\b(?!['’]|\s+[a-z])", rest)
    return bool((set(listed) | _letters(_BRACKETED, rest)) - {letter})


def _bare(text: str) -> str:
    """An option's text without article, case and the like."""
    return re.sub(r"^(?:the|an?)\s+", "", plain(text).casefold())


def _same(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the only option whose text this is: as text, by value, or as its number without the unit."""
    found = [n for n, choice in enumerate(choices) if _bare(text) == _bare(choice)]
    if not found and not re.fullmatch(r"[(\[]?[A-J][)\]]?[.:]?", text):
        found = [n for n, choice in enumerate(choices) if same_answer(text, choice)]
    if not found and read_number(text):
        found = [n for n, choice in enumerate(choices) if read_number(plain(choice)) and same_value(text, choice)]
    return chr(ord("A") + found[0]) if len(found) == 1 else None


def _contained(text: str, choices: Sequence[str]) -> set[str]:
    """Letters of the options whose texts stand in this one: whole words, not denied, not inside a longer option's."""
    text, spans = text.casefold(), []
    for number, choice in enumerate(choices):
        if words := _bare(choice):
            pattern = r"(?<![\w.-])" + re.escape(words) + r"(?![\w%°]|[.,]\d)"
            found = [m.span() for m in re.finditer(pattern, text) if not _DENIES.search(text[: m.start()])]
            spans += [(span, chr(ord("A") + number)) for span in found]
    return {
        letter
        for (start, end), letter in spans
        if not any(a <= start and end <= b and (a, b) != (start, end) for (a, b), _ in spans)
    }
