"""Finding the model that a training run left."""

from __future__ import annotations

from pathlib import Path


def latest_model(folder: Path | str) -> Path:
    """The newest whole checkpoint's Hugging Face folder below a run's `trainer.default_local_dir`.

    verl names the newest whole one in latest_checkpointed_iteration.txt; SFT writes `huggingface/` in it, RL
    `actor/huggingface/`. Raises FileNotFoundError where there is none.
    """
    folder = Path(folder)
    tracker = folder / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: {tracker.name} is missing")
    step = folder / f"global_step_{tracker.read_text().strip()}"
    for model in (step / "huggingface", step / "actor" / "huggingface"):
        if list(model.glob("*.safetensors")):
            return model
    raise FileNotFoundError(f"{step} has no model in Hugging Face format; train with hf_model among its save_contents")
