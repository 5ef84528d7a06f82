"""avar data: what a person sees of it, and what it returns."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_sets import ANSWERED, PICTURE, TEXT, geometry3k, hub, png, vlmevalkit

from verl_avar.cli import main
from verl_avar.data.benchmarks import HASHES, read_benchmark, read_hashes
from verl_avar.data.fingerprints import fingerprint, look_of
from verl_avar.data.reader import Broken
from verl_avar.data.schema import ROWS, content_id
from verl_avar.data.similar import Benchmarks
from verl_avar.errors import ConfigError
from verl_avar.miniature.scenes import Object, Scene, render
from verl_avar.training.data import RL_SCHEMA, SFT_SCHEMA, write_rl, write_sft


def avar(capsys, *arguments):
    capsys.readouterr()
    status = main(["data", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out + said.err


def saved(*objects):
    import io

    buffer = io.BytesIO()
    render(Scene(tuple(Object(*each) for each in objects))).save(buffer, format="PNG")
    return buffer.getvalue()


ONE, TWO, THREE = saved((0, "circle", "red")), saved((4, "cross", "blue")), saved((8, "square", "green"))


def good(**changes):
    row = {
        "source": "set",
        "source_row": 0,
        "question": "<image>Which?\nA. red\nB. blue",
        "answer": "B",
        "choices": ["red", "blue"],
        "images": [{"bytes": png()}],
        "meta": "{}",
    } | changes
    images = [image["bytes"] or b"" for image in row["images"] or []]
    return {"id": content_id(row["question"] or "", row["answer"] or "", row["choices"] or (), images)} | row


def written(path, rows, schema=ROWS):
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([f.with_nullable(True) for f in schema])), path)
    return path


def test_sources_names_every_reader(capsys):
    status, said = avar(capsys, "sources")
    assert status == 0 and "hiyouga/geometry3k" in said and "generic" in said


def test_convert_writes_rows_that_validate_finds_fine(capsys, tmp_path):
    out = tmp_path / "out" / "rows.parquet"
    status, said = avar(capsys, "convert", geometry3k(tmp_path / "set"), "--reader", "geometry3k", "--out", out)
    assert status == 0 and said == f"{out}: 1 rows, 1 left out\n  row 1, no_image: no image\n"
    assert avar(capsys, "validate", out) == (0, f"{out}: 1 rows, all fine\n")
    status, said = avar(capsys, "convert", tmp_path / "set", "--out", out, "--column", "question")
    assert status == 2 and said == "error: --column question: write OURS=THEIRS, such as question=query\n"
    status, said = avar(capsys, "convert", tmp_path / "none", "--out", tmp_path / "none.parquet")
    assert status == 2 and "no such file or folder" in said and not (tmp_path / "none.parquet").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answer": None}, "answer: null. To fix: the schema wants string."),
        ({"question": " "}, "question: ' ' is no text. To fix: give it, or leave the row out."),
        ({"images": []}, "images: none. To fix: give one, or leave the row out."),
        ({"images": [{"bytes": None}]}, "images: image 0 has no bytes."),
        ({"images": [{"bytes": b"x"}]}, "images: image 0 can't be read"),
        ({"images": [{"bytes": png(kind="BMP")}]}, "images: image 0 is BMP. To fix: one of PNG, JPEG, WEBP."),
        ({"question": "Which?\nA. red\nB. blue"}, "question: 0 <image> for 1 images."),
        ({"question": "<image>Which?"}, "question: the choices don't stand in it."),
        ({"answer": "C"}, "answer: C of 2 choices."),
        ({"choices": ["red", ""]}, "choices: empty texts"),
        ({"meta": "[]"}, "meta: '[]' is no JSON object."),
        ({"id": "0" * 32}, "id: not the hash of the row's content."),
        ({"source_row": 7}, "source_row: the same source and source_row as row 0."),
    ],
)
def test_validate_explains_a_broken_row_of_the_schema(capsys, tmp_path, changes, said):
    rows = [good(source_row=7), good(**{"source_row": 8} | changes)]
    path = written(tmp_path / "rows.parquet", rows)
    status, text = avar(capsys, "validate", path)
    assert status == 1 and text.startswith(f"{path}: 2 rows, 1 broken\n  row 1, {said}")


def test_validate_shows_five_and_counts_the_rest(capsys, tmp_path):
    path = written(tmp_path / "rows.parquet", [good(source_row=n, answer="C") for n in range(9)])
    _, text = avar(capsys, "validate", path)
    assert text.count("answer: C of 2 choices") == 5 and text.endswith("  and 4 more\n")


@pytest.fixture
def trained(tmp_path):
    """Our SFT and RL rows of one question."""
    talk = [{"role": "user", "content": "Find x."}, {"role": "assistant", "content": ANSWERED.format(3)}]
    (tmp_path / "1.png").write_bytes(png())
    (tmp_path / "train.json").write_text(json.dumps([{"messages": talk, "images": ["1.png"]}]))
    write_sft(tmp_path / "sft.parquet", [str(tmp_path / "train.json")])
    (tmp_path / "q.json").write_text(json.dumps([{"question": "Find x.", "answer": "3", "images": ["1.png"]}]))
    write_rl(tmp_path / "rl.parquet", [str(tmp_path / "q.json")])
    return tmp_path


def test_validate_knows_what_training_data_writes(capsys, trained):
    for name in ("sft", "rl"):
        path = trained / f"{name}.parquet"
        assert avar(capsys, "validate", path) == (0, f"{path}: 1 rows, all fine\n")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "sft",
            lambda row: row["messages"].pop(0),
            "messages: the roles are ['user', 'assistant']. To fix: begin",
        ),
        (
            "sft",
            lambda row: row["messages"].pop(),
            "messages: the roles are ['system', 'user']. To fix: after",
        ),
        ("sft", lambda row: row["messages"].clear(), "messages: no messages, or one without a text"),
        ("sft", lambda row: row["messages"][2].update(content="3"), "messages: the reply '3' is not <think>…</think>"),
        ("sft", lambda row: row["images"].append({"bytes": png()}), "messages: 1 <image> for 2 images."),
        (
            "rl",
            lambda row: row["prompt"].append(row["prompt"][0]),
            "prompt: the roles are ['system', 'user', 'sys",
        ),
        ("rl", lambda row: row["reward_model"].update(ground_truth=" "), "reward_model: ground_truth is ' '."),
        ("rl", lambda row: row.update(images=None), "images: none."),
    ],
)
def test_validate_explains_a_broken_training_row(capsys, trained, name, change, said):
    (row,) = pq.read_table(trained / f"{name}.parquet").to_pylist()
    change(row)
    path = written(trained / "broken.parquet", [row], SFT_SCHEMA if name == "sft" else RL_SCHEMA)
    status, text = avar(capsys, "validate", path)
    assert status == 1 and f"row 0, {said}" in text


def test_validate_can_not_read_what_is_no_such_file(capsys, tmp_path):
    (tmp_path / "a.parquet").write_text("x")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"question": ["a"], "id": ["a"]}), tmp_path / "c.parquet")
    written(tmp_path / "d.parquet", [])
    for name, said in (
        ("a", "not a whole parquet file"),
        ("b", "no layout that is known"),
        ("c", "schema ROWS must have a column source, source_row, answer, choices, images, meta; the columns are"),
        ("d", "no rows"),
        ("e", "No such file"),
    ):
        status, text = avar(capsys, "validate", tmp_path / f"{name}.parquet")
        assert status == 2 and text.startswith("error: ") and said in text and text.count("\n") == 1


def test_hashes_of_benchmarks_come_back_as_they_were(capsys, tmp_path):
    tsv = vlmevalkit(
        tmp_path / "MMStar.tsv",
        [ONE, "0", [TWO, THREE], "data:image/png;base64,%%%"],
        ["What colour?", "Where?", "Which?", "Why?"],
    )
    mmmu = hub(
        tmp_path / "MMMU",
        [
            {"question": "Which of <image 1> and <image 2>?", "image_1": {"bytes": ONE}, "image_2": {"bytes": TWO}},
            {"question": "Is <image 1> red?", "image_1": {"bytes": ONE}, "image_2": None},
        ],
        {"question": TEXT, "image_1": PICTURE, "image_2": PICTURE},
        "validation",
    )
    verse = hub(
        tmp_path / "MathVerse",
        [
            {"question": "", "question_for_eval": "Find x.", "image": "1.png", "decoded_image": {"bytes": ONE}},
            {"question": "", "question_for_eval": None, "image": "1.png", "decoded_image": {"bytes": THREE}},
        ],
        {"question": TEXT, "question_for_eval": TEXT, "image": TEXT, "decoded_image": PICTURE},
        "testmini",
    )
    out = tmp_path / "hashes.parquet"
    status, said = avar(capsys, "hashes", tsv, mmmu, f"{verse}@testmini", "--out", out)
    assert status == 0 and said == (
        "MMStar: 3 questions\nMMMU: 2 questions\nMathVerse@testmini: 2 questions\n"
        f"{out}: 7 questions, 1 left out\n  MMStar, row 3: an image is neither a path nor base64: %%%…\n"
    )
    again = list(read_hashes(out))
    direct = [each for source in (tsv, mmmu, verse + "@testmini") for each in read_benchmark(source)]
    assert again == [each for each in direct if not isinstance(each, Broken)]
    assert [(q.stem, q.hashes) for q in again] == [
        ("what colour?", (look_of(ONE)[0],)),
        ("where?", (look_of(ONE)[0],)),
        ("which?", (look_of(TWO)[0], look_of(THREE)[0])),
        ("which of and ?", (look_of(ONE)[0], look_of(TWO)[0])),
        ("is red?", (look_of(ONE)[0],)),
        ("find x.", (look_of(ONE)[0],)),
        ("", (look_of(THREE)[0],)),
    ]
    row = good(question="<image>What colour?\nA. red\nB. blue", images=[{"bytes": ONE}])
    assert Benchmarks(again).look(fingerprint(row)).detail == "repeats row 0 of the benchmark MMStar"


def test_what_is_no_benchmark_or_no_hashes_is_one_line(capsys, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "a"}')
    (tmp_path / "gone.jsonl").write_text('{"question": "a", "image": "1.png"}')
    pq.write_table(pa.table({"row": [1]}), tmp_path / "other.parquet")
    out = tmp_path / "hashes.parquet"
    status, said = avar(capsys, "hashes", tmp_path / "text.jsonl", "--out", out)
    assert status == 2 and "questions must be in a column question or" in said and "the columns are text" in said
    status, said = avar(capsys, "hashes", tmp_path / "gone.jsonl", "--out", out)
    assert status == 2 and "no question can be read; row 0: an image: no image file 1.png" in said and not out.exists()
    with pytest.raises(ConfigError, match="its columns are row"):
        list(read_hashes(tmp_path / "other.parquet"))
    assert HASHES.names == ["benchmark", "row", "question", "hashes", "thumbnails"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
