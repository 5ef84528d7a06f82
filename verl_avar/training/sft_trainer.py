"""verl's SFT trainers with the engine's metrics as numbers, sealed checkpoints (`whole_checkpoints.py`), and an end on
request (`stopping.py`).

verl's SFT has no metrics of its own beside the loss, so what an engine adds reaches the loggers as a list over ranks
of lists over micro-batches (verl/trainer/sft_trainer.py:348), which they can't write.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from verl.trainer.sft_trainer import SFTTrainer
from verl.trainer.sft_trainer_ray import SFTTrainer as RaySFTTrainer
from verl.utils import tensordict_utils as tu

from verl_avar.training.stopping import Stopped
from verl_avar.training.whole_checkpoints import seal


class StoppableSFT:
    """What both trainers add to verl's.

    stop_requested: set it at any time; after the step that is running a checkpoint is saved, and Stopped is raised.
    """

    stop_requested = False

    def _build_engine(self):
        super()._build_engine()
        train_batch = self.training_client.train_batch

        def train(data):
            output = train_batch(data)
            if self._shall_stop():
                self.save_freq = 1  # verl's loop looks at it after each step
            return self._with_numbers(output)

        self.training_client.train_batch = train

    def _build_ckpt_handler(self):
        super()._build_ckpt_handler()
        handler, save = self.ckpt_handler, self.ckpt_handler.save_checkpoint

        def save_and_seal(step):
            save(step)
            if handler.rank == 0:  # verl's SFT has no hook after a checkpoint, and here all ranks have written it
                seal(Path(handler.default_local_dir) / f"global_step_{step}")
            if self.save_freq == 1 and self._shall_stop():
                raise Stopped.after(step)

        handler.save_checkpoint = save_and_seal


class AvarSFTTrainer(StoppableSFT, SFTTrainer):
    """In this process, or in torchrun's."""

    def _shall_stop(self) -> bool:
        """Whether any rank was asked to: torchrun's ranks get its signal in different steps."""
        asked = torch.tensor(int(self.stop_requested), device=self.device_name)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return bool(asked)

    def _with_numbers(self, output):
        return with_numbers(output)


class AvarRaySFTTrainer(StoppableSFT, RaySFTTrainer):
    """On Ray workers, directed by this process."""

    def _shall_stop(self) -> bool:
        return self.stop_requested

    def _with_numbers(self, future):
        return SimpleNamespace(get=lambda: with_numbers(future.get()))


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
