"""verl's V1 trainers with VARS: `trainer_mode: avar_sync`, `avar_colocate_async` or `avar_separate_async`.

They are verl's `sync`, `colocate_async` and `separate_async`, with additions. The visual term of the reward,
where `avar.vars` leaves it to the trainer (`visual_reward.py`), and `vars/*` in every step's metrics. The parts of the
reward as `reward/*`: what a reward function returns beside its score stops, in verl, at the rollouts' extra fields
(verl/trainer/ppo/v1/trainer_base.py:1868). And the rollouts' scores in asynchronous modes (`partial_rollouts.py`).
They also end where verl would go on without its rollouts (`failed_rollouts.py`), and when asked to (`stopping.py`).
"""

from __future__ import annotations

import shutil
from numbers import Real
from typing import ClassVar, NoReturn

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync, register_trainer
from verl.workers.utils.padding import response_from_nested

from verl_avar.training.checks import check_visual_reward
from verl_avar.training.command import one_line
from verl_avar.training.failed_rollouts import FailedRollouts
from verl_avar.training.partial_rollouts import ScoredAsyncClient
from verl_avar.training.stopping import Stopped, request
from verl_avar.training.visual_reward import (
    Sessions,
    actor_terms,
    add_on_last_token,
    counted_terms,
    hand_over,
    rollout_terms,
    source_metrics,
)

FAILED_SHARE = 0.1  # avar.failed_share where a config of verl's own has no block avar
MEASURES_NOTHING = (
    "avar.vars.source=actor: the old-log-prob pass measured no attention; set VERL_ENGINE_VENDOR=avar and "
    "avar.masses of the actor's engine to infer or always"
)


class VisualRewards:
    """What the three trainers add to verl's.

    Metrics gain `reward/<name>`, the mean over the step's rollouts of each number the reward function returned;
    `vars/rollout` and `vars/actor`, the mean visual term, ungated, of each source that was measured, and where both
    were `vars/difference` (mean absolute) and `vars/difference_max`; `vars/reward`, the mean of what the trainer added.
    """

    verl_mode: ClassVar[str]

    def __init__(self, config):
        check_visual_reward(config)
        self.visual_reward = hand_over(config)
        config.trainer.v1.trainer_mode = self.verl_mode  # verl chooses buffers and checkpoints by its own names
        super().__init__(config)

    def _build_replay_buffer(self):
        buffer, settings = super()._build_replay_buffer(), self.config.get("avar", {})
        buffer.poll_interval = float(settings.get("poll_s", buffer.poll_interval))
        share = float(settings.get("failed_share", FAILED_SHARE))
        self.failed_rollouts = FailedRollouts(buffer, share * self.config.data.train_batch_size)
        return buffer

    def on_step_begin(self):
        if request(self.config.trainer.default_local_dir).exists():
            self._save_and_stop()
        super().on_step_begin()

    def _save_and_stop(self) -> NoReturn:
        self.global_steps -= 1  # the step that is done
        if self.global_steps not in (self.resumed_from, self.saved):
            self._save_checkpoint()
        raise Stopped.after(self.global_steps)

    def _load_checkpoint(self):
        super()._load_checkpoint()
        self.resumed_from, self.saved = self.global_steps, None

    def _save_checkpoint(self):
        folder = self.config.trainer.default_local_dir
        try:
            super()._save_checkpoint()
        except Exception as error:  # torch's own words for a full disk are hard to know again
            free = shutil.disk_usage(folder).free / 2**30
            raise RuntimeError(
                f"the checkpoint of step {self.global_steps} could not be written to {folder} ({free:.1f} GiB free): "
                f"{one_line(error)}"
            ) from error
        self.saved = self.global_steps

    def _compute_old_log_prob(self, batch, metrics):
        batch = super()._compute_old_log_prob(batch, metrics)
        # Here rather than before the advantages: a reference pass of the same worker overwrites what this one measured.
        self._add_visual_terms(batch, metrics)
        return batch

    def _add_visual_terms(self, batch, metrics) -> None:
        settings = self.visual_reward
        sessions = Sessions.of(batch.keys, [tag.get("is_padding", False) for tag in batch.tags])
        names = ["extra_fields", "rm_scores", "response_mask", settings.score, "system_mass"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        extra = data.pop("extra_fields").tolist()
        rewards = [extra[row].get("reward_extra_info", {}) for row in sessions.final.tolist()]
        terms = {"rollout": rollout_terms(rewards), "actor": None}
        if settings.score in data.keys():  # noqa: SIM118  (a TensorDict's `in` means something else)
            mask = data["response_mask"]
            measured = (response_from_nested(data[name], mask) for name in (settings.score, "system_mass"))
            terms["actor"] = actor_terms(*measured, mask, settings)[sessions.final]
        metrics.update(source_metrics(terms["rollout"], terms["actor"]))
        if not settings.by_trainer:
            return
        if terms[settings.source] is None:
            raise ValueError(MEASURES_NOTHING)
        added = settings.lambda_v * counted_terms(terms[settings.source], rewards, sessions.group, settings)
        metrics["vars/reward"] = float(added.mean())
        by_row = torch.cat((added, added.new_zeros(1)))[sessions.of_row]  # the zero is padding's: its session is -1
        scores = add_on_last_token(data["rm_scores"], by_row)
        fields = TensorDict({"rm_scores": scores}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch):
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
        extra = data.pop("extra_fields").tolist()
        rollouts = [
            fields["reward_extra_info"]
            for fields, tag in zip(extra, batch.tags, strict=True)
            if not tag.get("is_padding", False)
        ]
        metrics.update(reward_means(rollouts))
        metrics["rollout/failed_prompts"] = self.failed_rollouts.of_step()


@register_trainer("avar_sync")
class AvarTrainer(VisualRewards, PPOTrainerSync):
    """verl's synchronous trainer."""

    verl_mode = "sync"


@register_trainer("avar_colocate_async")
class AvarColocateAsyncTrainer(VisualRewards, PPOTrainerColocateAsync):
    """verl's asynchronous trainer on the rollouts' own devices."""

    verl_mode = "colocate_async"

    def get_llm_client(self):
        return self.llm_server_manager.get_client(client_cls=ScoredAsyncClient)


@register_trainer("avar_separate_async")
class AvarSeparateAsyncTrainer(VisualRewards, PPOTrainerSeparateAsync):
    """verl's asynchronous trainer beside servers on devices of their own."""

    verl_mode = "separate_async"

    def get_llm_client(self):
        return self.standalone_server_manager.get_client(client_cls=ScoredAsyncClient)


def reward_means(rollouts: list[dict]) -> dict[str, float]:
    """`reward/<name>`: the mean of every number that the reward function returned for all rollouts."""
    names = [name for name, value in rollouts[0].items() if isinstance(value, Real)] if rollouts else []
    return {f"reward/{name}": float(np.mean([info[name] for info in rollouts])) for name in names}
