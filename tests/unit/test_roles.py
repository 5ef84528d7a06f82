"""Token roles, by hand-worked sequences. Letters: one token each; S U A T are turn names, V an image placeholder."""

import pytest
import torch

from verl_avar.roles import ChatTokens, Role, query_mask, token_roles

VOCABULARY = "_<>\nSUATV[]abcdefgh"  # _ padding, < > turn markers, [ ] vision begin and end
IDS = {letter: i for i, letter in enumerate(VOCABULARY)}
LETTER = {Role.OTHER: ".", Role.SYSTEM: "s", Role.VISUAL: "v", Role.USER: "u", Role.RESPONSE: "r"}
CHAT = ChatTokens(
    turn_start=IDS["<"],
    turn_end=IDS[">"],
    headers={"system": (IDS["S"],), "user": (IDS["U"],), "assistant": (IDS["A"],), "tool": (IDS["T"],)},
    newline=IDS["\n"],
    visual=frozenset({IDS["V"]}),
    pad=IDS["_"],
)


def roles_of(*texts: str, masks: list[str] | None = None, padding: bool = False) -> list[str]:
    """One letter per token and row. masks: 1 where the response mask is set."""
    ids = torch.tensor([[IDS[letter] for letter in text] for text in texts])
    attention = (ids != CHAT.pad) if padding else None
    written = None if masks is None else torch.tensor([[int(c) for c in mask] for mask in masks])
    roles = token_roles(ids, CHAT, attention, written)
    assert roles.dtype == torch.uint8
    return ["".join(LETTER[Role(r)] for r in row) for row in roles.tolist()]


def test_one_turn_each():
    assert roles_of("<S\nab>\n<U\n[VV]cd>\n<A\nef>\n") == ["sssssss" + "uuuuvvuuuuu" + "...rrr."]


def test_a_prompt_without_a_response():
    assert roles_of("<S\na>\n<U\nVb>\n<A\n") == ["ssssssuuuvuuu..."]


def test_no_system_turn_and_no_image():
    assert roles_of("<U\na>\n<A\nb>\n") == ["uuuuuu...rr."]


def test_a_begin_of_sequence_token_belongs_to_the_system_turn_only():
    assert roles_of("h<S\na>\n<U\nb>\n") == ["sssssssuuuuuu"]
    assert roles_of("h<U\na>\n") == [".uuuuuu"]


def test_several_turns_images_and_tools():
    text = "<S\na>\n<U\n[V]b>\n<A\nc>\n<T\nd>\n<U\n[VV]>\n<A\ne>\n"
    assert roles_of(text) == ["ssssssuuuuvuuuu...rr.uuuuuuuuuuvvuuu...rr."]


def test_several_turns_under_a_loss_mask():
    text = "<U\na>\n<A\nb>\n<U\nc>\n<A\nd>\n"
    mask = "000000000000000000000111"
    assert roles_of(text, masks=[mask]) == ["uuuuuu......uuuuuu...rrr"]


def test_padding_on_either_side_is_other():
    assert roles_of("___<U\na>\n<A\nb>", "<U\nVb>\n<A\nb>__", padding=True) == [
        "...uuuuuu...rr",
        "uuuvuuu...rr..",
    ]


def test_a_turn_name_followed_by_content_without_newline():
    assert roles_of("<Ua>\n<Ab>") == ["uuuuu..rr"]


def test_sampled_markers_stay_response_under_the_mask():
    assert roles_of("<U\na>\n<A\nb<SV>", masks=["00000000011111"]) == ["uuuuuu...rrrrr"]


@pytest.mark.parametrize(
    "text,mask,message",
    [
        ("abc", None, "no turn starts"),
        ("<h\na>\n", None, "unknown role .known: system, user, assistant, tool."),
        ("__<U\na>", None, "padding without an attention mask"),
        ("<U\na>\n<S\nb>", None, "a system turn after a user turn"),
        ("<U\na>\n<A\nV>", None, "placeholder in an assistant turn"),
        ("<U\na>\n<A\nb>", "00010000000", "outside assistant turns"),
    ],
)
def test_undeterminable_roles_are_errors_that_show_where(text, mask, message):
    with pytest.raises(ValueError, match=message) as error:
        roles_of(text, masks=None if mask is None else [mask])
    assert "row 0" in str(error.value) and "[" in str(error.value)  # the neighbourhood


def test_a_response_mask_on_padding_is_an_error():
    with pytest.raises(ValueError, match="marks padding"):
        roles_of("<U\na>__", masks=["0000011"], padding=True)


def test_query_scopes():
    roles = token_roles(torch.tensor([[IDS[c] for c in "<U\na[V]b>\n<A\ncd>\n"]]), CHAT)

    def queries(scope):
        return "".join(str(int(q)) for q in query_mask(roles, scope)[0])

    assert queries("user") == "00000011110000000"  # after the image only
    assert queries("response") == "00000000000011100"  # one before each of the three response tokens
    assert queries("user+response") == "00000011110011100"
    with pytest.raises(ValueError, match="unknown query scope"):
        query_mask(roles, "all")
