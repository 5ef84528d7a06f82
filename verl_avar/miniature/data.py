"""The miniature's data sets as parquet files in verl's formats.

SFT rows follow verl 0.9.1's MultiTurnSFTDataset (`messages`, `images`), RL and evaluation rows its RLHFDataset
(`prompt`, `images`, `data_source`, `reward_model`, `extra_info`). Questions alone, from which `avar synth run` makes
cold-start data, are rows of `verl_avar.data.schema.ROWS`. Every writer is deterministic by its seed and leaves no
half-written file behind.

    python -m verl_avar.miniature.data questions.parquet 200 [SEED]      writes questions
"""

import io
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from verl_avar.data.schema import IMAGE, ROWS, content_id
from verl_avar.miniature.tasks import SYSTEM, TASKS, Sample, draw_sample
from verl_avar.miniature.teacher import SCENE_KEY

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_IMAGES = pa.list_(pa.struct([("bytes", pa.binary())]))
SFT_SCHEMA = pa.schema(
    [
        ("messages", _MESSAGES),
        ("images", _IMAGES),
        ("task", pa.string()),
        ("answer", pa.string()),
        ("scene", pa.string()),
    ]
)
RL_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", _MESSAGES),
        ("images", _IMAGES),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct([("index", pa.int64()), ("task", pa.string()), ("split", pa.string()), ("scene", pa.string())]),
        ),
    ]
)


def write_sft(path: Path | str, n: int, seed: int) -> Path:
    """Write `n` cold-start conversations (system, user with "<image>", assistant) from the training split."""
    return _write(path, SFT_SCHEMA, (_sft_row(sample) for sample in _mixed(n, random.Random(f"sft {seed}"))))


def write_questions(path: Path | str, n: int, seed: int) -> Path:
    """Write the questions and answers of `write_sft(…, n, seed)`, in its order, without the chains.

    Each picture says in its file's text which scene it shows, for the exact teacher (`teacher.read_scene`); its pixels
    are those of `write_sft`.
    """
    samples = _mixed(n, random.Random(f"sft {seed}"))
    return _write(path, ROWS, (_question_row(sample, index) for index, sample in enumerate(samples)))


def write_rl(path: Path | str, n: int, seed: int) -> Path:
    """Write `n` prompts with their answers from the training split."""
    samples = _mixed(n, random.Random(f"rl {seed}"))
    return _write(path, RL_SCHEMA, (_rl_row(sample, index) for index, sample in enumerate(samples)))


def write_eval(path: Path | str, n_per_task: int, seed: int) -> Path:
    """Write `n_per_task` prompts of every task from the evaluation split, in the format of `write_rl`.

    No picture occurs twice in one task.
    """
    rng = random.Random(f"eval {seed}")
    samples = [sample for task in TASKS for sample in _distinct(task, n_per_task, rng)]
    return _write(path, RL_SCHEMA, (_rl_row(sample, index) for index, sample in enumerate(samples)))


def prompt(sample: Sample) -> list[dict[str, str]]:
    """System and user message; "<image>" stands where the picture goes."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"<image>{sample.question}"}]


def _mixed(n: int, rng: random.Random) -> Iterator[Sample]:
    """Samples of all tasks in turn, in random order."""
    order = [TASKS[index % len(TASKS)] for index in range(n)]
    rng.shuffle(order)
    return (draw_sample(task, "train", rng) for task in order)


def _distinct(task: str, n: int, rng: random.Random) -> list[Sample]:
    """Raises ValueError when the split has too few different pictures."""
    found: dict[str, Sample] = {}
    for _ in range(50 * n):
        if len(found) == n:
            break
        sample = draw_sample(task, "eval", rng)
        found.setdefault(sample.scene, sample)
    if len(found) < n:
        raise ValueError(f"task {task!r}: found {len(found)} different evaluation pictures, asked for {n}")
    return list(found.values())


def _sft_row(sample: Sample) -> dict:
    messages = [*prompt(sample), {"role": "assistant", "content": sample.response}]
    return {
        "messages": messages,
        "images": [{"bytes": _png(sample.image)}],
        "task": sample.task,
        "answer": sample.answer,
        "scene": sample.scene,
    }


def _question_row(sample: Sample, index: int) -> dict:
    question, image = f"{IMAGE}{sample.question}", _png(sample.image, sample.scene)
    return {
        "id": content_id(question, sample.answer, [], [image]),
        "source": "miniature",
        "source_row": index,
        "question": question,
        "answer": sample.answer,
        "choices": [],
        "images": [{"bytes": image}],
        "meta": json.dumps({"task": sample.task, "scene": sample.scene}),
    }


def _rl_row(sample: Sample, index: int) -> dict:
    return {
        "data_source": f"miniature/{sample.task}",
        "prompt": prompt(sample),
        "images": [{"bytes": _png(sample.image)}],
        "reward_model": {"style": "rule", "ground_truth": sample.answer},
        "extra_info": {"index": index, "task": sample.task, "split": sample.split, "scene": sample.scene},
    }


def _png(image: Image.Image, scene: str | None = None) -> bytes:
    """The picture's file; with `scene`, which is written into the file's text."""
    text = None
    if scene is not None:
        text = PngInfo()
        text.add_text(SCENE_KEY, scene)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=text)
    return buffer.getvalue()


def _write(path: Path | str, schema: pa.Schema, rows: Iterator[dict]) -> Path:
    """Write beside the target and rename, so that the target is always whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def main(arguments: list[str]) -> None:
    """FILE ROWS [SEED]: writes questions, and prints where they lie. Exits with the usage for anything else."""
    if len(arguments) not in (2, 3) or not all(number.isdecimal() for number in arguments[1:]):
        sys.exit("usage: python -m verl_avar.miniature.data FILE ROWS [SEED]")
    path, *numbers = arguments
    print(write_questions(path, *map(int, [*numbers, "0"][:2])))


if __name__ == "__main__":
    main(sys.argv[1:])
