"""What an anchored chain must not say: that its writer read a description, a caption or a text in place of the image.

Of the mentions some are innocent: of the problem's own description or of an answer option's, of a caption printed in
the image, of text that stands in the image ("the text on the sign"), of a described circle, of laws that describe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from verl_avar.synthesis.checks.patterns import compile_all, simplified

_OWN = r"(?:problem|question|task|exercise|puzzle|statement|stem)"
_PICTURE = r"(?:image|picture|scene|photo|photograph|figure|diagram|chart|graph|drawing|illustration)"
_THE = r"\b(?:the|this|that|these|those|your|my|our)"
_KIND = (
    r"(?: (?:given|provided|supplied|original|initial|detailed|full|long|written|textual|text|verbal|visual|"
    rf"accompanying|above|earlier|previous|same|whole|entire|exact|actual|global|overall|user's|{_PICTURE}(?:'s)?)){{0,3}}"
)
_NOUN = r"(?:descriptions?|captions?)\b"
# "the description in the question", "of option B", "of a rhombus": not of this image.
_ELSEWHERE = (
    rf"(?! (?:given |provided |stated )?(?:in|of|from|for|by) (?:the |this |that |each |both |all )?"
    rf"(?:{_OWN}|options?|choices?|answers?|statements?)\b)"
    rf"(?! of an? (?!{_PICTURE}\b))"
)
# A caption that is printed in the image: "the caption below the photo".
_PRINTED = (
    r"(?<!caption)(?<!captions)"
    r"|(?! (?:\w+ )?(?:below|under|underneath|beneath|above|beside|at|in|on|inside) (?:the|this|that|it)\b)"
)
_THERE = rf"{_NOUN}(?:{_PRINTED}){_ELSEWHERE}"
_SAYS = (
    r"(?: (?:also|itself|only|clearly|explicitly|just|simply|then|even|had|has|did not|didn't|does not|doesn't))*"
    r" (?:say|said|state|mention|note|indicate|list|specif|tell|told|give|confirm|provided|read|describe|show|impl|"
    r"suggest|report|explain|call)"
)

# Always a leak.
_STRONG = re.compile(
    rf"(?:according to|based on|relying on|as per|\bper|\bfrom|\busing|\bfollowing|\bby|\bin|\bre-?read(?:ing)?|"
    rf"\brefer(?:ring)? (?:back )?to|\bgo(?:ing)? back to|\bback to|\bcheck(?:ing)?) (?:the|this|that|your|my|our)?"
    rf"{_KIND} ?\b{_THERE}"
    rf"|{_THE}{_KIND} {_THERE}{_SAYS}"
    rf"|(?:^|[.,;:!?] )(?:image |scene |visual )?{_THERE}{_SAYS}"
    rf"|\b(?:image|visual|scene|picture|photo|textual|text|written|verbal)(?:'s)? {_NOUN}(?:{_PRINTED})"
    rf"|\b(?:given|provided|supplied) {_THERE}"
    rf"|\bdescriptions? (?:of|for) (?:the|this|an?) (?:given |provided )?{_PICTURE}\b"
    rf"|\b(?:only|just|given|have|had|with) (?:only |just )?an?{_KIND} {_THERE}"
    rf"(?! of (?:the|an?|its|his|her|their|each) (?!{_PICTURE}\b))"
)
# A leak unless the question itself speaks of descriptions or captions ("Which description fits?").
_WEAK = re.compile(rf"{_THE}{_KIND} {_THERE}|(?<!problem )(?<!question )(?<!task )\bdescription\*{{0,2}}:")
_NAMED_SOURCE = (
    rf"(?! (?:above|earlier|below|before|previously|here|using|as|by|(?:in|on|by) (?:the |this |that )?"
    rf"(?:\w+ )?(?:{_OWN}|{_PICTURE}|options?|choices?|equations?|formula|law|theorem|definition|function|rules?|"
    r"passage|steps?|legend|title|text of)\b))"
)
_AS_DESCRIBED = re.compile(
    r"\bas (?:is |was |were |has been )?(?:previously |already |explicitly |originally )?described\b" + _NAMED_SOURCE
)
_DESCRIBED = re.compile(
    rf"\bdescribed {_PICTURE}\b|\bit(?:'s| is| was) described (?:that|how)\b"
    rf"|\bwhat(?:'s| is| was| has been) described\b{_NAMED_SOURCE}"
    rf"|\b(?:{_PICTURE}|objects?|elements?|details|items) (?:that |which )?(?:as |is |are |was |were )?described\b"
    rf"{_NAMED_SOURCE}"
)
# Not the names that a science gives: "this process is described as mitosis".
_DESCRIBED_AS = re.compile(
    rf"^(?!.*\b{_OWN}\b).*\b(?!(?:process|phenomenon|theorem|method|reaction|relationship|motion|law|function|effect|"
    r"theory|term|concept|rule|type|kind)s? )[\w']{1,30} (?:is|are|was|were)(?: \w{1,20}ly)? described as\b"
)
_AFTER_TEXT = (
    r"(?! (?:in|on|inside|at|label|labels|box|boxes|above|below|next|under|near|beside|of|that|within|along)\b)"
)
_TEXT = re.compile(
    rf"\b(?:provided|given|supplied|accompanying) text\b{_AFTER_TEXT}"
    rf"|\btext (?:that (?:is|was) |which (?:is|was) |i (?:was|am) )?(?:provided|given|supplied)\b{_AFTER_TEXT}"
    rf"|\b(?:according to|based on|from|as per|per) (?:the|this) text\b{_AFTER_TEXT}"
    r"|\b(?:the|this) text (?:only |also |explicitly |clearly )?(?:mentions|describes|describing|tells (?:us|me))\b"
    r"|\btext(?:ual)?[- ](?:only|based) (?:input|version|representation|information|account|summary)\b"
    r"|\btextual (?:information|details|data|content|input|clues)\b"
)
_ASKS_OF_TEXT = re.compile(r"\b(?:text|passage|paragraph|read)\b")
_BLIND = re.compile(
    r"\b(?:can't|cannot|can not|unable to|not able to|couldn't|don't|do not) "
    r"(?:actually |directly |really |physically )?(?:see|view|access|look at) "
    r"(?:the|this|any) (?:actual |original )?(?:image|picture|figure|diagram|photo)\b"
    r"(?! (?:of|distance|formed|point|plane|clearly)\b)"
    rf"|\b(?:don't|do not) have (?:direct |any )?(?:access to )?(?:the|this|an) (?:actual |original )?{_PICTURE}\b"
    r"(?! of)"
    r"|\bwithout (?:seeing|access to|having|viewing) (?:the|an) (?:actual |original )?"
    r"(?:image|picture|figure|diagram)\b"
    r"|\bwithout the (?:actual |original )?(?:image|picture|figure|diagram)(?:[,.;]| i\b| itself\b)"
    r"|\bno (?:actual )?(?:image|picture|photo|figure|diagram) (?:is|was|has been) "
    r"(?:provided|given|attached|supplied)\b(?! for\b)"
    r"|\bas an? (?:text|language)[- ](?:based |only )?(?:ai|model)\b"
)
_CHINESE = re.compile(
    r"(?:根据|按照|依据|基于|从|按|依|正如|如)(?:了|着|上述|上面|以上|给定|所给|给出|提供|这段|该|图片|图像|图|场景|画面|文字|这个|的)*"
    r"(?:描述|文字说明|说明文字)(?!了|的?(?:函数|规律|定律|方程|题|问题))"
    r"|(?<!题目)(?<!题目的)(?<!问题)(?<!问题的)(?<!题干)(?<!选项)(?<!选项的)(?:描述|文字说明|说明文字)"
    r"(?:中|里|说|还说|提到|指出|显示|表明|称|写道|给出|没有|所述|所说)"
    r"|(?:图片|图像|画面|场景|文字|给定|所给|提供)的?描述(?!了|的)"
    r"|(?:看不到|无法看到|没有看到|不能看到)(?:这张|该)?(?:图片|图像|原图|图(?=[，。,.]|$))"
)
_CHINESE_TRIGGERS = ("描述", "说明", "看")


def find_leak(text: str, question: str, extra: Sequence[str] = ()) -> str | None:
    """The words that give away that there was a text in place of the image, with their surroundings; None: nothing.

    extra: further regular expressions. Raises ConfigError for one that is none.
    """
    for pattern in compile_all(extra, "leak_phrases"):
        if match := pattern.search(text):
            return _around(text, match)
    plain = simplified(text)
    if "descri" in plain or "caption" in plain:
        asked = question.lower()
        for match in _STRONG.finditer(plain):
            if "caption" not in asked or "caption" not in match[0]:  # "Read the caption under the photo"
                return _around(plain, match)
        if "descri" not in asked and "caption" not in asked and (match := _WEAK.search(plain)):
            return _around(plain, match)
        if "described" in plain and (match := _described(plain, asked)):
            return match
    if "text" in plain and not _ASKS_OF_TEXT.search(question.lower()) and (match := _TEXT.search(plain)):
        return _around(plain, match)
    if match := _BLIND.search(plain):
        return _around(plain, match)
    if not plain.isascii() and any(word in plain for word in _CHINESE_TRIGGERS) and (match := _CHINESE.search(plain)):
        return _around(plain, match)
    return None


def _described(plain: str, asked: str) -> str | None:
    """Of "as described", "is described as" and "the described scene" the first that points at no other source."""
    if "described" in asked:
        return None
    for pattern in (_AS_DESCRIBED, _DESCRIBED):
        if match := pattern.search(plain):
            return _around(plain, match)
    for sentence in plain.split(". "):
        if " described as" in sentence and len(sentence) <= 1000 and _DESCRIBED_AS.match(sentence):
            return sentence[-120:]
    return None


def _around(text: str, match: re.Match) -> str:
    """The match with up to 30 characters on either side, on one line."""
    start, end = max(0, match.start() - 30), min(match.end(), match.start() + 120) + 30
    return " ".join(text[start:end].split())
