"""Roles under the real processors of all families, against each family's format written out by hand."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import families
import numpy as np
import pytest
from PIL import Image

from verl_avar.roles import Role
from verl_avar.template import ChatTemplate

LETTER = {Role.OTHER: ".", Role.SYSTEM: "s", Role.VISUAL: "v", Role.USER: "u"}
WORDS = [
    "What",
    "colour",
    "is",
    "?",
    "12",
    ".",
    "été",
    "日本",
    "😀",
    "\n",
    "\n\n",
    "  ",
    "user",
    "USER:",
    "Assistant:",
    "<think>",
]


@dataclass(frozen=True)
class Format:
    """How a family writes a conversation, without white space."""

    header: Callable[[str], str]  # of a role's turn
    end: str  # of each turn
    visual: str  # the placeholder that carries an embedding
    image: str  # a pattern of what stands for an image
    begin: str = ""
    system: str = ""  # text of a system turn where the caller gives none
    thoughts: str = ""  # at the end of the generation prompt
    images_first: bool = False
    merged: bool = False  # the system text stands in the first user turn

    def pieces(self, messages: list[dict]) -> list[tuple[str, str | None]]:
        """(letter of the role, text or None for an image) in the order of the prompt."""
        given = messages[0]["role"] == "system"
        pieces = [("s" if given or self.system else ".", self.begin)]
        if self.system and not given:
            pieces.append(("s", self.header("system") + self.system + self.end))
        if self.merged and given:
            pieces.append(("s", self.header("user") + messages[0]["content"][0]["text"]))
        for m, message in enumerate(messages):
            if self.merged and message["role"] == "system":
                continue
            letter = {"system": "s", "user": "u", "assistant": "."}[message["role"]]
            header = "" if self.merged and given and m == 1 else self.header(message["role"])
            parts = [part.get("text") for part in message["content"]]
            if self.images_first:
                parts.sort(key=lambda part: part is not None)
            pieces += [(letter, piece) for piece in (header, *parts, self.end)]
        return [*pieces, (".", self.header("assistant") + self.thoughts)]


def chatml(visual: str, image: str, **more) -> Format:
    return Format(lambda role: f"<|im_start|>{role}", "<|im_end|>", visual, image, **more)


QWEN = "<|image_pad|>", r"<\|vision_start\|>(<\|image_pad\|>)+<\|vision_end\|>"
IDEFICS = Format(
    lambda role: f"{role.capitalize()}:",
    "<end_of_utterance>",
    "<image>",
    "(<fake_token_around_image><row_._col_.>(<image>)+)*"
    "<fake_token_around_image><global-img>(<image>)+<fake_token_around_image>",
)
FORMATS = {
    "qwen2_vl": chatml(*QWEN, system="You are a helpful assistant."),
    "qwen2_5_vl": chatml(*QWEN, system="You are a helpful assistant."),
    "qwen3_vl": chatml(*QWEN),
    "qwen3_vl_moe": chatml(*QWEN),
    "qwen3_5": chatml(*QWEN, thoughts="<think>"),
    "qwen3_5_moe": chatml(*QWEN, thoughts="<think>"),
    "internvl": chatml("<IMG_CONTEXT>", "<img>(<IMG_CONTEXT>)+</img>"),
    "llava": Format(
        lambda role: "" if role == "system" else f"{role.upper()}:",
        end="",
        visual="<image>",
        image="(<image>)+",
        begin="<s>",
        images_first=True,
    ),
    "llava_onevision": chatml("<image>", "(<image>)+", images_first=True),
    "gemma3": Format(
        lambda role: "<start_of_turn>" + {"user": "user", "assistant": "model"}[role],
        end="<end_of_turn>",
        visual="<image_soft_token>",
        image="<start_of_image>(<image_soft_token>)+<end_of_image>",
        begin="<bos>",
        merged=True,
    ),
    "mllama": Format(
        lambda role: f"<|start_header_id|>{role}<|end_header_id|>",
        end="<|eot_id|>",
        visual="<|image|>",
        image=r"<\|image\|>",
        begin="<|begin_of_text|>",
    ),
    "smolvlm": replace(IDEFICS, begin="<|im_start|>"),
    "idefics3": replace(IDEFICS, begin="<|begin_of_text|>"),
}


def text(rng: random.Random) -> str:
    drawn = rng.choice(["", " ", "\n"]).join(rng.choices(WORDS, k=rng.randint(1, 5)))
    return drawn if drawn.strip() else text(rng)


def conversation(rng: random.Random) -> list[dict]:
    """With or without a system message, one to three questions, each with none to three images between its texts."""

    def message(role, *parts):
        return {"role": role, "content": [{"type": "text", "text": p} if p else {"type": "image"} for p in parts]}

    messages = [message("system", text(rng))] if rng.random() < 0.5 else []
    for turn in range(rng.randint(1, 3)):
        if turn:
            messages.append(message("assistant", text(rng)))
        parts = [None] * rng.choice([0, 1, 1, 2, 3]) + [text(rng) for _ in range(rng.randint(0, 2))] or [text(rng)]
        messages.append(message("user", *rng.sample(parts, len(parts))))
    return messages


def processed(processor, prompt: str, messages: list[dict], rng: random.Random) -> list[int]:
    """The ids of a prompt with images of random sizes."""
    sizes = [
        (rng.randint(30, 170), rng.randint(30, 170)) for m in messages for part in m["content"] if "text" not in part
    ]
    images = [Image.new("RGB", size) for size in sizes]
    begin = processor.tokenizer.bos_token
    add = not (begin and prompt.startswith(begin))
    return processor(text=[prompt], images=[images] if images else None, add_special_tokens=add)["input_ids"][0]


def spelled(processor, ids, roles) -> tuple[str, str]:
    """What the ids spell without white space, and the letter of each character's role."""
    cuts = [0, *(np.flatnonzero(np.diff(roles)) + 1).tolist(), len(ids)]
    runs = [("".join(processor.tokenizer.decode(ids[a:b]).split()), LETTER[Role(roles[a])]) for a, b in pairwise(cuts)]
    return "".join(run for run, _ in runs), "".join(letter * len(run) for run, letter in runs)


def test_every_family_has_its_format_here():
    assert set(FORMATS) == set(families.FAMILIES)


@pytest.mark.parametrize("family", FORMATS)
def test_what_each_role_covers_in_random_conversations(family):
    config, processor = families.FAMILIES[family]()
    chat, form, rng = ChatTemplate.of(processor, config), FORMATS[family], random.Random(family)
    assert processor.tokenizer.convert_ids_to_tokens(list(chat.end_of_turn)) == [form.end] * bool(form.end)
    for _ in range(12):
        messages = conversation(rng)
        ids = processed(processor, chat.render(messages), messages, rng)
        whole, letters = spelled(processor, ids, chat.roles(messages, ids))
        pieces = [
            (letter, None if piece is None else "".join(piece.split())) for letter, piece in form.pieces(messages)
        ]
        groups = [
            f"(?P<g{n}>{form.image if piece is None else re.escape(piece)})" for n, (_, piece) in enumerate(pieces)
        ]
        match = re.fullmatch("".join(groups), whole)
        assert match, (messages, whole)
        expected = "".join(letter * len(match[f"g{n}"]) for n, (letter, _) in enumerate(pieces))
        for placeholder in re.finditer(re.escape(form.visual), whole):
            a, b = placeholder.span()
            expected = expected[:a] + "v" * (b - a) + expected[b:]
        assert letters == expected, (messages, whole)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "smolvlm"])
def test_videos_in_two_turns(family):
    config, processor = families.FAMILIES[family]()
    chat = ChatTemplate.of(processor, config)
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Watch."}]},
        {"role": "user", "content": [{"type": "text", "text": "first"}, {"type": "video"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is red."}]},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "And now?"}]},
    ]
    videos = [np.zeros((4, 60, 60, 3), dtype=np.uint8) for _ in range(2)]
    times = [{"fps": 2.0, "total_num_frames": 4, "duration": 2.0, "frames_indices": [0, 1, 2, 3]} for _ in videos]
    if family == "smolvlm":
        videos, times = [videos], [times]
    options = {"video_metadata": times} if family in ("qwen3_vl", "smolvlm") else {}
    prompt = chat.render(messages)
    ids = processor(text=[prompt], videos=videos, do_sample_frames=False, return_tensors="pt", **options)["input_ids"][
        0
    ]
    whole, letters = spelled(processor, ids, chat.roles(messages, ids))
    assert [letters[whole.index(text)] for text in ("Watch.", "first", "Itisred.", "Andnow?")] == ["s", "u", ".", "u"]
    assert re.fullmatch(r"s+u+(v+u*)+\.+u+(v+u+)+\.+", letters)
