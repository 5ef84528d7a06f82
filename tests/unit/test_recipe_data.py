"""Published layouts become verl's rows, by the code that also reads the hub, from folders that the tests write."""

import io
import json

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from omegaconf import OmegaConf
from PIL import Image
from settings import load
from stages import data as data_stage

from verl_avar.data.images import encoded
from verl_avar.data.published import check_reachable, named, placed
from verl_avar.data.schema import SYSTEM
from verl_avar.errors import ConfigError
from verl_avar.training.checks import check_files, check_roles
from verl_avar.training.data import describe, main, write_rl, write_sft

ANSWER = "<think>I look at the triangle again.</think><answer>3</answer>"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(width=8, height=6, colour=(255, 0, 0)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def talk(question="<image>How long is x?", answer=ANSWER, keys=("from", "value"), roles=("human", "gpt")):
    return [{keys[0]: role, keys[1]: text} for role, text in zip(roles, (question, answer), strict=True)]


def json_folder(folder, rows, name="train.json"):
    folder.mkdir(exist_ok=True)
    (folder / "1.png").write_bytes(png())
    (folder / name).write_text(json.dumps(rows))
    return str(folder)


def hub_folder(folder, rows, features, split="train"):
    """A folder as the hub has it: parquet shards whose schema says what is an image."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


GEOMETRY3K = {
    "images": datasets.List(datasets.Image()),
    "problem": datasets.Value("string"),
    "answer": datasets.Value("string"),
}
MMK12 = {name: datasets.Value("string") for name in ("id", "question", "answer", "subject")} | {
    "image": datasets.Image()
}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": talk(), "images": ["1.png"]},
        {"conversations": talk(), "image": "1.png"},
        {"messages": talk(keys=("role", "content"), roles=("user", "assistant")), "images": ["1.png"]},
        {
            "messages": talk("How long is x?", keys=("role", "content"), roles=("user", "assistant")),
            "images": ["1.png"],
        },
    ],
)
def test_sharegpt_becomes_conversations_with_a_system_turn_and_the_image_inside(row, tmp_path):
    counts = write_sft(tmp_path / "sft.parquet", [json_folder(tmp_path / "set", [row])])
    (made,) = pq.read_table(tmp_path / "sft.parquet").to_pylist()
    assert made["messages"] == [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "<image>How long is x?"},
        {"role": "assistant", "content": ANSWER},
    ]
    assert made["images"] == [{"bytes": png()}] and describe(counts) == "1 rows"
    check_files(str(tmp_path / "sft.parquet"), ["messages", "images"])
    check_roles(str(tmp_path / "sft.parquet"), "messages")


def test_what_is_unusual_in_a_set_is_counted(tmp_path):
    own = {"role": "system", "content": "Be brief."}
    chat = talk(keys=("role", "content"), roles=("user", "assistant"))
    plain = talk(answer="3", keys=("role", "content"), roles=("user", "assistant"))
    rows = [
        {"messages": [own, *chat], "images": ["1.png"]},
        {"messages": plain, "images": ["1.png"]},
        {"messages": chat, "images": []},
    ]
    counts = write_sft(tmp_path / "sft.parquet", [json_folder(tmp_path / "set", rows)])
    assert describe(counts) == (
        "2 rows (1 with a system turn of their own, 1 not <think>…</think><answer>…</answer>, 1 without an image)"
    )
    assert pq.read_table(tmp_path / "sft.parquet").to_pylist()[0]["messages"][0]["content"] == "Be brief."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "images": ["1.png"]}, r"must be in one column named messages or conversations; the columns are"),
        ({"messages": talk(), "conversations": talk(), "images": ["1.png"]}, "must be in one column named messages"),
        ({"conversations": talk(), "picture": "1.png"}, "images must be in one column named images or image"),
        ({"conversations": talk(roles=("human", "tool")), "images": ["1.png"]}, "row 0: a message must be .*'tool'"),
        ({"conversations": talk()[:1], "images": ["1.png"]}, "row 0: user and assistant must take turns"),
        ({"conversations": talk("<image><image>x"), "images": ["1.png"]}, "row 0: 2 <image> in the text, 1 images"),
        ({"conversations": talk(), "images": ["2.png"]}, "row 0: no image file .*2.png"),
        ({"conversations": talk(), "images": ["train.json"]}, "row 0: an image can't be read"),
    ],
)
def test_an_unknown_layout_is_one_line_and_leaves_no_file(row, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        write_sft(tmp_path / "out" / "sft.parquet", [json_folder(tmp_path / "set", [row])])
    assert "\n" not in str(error.value)
    assert list((tmp_path / "out").glob("*") if (tmp_path / "out").exists() else []) == []


def test_geometry3k_and_mmk12_become_prompts_with_verifiable_answers(tmp_path):
    geometry = [
        {"images": [{"bytes": png()}], "problem": "<image>Find x.", "answer": "3"},
        {"images": [], "problem": "Find y.", "answer": "4"},
    ]
    mmk12 = [
        {"id": "a7", "question": "Which one?", "answer": " B ", "subject": "physics", "image": {"bytes": png(9, 9)}},
        {"id": "a8", "question": "Which one?", "answer": "", "subject": "physics", "image": {"bytes": png()}},
    ]
    sources = [
        hub_folder(tmp_path / "geometry3k", geometry, GEOMETRY3K),
        hub_folder(tmp_path / "MMK12", mmk12, MMK12),
    ]
    counts = write_rl(tmp_path / "rl.parquet", sources)
    assert counts == {"rows": 2, "without an image": 1, "without an answer": 1}
    first, second = pq.read_table(tmp_path / "rl.parquet").to_pylist()
    assert first == {
        "data_source": "geometry3k",
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "<image>Find x."}],
        "images": [{"bytes": png()}],
        "ability": "geometry3k",
        "reward_model": {"style": "rule", "ground_truth": "3"},
        "extra_info": {"index": 0, "task": "geometry3k", "split": "train", "id": "0"},
    }
    assert second["prompt"][1]["content"] == "<image>Which one?" and second["images"] == [{"bytes": png(9, 9)}]
    assert second["reward_model"]["ground_truth"] == "B"
    assert second["extra_info"] == {"index": 1, "task": "physics", "split": "train", "id": "a7"}


def test_a_split_is_chosen_by_its_name(tmp_path):
    row = {"images": [{"bytes": png()}], "problem": "<image>Find x.", "answer": "3"}
    folder = hub_folder(tmp_path / "set", [row], GEOMETRY3K)
    hub_folder(tmp_path / "set", [row | {"answer": "5"}], GEOMETRY3K, split="test")
    write_rl(tmp_path / "eval.parquet", [f"{folder}@test"])
    (made,) = pq.read_table(tmp_path / "eval.parquet").to_pylist()
    assert made["reward_model"]["ground_truth"] == "5" and made["extra_info"]["split"] == "test"
    with pytest.raises(ConfigError, match="@validation: no rows can be read"):
        write_rl(tmp_path / "no.parquet", [f"{folder}@validation"])
    assert named("FanqingM/MMK12") == ("FanqingM/MMK12", "train")


def test_verl_reads_the_rows_that_were_written(tmp_path):
    from transformers import AutoProcessor
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
    from verl.utils.dataset.rl_dataset import RLHFDataset

    from verl_avar.miniature import base_path

    processor = AutoProcessor.from_pretrained(base_path())
    write_sft(
        tmp_path / "sft.parquet", [json_folder(tmp_path / "set", [{"conversations": talk(), "images": ["1.png"]}])]
    )
    options = OmegaConf.create({"pad_mode": "no_padding", "max_length": 4096, "ignore_input_ids_mismatch": True})
    sample = MultiTurnSFTDataset(str(tmp_path / "sft.parquet"), processor.tokenizer, options, processor)[0]
    learnt = processor.tokenizer.decode(sample["input_ids"][sample["loss_mask"].bool()])
    assert "</think><answer>" in learnt.replace(" ", "") and sample["multi_modal_inputs"]["pixel_values"].shape[0] > 0

    row = {"images": [{"bytes": png()}], "problem": "<image>Find x.", "answer": "3"}
    write_rl(tmp_path / "rl.parquet", [hub_folder(tmp_path / "geo", [row], GEOMETRY3K)])
    options = OmegaConf.create(
        {"max_prompt_length": 4096, "cache_dir": str(tmp_path / "c"), "filter_overlong_prompts_workers": 1}
    )
    prompts = RLHFDataset(str(tmp_path / "rl.parquet"), processor.tokenizer, options, processor)
    assert len(prompts) == 1
    assert [part["type"] for part in prompts[0]["raw_prompt"][1]["content"]] == ["image", "text"]
    assert prompts[0]["reward_model"]["ground_truth"] == "3"


def test_a_large_image_is_scaled_down_and_a_small_one_kept_as_it_is():
    small = encoded({"bytes": png(20, 10), "path": None}, None, 200, "here")
    assert small["bytes"] == png(20, 10)
    with Image.open(io.BytesIO(encoded({"bytes": png(200, 100)}, None, 200, "here")["bytes"])) as image:
        assert image.size == (20, 10) and np.asarray(image)[0, 0].tolist() == [255, 0, 0]


def test_placeholders_are_put_where_there_are_none():
    user = {"role": "user", "content": "x"}
    assert placed([user], 2, "here") == [{"role": "user", "content": "<image><image>x"}]
    assert placed([user], 0, "here") == [user]
    with pytest.raises(ConfigError, match="here: 1 <image> in the text, 2 images"):
        placed([{"role": "user", "content": "<image>x"}], 2, "here")


def test_a_source_that_is_not_there_is_named(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="no such file or folder, and no hub name"):
        check_reachable("./nowhere")
    with pytest.raises(ConfigError, match=r"owner/set: not in .* HF_HUB_OFFLINE is set"):
        check_reachable("owner/set")
    (tmp_path / "datasets--owner--set").mkdir()
    check_reachable("owner/set@test")
    check_reachable(str(tmp_path))


def test_the_command_tells_a_mistake_in_one_line(tmp_path, capsys):
    folder = json_folder(tmp_path / "set", [{"conversations": talk(), "images": ["1.png"]}])
    assert main(["sft", folder, "--out", str(tmp_path / "a.parquet"), "--system", "Look."]) == 0
    assert capsys.readouterr().out.endswith("a.parquet: 1 rows\n")
    assert main(["rl", folder, "--out", str(tmp_path / "b.parquet")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "problem or question" in error


def test_the_data_stage_converts_the_recipes_sources(tmp_path):
    from rich.console import Console

    folder = json_folder(tmp_path / "set", [{"conversations": talk(), "images": ["1.png"]}])
    row = {"images": [{"bytes": png(40, 40)}], "problem": "<image>Find x.", "answer": "3"}
    geometry = hub_folder(tmp_path / "geo", [row], GEOMETRY3K)
    pd.DataFrame({"prompt": [0]}).to_parquet(tmp_path / "mine.parquet")
    recipe = load(
        ROOT / "recipes" / "avar_qwen25vl_7b.yaml",
        [
            f"data.sft_sources=[{folder}]",
            f"data.rl_sources=[{geometry}]",
            f"data.eval={tmp_path / 'mine.parquet'}",
            "data.system=Look.",
            "data.max_pixels=400",
        ],
    )
    data_stage(recipe, tmp_path / "run", Console(file=io.StringIO()))
    assert sorted(path.name for path in (tmp_path / "run" / "data").iterdir()) == [
        "counts.json",
        "rl.parquet",
        "sft.parquet",
    ]
    (made,) = pq.read_table(tmp_path / "run" / "data" / "rl.parquet").to_pylist()
    assert made["prompt"][0]["content"] == "Look."
    with Image.open(io.BytesIO(made["images"][0]["bytes"])) as image:
        assert image.size == (20, 20)
