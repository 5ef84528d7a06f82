"""From the text of a prompt to its processed ids: expansions of any kind, and ids that are not the prompt's."""

import pytest
from families import tokenizers
from prompts import ANSWER, QUESTION, SPECIALS, SYSTEM, chat_template, spans, turn


@pytest.mark.parametrize("tokenizer", ["byte_level", "qwen", "gemma"])
@pytest.mark.parametrize(
    "expansion",
    [
        "[a][soft][soft][b]",
        "\n\n[a][soft][soft][b]\n\n",
        "[a][soft][b][a][soft][b]\n[a][soft][b]\n\n[a][soft][b]",
        "Frame 1: [a][soft]\nFrame 2: [a][soft]",
        "here is[soft]an image[soft][soft]what",
    ],
)
def test_an_expansion_may_hold_any_text_and_merge_with_the_prompts(tokenizer, expansion):
    chat = chat_template(tokenizer=getattr(tokenizers, tokenizer)(SPECIALS), visual="[soft]")
    conversation = [
        turn("system", "Look closely.\n\n"),
        turn("user", "\n", "image", "image", "\nso", "image"),
        ANSWER,
        turn("user", "image", "What"),
    ]
    found = spans(chat, conversation, expansion, add_special_tokens=False)
    x = expansion
    user = [f"[turn]user:\n{x}{x}\nso{x}[end]", f"[turn]user:{x}What[end]"]
    assert found[0] == "s[turn]system:Look closely.\n\n[end]" and found[-1] == ".[turn]assistant:"
    middle = found.index(".[turn]assistant:A 12.[end]")
    assert ["".join(s[1:] for s in part) for part in (found[1:middle], found[middle + 1 : -1])] == user
    assert {s for s in found if s[0] == "v"} <= {"v[soft]", "v[soft][soft]"}
    assert all("[soft]" not in s for s in found if s[0] != "v")


def test_ids_of_another_prompt_are_an_error_that_shows_where():
    chat = chat_template()
    ids = chat._renderer.tokenizer(chat.render([SYSTEM, QUESTION]))["input_ids"]
    with pytest.raises(
        ValueError, match=r"not this prompt's: \d+ tokens from the start, .*closely.* instead of .*away"
    ):
        chat.roles([turn("system", "Look away."), QUESTION], ids)
    with pytest.raises(ValueError, match=r"\d+ tokens from the end, .*What is it.* instead of .*Why is it"):
        chat.roles([SYSTEM, turn("user", "image", "Why is it?")], ids)
    with pytest.raises(ValueError, match="not this prompt's"):
        chat.roles([SYSTEM, QUESTION], ids + ids[-1:])
    with pytest.raises(ValueError, match="not in the processed ids, in its order: 'and'"):
        both = chat._renderer.tokenizer(chat.render([turn("user", "image", "or", "image", "What?")]))["input_ids"]
        chat.roles([turn("user", "image", "and", "image", "What?")], both)


def test_a_number_of_images_that_does_not_fit_is_an_error():
    chat = chat_template()
    tokenizer = chat._renderer.tokenizer
    with pytest.raises(ValueError, match="hold 1 images and videos, the processed ids 0 visual placeholders"):
        chat.roles([QUESTION], tokenizer("[turn]user:What is it?[end][turn]assistant:")["input_ids"])
    with pytest.raises(ValueError, match="hold 0 images and videos, the processed ids 1 visual placeholders"):
        chat.roles([turn("user", "What is it?")], tokenizer(chat.render([QUESTION]))["input_ids"])


def test_turns_between_images_that_the_ids_do_not_tell_apart_are_an_error():
    chat = chat_template()
    conversation = [QUESTION, ANSWER, QUESTION]
    between = chat.render(conversation).split("[img]")[1]
    with pytest.raises(ValueError, match="can't tell which images"):
        spans(chat, conversation, f"[img]{between}[img]")


def test_placeholders_in_a_text_are_an_error():
    for text in ("Is [img] a token?", "[img]"):
        with pytest.raises(ValueError, match=r"message 0 \(user\) has '\[img\]' in its text"):
            chat_template().roles([turn("user", "image", text)], [])
    with pytest.raises(ValueError, match=r"message 1 \(user\) has '\[soft\]' in its text"):
        chat_template(visual="[soft]").roles([SYSTEM, turn("user", "[soft]")], [])
