"""Replies that decline, apologise or complain that there is no image, told by how they begin."""

from __future__ import annotations

import re

from verl_avar.evaluation.scoring import TAGS
from verl_avar.synthesis.checks.patterns import simplified

_IMAGE = r"(?:images?|pictures?|photos?|photographs?|attachments?|files?|visual content|visuals)"
_UNABLE = (
    r"(?:i|we) (?:can't|cannot|can not|could not|couldn't|am unable to|am not able to|won't|will not|must decline to|"
    r"have to decline to|don't have the ability to|do not have the ability to)|(?:i'm|we're) (?:unable to|not able to)"
)
_OPENING = (  # "Okay, unfortunately, …"
    r"(?:(?:okay|ok|hello|hi|well|thank you|thanks|unfortunately|regrettably|sorry|but|however)\b[^a-z]{0,3}){0,3}"
)
_DECLINES = re.compile(
    r"(?:sorry\b[,.!;:]|(?:很|非常)?(?:抱歉|对不起|遗憾))"
    rf"|{_OPENING}(?:"
    r"(?:i'm|i am|we are|we're) (?:really |very |so |truly |deeply )?sorry\b"
    r"|(?:i'm|i am) afraid (?:that )?(?:i|the|no|this)\b"
    r"|(?:my )?(?:sincere )?apologies\b|(?:i|we) (?:must |do )?apologi[sz]e\b"
    r"|as an? (?:ai\b|assistant,|text[- ](?:based|only)\b|(?:\w+[- ]){0,3}(?:language|ai) (?:model|assistant)\b)"
    rf"|(?:{_UNABLE}) (?:\w+ly )?(?:"
    r"(?:help|assist)(?:[.!]| (?:you|with)\b)|(?:fulfil|fulfill|comply|engage|participate)\b"
    r"|(?:process|complete|answer|respond to) (?:this|that|the|your|such)(?: \w+)? "
    r"(?:request|question|query|task|image|prompt)(?! (?:yet|until|without|directly|from|by))"
    r"|(?:provide|generate|create|give|offer|write) (?:an?|the|any|you|this|that|such) "
    r"(?:\w+ )?(?:description|answer|response|assistance|content|information|analysis|help)(?! (?:yet|until|without))"
    r"|(?:identify|recogni[sz]e|name) (?:the |this |any |real )?(?:person|people|individuals?|faces?)\b|do that\b)"
    r"|i (?:must|have to|need to) (?:respectfully )?(?:decline|refuse)\b"
    r"|作为(?:一个|一名|一款)?(?:大型|人工智能|ai|语言)+(?:模型|助手|语言模型)?"
    r"|(?:我|目前|暂时|很?遗憾)+[,， ]*(?:无法|不能|没办法|没有办法)(?:为您|为你)?"
    r"(?:(?:提供|给出)(?:相关|任何)?(?:帮助|协助|描述|答案|信息)|帮助|协助|满足|回答(?:这个|该|您的|你的)(?:问题|请求))"
    r")"
)
# A chain may own up to that and go on from the description; a reply or an answer that begins so goes nowhere.
_SEES_NOTHING = re.compile(
    rf"{_OPENING}(?:"
    rf"(?:{_UNABLE}) (?:\w+ly )?(?:see|view|open|access|display|analy[sz]e|describe|interpret|examine|process|read) "
    rf"(?:the |this |that |any |your |an? )?(?:\w+ )?{_IMAGE}\b(?! of\b)"
    rf"|(?:i|we) (?:don't|do not) (?:see|have(?: access to)?) (?:an?y?|the|your) (?:\w+ )?{_IMAGE}\b(?! of\b)"
    rf"|(?:there (?:is|was) )?no (?:\w+ )?{_IMAGE} (?:(?:is|was|were|has been|have been|seems to be) )?"
    r"(?:attached|provided|included|uploaded|available|given|supplied)\b"
    rf"|it (?:seems|looks like|appears)(?: that)? (?:no {_IMAGE} (?:was|were|is|has)|(?:the|your|an?) {_IMAGE} "
    r"(?:wasn't|was not|weren't|didn't|did not|is missing|hasn't|has not|failed))"
    rf"|(?:could you )?please (?:provide|upload|attach|share|send)[^.]{{0,30}} {_IMAGE}\b"
    r"|我?(?:无法|不能|没办法|没有办法)(?:直接)?"
    r"(?:看到|查看|打开|访问|识别|处理|分析|描述)(?:这张|该|您的?|你的?|任何)*(?:图片|图像|照片|人物)"
    r"|我?(?:您|你)?(?:似乎|好像)?(?:没有|未)(?:提供|上传|看到|收到)(?:任何)?(?:图片|图像|照片)"
    r"|请(?:您|你)?(?:提供|上传)(?:一张|相关)?(?:图片|图像|照片)"
    r")"
)
_DRESS = " \t\r\n*#>_\"'`-"
_START = 300  # characters of a beginning


def find_refusal(text: str) -> str | None:
    """How a refusal begins: at the start of the reply, of the reasoning, of what follows it or of the answer.

    "I can't see the hidden side" in the middle of a chain is none, nor is a chain that begins with not seeing the
    image.
    """
    begins = {tag: at + len(tag) for tag in TAGS[:3] if (at := text.find(tag)) >= 0}
    for tag, start in {"": 0, **begins}.items():
        beginning = simplified(text[start : start + _START].lstrip(_DRESS))
        if _DECLINES.match(beginning) or (tag != TAGS[0] and _SEES_NOTHING.match(beginning)):
            return beginning[:100]
    return None
