"""Explicit looks at the image in a chain (AVAR §4.1, arXiv:2603.03825): where they are and whether they name things.

An anchor is a sentence in which the writer looks ("looking at the triangle again", "I see two crosses", "let me check
the figure", "on closer inspection"), or takes something from the image by name ("in the diagram", "the chart shows").
Looks at what is not there to be seen (an equation, the options, a mistake) and what a question says are none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from verl_avar.synthesis.checks.patterns import compile_all, simplified
from verl_avar.synthesis.checks.words import content_words


@dataclass(frozen=True)
class Anchor:
    """One look at the image."""

    text: str  # the sentence; with the next one where it names nothing itself ("Let me look again.")
    position: float  # 0 to 1: where in the chain inside <think> it begins


_IMAGE = (
    r"(?:images?|pictures?|figures?|diagrams?|photos?|photographs?|charts?|graphs?|plots?|drawings?|illustrations?|"
    r"scenes?|maps?|tables?|screenshots?|grids?|boards?|visuals?|sketch(?:es)?|legends?|axis|axes|panels?)\b"
    r"(?! (?:paper|theory|of (?:values|integrals|contents)))"
)
# What cannot be looked at in the image.
_ABSTRACT = (
    r"(?:equations?|expressions?|formulas?|options?|choices?|answers?|problem|question|statement|result|calculations?|"
    r"case|cases|definition|theorem|propert(?:y|ies)|reasoning|steps?|work|logic|wording|prompt|mistake|error|issue|"
    r"pattern|relationship|difference|derivation|algebra|arithmetic|assumptions?|approach|contradiction|"
    r"conditions?|constraints?|requirements?|sums?|totals?|math|maths|units|possibilit(?:y|ies)|ways?|reasons?|solutions?|"
    r"numbers?(?! (?:line|on|in|at|along|next|near|beside|above|below|under)))\b"
)
_DET = r"(?:the|this|that|these|those|its|our|my|each|all|both|every|another)"
_LOOK = re.compile(
    r"\b(?:look|looking|glance|glancing|gaze|gazing|peer|peering|stare|staring)(?: [a-z]+){0,3}?"
    rf" (?:at|into|over|to|along|across)\b(?! (?:{_DET} )?(?:[a-z]+ ){{0,2}}?{_ABSTRACT})"
    r"(?! (?:it|this|that|things) (?:another|differently|from a|in a|as a)\b)"
    r"|\b(?:look|looking) (?:again|closely|carefully|closer|more closely|more carefully|once more)\b"
    rf"(?! (?:at|to|over|on|into|through) (?:{_DET} )?(?:[a-z]+ ){{0,2}}?{_ABSTRACT})"
    r"|\b(?:take|taking|have|having) (?:a|another|one more) (?:\w+ )?look\b(?! (?:at|to|over|on|into|through) "
    rf"(?:{_DET} )?(?:[a-z]+ ){{0,2}}?{_ABSTRACT})"
    r"|\b(?:closer|closest|careful|visual|second) (?:look|inspection|examination)\b(?! (?:at|of) "
    rf"(?:{_DET} )?(?:[a-z]+ ){{0,2}}?{_ABSTRACT})|\bmy eyes?\b"
)
_SEE = re.compile(
    r"\bi(?:'ve|'ll)?(?: (?:can|could|do|have|also|now|only|clearly|again|indeed|actually|still|then|just|even))*"
    r" (?:see|saw|seen|notice|noticed|observe|observed|spot|spotted|make out|perceive|count|counted|recount|read)\b"
    r"(?! ?[.,!?]|$)(?! (?:why|how|what you|now|no reason|if|whether|my|where i|where my)\b)"
    rf"(?! (?:that )?(?:i|we|you)\b)(?! (?:that )?(?:an?|the|this|that|my|some|no)? ?(?:\w+ )?{_ABSTRACT})"
    r"(?! that (?:[a-z]|\d+) ?(?:[=<>+*/-]|is |equals ))"
    r"|\bi'm (?:now |also |still )?(?:seeing|counting|noticing|observing)\b|\bfrom what (?:i|we)(?: can)? see\b"
    rf"|\bwe(?: (?:can|could|also|now|clearly|indeed|then))* (?:see|observe|notice|spot|count)\b"
    rf"(?! (?:that|why|how|if|whether|from)\b)(?! ?[.,!?]|$)(?! (?:an?|the|this)? ?(?:\w+ )?{_ABSTRACT})"
    rf"(?! (?:[a-z]|\d+) ?[=<>+*/-])"
    r"|\b(?:can|could) (?:clearly |also |easily )?be seen\b|\b(?:is|are) (?:\w+ly )?visible\b"
    r"|\bvisually (?:inspect|confirm|check|verif|compar|examin|trac)"
)
_CHECK = re.compile(
    r"\b(?:re-?|double-|cross-)?(?:check|verif|examin|inspect|visit|review|consult|read|confirm|scan|zoom|focus|refer|return|"
    r"study|trace|compare|trust|count|observ)\w* (?:[\w',-]+ ){0,8}?" + rf"(?:{_DET}) (?:[\w'-]+ ){{0,2}}?{_IMAGE}"
    r"|\b(?:go|going|come|coming|turn|turning|move|moving|shift|shifting) (?:my \w+ )?back (?:[\w',-]+ ){0,3}?"
    rf"(?:{_DET}) (?:[\w'-]+ ){{0,2}}?{_IMAGE}"
    r"|\bzoom(?:ing)? in\b"
    rf"|\b(?:re-?)?(?:inspect|examin|scan|observ)(?:e|ing)? (?:the|this|these|those|its|each)"
    rf"(?! (?:[a-z]+ ){{0,2}}?{_ABSTRACT})"
)
_PLACE = re.compile(
    rf"\b(?:in|from|on|across|within|inside|throughout|per|by) (?:the|this) (?:[\w'-]+ )?{_IMAGE}"
    r"(?! is (?:correct|wrong))"
    rf"|\b(?:the|this) (?:[\w'-]+ )?{_IMAGE} (?:(?:also|clearly|itself|indeed|really|actually|only) )*"
    r"(?:show|depict|display|contain|confirm|reveal|indicate|present|feature|illustrate|has|have)"
)
_ASKED = re.compile(
    r"\b(?:problem|question|prompt|statement)\b (?:\w+ )?"
    r"(?:says?|states?|asks?|tells?|mentions?|gives?|wants?|is asking)\b"
)
_CHINESE = re.compile(
    r"(?:再|重新|仔细|回头|回过头|让我|先)?(?:看一?[看下眼]?|观察一?下?|检查一?下?|查看一?下?|审视|对照|核对一?下?)"
    r"(?:这张|这幅|该|一下|原|整张|到)?图(?!书)"
    r"|(?:再|重新|仔细|回头|回过头)(?:次|来)?(?:看|观察|检查|查看|审视|数)(?!.{0,6}(?:题|选项|公式|方程|问题|答案|计算|步骤|条件))"
    r"|(?:从|在|由|根据)(?:这张|这幅|该|原|上)?(?:图|示意图|图片|图像|图形|图表|画面)(?:片|像|形|表)?(?:中|上|里|来看|可知|可见|可以|看)"
    r"|如图(?:所示)?|图(?:片|像|形|表)?(?:中|上|里)(?!点|位数|文)|我(?:可以|能|还|又)?(?:看到|看见|注意到|观察到|数到|数了)(?!我|题|自己)"
    r"|回到(?:这张|原)?图|放大(?:来|图)?看"
)
# First three letters of words without one of which an English sentence is no look.
_BEGINNINGS = """
loo gla gaz pee sta see saw not obs spo mak per cou rec rea vis ins exa che dou cro ver rev con sca zoo foc ref
ret stu tra com tru eye bac tak hav clo car sec ree ima pic fig dia pho cha gra plo dra ill sce map tab scr gri
boa ske leg axi axe pan re
"""
_TRIGGERS = frozenset(_BEGINNINGS.split())
_LETTERS = re.compile(r"[a-z]+")
_HAN = re.compile("[\u4e00-\u9fff]")
_END = re.compile(r"[.!?](?<![ie]\.[eg]\.)(?<!\b[Ff]ig\.)[\"')*]{0,3}\s+|[。！？；]|;\s|\n+")
_LONGEST = 1000  # characters of a sentence that are searched


def thinking(text: str) -> str:
    """What stands inside <think>…</think>; of a text without these tags all of it."""
    return text.partition("<think>")[2].partition("</think>")[0] if "<think>" in text else text


def find_anchors(text: str, extra: Sequence[str] = ()) -> list[Anchor]:
    """The looks at the image inside <think> of a reply, in order; one per sentence at most.

    A look whose sentence names nothing goes on into the next sentence, which then counts as the same look. extra:
    regular expressions of further anchors, as `checks.anchor.anchor_phrases`. Raises ConfigError for one that is none.
    """
    patterns = compile_all(extra, "anchor_phrases")
    chain = thinking(text)
    sentences = list(_sentences(chain))
    anchors, index = [], 0
    while index < len(sentences):
        start, sentence = sentences[index]
        index += 1
        if not _is_anchor(sentence, patterns):
            continue
        if not content_words(sentence) and index < len(sentences):
            sentence = f"{sentence} {sentences[index][1]}"
            index += 1
        anchors.append(Anchor(" ".join(sentence.split()), start / len(chain)))
    return anchors


def _sentences(chain: str) -> Iterator[tuple[int, str]]:
    """Sentences and lines with the place of their first character; white space alone is none."""
    start = 0
    for end in (*(match.end() for match in _END.finditer(chain)), len(chain)):
        part = chain[start:end]
        if words := part.strip():
            yield start + len(part) - len(part.lstrip()), words
        start = end


def _is_anchor(sentence: str, extra: Sequence[re.Pattern]) -> bool:
    if any(pattern.search(sentence) for pattern in extra):
        return True
    plain = simplified(sentence[:_LONGEST])
    if _HAN.search(plain) and _CHINESE.search(plain):
        return True
    if _TRIGGERS.isdisjoint([word[:3] for word in _LETTERS.findall(plain)]):
        return False
    if _LOOK.search(plain) or _SEE.search(plain) or _CHECK.search(plain):
        return True
    return bool(_PLACE.search(plain)) and not _ASKED.search(plain)


def grounded_share(anchors: Sequence[Anchor], description: str) -> float:
    """Share of the anchors that name something which the description names too. 0 to 1; 1 without anchors."""
    names = content_words(description)
    return sum(not names.isdisjoint(content_words(a.text)) for a in anchors) / len(anchors) if anchors else 1.0
