"""What the checks count: words, writing systems, repeated runs, and the words that name something."""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence

from verl_avar.errors import ConfigError
from verl_avar.evaluation.scoring import TAGS

HAN = "\u3005\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # written without spaces
_ASCII_WORD = re.compile(r"[A-Za-z0-9]+(?:['.,-][A-Za-z0-9]+)*")
_WORD = re.compile(rf"[{HAN}]|[^\W_{HAN}]+(?:['’.,-][^\W_{HAN}]+)*")
_LETTERS = re.compile(rf"[{HAN}]+|[^\W\d_{HAN}]+")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_RUN, _HAN_RUN = 4, 6  # words, characters: about as much text
_LOOP_WORDS, _LOOP_TIMES, _LOOP_PERIOD, _LOOP_WITHIN = 20, 5, 64, 4000
_LOOP_CHARACTERS, _LOOP_CHARACTER_PERIOD = 200, 32


def untagged(text: str) -> str:
    """Without the four tags."""
    for tag in TAGS:
        text = text.replace(tag, " ")
    return text


def words(text: str) -> list[str]:
    """Words as written, tags not among them. Each Chinese character and each kana is one, as word processors count."""
    text = untagged(text)
    return (_ASCII_WORD if text.isascii() else _WORD).findall(text)


def foreign(text: str, scripts: Sequence[str]) -> tuple[float, str]:
    """The share of letters of other writing systems than `scripts`, and the commonest of those ("" for none).

    Tags, digits, LaTeX commands, letters that stand alone (x, θ) and labels of up to four capitals (ABC) don't count:
    formulas have them in every language. Raises ConfigError for a writing system that Unicode's names don't know.
    """
    wanted = frozenset(scripts)
    if unknown := wanted - {"latin"} and wanted - known_scripts():
        raise ConfigError(
            f"checks: scripts has '{min(unknown)}'; writing systems are named as in Unicode: latin, han, hiragana, "
            "katakana, hangul, cyrillic, arabic, …"
        )
    if not wanted or ("latin" in wanted and text.isascii()):
        return 0.0, ""
    runs = _LETTERS.findall(_COMMAND.sub(" ", untagged(text)))
    counted = Counter("".join(r for r in runs if script(r[0]) == "han" or not _is_symbol(r)))
    counts: Counter[str] = Counter()
    for letter, count in counted.items():
        counts[script(letter)] += count
    others = [(count, name) for name, count in counts.items() if name not in wanted]
    if not others:
        return 0.0, ""
    return sum(count for count, _ in others) / counts.total(), max(others)[1]


def _is_symbol(run: str) -> bool:
    return len(run) == 1 or (len(run) <= 4 and run.isupper())


@functools.lru_cache(maxsize=65536)
def script(letter: str) -> str:
    """Writing system of a letter by its Unicode name: "latin", "han", "cyrillic", …; "" for one without a name."""
    name = unicodedata.name(unicodedata.normalize("NFKC", letter)[0], "").split(" ")[0].split("-")[0].lower()
    return "han" if name in ("cjk", "ideographic") else name


@functools.cache
def known_scripts() -> frozenset[str]:
    """Every writing system that `script` can answer."""
    return frozenset(script(c) for c in map(chr, range(sys.maxunicode + 1)) if c.isalpha()) - {""}


def repeated_share(tokens: Sequence[str]) -> float:
    """Share of runs of four words (six characters in mostly Chinese text) that stood before. 0 to 1."""
    tokens = [token.lower() for token in tokens]
    han = 0 if "".join(tokens).isascii() else sum(bool(_HAN_TEXT.match(token)) for token in tokens)
    length = _HAN_RUN if 2 * han > len(tokens) else _RUN
    runs = list(zip(*(tokens[i:] for i in range(length)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def loop_at_end(text: str) -> str | None:
    """What a text repeats at its end, five times or more over 20 words, or over 200 characters; None: nothing.

    Of units up to 64 words, in the last 4,000 characters.
    """
    text = text[-_LOOP_WITHIN:].strip()
    # Each word of a loop stands there as often as the loop turns: this rules out most texts without all their words.
    last = words(text[-100:])[-5:]
    tokens = words(text) if all(text.count(word) >= _LOOP_TIMES for word in last) else []
    for period in range(1, min(_LOOP_PERIOD, len(tokens) // _LOOP_TIMES) + 1):
        wanted, same = max(_LOOP_WORDS, _LOOP_TIMES * period) - period, 0
        while same < wanted and same + period < len(tokens) and tokens[-1 - same] == tokens[-1 - same - period]:
            same += 1
        if same == wanted:
            return " ".join(tokens[-period:])
    tail = text[-_LOOP_CHARACTERS:]
    if len(tail) == _LOOP_CHARACTERS:
        for period in range(1, _LOOP_CHARACTER_PERIOD + 1):
            if tail[period:] == tail[:-period]:
                return tail[-period:]
    return None


# Words that name nothing to be seen: grammar, talk of looking and of the image as such, and of reasoning.
_STOP = """
a about above actually again ah all alright also although am an and another any are aren't around as at back be
because been before being below between both but by can can't careful carefully check checked checking clear clearly
close closely closer come coming confirm confirming confirmed consider correct could did do does doesn't doing don't
double each earlier either else even ever every exactly examine examining final finally first fully further get give
given go goes going good had has have having he her here him his hmm how however i i'll i'm i've if in indeed inspect
inspecting into is isn't it it's its itself just know last let let's like look looked looking looks made make making
many may maybe me mean means might more most much must my near need next no not note notice noticed now observe
observed of off oh ok okay on once one only onto or other our out over own part perhaps precisely quick quickly really
recheck reexamine right said same saw say says second see seeing seem seems seen she should show showing shown shows
since so some something still such sure take taking than that that's the their them then there there's these they
thing things think this those through time to together too toward two under until up upon us use using verify
verifying very view want was we we'll well were what what's when where whether which while who whole why will with
within without would yes yet you your image images picture pictures photo photos photograph figure figures diagram
diagrams drawing illustration visual visually visible scene detail details question problem answer option choice
description caption
"""
STOP = frozenset(_STOP.split())
_HAN_STOP = re.compile(
    r"图[片像形中上里]?|再|看到|看见|看|一下|一遍|仔细|观察|注意到|可以|我们?|让|检查|确认|这[个张幅]?|那[个]?|的|是|在|有|了|从|中|和|与|所示|如|知|出"
)
_HAN_TEXT = re.compile(f"[{HAN}]+")


def content_words(text: str) -> set[str]:
    """What a text names: words without `STOP`, plurals made singular; numbers; pairs of Chinese characters."""
    names = set(map(_name, words(text.lower().replace("’", "'")))) - {""}
    if not text.isascii():
        for run in _HAN_TEXT.findall(_HAN_STOP.sub(" ", text)):
            names.update(run[i : i + 2] for i in range(len(run) - 1))
    return names


@functools.lru_cache(maxsize=65536)
def _name(word: str) -> str:
    return singular(word) if (len(word) > 1 or word.isdigit()) and word not in STOP else ""


def singular(word: str) -> str:
    """An English plural as its singular, by spelling alone: boxes, box; cherries, cherry; circles', circle."""
    word = word.removesuffix("'s").removesuffix("'")
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ses", "xes", "zes", "ches", "shes")) and not word.endswith("uses"):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
