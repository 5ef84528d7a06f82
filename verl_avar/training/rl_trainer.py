"""verl's synchronous V1 trainer with the parts of the reward in every step's metrics (`trainer_mode: avar_sync`).

What a reward function returns beside its score stops, in verl, at the rollouts' extra fields; validation logs it,
training doesn't (verl/trainer/ppo/v1/trainer_base.py:1868). Reward hacking of the visual term shows in these parts.
"""

from __future__ import annotations

from numbers import Real

import numpy as np
import transfer_queue as tq
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer


@register_trainer("avar_sync")
class AvarTrainer(PPOTrainerSync):
    """Metrics gain `reward/<name>`, the mean over the step's rollouts of each number the reward function returned."""

    def _build_replay_buffer(self):
        self.trainer_mode = "sync"  # verl chooses buffers and checkpoints by the name of its own mode
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = float(self.config.get("avar", {}).get("poll_s", buffer.poll_interval))
        return buffer

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


def reward_means(rollouts: list[dict]) -> dict[str, float]:
    """`reward/<name>`: the mean of every number that the reward function returned for all rollouts."""
    names = [name for name, value in rollouts[0].items() if isinstance(value, Real)] if rollouts else []
    return {f"reward/{name}": float(np.mean([info[name] for info in rollouts])) for name in names}
