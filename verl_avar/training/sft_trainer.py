"""verl's SFT trainers with the engine's metrics as numbers, and with sealed checkpoints (`whole_checkpoints.py`).

verl's SFT has no metrics of its own beside the loss, so what an engine adds reaches the loggers as a list over ranks
of lists over micro-batches (verl/trainer/sft_trainer.py:348), which they can't write.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from verl.trainer.sft_trainer import SFTTrainer
from verl.trainer.sft_trainer_ray import SFTTrainer as RaySFTTrainer
from verl.utils import tensordict_utils as tu

from verl_avar.training.whole_checkpoints import seal


class AvarSFTTrainer(SFTTrainer):
    """In this process, or in torchrun's."""

    def _build_engine(self):
        super()._build_engine()
        train_batch = self.training_client.train_batch
        self.training_client.train_batch = lambda data: with_numbers(train_batch(data))

    def _build_ckpt_handler(self):
        super()._build_ckpt_handler()
        seal_after_saving(self.ckpt_handler)


class AvarRaySFTTrainer(RaySFTTrainer):
    """On Ray workers."""

    def _build_engine(self):
        super()._build_engine()
        train_batch = self.training_client.train_batch

        def train(data):
            future = train_batch(data)
            return SimpleNamespace(get=lambda: with_numbers(future.get()))

        self.training_client.train_batch = train

    def _build_ckpt_handler(self):
        super()._build_ckpt_handler()
        seal_after_saving(self.ckpt_handler)


def seal_after_saving(handler) -> None:
    """verl's SFT has no hook after a checkpoint: one rank's handler seals what all have written."""
    save = handler.save_checkpoint

    def save_and_seal(step):
        save(step)
        if handler.rank == 0:
            seal(Path(handler.default_local_dir) / f"global_step_{step}")

    handler.save_checkpoint = save_and_seal


def with_numbers(output):
    """A step's output whose metrics are numbers: ours are equal on all ranks, and there is one per mini-batch."""
    if output is not None:
        metrics = tu.get(output, "metrics")
        metrics.update({name: _first(value) for name, value in metrics.items() if isinstance(value, list)})
    return output


def _first(value):
    while isinstance(value, list):
        value = value[0]
    return value
