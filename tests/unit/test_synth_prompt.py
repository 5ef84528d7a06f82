"""Prompts: what models are sent, and that a mistake in a template is one line that names file and line."""

import base64

import pytest

from verl_avar.errors import ConfigError
from verl_avar.synthesis import prompt
from verl_avar.synthesis.outcomes import STAGES

CONTEXT = {
    "question": "How tall is the {{ tower }}?",
    "answer": "SEVENTEEN METRES",
    "choices": [],
    "images": 1,
    "description": "A tower of bricks.",
    "chain": "<think>The description says bricks.</think><answer>17 m</answer>",
}
PNG, JPEG, WEBP = b"\x89PNG\r\n\x1a\n123", b"\xff\xd8\xff\xe0abc", b"RIFF\x10\0\0\0WEBPVP8 "


@pytest.fixture
def template(tmp_path):
    def write(text: str, name: str = "mine.jinja"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("stage", STAGES)
def test_shipped_prompts_have_what_their_stage_needs_and_no_more(stage):
    system, user = prompt.render(None, stage, CONTEXT)
    assert (system["role"], user["role"]) == ("system", "user")
    assert "<question>\nHow tall is the {{ tower }}?\n</question>" in user["content"]
    wanted = {"describe": [], "reason": ["description"], "anchor": ["chain"]}[stage]
    for key in ("description", "chain"):
        assert (CONTEXT[key] in user["content"]) == (key in wanted)
    assert CONTEXT["answer"] not in system["content"] + user["content"]
    assert set(prompt.VARIABLES[stage]) <= set(CONTEXT)


def test_the_reason_prompt_asks_for_a_letter_where_there_are_choices_and_never_tells_the_right_answer():
    (_, user) = prompt.render(None, "reason", CONTEXT | {"choices": ["12 m", "17 m"], "answer": "THE RIGHT ONE"})
    assert "only the letter" in user["content"] and "THE RIGHT ONE" not in user["content"]


@pytest.mark.parametrize(("images", "asks_for_each"), [(1, False), (2, True)])
def test_several_images_are_described_one_by_one(images, asks_for_each):
    text = prompt.render(None, "describe", CONTEXT | {"images": images})[1]["content"]
    assert ('"Image 1:"' in text) == asks_for_each


def test_images_are_parts_before_the_text_in_their_order_with_their_type(template):
    path = template("{% block user %}Look.{% endblock %}")
    (message,) = prompt.render(path, "describe", CONTEXT, [PNG, JPEG, WEBP])
    *parts, text = message["content"]
    assert text == {"type": "text", "text": "Look."}
    expected = [("png", PNG), ("jpeg", JPEG), ("webp", WEBP)]
    assert parts == [
        {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(image).decode()}"}}
        for kind, image in expected
    ]
    with pytest.raises(ConfigError, match="neither PNG, JPEG nor WebP"):
        prompt.render(path, "describe", CONTEXT, [b"GIF89a"])


@pytest.mark.parametrize("system", ["", "{% block system %} \n{% endblock %}"])
def test_without_a_system_text_there_is_no_system_turn(template, system):
    path = template(system + "{% block user %}\nSolve {{ question }}\n{% endblock %}\n")
    assert prompt.render(path, "reason", {"question": "1 + 1"}) == [{"role": "user", "content": "Solve 1 + 1"}]


@pytest.mark.parametrize(
    ("stage", "text", "message"),
    [
        ("describe", "{% block system %}Hi{% endblock %}", "line 1: no {% block user %}"),
        ("describe", "\n{% block usr %}Hi{% endblock %}", "line 2: block usr; known are system, user"),
        ("describe", "{% block user %}\n\n{{ qestion }}{% endblock %}", "line 3: no variable 'qestion' in the stage"),
        (
            "describe",
            "{% block user %}\n{{ chain }}{% endblock %}",
            "line 2: no variable 'chain' in the stage describe",
        ),
        ("describe", "{% block user %}\n{% if %}{% endblock %}", "line 2: Expected an expression"),
        ("describe", "{% block user %}a{% endblock %}\n\nAlso this.", "outside of the blocks system and user"),
        ("describe", "{% set a = 1 %}{% block user %}a{% endblock %}", "line 1: outside of the blocks"),
        ("describe", "{% extends 'reason.jinja' %}", "line 1: a prompt is one file"),
        ("describe", "{% block user %}\n{% include '/etc/passwd' %}{% endblock %}", "line 2: a prompt is one file"),
    ],
)
def test_a_mistake_is_seen_before_anything_is_sent(template, stage, text, message):
    path = template(text)
    with pytest.raises(ConfigError) as error:
        prompt.check(path, stage)
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("{{ choices[3] }}", "line 3: list object has no element 3"),
        ("{{ question + 1 }}", "line 3: can only concatenate"),
        ("{{ 1 / (images - 1) }}", "line 3: division by zero"),
        ("{{ question.__class__.__mro__ }}", "line 3: access to attribute '__class__'"),
        ("{{ choices.append('d') }}", "line 3: access to attribute 'append'"),
        ("{{ '' }}", "the block user came out empty"),
    ],
)
def test_a_mistake_that_shows_on_a_row_names_file_and_line(template, expression, message):
    path = template("{% block user %}\n\n" + expression + "{% endblock %}")
    with pytest.raises(ConfigError) as error:
        prompt.render(path, "describe", CONTEXT)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_a_value_that_the_caller_forgot_is_an_error():
    with pytest.raises(ConfigError, match=r"reason\.jinja, line \d+: 'description' is undefined"):
        prompt.render(None, "reason", {"question": "?", "choices": []})


def test_a_missing_file_says_how_to_get_one(tmp_path):
    with pytest.raises(ConfigError, match="avar synth prompts DIR"):
        prompt.render(tmp_path / "none.jinja", "reason", CONTEXT)


def test_the_hash_is_of_the_text_wherever_it_lies(template, tmp_path):
    texts = ["{% block user %}a{% endblock %}", "{% block user %}a{% endblock %}", "{% block user %}b{% endblock %}"]
    same, again, other = (
        prompt.template_hash(template(text, f"{i}.jinja"), "describe") for i, text in enumerate(texts)
    )
    assert same == again != other
    (copy, *_) = prompt.copy_prompts(tmp_path / "copies")
    assert prompt.template_hash(copy, "describe") == prompt.template_hash(None, "describe")


def test_copies_are_whole_and_never_overwritten(tmp_path):
    folder = tmp_path / "new" / "prompts"
    copies = prompt.copy_prompts(folder)
    assert [copy.name for copy in copies] == [f"{stage}.jinja" for stage in STAGES]
    for stage, copy in zip(STAGES, copies, strict=True):
        assert prompt.render(copy, stage, CONTEXT) == prompt.render(None, stage, CONTEXT)
    copies[0].unlink()
    copies[1].write_text("mine")
    with pytest.raises(ConfigError, match=r"reason\.jinja exists already"):
        prompt.copy_prompts(folder)
    assert copies[1].read_text() == "mine" and not copies[0].exists()
