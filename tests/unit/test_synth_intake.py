"""Intake: every record of every source is kept or left out for a reason, once, and nothing is read twice."""

import io
import json

import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from published_sets import geometry3k, vlmevalkit

from verl_avar.data.benchmarks import write_hashes
from verl_avar.data.schema import MAX_PIXELS, ROWS
from verl_avar.errors import ConfigError
from verl_avar.miniature.scenes import Object, Scene, render
from verl_avar.synthesis import intake as module
from verl_avar.synthesis.config import Duplicates, Overlap, Source
from verl_avar.synthesis.intake import REJECTS, intake


def scene(*objects, kind="PNG"):
    buffer = io.BytesIO()
    render(Scene(tuple(Object(*each) for each in objects))).save(buffer, format=kind)
    return buffer.getvalue()


ONE, TWO = (0, "circle", "red"), (4, "cross", "blue")


def settings(*sources, **changes):
    return OmegaConf.create(
        {
            "sources": [OmegaConf.structured(Source(**source)) for source in sources],
            "duplicates": OmegaConf.structured(Duplicates()),
            "overlap": OmegaConf.structured(Overlap()),
            "max_pixels": MAX_PIXELS,
        }
        | changes
    )


@pytest.fixture
def source(tmp_path):
    """Five records: one, the same again, a copy as JPEG, another question, and one without an image."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "1.png").write_bytes(scene(ONE))
    (folder / "1.jpg").write_bytes(scene(ONE, kind="JPEG"))
    (folder / "2.png").write_bytes(scene(TWO))
    rows = [
        {"question": "What colour is the circle?", "answer": "red", "image": "1.png"},
        {"question": "What colour is the circle?", "answer": "red", "image": "1.png"},
        {"question": "What color is the circle?", "answer": "Red", "image": "1.jpg"},
        {"question": "What colour is the cross?", "answer": "blue", "image": "2.png"},
        {"question": "What colour is the cross?", "answer": "blue", "image": None},
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"path": str(folder)}


def left_out(out):
    return [tuple(row.values())[1:] for row in pq.read_table(out / "intake.parquet").to_pylist()]


def test_every_record_is_kept_or_left_out_for_a_reason(source, tmp_path):
    steps = []
    counts = intake(settings(source), tmp_path / "out", lambda *so_far: steps.append(so_far))
    assert counts["rows"] == 2 and counts["rejected"] == 3 and counts["sources"] == {"mine": {"rows": 2, "rejected": 3}}
    assert counts["reasons"] == {"duplicate": 1, "near_duplicate": 1, "no_image": 1}
    table = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert table.schema.equals(ROWS) and table["source_row"].to_pylist() == [0, 3]
    assert pq.read_schema(tmp_path / "out" / "intake.parquet").equals(REJECTS)
    assert left_out(tmp_path / "out") == [
        ("mine", 1, "duplicate", "the same as row 0 of mine"),
        ("mine", 2, "near_duplicate", "nearly the same as row 0 of mine"),
        ("mine", 4, "no_image", "no image"),
    ]
    ids = pq.read_table(tmp_path / "out" / "intake.parquet")["id"].to_pylist()
    assert ids[0] == table["id"][0].as_py() and ids[1] and ids[2] is None
    assert steps[-1] == (2, 3) and len(steps) == 5
    assert json.loads((tmp_path / "out" / "intake.json").read_text()) == counts


def test_what_a_benchmark_asks_is_left_out(source, tmp_path):
    tsv = vlmevalkit(tmp_path / "bench.tsv", [scene(TWO)], ["What colour is the cross?"])
    write_hashes([tsv], tmp_path / "hashes.parquet")
    for number, overlap in enumerate(({"benchmarks": [tsv]}, {"hashes": [str(tmp_path / "hashes.parquet")]})):
        out = tmp_path / f"out{number}"
        counts = intake(settings(source, overlap=OmegaConf.structured(Overlap(**overlap))), out)
        assert counts["reasons"]["benchmark_overlap"] == 1 and counts["benchmarks"] == {"questions": 1, "unread": 0}
        assert ("mine", 3, "benchmark_overlap", "repeats row 0 of the benchmark bench") in left_out(out)


def test_a_rerun_reads_nothing_and_a_change_reads_again(source, tmp_path, monkeypatch):
    reads = []
    read = module._read
    monkeypatch.setattr(module, "_read", lambda *arguments: reads.append(1) or read(*arguments))
    out, config = tmp_path / "out", settings(source)
    first = intake(config, out)
    assert intake(config, out) == first and len(reads) == 1
    config.duplicates.near = False
    assert intake(config, out)["rows"] == 3 and len(reads) == 2
    with (tmp_path / "mine" / "train.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"question": "Where?", "answer": "centre", "image": "2.png"}))
    assert intake(config, out)["rows"] == 4 and len(reads) == 3
    (out / "intake.parquet").unlink()
    intake(config, out)
    assert len(reads) == 4
    config.sources[0].limit = 1
    assert intake(config, out)["rows"] == 1 and len(reads) == 5
    (out / "intake.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        intake(config, out)


def test_an_interrupted_intake_is_begun_again(source, tmp_path):
    out, config = tmp_path / "out", settings(source)
    intake(config, out)
    config.max_pixels = 100

    def stop(*so_far):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        intake(config, out, stop)
    assert sorted(path.name for path in out.iterdir()) == ["intake.parquet", "rows.parquet"]  # whole, of the first run
    assert pq.read_table(out / "rows.parquet").num_rows == 2
    assert intake(config, out)["rows"] == 2


def test_sources_of_one_name_are_told_apart(source, tmp_path):
    test = geometry3k(tmp_path / "geometry3k")
    sources = [source, source, {"path": test, "reader": "geometry3k"}, {"path": test, "reader": "geometry3k"}]
    config = settings(*sources, duplicates=OmegaConf.structured(Duplicates(exact=False, near=False)))
    counts = intake(config, tmp_path / "out")
    assert list(counts["sources"]) == ["mine", "mine#2", "geometry3k", "geometry3k#2"]
    rows = pq.read_table(tmp_path / "out" / "rows.parquet", columns=["source", "source_row"]).to_pylist()
    assert len({tuple(row.values()) for row in rows}) == len(rows) == counts["rows"] == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no rows|needs a column question"),
        ('{"question": "a", "answer": "b", "image": null}', "none of its 1 records is a row; row 0: no image"),
        ('{"text": "a"}', "needs a column question"),
    ],
)
def test_a_source_without_rows_ends_the_run_in_one_line_and_leaves_nothing(tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        intake(settings({"path": str(tmp_path / "rows.jsonl")}), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_rows_are_written_in_groups_of_64_and_are_the_same_again(tmp_path):
    rows = [{"question": f"Which is number {n}?", "answer": "this", "image": "1.png"} for n in range(150)]
    (tmp_path / "1.png").write_bytes(scene(ONE))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("a", "b"):
        intake(settings({"path": str(tmp_path / "rows.jsonl")}), tmp_path / name)
    file = pq.ParquetFile(tmp_path / "a" / "rows.parquet")
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [64, 64, 22]
    assert (tmp_path / "a" / "rows.parquet").read_bytes() == (tmp_path / "b" / "rows.parquet").read_bytes()
