"""Whole checkpoints: each gets a list of its files once they are written, and a run resumes from one that fits it.

verl resumes from the checkpoint that `latest_checkpointed_iteration.txt` names, whatever has become of its files since
(verl/utils/checkpoint/checkpoint_manager.py, `find_latest_ckpt_path`).
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from omegaconf import DictConfig
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.utils.checkpoint.checkpoint_manager import get_checkpoint_tracker_filename

from verl_avar.training.checkpoint import latest_step

MANIFEST = "avar_files.json"
CARD = "README.md"  # written, and written again, after a checkpoint is whole (report/model_card.py); no run reads it


class SealCheckpoints(CheckpointCallback):
    """verl's hook after a checkpoint (`trainer.checkpoint_callback_class`): seals it."""

    def on_save(self, trainer, global_step: int, checkpoint_dir: str, async_save: bool = False, **kwargs) -> None:
        if not async_save:  # else its files are not written yet
            seal(Path(checkpoint_dir))


def seal(checkpoint: Path) -> None:
    """Lists the files of a finished checkpoint but for model cards, with their sizes in bytes, in its MANIFEST."""
    sizes = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, CARD)
    }
    temporary = checkpoint / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(sizes, indent=1))
    temporary.replace(checkpoint / MANIFEST)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a sealed checkpoint, or None."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    for name, size in sizes.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found} bytes, was saved with {size}"
    return None


def settle(folder: Path | str) -> str | None:
    """Before a run: makes verl resume from the newest whole checkpoint of `trainer.default_local_dir`.

    A newest checkpoint whose files don't fit its list is set aside as `global_step_N.broken`, and the newest whole one
    takes its place. One that was never sealed (by verl's own commands) is taken as it is. Returns a line about what was
    done, or None.
    """
    folder, step = Path(folder), latest_step(folder)
    newest = folder / f"global_step_{step}"
    if step == 0 or (newest.is_dir() and not (newest / MANIFEST).exists()) or (wrong := fault(newest)) is None:
        return None
    if newest.is_dir():
        newest.rename(_unused(newest))
    others = {int(m[1]): path for path in folder.iterdir() if (m := re.fullmatch(r"global_step_(\d+)", path.name))}
    whole = max((step for step, path in others.items() if fault(path) is None), default=0)
    tracker = Path(get_checkpoint_tracker_filename(str(folder)))
    if whole == 0:
        tracker.unlink()
        return f"checkpoint {newest} is broken ({wrong}) and no other is whole: the run begins again"
    temporary = tracker.with_suffix(".tmp")
    temporary.write_text(str(whole))
    temporary.replace(tracker)
    return f"checkpoint {newest} is broken ({wrong}): the run resumes from step {whole}"


def before_resuming(trainer: DictConfig) -> None:
    """`settle` for a run with this block `trainer` of its config, on one of torchrun's ranks; says what it did."""
    first = os.environ.get("RANK", "0") == "0"
    if trainer.resume_mode == "auto" and first and (done := settle(trainer.default_local_dir)):
        print(f"warning: {done}", file=sys.stderr, flush=True)


def _unused(checkpoint: Path) -> Path:
    """A name beside a broken checkpoint that is free: another may have been broken at the same step."""
    names = (checkpoint.with_name(f"{checkpoint.name}.broken{n or ''}") for n in range(1000))
    return next(path for path in names if not path.exists())
