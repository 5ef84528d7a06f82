"""Training data from a run's accepted rows, in the layouts that trainers read, and its rejects for a person to read.

Every target is whole or absent at any time, and a few rows are in memory at once. Placeholders of images, videos and
sounds in the models' texts are put in round brackets: trainers take them for media that the row does not have.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from verl_avar.data.choices import with_options
from verl_avar.data.published import write
from verl_avar.data.schema import IMAGE
from verl_avar.synthesis.joined import accepted, joined, outcomes
from verl_avar.synthesis.outcomes import ACCEPTED, REJECTED, TEXTS
from verl_avar.training.data import RL_SCHEMA, SFT_SCHEMA

# `weight`: of the row in training, 1 unless attention decided otherwise.
SFT = pa.schema([*SFT_SCHEMA, ("answer", pa.string()), ("id", pa.string()), ("weight", pa.float64())])
SHARD = 2000  # rows in a file of the plain data set
TARGETS = {"sft": "sft.parquet", "rl": "rl.parquet", "sharegpt": "sharegpt", "dataset": "dataset"}
REJECTS = "rejected.jsonl"
MEDIA = re.compile(r"<(image|video|audio)>")


def write_outputs(config: Any, out: Path) -> dict[str, Path]:
    """Writes what `config.outputs` names into a run's folder, and the rejects; returns the paths by name.

    sft       verl's MultiTurnSFTDataset: messages (system, user, assistant = the anchored chain), images; and source,
              answer, id, weight
    rl        verl's RLHFDataset: prompts of the accepted rows, whose answers a model has been seen to reach
    sharegpt  a folder for LLaMA-Factory's `dataset_dir`: data.json, images/ and dataset_info.json
    dataset   a folder for `datasets.load_dataset`: the rows with the texts of the three stages
    rejected  rejected.jsonl: every rejected row with its reason and its texts, without images

    Where attention weights rows (`attention.weight`), sft and sharegpt have each row as often as its weight says, once
    on average: verl's loss knows no weight of a row.

    Without an accepted row only `rejected` is written, and earlier data files are removed. Raises ConfigError where
    rows.parquet and outcomes.parquet don't belong together.
    """
    out = Path(out)
    made = {"rejected": _rejects(out)}
    rows = sum(outcome["status"] == ACCEPTED for outcome in outcomes(out, ["status"]))
    for name, target in TARGETS.items():
        path = out / target
        if name not in config.outputs or not rows:
            remove(path)
        elif name == "sft":
            write(path, SFT, (_sft(outcome, row, config.system) for outcome, row in _weighted(config, out)))
        elif name == "rl":
            write(path, RL_SCHEMA, (_rl(i, row, config.system) for i, (_, row) in enumerate(accepted(out))))
        elif name == "sharegpt":
            _sharegpt(path, config.name, config.system, _weighted(config, out))
        else:
            _dataset(path, rows, out)
        if path.exists():
            made[name] = path
    return made


def without_media(text: str) -> str:
    """Text in which no trainer finds a placeholder of an image, a video or a sound."""
    return MEDIA.sub(r"(\1)", text)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _prompt(row: dict, system: str) -> list[dict[str, str]]:
    # The placeholders of the row's own images stay.
    question = IMAGE.join(without_media(part) for part in with_options(row["question"], row["choices"]).split(IMAGE))
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def _sft(outcome: dict, row: dict, system: str) -> dict:
    answer = {"role": "assistant", "content": without_media(outcome["anchored"])}
    return {
        "messages": [*_prompt(row, system), answer],
        "images": row["images"],
        "weight": 1.0 if outcome["weight"] is None else outcome["weight"],
    } | {name: row[name] for name in ("source", "answer", "id")}


def _rl(index: int, row: dict, system: str) -> dict:
    task = str(json.loads(row["meta"]).get("subject") or row["source"])
    return {
        "data_source": row["source"],
        "prompt": _prompt(row, system),
        "images": row["images"],
        "ability": task,
        "reward_model": {"style": "rule", "ground_truth": row["answer"]},
        "extra_info": {"index": index, "task": task, "split": "train", "id": row["id"]},
    }


def _weighted(config: Any, out: Path) -> Iterator[tuple[dict, dict]]:
    """Accepted rows, each as often as its weight says where attention weights them."""
    if not config.attention.weight:
        return accepted(out)
    from verl_avar.synthesis.selection import resample

    statuses = outcomes(out, ["status", "weight"])
    return resample(accepted(out), [one["weight"] for one in statuses if one["status"] == ACCEPTED], config.seed)


def _sharegpt(path: Path, name: str, system: str, rows: Iterable[tuple[dict, dict]]) -> None:
    """`data.json` names its images relative to the folder, which is what LLaMA-Factory takes for `media_dir`."""
    with _whole(path) as folder, (folder / "data.json").open("w", encoding="utf-8") as file:
        (folder / "images").mkdir()
        for number, (outcome, row) in enumerate(rows):
            files = []
            for index, image in enumerate(row["images"]):
                files.append(f"images/{row['id']}_{index}.{_format(image['bytes'])}")
                (folder / files[-1]).write_bytes(image["bytes"])
            turns = [{"from": "human", "value": _prompt(row, system)[1]["content"]}]
            turns.append({"from": "gpt", "value": without_media(outcome["anchored"])})
            entry = {"conversations": turns, "system": system, "images": files}
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(entry, ensure_ascii=False))
        file.write("\n]\n")
        columns = {"messages": "conversations", "system": "system", "images": "images"}
        info = {name: {"file_name": "data.json", "formatting": "sharegpt", "columns": columns}}
        (folder / "dataset_info.json").write_text(json.dumps(info, indent=2, ensure_ascii=False), encoding="utf-8")


def _dataset(path: Path, rows: int, out: Path) -> None:
    from datasets import Features, Image, List, Value

    text = {name: Value("string") for name in ("id", "source", "question", "answer")}
    features = Features(
        text
        | {"source_row": Value("int64"), "choices": List(Value("string")), "images": List(Image())}
        | {name: Value("string") for name in TEXTS.values()}
        | {"attention": Value("float64"), "weight": Value("float64")}
    )
    with _whole(path) as folder:
        made = ({name: (outcome | row)[name] for name in features} for outcome, row in accepted(out))
        shards = math.ceil(rows / SHARD)
        for shard in range(shards):  # the schema's metadata tells `datasets` what is an image
            file = folder / "data" / f"train-{shard:05}-of-{shards:05}.parquet"
            write(file, features.arrow_schema, itertools.islice(made, SHARD))


def _rejects(out: Path) -> Path:
    path = out / REJECTS
    part = path.with_name(f".{path.name}.{os.getpid()}")
    kept = ("source", "source_row", "id", "stage", "reason", "detail")
    try:
        with part.open("w", encoding="utf-8") as file:
            for outcome, row in joined(out):
                if outcome["status"] != REJECTED:
                    continue
                entry = {name: outcome[name] for name in kept}
                entry |= {name: row[name] if row else None for name in ("question", "choices", "answer")}
                entry |= {name: outcome[name] for name in (*TEXTS.values(), "candidates")}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of `path` once it is complete."""
    part, old = (path.with_name(f".{path.name}.{os.getpid()}{end}") for end in ("", ".old"))
    remove(part)
    part.mkdir()
    try:
        yield part
        if path.exists():
            path.replace(old)
        part.replace(path)
    finally:
        remove(part)
        remove(old)


def _format(image: bytes) -> str:
    """The ending of an image file's name, by its content."""
    from PIL import Image

    with Image.open(io.BytesIO(image)) as picture:
        return {"JPEG": "jpg"}.get(picture.format, picture.format.lower())
