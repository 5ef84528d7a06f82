"""What templates, processors and conversations must bring to have roles: an error says what is missing."""

from types import SimpleNamespace

import pytest
from prompts import ANSWER, PLAIN, QUESTION, SYSTEM, Processor, chat_template, spans, template, turn
from transformers import PreTrainedTokenizer

from verl_avar.template import ChatTemplate


@pytest.mark.parametrize(
    "does,message",
    [
        (
            "{%- if role == 'system' %}{{- raise_exception('not here') }}{%- endif %}",
            r"refuses system messages \(not here\)",
        ),
        ("{%- if role == 'system' %}{%- continue %}{%- endif %}", "doesn't write the text of system messages"),
    ],
)
def test_a_system_message_is_never_dropped_silently(does, message):
    chat = chat_template(template(does + "{{- '[turn]' + role + ':' + text + '[end]' }}"))
    assert spans(chat, [QUESTION])[0] == "u[turn]user:"
    for call in (lambda: chat.render([SYSTEM, QUESTION]), lambda: chat.roles([SYSTEM, QUESTION], [])):
        with pytest.raises(ValueError, match=message):
            call()


def test_what_a_template_refuses_in_one_conversation_is_an_error():
    refuses = "{%- if loop.length > 4 %}{{- raise_exception('too long') }}{%- endif %}"
    chat = chat_template(template(refuses + "{{- '[turn]' + role + ':' + text + '[end]' }}"))
    with pytest.raises(ValueError, match="refuses a conversation of user, assistant, user, assistant, user: too long"):
        chat.render([QUESTION, ANSWER] * 2 + [QUESTION])


@pytest.mark.parametrize(
    "body,message",
    [
        ("text + ('' if loop.last else '[end]')", "can't tell where the first user turn starts"),
        ("text + ('[a]' if loop.last and role == 'user' else '[end]')", r"can't tell where message 1 \(user\) ends"),
        (
            "text + ('' if loop.last and role == 'assistant' else '[end]')",
            "can't tell where the first user turn starts",
        ),
        ("text + text + '[end]'", "doesn't write the text of user messages, or not once"),
        ("(text if text | length < 9 else text[:9]) + '[end]'", r"drops or repeats a text of message 0 \(system\)"),
        ("(text if 'is' not in text else 'is' + text) + '[end]'", None),
        ("(text if not text.startswith('Look') else '!' + text) + '[end]'", "rewrites a text of these messages"),
    ],
)
def test_a_template_that_can_not_be_followed_is_an_error(body, message):
    made = template("{{- '[turn]' + role + ':' + " + body + " }}")
    if message is None:  # what the template adds to a text is its own
        assert spans(chat_template(made), [SYSTEM, QUESTION])[3] == "uWhat is it?[end]"
        return
    with pytest.raises(ValueError, match=message):
        spans(chat_template(made), [SYSTEM, QUESTION, ANSWER, QUESTION])


def test_a_system_text_that_the_template_moves_behind_a_users_turn_is_an_error():
    moves = (
        "{%- set systems = messages | selectattr('role', 'equalto', 'system') | list %}"
        "{%- for message in messages if message['role'] != 'system' %}{{- '[turn]' + message['role'] + ':' }}"
        "{%- if loop.last and systems %}{{- systems[0]['content'][0]['text'] + ' / ' }}{%- endif %}"
        "{%- for part in message['content'] %}{{- part['text'] if part['type'] == 'text' else '[img]' }}{%- endfor %}"
        "{{- '[end]' }}{%- endfor %}{%- if add_generation_prompt %}[turn]assistant:{%- endif %}"
    )
    chat = chat_template(moves)
    assert spans(chat, [SYSTEM, QUESTION])[0] == "s[turn]user:Look closely. / "
    with pytest.raises(ValueError, match=r"moves message 1 \(user\) out of its order"):
        spans(chat, [SYSTEM, QUESTION, ANSWER, QUESTION])


@pytest.mark.parametrize(
    "messages,message",
    [
        ([turn("critic", "Hm.")], r"message 0 \(critic\): unknown role; known are system, user, assistant, tool"),
        ([QUESTION, SYSTEM], r"message 1 \(system\): a system message after another's"),
        ([{"role": "user", "content": [{"type": "audio"}]}], r"message 0 \(user\): a part of type 'audio'"),
        ([turn("user", "\U000f0000")], r"message 0 \(user\): private-use character U\+F0000"),
        ([SYSTEM], "needs a user message"),
        ([ANSWER, QUESTION], "needs a user message, first"),
        ([turn("user", " ")], r"message 0 \(user\) holds neither text nor image"),
        ([turn("user", "video")], "writes no token for a video"),
    ],
)
def test_conversations_that_have_no_roles_are_errors(messages, message):
    with pytest.raises(ValueError, match=message):
        chat_template().roles(messages, [])


def test_processors_that_can_not_be_read_are_errors_that_say_what_to_do():
    config = SimpleNamespace(image_token_id=3)
    base = Processor(None)
    with pytest.raises(ValueError, match=r"Processor has no chat template: a base model\? Use an instruction-tuned"):
        ChatTemplate.of(base, config)
    base.tokenizer.chat_template = PLAIN
    with pytest.raises(ValueError, match=r"set processor.chat_template = processor.tokenizer.chat_template"):
        ChatTemplate.of(base, config)

    class Slow(PreTrainedTokenizer):
        vocab_size = 0
        get_vocab = dict

    with pytest.raises(ValueError, match=r"Slow is a slow tokenizer, .*; the checkpoint needs a tokenizer.json"):
        ChatTemplate.of(Processor(tokenizer=Slow()), config)


def test_configs_without_the_tokenizers_placeholder_are_errors():
    class TextConfig:
        pass

    with pytest.raises(ValueError, match=r"TextConfig has none of image_token_id, .*; pass the config of the whole"):
        ChatTemplate.of(Processor(), TextConfig())
    with pytest.raises(ValueError, match=r"placeholder ids \[99999\] of SimpleNamespace are no tokens of Processor's"):
        ChatTemplate.of(Processor(), SimpleNamespace(image_token_id=99999))
