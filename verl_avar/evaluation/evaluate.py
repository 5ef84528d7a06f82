"""One checkpoint on one set of verifiable rows: greedy accuracy, the shuffled-image control, VAS and masses."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from verl_avar import families
from verl_avar.evaluation.answer import Answers, answer, answer_masses
from verl_avar.evaluation.checkpoint import load_checkpoint
from verl_avar.vas import Vas

Score = Callable[[dict, str], float]  # (row, response text) -> 1.0 if right
Progress = Callable[[Iterable, str], Iterable]


def evaluate(
    path: str | Path,
    rows: pd.DataFrame,
    score: Score,
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress = lambda steps, _: steps,
    device: str = "cpu",
    dtype: Any = torch.float32,
) -> dict:
    """Evaluates a checkpoint folder on rows in verl's RL format, with `extra_info["task"]`.

    dtype: a torch dtype, or "auto" for the checkpoint's own.

    Returns {"accuracy", "shuffled": {"all", task: …}, "vas": {"user", "response"}, "mass": {"visual", "system"} over
    response queries, "responses": list of texts, "dtype", "seconds"}.
    """
    start = time.monotonic()
    checkpoint = load_checkpoint(path, dtype=dtype, device=device)
    vas = {scope: Vas(scope) for scope in ("user", "response")}

    def look(answers: Answers) -> None:
        masses, layers = families.masses(checkpoint.model, answer_masses(checkpoint, answers))
        reach = families.reach(checkpoint.model, answers.roles, layers)
        for scope in vas.values():
            scope.add(*masses.unbind(-1), answers.roles, reach)

    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": progress}
    responses = _answers(checkpoint, rows, list(rows["images"]), look, label="images", **options)
    blind = _answers(checkpoint, rows, shuffled_images(rows, seed), None, label="shuffled", **options)
    summaries = {scope: v.summary() for scope, v in vas.items()}
    return {
        "accuracy": _by_task(rows, responses, score),
        "shuffled": _by_task(rows, blind, score),
        "vas": {scope: {k: s[k] for k in ("paper", "head_mean", "median")} for scope, s in summaries.items()},
        "mass": summaries["response"]["mass"],
        "responses": responses,
        "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
        "seconds": time.monotonic() - start,
    }


def shuffled_images(rows: pd.DataFrame, seed: int) -> list:
    """The images of other rows of the same task: a fixed rotation of a shuffled order, so that none keeps its own."""
    images = list(rows["images"])
    order = np.random.default_rng(seed)
    for _, members in rows.reset_index(drop=True).groupby(_task_column(rows)).groups.items():
        members = order.permutation(np.asarray(members))
        if len(members) < 2:
            raise ValueError("the shuffled control needs at least two rows of each task")
        for row, other in zip(members, np.roll(members, 1), strict=True):
            images[row] = rows["images"].iloc[other]
    return images


def _answers(checkpoint, rows, images: Sequence, look, *, label, max_new_tokens, batch_size, progress) -> list[str]:
    texts: list[str] = []
    for first in progress(range(0, len(rows), batch_size), label):
        part = slice(first, first + batch_size)
        with torch.inference_mode():
            answers = answer(checkpoint, list(rows["prompt"].iloc[part]), images[part], max_new_tokens)
            if look is not None:
                look(answers)
        texts += answers.texts
    return texts


def _task_column(rows: pd.DataFrame) -> np.ndarray:
    return np.asarray([info["task"] for info in rows["extra_info"]])


def _by_task(rows: pd.DataFrame, texts: Sequence[str], score: Score) -> dict[str, float]:
    right = defaultdict(list)
    for row, text, task in zip(rows.to_dict("records"), texts, _task_column(rows), strict=True):
        value = score(row, text)
        right["all"].append(value)
        right[str(task)].append(value)
    return {task: float(np.mean(values)) for task, values in right.items()}
