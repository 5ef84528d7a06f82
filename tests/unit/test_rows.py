"""Image questions from files and folders."""

import json

import pandas as pd
import pytest
from PIL import Image

from verl_avar.evaluation.rows import read_rows
from verl_avar.miniature.data import write_eval, write_sft


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    return "a.png"


def jsonl(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_a_folder_of_images_with_one_question(tmp_path, picture):
    (tmp_path / "b.JPG").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not an image")
    rows = read_rows(tmp_path, question="What is it?", system="Be brief.")
    assert [row.id for row in rows] == ["a.png", "b.JPG"]
    assert [m["role"] for m in rows[0].messages] == ["system", "user"]
    assert [p["type"] for p in rows[0].messages[1]["content"]] == ["image", "text"]
    assert rows[0].question == "What is it?"
    with pytest.raises(ValueError, match="needs --question"):
        read_rows(tmp_path)


def test_plain_questions_take_their_images_first(tmp_path, picture):
    path = jsonl(
        tmp_path,
        {"id": "x", "question": "Colour?", "image": picture, "answer": 7, "response": "red"},
        {"question": "Before <image> after", "images": [picture]},
        {"question": "Two?", "images": [picture, {"path": picture}]},
    )
    one, two, three = read_rows(path)
    assert (one.id, one.answer, one.response, two.id) == ("x", "7", "red", "1")
    assert one.images == [{"path": str(tmp_path / "a.png")}]  # relative to the file
    assert [p["type"] for p in two.messages[0]["content"]] == ["text", "image", "text"]
    assert [p["type"] for p in three.messages[0]["content"]] == ["image", "image", "text"]


def test_verl_rows_bring_answers_and_responses(tmp_path):
    rl = read_rows(write_eval(tmp_path / "rl.parquet", 2, seed=0))
    frame = pd.read_parquet(tmp_path / "rl.parquet")
    assert [row.answer for row in rl] == [m["ground_truth"] for m in frame["reward_model"]]
    assert all(row.response is None and len(row.images) == 1 and not row.problem for row in rl)
    sft = read_rows(write_sft(tmp_path / "sft.parquet", 3, seed=0))
    assert all(row.messages[-1]["role"] == "user" and "<answer>" in row.response for row in sft)


def test_content_parts_pass_through_parquet(tmp_path, picture):
    content = [{"type": "image", "text": None}, {"type": "text", "text": "Colour?"}]
    frame = pd.DataFrame({"messages": [[{"role": "user", "content": content}]], "images": [[{"path": picture}]]})
    frame.to_parquet(tmp_path / "rows.parquet")
    (row,) = read_rows(tmp_path / "rows.parquet")
    assert row.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "Colour?"}]


def test_broken_rows_say_why_and_keep_their_place(tmp_path, picture):
    user = {"role": "user", "content": "<image>?"}
    path = jsonl(
        tmp_path,
        "{not json",
        {"image": picture},
        {"prompt": [user], "images": []},
        {"prompt": [{"role": "user"}], "images": [picture]},
        {"prompt": [user, {"role": "system", "content": "late"}], "images": [picture]},
        {"question": "?", "videos": ["clip.mp4"]},
        {"question": "?", "image": 5},
        {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a"}]}]},
        [1, 2],
        {"question": "fine", "image": picture},
    )
    problems = [row.problem for row in read_rows(path)]
    for problem, words in zip(
        problems,
        (
            "line 1 is no JSON in UTF-8",
            "no question",
            "1 image places in the conversation, 0 images",
            "a role and a content",
            "must end with a user's turn",
            "videos are not read",
            "a path or bytes, got int",
            "type audio",
            "expected an object",
        ),
        strict=False,
    ):
        assert words in problem
    assert problems[-1] is None and len(problems) == 10


def test_values_of_the_wrong_kind_are_named(tmp_path, picture):
    def messages(content):
        return {"messages": [{"role": "user", "content": content}], "image": picture}

    cases = (
        ({"question": 5, "image": picture}, "column question: expected text, got int"),
        ({"question": "  ", "image": picture}, "no question"),
        ({"question": "?", "image": picture, "response": 5}, "column response: expected text, got int"),
        ({"question": "?", "image": {"bytes": "aGk="}}, "an image's bytes must be bytes, got str"),
        ({"question": "?", "image": {"path": None}}, "a path or bytes, got NoneType"),
        ({"messages": {"role": "user"}, "image": picture}, "messages must be a list, got dict"),
        (messages(5), "content must be a text or a list of parts, got int"),
        (messages(["<image>"]), "a content part must be an object with a type, got str"),
        (messages([{"type": "image"}, {"type": "text"}]), "type text without a text"),
    )
    path = jsonl(tmp_path, *(row for row, _ in cases))
    for row, (_, words) in zip(read_rows(path), cases, strict=True):
        assert words in row.problem
    (tmp_path / "latin.jsonl").write_bytes('{"question": "café"}\n'.encode("latin1"))
    assert "line 1 is no JSON in UTF-8" in read_rows(tmp_path / "latin.jsonl")[0].problem


def test_what_a_row_does_not_need_may_be_of_any_kind(tmp_path, picture):
    extras = ({"id": None}, {"extra_info": "x"}, {"reward_model": "rule"}, {"answer": ["a", "b"]}, {"videos": []})
    path = jsonl(tmp_path, *({"question": "?", "image": picture} | extra for extra in extras))
    rows = read_rows(path)
    assert not any(row.problem for row in rows) and [row.id for row in rows] == ["0", "1", "2", "3", "4"]
    assert all(row.answer is None for row in rows)  # a list is no answer that a response could equal


def test_images_may_stand_in_the_content_parts(tmp_path, picture):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Colour?"}]
    (row,) = read_rows(jsonl(tmp_path, {"messages": [{"role": "user", "content": content}]}))
    assert row.images == [{"path": str(tmp_path / "a.png")}] and row.question == "Colour?"


def test_the_assistants_last_message_is_the_response_as_it_is(tmp_path, picture):
    user, said = {"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "in <image> I see"}
    parts = {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "here"}]}
    path = jsonl(tmp_path, *({"messages": [user, last], "image": picture} for last in (said, parts)))
    text, image = read_rows(path)
    assert text.response == "in <image> I see" and len(text.messages) == 1
    assert image.problem == "an image in the assistant's answer"


def test_a_text_only_row_is_a_row_without_images(tmp_path):
    (row,) = read_rows(jsonl(tmp_path, {"question": "1+1?"}))
    assert row.images == [] and row.problem is None


def test_sources_that_cannot_be_read(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, words in (("a.parquet", "not a parquet"), ("a.csv", "expected .parquet"), ("empty.jsonl", "no rows")):
        with pytest.raises(ValueError, match=words):
            read_rows(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_rows(tmp_path / "nowhere.jsonl")


def test_the_limit_counts_rows(tmp_path, picture):
    path = jsonl(tmp_path, *({"question": str(i), "image": picture} for i in range(5)))
    assert [row.question for row in read_rows(path, limit=2)] == ["0", "1"]
