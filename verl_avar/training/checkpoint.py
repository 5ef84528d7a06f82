"""Checkpoints of a run: where the newest whole one is, and its model in Hugging Face format.

verl writes `global_step_N/` and then the number N to `latest_checkpointed_iteration.txt`; SFT keeps the model files in
the folder itself, RL in its `actor/` (verl/utils/checkpoint/checkpoint_handler.py, trainer/ppo/v1/trainer_base.py:948).
There it is `huggingface/` on FSDP, `model/huggingface/` on Megatron (verl/utils/megatron_utils.py:1008).
"""

from __future__ import annotations

from pathlib import Path


def latest_step(folder: Path | str) -> int:
    """Step of the newest checkpoint in `trainer.default_local_dir`; 0 where there is none."""
    tracker = Path(folder) / "latest_checkpointed_iteration.txt"
    text = tracker.read_text().strip() if tracker.exists() else ""
    return int(text) if text.isdigit() else 0


def latest_model(folder: Path | str) -> Path:
    """The newest checkpoint's model folder, which `transformers` and `vllm serve` load.

    Raises FileNotFoundError where there is no checkpoint, or one without `hf_model` among its contents.
    """
    step = latest_step(folder)
    if step == 0:
        raise FileNotFoundError(f"no finished checkpoint in {folder}")
    saved = Path(folder) / f"global_step_{step}"
    for folder in (saved, saved / "model", saved / "actor", saved / "actor" / "model"):
        model = folder / "huggingface"
        if (model / "config.json").is_file() and list(model.glob("*.safetensors")):
            return model
    raise FileNotFoundError(
        f"{saved} holds no model in Hugging Face format; add hf_model to the checkpoint's save_contents"
    )
