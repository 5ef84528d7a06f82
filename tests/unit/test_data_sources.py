"""Every published layout becomes rows of the schema; a record that does not fit is told, not guessed at."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_sets import (
    PICTURE,
    TEXT,
    algopuzzlevqa,
    avar_coldstart,
    geometry3k,
    hub,
    m3cot,
    mmk12,
    png,
    r1_sharevl,
    solidgeo,
    vlmevalkit,
)

from verl_avar.data import records
from verl_avar.data.choices import choices_of, letter_of, with_options
from verl_avar.data.images import encoded, flat
from verl_avar.data.reader import Broken
from verl_avar.data.schema import ROWS, content_id
from verl_avar.data.sources import READERS, read_source, source_name
from verl_avar.errors import ConfigError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(path, reader="generic", **options):
    """(rows without id and images, broken) of a source, whose rows fit the schema."""
    rows = list(read_source(str(path), reader, **options))
    broken = [row for row in rows if isinstance(row, Broken)]
    rows = [row for row in rows if not isinstance(row, Broken)]
    assert pa.Table.from_pylist(rows, schema=ROWS).num_rows == len(rows)
    for row in rows:
        images = [image["bytes"] for image in row["images"]]
        assert row["id"] == content_id(row["question"], row["answer"], row["choices"], images)
        assert row["question"].count("<image>") == len(images)
    return [{**row, "meta": json.loads(row["meta"]), "images": len(row["images"])} for row in rows], broken


def shown(row):
    return row["question"], row["answer"], row["choices"], row["images"]


def test_every_reader_says_what_it_reads_and_where_that_was_read():
    for name, reader in READERS.items():
        if name != "generic":
            text = reader.convert.__doc__
            assert text.startswith(reader.hub) and "Columns: " in text and " rows" in text and "rom " in text


def test_avar_coldstart_keeps_the_conversation(tmp_path):
    (row,), (broken,) = read(avar_coldstart(tmp_path / "set"), "avar_coldstart")
    assert shown(row) == ("<image>How long is AB?", "5 cm", [], 1)
    assert [turn["role"] for turn in row["meta"]["conversation"]] == ["user", "assistant"]
    assert broken == Broken("avar_coldstart", 1, "no_answer", "0 <answer>…</answer> in the reply; wanted one")


def test_geometry3k_is_open_though_choices_come_with_it(tmp_path):
    (row,), (broken,) = read(geometry3k(tmp_path / "set"), "geometry3k")
    assert shown(row) == ("<image>Find x.", "3", [], 1)
    assert row["meta"] == {"id": 0, "choices": ["1", "3", "5", "7"], "ground_truth": "B"}
    assert broken == Broken("geometry3k", 1, "no_image", "no image")


def test_r1_sharevl_and_mmk12(tmp_path):
    (row,), _ = read(r1_sharevl(tmp_path / "share"), "r1_sharevl")
    assert shown(row) == ("<image>Find x.", "3", [], 1) and row["meta"] == {"new_questions": ["What is x?"]}
    (row,), _ = read(mmk12(tmp_path / "mmk12"), "mmk12")
    assert shown(row) == ("<image>Which one?\nA. left\nB. right", "B", [], 1)
    assert row["meta"] == {"id": "a7", "subject": "physics"}


def test_m3cot_puts_the_context_before_and_the_options_after_the_question(tmp_path):
    (row,), (broken,) = read(m3cot(tmp_path / "set"), "m3cot")
    assert shown(row) == ("<image>Two pets.\nWhich?\nA. a cat\nB. a dog", "B", ["a cat", "a dog"], 1)
    assert broken.reason == "no_image" and row["meta"]["rationale"] == "Look."


def test_algopuzzlevqa_of_the_repository(tmp_path):
    (board, clock), broken = read(algopuzzlevqa(tmp_path / "AlgoPuzzleVQA"), "algopuzzlevqa")
    assert shown(board) == ("<image>Solve the board_tile.\nA. Yes\nB. No", "B", ["Yes", "No"], 1)
    assert shown(clock) == ("<image>Solve the clock.", "4:23", [], 1) and not broken
    assert clock["meta"]["solution"] == {"current_hour": 2, "add": {"hour": 1}} and clock["source_row"] == 1


def test_algopuzzlevqa_of_the_hub_has_one_split_called_data(tmp_path):
    rows = [{"image": {"bytes": png()}, "question": "Solve it.", "options": ["3", "4"], "answer": "4"}]
    features = datasets.Features({"image": PICTURE, "question": TEXT, "options": datasets.List(TEXT), "answer": TEXT})
    saved = datasets.DatasetDict({"data": datasets.Dataset.from_list(rows, features=features)})
    saved.save_to_disk(tmp_path / "set")
    for path in (tmp_path / "set", tmp_path / "set" / "data"):
        (row,), _ = read(path, "algopuzzlevqa")
        assert shown(row) == ("<image>Solve it.\nA. 3\nB. 4", "B", ["3", "4"], 1)
    with pytest.raises(ConfigError, match="no split test; there are data"):
        read(tmp_path / "set", "algopuzzlevqa", split="test")


def test_solidgeo_of_the_repository(tmp_path):
    (height, views, which), (see, places) = read(solidgeo(tmp_path / "SolidGeo"), "solidgeo")
    assert shown(height) == ("<image>Find the height.", "diameter $=10 \\mathrm{~m}$", [], 1)
    assert shown(views) == ("The left view is ()\n\n<image>\nA.\n\n<image>\nB.\n\n<image>", "A", [], 3)
    assert shown(which) == ("<image>Which?\nA. 3\nB. 4", "B", ["3", "4"], 1) and which["source_row"] == 4
    assert (see.source_row, see.reason) == (2, "no_answer")
    assert places == Broken("solidgeo", 3, "bad_row", "1 <image> in the text, 2 images")


def test_the_generic_reader_takes_columns_by_our_names_or_by_mapping(tmp_path):
    tsv = vlmevalkit(tmp_path / "bench.tsv", [png(), [png(), png((0, 0, 9))]], ["Which?", "Which of both?"])
    (one, two), _ = read(tsv, columns={"choices": "A,B"})
    assert shown(one) == ("<image>Which?\nA. x\nB. y", "A", ["x", "y"], 1) and one["source"] == "bench"
    assert shown(two)[3] == 2 and two["meta"] == {"index": "1"}
    (tmp_path / "1.png").write_bytes(png())
    (tmp_path / "q.jsonl").write_text(
        json.dumps({"text": "Why?", "a": 3.5, "first": "1.png", "second": "1.png", "third": None, "more": [1]})
    )
    mapping = {"question": "text", "answer": "a", "image": "first,second,third"}
    (row,), _ = read(tmp_path / "q.jsonl", columns=mapping)
    assert shown(row) == ("<image><image>Why?", "3.5", [], 2) and row["meta"] == {"more": [1]}


def test_rows_of_the_schema_are_read_as_they_are(tmp_path):
    first = list(read_source(mmk12(tmp_path / "set"), "mmk12"))
    pq.write_table(pa.Table.from_pylist(first, schema=ROWS), tmp_path / "rows.parquet")
    (again,) = read_source(str(tmp_path / "rows.parquet"))
    assert again["id"] == first[0]["id"] and again["source"] == "rows"
    meta = {"source": "mmk12", "source_row": 0} | json.loads(first[0]["meta"])
    assert json.loads(again["meta"]) == meta
    pq.write_table(pa.Table.from_pylist([again, again | {"meta": "[]"}], schema=ROWS), tmp_path / "more.parquet")
    more, broken = read_source(str(tmp_path / "more.parquet"))
    assert json.loads(more["meta"]) == meta  # where they came from first
    assert broken.reason == "bad_row" and "meta is no JSON object" in broken.detail


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        ({"question": " "}, "no_question", "the question is ' '"),
        ({"question": None}, "no_question", "the question is None"),
        ({"answer": ""}, "no_answer", "the answer is empty"),
        ({"answer": None}, "no_answer", "the answer is 'None'; wanted text or a number"),
        ({"image": None}, "no_image", "no image"),
        ({"image": []}, "no_image", "no image"),
        ({"image": "2.png"}, "bad_image", "no image file 2.png"),
        ({"image": "cut.png"}, "bad_image", "an image can't be read"),
        ({"image": "rows.jsonl"}, "bad_image", "an image can't be read"),
        ({"image": "https://example.org/1.png"}, "bad_image", "download it and give its path"),
        ({"image": 7}, "bad_image", "an image must be bytes, a path or {bytes, path}, it is 7"),
        ({"question": "<image> and <image>?"}, "bad_row", "2 <image> in the text, 1 images"),
        ({"choices": 5}, "bad_row", "choices must be a list"),
        ("no object", "bad_row", "line 2 is no object: '\"no object\"'"),
    ],
)
def test_a_broken_record_is_told_and_the_next_is_read(tmp_path, record, reason, detail):
    good = {"question": "Where?", "answer": "here", "image": "1.png", "choices": None}
    (tmp_path / "1.png").write_bytes(png())
    (tmp_path / "cut.png").write_bytes(png(size=(300, 300))[:200])
    lines = [good, record if isinstance(record, str) else good | record, good]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (_, after), (broken,) = read(tmp_path / "rows.jsonl")
    assert (broken.source, broken.source_row, broken.reason) == ("rows", 1, reason) and detail in broken.detail
    assert after["source_row"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reader": "geometry3k"}, "reader geometry3k needs a column problem; the columns are question, answer, image"),
        ({"reader": "geo"}, "no reader 'geo'; there are avar_coldstart,"),
        ({"columns": {"question": "q"}}, "no column q for question; the columns are question"),
        ({"columns": {"text": "q"}}, "columns names 'text'; known are question, answer, choices, images"),
        ({"reader": "mmk12", "columns": {"question": "q"}}, "`columns` is for the generic reader"),
    ],
)
def test_a_source_with_other_columns_is_one_line(tmp_path, options, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "a", "answer": "b", "image": "1.png"}))
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path / "rows.jsonl", **options)
    assert "\n" not in str(error.value)


def test_which_file_of_a_folder_is_read(tmp_path):
    row = json.dumps({"question": "Where?", "answer": "here", "image": "1.png"})
    (tmp_path / "1.png").write_bytes(png())
    with pytest.raises(ConfigError, match="no rows in it"):
        read(tmp_path)
    (tmp_path / "questions.jsonl").write_text(row)
    assert len(read(tmp_path)[0]) == 1
    with pytest.raises(ConfigError, match=r"no file for split test; there are questions\.jsonl"):
        read(tmp_path, split="test")
    (tmp_path / "test.jsonl").write_text(f"{row}\n{row}")
    (rows, _) = read(tmp_path, split="test")
    assert [r["source"] for r in rows] == [f"{tmp_path.name}@test"] * 2
    with pytest.raises(ConfigError, match="no file for split train"):
        read(tmp_path)
    (tmp_path / "test_more.jsonl").write_text(row)
    with pytest.raises(ConfigError, match=r"several files for split test, test.jsonl, test_more.jsonl; name one"):
        read(tmp_path, split="test")
    (tmp_path / "test.csv").write_text("question\n")
    with pytest.raises(ConfigError, match="rows in files of several kinds"):
        read(tmp_path, split="test")


@pytest.mark.parametrize("layout", ["lines", "array", "indented array", "object", "indented object"])
def test_json_files_are_read_a_piece_at_a_time_whatever_their_layout(tmp_path, layout, monkeypatch):
    from verl_avar.data import json_rows

    monkeypatch.setattr(json_rows, "CHUNK", 16)
    rows = [{"question": f'{{"x": [{n}]}}, ]"' * n, "n": n, "deep": {"a": [n, {"b": "é"}]}} for n in range(20)]
    indent = 1 if "indented" in layout else None
    if layout == "lines":
        text = "\n".join(map(json.dumps, rows))
    else:
        whole = {str(n): row for n, row in enumerate(rows)} if "object" in layout else rows
        text = json.dumps(whole, indent=indent, ensure_ascii=False)
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    assert list(json_rows.json_rows(tmp_path / "rows.json")) == rows
    if layout != "lines":
        (tmp_path / "cut.json").write_text(text[:-30], encoding="utf-8")
        with pytest.raises(ConfigError, match=r"breaks off, or is no JSON|no JSON after member"):
            list(json_rows.json_rows(tmp_path / "cut.json"))


@pytest.mark.parametrize(
    ("name", "text"), [("rows.json", "5"), ("rows.parquet", "x"), ("rows.txt", "x"), ("a/b", None)]
)
def test_what_is_no_source_is_one_line(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=name):
        read(tmp_path / name if text is not None else name)


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"question": ["a" * 99] * 99, "answer": ["b"] * 99, "image": ["1.png"] * 99}), path)
    whole = path.read_bytes()
    path.write_bytes(b"PAR1" + bytes(60) + whole[64:])
    with pytest.raises(ConfigError, match="a damaged parquet file"):
        read(path)


def test_hub_names_are_streamed_only_where_a_part_is_wanted_and_nothing_is_cached(monkeypatch, tmp_path):
    calls = []

    def load_dataset(name, split, streaming=False):
        calls.append((name, split, streaming))
        rows = [{"problem": "Find x.", "answer": "3", "images": [{"bytes": png()}]}] * 5
        features = datasets.Features({"problem": TEXT, "answer": TEXT, "images": datasets.List(PICTURE)})
        whole = datasets.Dataset.from_list(rows, features=features)
        return whole.to_iterable_dataset() if streaming else whole

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "built"))
    assert len(read("hiyouga/geometry3k", "geometry3k")[0]) == 5
    rows, _ = read("hiyouga/geometry3k", "geometry3k", limit=2, split="test")
    assert [row["source"] for row in rows] == ["geometry3k@test"] * 2
    (tmp_path / "hub" / "datasets--hiyouga--geometry3k").mkdir(parents=True)
    assert len(read("hiyouga/geometry3k", "geometry3k", limit=2)[0]) == 2
    assert [call[1:] for call in calls] == [("train", False), ("test", True), ("train", False)]


def test_rows_come_while_the_file_is_read(monkeypatch, tmp_path):
    rows = [{"image": {"bytes": png()}, "question": "Where?", "answer": str(n)} for n in range(200)]
    path = hub(tmp_path / "set", rows, {"image": PICTURE, "question": TEXT, "answer": TEXT})
    monkeypatch.setattr(records, "BATCH", 10)
    batches = []
    decode = pq.ParquetFile.iter_batches

    def counted(file, batch_size):
        for batch in decode(file, batch_size):
            batches.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    source = read_source(path)
    assert [next(source)["answer"] for _ in range(25)][-1] == "24" and batches == [10, 10, 10]


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (None, []),
        (["red", "blue"], ["red", "blue"]),
        (["A. red", "B) blue"], ["red", "blue"]),
        (["(A) red", "(B) blue"], ["red", "blue"]),
        ({"B": "blue", "A": "red"}, ["red", "blue"]),
        ("A. red\n\nB. blue", ["red", "blue"]),
        ("['red', 'blue']", ["red", "blue"]),
        ('{"A": "red", "B": 2}', ["red", "2"]),
        (["B. red", "A. blue"], ["B. red", "A. blue"]),
    ],
)
def test_choices_however_they_are_stored(value, texts):
    assert choices_of(value) == texts


@pytest.mark.parametrize("value", [7, "red or blue", {"a": "red"}, "A. red\nC. blue", "['red'"])
def test_choices_that_are_none(value):
    with pytest.raises(ValueError, match="choices"):
        choices_of(value)


@pytest.mark.parametrize(
    "question",
    [
        "Which?\nA. red\nB. blue",
        "Which? (A) red (B) blue",
        "Which?\nOptions: A: red, B: blue",
        "A. red B. blue: which?",
    ],
)
def test_options_that_stand_in_the_question_are_not_added_again(question):
    assert with_options(question, ["red", "blue"]) == question
    assert with_options(question, ["red", "green"]) == question + "\nA. red\nB. green"


def test_the_letter_of_an_answer_is_that_of_the_only_option_it_repeats():
    assert letter_of("no", ["Yes", "No"]) == "B" and letter_of("B", ["Yes", "No"]) == "B"
    assert letter_of("3", ["3", "3"]) == "3" and letter_of("no", ["no", "No"]) == "A"


def test_images_are_whole_and_in_a_form_that_servers_read():
    from PIL import Image

    assert encoded({"bytes": png()}, None, 100, "") == {"bytes": png()}
    bitmap = encoded({"bytes": png(kind="BMP")}, None, 100, "")["bytes"]
    assert bitmap.startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="row 3: an image can't be read"):
        encoded({"bytes": png(size=(300, 300), kind="JPEG")[:-400]}, None, 10**6, "row 3")
    assert flat(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_sources_are_named_by_reader_or_by_place(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    assert source_name("hiyouga/geometry3k", "geometry3k") == "geometry3k"
    assert source_name("org/set", split="test") == "org/set@test"
    assert source_name(str(tmp_path / "rows.jsonl"), split="test") == "rows"
