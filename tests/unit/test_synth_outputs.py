"""The training data of a run: what each layout holds, that its readers take it, and that rejects are kept."""

import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from synthesis_folder import folder_rows, many_rows, png, write_folder

from verl_avar.data.schema import IMAGE, SYSTEM
from verl_avar.errors import ConfigError
from verl_avar.synthesis.joined import accepted, joined
from verl_avar.synthesis.outcomes import ACCEPTED, REJECTED
from verl_avar.synthesis.outputs import without_media, write_outputs
from verl_avar.training.checks import check_files, check_roles
from verl_avar.training.data import RL_SCHEMA, SFT_SCHEMA, write_sft


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def run(tmp_path):
    """(settings, folder) of a run with every output written."""
    out = tmp_path / "run"
    config = write_folder(out)
    made = write_outputs(config, out)
    assert set(made) == {"sft", "rl", "sharegpt", "dataset", "rejected"}
    return config, out


def test_every_source_row_is_joined_with_its_own_row_once(run):
    _, out = run
    expected = [(one["source"], one["source_row"], row["question"] if there else None)
                for one, row, there in folder_rows()]  # fmt: skip
    found = [(one["source"], one["source_row"], row and row["question"]) for one, row in joined(out)]
    assert found == expected and len(list(accepted(out))) == 4


def test_sft_rows_are_system_question_and_anchored_chain(run):
    _, out = run
    table = pq.read_table(out / "sft.parquet")
    assert table.schema.names == [*SFT_SCHEMA.names, "answer", "id", "weight"]
    several, chosen, chinese, long_one = table.to_pylist()
    assert [turn["role"] for turn in several["messages"]] == ["system", "user", "assistant"]
    assert several["messages"][0]["content"] == SYSTEM
    assert several["messages"][1]["content"] == f"{IMAGE}{IMAGE}Which of the two is larger?"
    assert several["messages"][2]["content"].startswith("<think>Looking at the triangle, the base is 0.")
    assert [image["bytes"] for image in several["images"]] == [png(0), png(1, kind="JPEG")]
    assert chosen["messages"][1]["content"] == (
        f"{IMAGE}Which side is longest?\nA. $AB$\nB. $BC$ | the base\nC. none of them"
    )
    assert (chosen["answer"], chosen["source"], chosen["weight"], chinese["weight"]) == ("B", "geo", 1.0, 0.5)
    assert chinese["messages"][1]["content"].startswith(f"{IMAGE}如图")
    assert IMAGE not in long_one["messages"][2]["content"] and "(image) Let me" in long_one["messages"][2]["content"]
    check_files(str(out / "sft.parquet"), ["messages", "images"])
    check_roles(str(out / "sft.parquet"), "messages")


def test_rl_rows_are_the_prompts_of_accepted_rows_with_their_answers(run):
    _, out = run
    table = pq.read_table(out / "rl.parquet")
    assert table.schema == RL_SCHEMA
    rows = table.to_pylist()
    assert [row["reward_model"]["ground_truth"] for row in rows] == ["the second", "B", "\\frac{9}{2}", "7"]
    assert [row["extra_info"]["index"] for row in rows] == [0, 1, 2, 3]
    assert rows[2]["ability"] == "几何" and rows[0]["ability"] == "geo"
    assert [turn["role"] for turn in rows[0]["prompt"]] == ["system", "user"]
    check_files(str(out / "rl.parquet"), ["prompt", "reward_model"])


def test_verls_data_sets_read_every_row(run, tmp_path):
    from transformers import AutoProcessor
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
    from verl.utils.dataset.rl_dataset import RLHFDataset

    from verl_avar.miniature import base_path

    _, out = run
    processor = AutoProcessor.from_pretrained(base_path())
    options = OmegaConf.create(
        {"pad_mode": "no_padding", "max_length": 65536, "ignore_input_ids_mismatch": True, "truncation": "error"}
    )
    talks = MultiTurnSFTDataset(str(out / "sft.parquet"), processor.tokenizer, options, processor)
    assert len(talks) == 4
    for index in range(4):
        sample = talks[index]
        learnt = processor.tokenizer.decode(sample["input_ids"][sample["loss_mask"].bool()])
        assert "<think>" in learnt and "</answer>" in learnt
        assert len(sample["multi_modal_inputs"]["image_grid_thw"]) == (2 if index == 0 else 1)
    options = OmegaConf.create(
        {"max_prompt_length": 8192, "cache_dir": str(tmp_path / "c"), "filter_overlong_prompts": False}
    )
    prompts = RLHFDataset(str(out / "rl.parquet"), processor.tokenizer, options, processor)
    assert len(prompts) == 4
    parts = [part["type"] for part in prompts[0]["raw_prompt"][1]["content"]]
    assert parts == ["image", "image", "text"]


def test_the_sharegpt_folder_says_the_same_as_the_sft_rows(run, tmp_path):
    _, out = run
    folder = out / "sharegpt"
    entries = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    assert info == {
        "triangles": {
            "file_name": "data.json",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "system": "system", "images": "images"},
        }
    }
    assert all(name.startswith("images/") and (folder / name).is_file() for e in entries for name in e["images"])
    assert [name.rpartition(".")[2] for name in entries[0]["images"]] == ["png", "jpg"]
    # Through the reader of published sets in this layout, the same conversations and images come out.
    write_sft(tmp_path / "again.parquet", [str(folder / "data.json")], max_pixels=10**7)
    again, sft = (pq.read_table(path).to_pylist() for path in (tmp_path / "again.parquet", out / "sft.parquet"))
    assert [(row["messages"], row["images"]) for row in again] == [(row["messages"], row["images"]) for row in sft]


def test_load_dataset_reads_the_plain_data_set_with_images_and_all_three_texts(run):
    _, out = run
    rows = datasets.load_dataset(str(out / "dataset"), split="train")
    assert rows.features["images"] == datasets.List(datasets.Image())
    assert rows[0]["images"][1].size == (160, 120) and rows[3]["images"][0].size == (1600, 1100)
    assert rows[1]["choices"] == ["$AB$", "$BC$ | the base", "none of them"]
    assert rows[0]["description"].startswith("A triangle") and "The description says" in rows[0]["chain"]
    assert rows[0]["anchored"].startswith("<think>Looking") and rows[3]["attention"] is None


def test_rejects_are_kept_with_reason_and_texts(run):
    _, out = run
    rejects = [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["stage"], r["reason"]) for r in rejects] == [
        (one["stage"], one["reason"]) for one, _, _ in folder_rows() if one["status"] == REJECTED
    ]
    at_intake, wrong = rejects[1], rejects[4]
    assert at_intake["id"] is None and at_intake["question"] is None and at_intake["detail"].startswith("as row 17")
    assert wrong["answer"] == "4 cm" and "<answer>5 cm</answer>" in wrong["chain"] and wrong["anchored"] is None


def test_targets_that_are_no_longer_wanted_or_have_no_row_are_removed(run):
    config, out = run
    config.outputs = ["sft"]
    assert set(write_outputs(config, out)) == {"sft", "rejected"}
    assert not any((out / name).exists() for name in ("rl.parquet", "sharegpt", "dataset"))
    write_folder(out, [one for one in folder_rows() if one[0]["status"] != ACCEPTED])
    assert set(write_outputs(config, out)) == {"rejected"} and not (out / "sft.parquet").exists()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_stop_halfway_leaves_the_earlier_target_whole(run, monkeypatch):
    config, out = run
    before = (out / "sharegpt" / "data.json").read_bytes()

    def broken(image):
        raise KeyboardInterrupt

    monkeypatch.setattr("verl_avar.synthesis.outputs._format", broken)
    with pytest.raises(KeyboardInterrupt):
        write_outputs(config, out)
    assert (out / "sharegpt" / "data.json").read_bytes() == before
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_data_set_of_many_rows_has_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("verl_avar.synthesis.outputs.SHARD", 8)
    config = write_folder(tmp_path / "run", many_rows(40))
    config.outputs = ["dataset"]
    made = write_outputs(config, tmp_path / "run")["dataset"]
    kept = [one["source_row"] for one, _, _ in many_rows(40) if one["status"] == ACCEPTED]
    assert len(kept) > 8 and len(list((made / "data").glob("*.parquet"))) == -(-len(kept) // 8)
    assert datasets.load_dataset(str(made), split="train")["source_row"][:] == kept


def test_weights_reach_training_as_repetition(tmp_path):
    pytest.importorskip("verl_avar.synthesis.selection")
    weights = iter([0.0, 2.0, 1.0, 1.0])
    rows = [(one | ({"weight": next(weights)} if one["status"] == ACCEPTED else {}), row, there)
            for one, row, there in folder_rows()]  # fmt: skip
    config = write_folder(tmp_path, rows)
    config.attention.weight = True
    write_outputs(config, tmp_path)
    answers = pq.read_table(tmp_path / "sft.parquet").column("answer").to_pylist()
    assert answers == ["B", "B", "\\frac{9}{2}", "7"]
    entries = json.loads((tmp_path / "sharegpt" / "data.json").read_text(encoding="utf-8"))
    assert entries[0]["images"] == entries[1]["images"] and len(entries) == 4
    assert len(pq.read_table(tmp_path / "rl.parquet")) == 4


def test_rows_are_read_a_few_at_a_time(tmp_path):
    rows = many_rows(160)
    write_folder(tmp_path, [(one, row | {"images": [{"bytes": os.urandom(200_000)}]}, True) for one, row, _ in rows])
    before, most = pa.total_allocated_bytes(), 0
    for _ in joined(tmp_path):
        most = max(most, pa.total_allocated_bytes() - before)
    assert (tmp_path / "rows.parquet").stat().st_size > 30_000_000 and 0 < most < 16_000_000


def test_files_of_two_runs_are_told_apart(tmp_path):
    rows = folder_rows()
    config = write_folder(tmp_path, rows)
    table = pq.read_table(tmp_path / "rows.parquet")
    pq.write_table(table.take(pa.array(list(range(table.num_rows))[::-1])), tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match=r"outcomes\.parquet: nothing about row|rows\.parquet: row \d+ of"):
        write_outputs(config, tmp_path)
    (tmp_path / "outcomes.parquet").unlink()
    with pytest.raises(ConfigError, match=r"no file .*outcomes\.parquet; `avar synth run` writes it"):
        write_outputs(config, tmp_path)


def test_placeholders_in_a_models_text_are_no_media():
    assert without_media("See <image>, <video> and <audio>; not <b>.") == "See (image), (video) and (audio); not <b>."
