"""Where answers look in their images, for the page of flipped questions: pictures that are there, or computed here."""

from __future__ import annotations

import hashlib
import io
import json
import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.runs import Run

if TYPE_CHECKING:
    from verl_avar.evaluation.checkpoint import Checkpoint
    from verl_avar.report import HeatmapSample

# (model's name, question with its `prompt`, response) -> where the response looks, a picture (PNG), or nothing. It is
# asked for all answers of one model before those of the next.
Overlays = Callable[[str, dict, str], "HeatmapSample | bytes | None"]
PIECES = 24  # of a response: more pictures than that nobody compares
VERSION = 1  # of what is stored; another one is computed anew
MARK = "Answer"  # what a picture is of, among its PNG's texts


def stored_overlays(folder: Path | str) -> Overlays:
    """Pictures that lie at folder/MODEL/BENCHMARK/ID.png, each name with its odd characters as %XX.

    A picture that was computed here for another prompt or response is not shown.
    """

    def read(model: str, question: dict, response: str) -> bytes | None:
        from PIL import Image

        path = overlay_path(folder, model, question)
        if not path.is_file():
            return None
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            mark = picture.info.get(MARK)
        return data if mark in (None, _mark(question, response)) else None

    return read


def overlay_path(folder: Path | str, model: str, question: Mapping) -> Path:
    """folder/MODEL/BENCHMARK/ID.png."""
    parts = (quote(text, safe="") for text in (model, question["benchmark"], f"{question['id']}.png"))
    # quote leaves dots: a name of nothing else would be another folder.
    return Path(folder).joinpath(*(part.replace(".", "%2E") if set(part) == {"."} else part for part in parts))


class ComputedOverlays:
    """Each stored answer read once more by the model that gave it, behind what it was asked; nothing is generated.

    folder/MODEL/BENCHMARK/ID.png is a picture for itself, ID.npz beside it what the page shows. Both are computed
    again where the checkpoint, the prompt, the response or the images are others than they are of. One model at a time
    is in memory. problems: answers without a picture, each with its reason.
    """

    def __init__(self, runs: Sequence[Run], folder: Path | str, checkpoints: Mapping[str, str] | None = None):
        """checkpoints: name of a run -> its checkpoint, where it is not (or no longer) the one that its summary names.

        Raises ConfigError for a name that is no run's, and for a summary without a checkpoint.
        """
        self.folder, self.problems = Path(folder), list[str]()
        own = {run.name: run.summary.get("model") for run in runs}
        if unknown := [name for name in checkpoints or {} if name not in own]:
            raise ConfigError(f"--checkpoint {unknown[0]}=…: none of the runs; they are {', '.join(own)}")
        self.paths = {**own, **(checkpoints or {})}
        if unnamed := [name for name, path in self.paths.items() if not path]:
            raise ConfigError(
                f"{unnamed[0]}: its summary.json names no checkpoint; --checkpoint {unnamed[0]}=PATH does"
            )
        self.known: dict[str, str] = {}  # fingerprints
        self.loaded: tuple[str, Checkpoint] | None = None

    def __call__(self, model: str, question: dict, response: str) -> HeatmapSample | None:
        from verl_avar.evaluation.heatmap import stored_heatmap

        if not response or not question["images"]:
            return None
        path, key = overlay_path(self.folder, model, question), self._key(model, question, response)
        if (found := _read(path, key, question)) is not None:
            return found
        checkpoint = self._checkpoint(model)
        images = [image["bytes"] for image in question["images"]]
        try:
            sample = stored_heatmap(checkpoint, json.loads(question["prompt"]), images, response, PIECES)
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            self.problems.append(f"{model}, {question['benchmark']} {question['id']}: {reason}")
            return None
        _write(path, key, sample, _mark(question, response))
        return sample

    def _checkpoint(self, model: str) -> Checkpoint:
        """Raises ConfigError where it can't be loaded."""
        from verl_avar.evaluation.options import load

        if self.loaded is None or self.loaded[0] != model:
            self.loaded = None  # before the next one takes its memory
            path = self.paths[model]
            try:
                self.loaded = model, load(Namespace(model=path, device=None, dtype="auto"))
            except (OSError, ValueError, RuntimeError, ImportError) as error:
                reason = " ".join(str(error).split())
                raise ConfigError(
                    f"{model}: its checkpoint can't be loaded: {reason}; --checkpoint {model}=PATH says where it is"
                ) from None
        return self.loaded[1]

    def _key(self, model: str, question: Mapping, response: str) -> str:
        from verl_avar.evaluation.partial import fingerprint

        if model not in self.known:
            self.known[model] = fingerprint(self.paths[model])
        images = [hashlib.sha256(image["bytes"]).hexdigest() for image in question["images"]]
        return _digest(VERSION, PIECES, self.known[model], question["prompt"], response, images)


def _mark(question: Mapping, response: str) -> str:
    return _digest(question.get("prompt"), response)


def _digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def _read(path: Path, key: str, question: Mapping) -> HeatmapSample | None:
    """The stored sample of this key, if there is one and its picture."""
    from verl_avar.evaluation.heatmap import side_by_side
    from verl_avar.evaluation.images import open_images
    from verl_avar.report import HeatmapSample

    data = path.with_suffix(".npz")
    if not (path.is_file() and data.is_file()):
        return None
    with np.load(data, allow_pickle=False) as stored:
        if str(stored["key"]) != key:
            return None
        steps = list(zip(stored["texts"].tolist(), stored["weights"].astype(float), strict=True))
        asked = str(stored["question"])
    picture, _ = side_by_side(open_images(question["images"]))
    return HeatmapSample(picture, asked, steps)


def _write(path: Path, key: str, sample: HeatmapSample, mark: str) -> None:
    """The picture, then what the page shows with its key: a picture without it is drawn again."""
    from verl_avar.report.heatmaps import heatmap_sheet

    path.parent.mkdir(parents=True, exist_ok=True)
    data, sheet = io.BytesIO(), io.BytesIO()
    heatmap_sheet(sample).savefig(sheet, format="png", metadata={MARK: mark})
    texts, weights = zip(*sample.steps, strict=True)
    np.savez_compressed(data, key=key, question=sample.question, texts=np.array(texts),
                        weights=np.stack(weights).astype(np.float32))  # fmt: skip
    for target, content in ((path, sheet), (path.with_suffix(".npz"), data)):
        unfinished = target.with_name(target.name + ".tmp")
        unfinished.write_bytes(content.getvalue())
        os.replace(unfinished, target)
