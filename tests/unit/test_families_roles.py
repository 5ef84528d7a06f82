"""Roles of every model family, written out by hand: who is who in a prompt with a system turn, an image, a question."""

import families
import pytest
from families.loaded import load, two_rows, who

from verl_avar.roles import Role


# Who is who in the first of `two_rows`, by hand: a role and its text, or for VISUAL how many tokens.
def chatml(*user, generation="<|im_start|>assistant\n"):
    return [
        (Role.SYSTEM, "<|im_start|>system\nYou are careful.<|im_end|>\n"),
        *user,
        (Role.OTHER, generation),
        (Role.RESPONSE, "Red.<|im_end|>"),
    ]


def qwen(visual, **generation):
    return chatml(
        (Role.USER, "<|im_start|>user\n<|vision_start|>"),
        (Role.VISUAL, visual),
        (Role.USER, "<|vision_end|>What colour is it?<|im_end|>\n"),
        **generation,
    )


def split(start):
    """Tiles by rows, 4 tokens each, then the whole image."""
    tokens = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2, 3)]
    before = ["User:", "", "", "\n", "", ""]
    pieces = []
    for words, token in zip(before, tokens, strict=True):
        pieces += [(Role.USER, f"{words}<fake_token_around_image>{token}"), (Role.VISUAL, 4)]
    return [
        (Role.SYSTEM, f"{start}System: You are careful.<end_of_utterance>\n"),
        *pieces,
        (Role.USER, "\n\n<fake_token_around_image><global-img>"),
        (Role.VISUAL, 4),
        (Role.USER, "<fake_token_around_image>What colour is it?<end_of_utterance>\n"),
        (Role.OTHER, "Assistant:"),
        (Role.RESPONSE, "Red.<end_of_utterance>"),
    ]


THINKING = "<|im_start|>assistant\n<think>\n"
WHO = {
    "qwen2_vl": qwen(10),
    "qwen2_5_vl": qwen(10),
    "qwen3_vl": qwen(10),
    "qwen3_vl_moe": qwen(10),
    "qwen3_5": qwen(10, generation=THINKING),
    "qwen3_5_moe": qwen(10, generation=THINKING),
    "internvl": chatml(
        (Role.USER, "<|im_start|>user\n<img>"),
        (Role.VISUAL, 12),
        (Role.USER, "</img>\nWhat colour is it?<|im_end|>\n"),
    ),
    "llava": [
        (Role.SYSTEM, "<s> You are careful."),
        (Role.USER, "USER: "),
        (Role.VISUAL, 16),
        (Role.USER, "\nWhat colour is it?"),
        (Role.OTHER, "ASSISTANT:"),
        (Role.RESPONSE, "Red.</s>"),
    ],
    "llava_onevision": [
        (Role.SYSTEM, "<|im_start|>system \nYou are careful.<|im_end|>"),
        (Role.USER, "<|im_start|>user "),
        (Role.VISUAL, 94),
        (Role.USER, "\nWhat colour is it?<|im_end|>"),
        (Role.OTHER, "<|im_start|>assistant\n"),
        (Role.RESPONSE, "Red.<|im_end|>"),
    ],
    "gemma3": [
        (Role.SYSTEM, "<bos><start_of_turn>user\nYou are careful.\n\n"),
        (Role.USER, "\n\n<start_of_image>"),
        (Role.VISUAL, 4),
        (Role.USER, "<end_of_image>\n\nWhat colour is it?<end_of_turn>\n"),
        (Role.OTHER, "<start_of_turn>model\n"),
        (Role.RESPONSE, "Red.<end_of_turn>"),
    ],
    "mllama": [
        (Role.SYSTEM, "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are careful.<|eot_id|>"),
        (Role.USER, "<|start_header_id|>user<|end_header_id|>\n\n"),
        (Role.VISUAL, 1),
        (Role.USER, "What colour is it?<|eot_id|>"),
        (Role.OTHER, "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        (Role.RESPONSE, "Red.<|eot_id|>"),
    ],
    "smolvlm": split("<|im_start|>"),
    "idefics3": split("<|begin_of_text|>"),
}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_roles_are_who_is_who(family):
    loaded = load(family)
    answers = loaded.passes(two_rows)[0]
    real = answers.inputs["attention_mask"][0].bool()
    ids, roles = answers.inputs["input_ids"][0][real].tolist(), answers.roles[0][real].tolist()
    assert who(loaded.ours.tokenizer, ids, roles) == WHO[family]
    assert (answers.roles[~answers.inputs["attention_mask"].bool()] == Role.OTHER).all()
