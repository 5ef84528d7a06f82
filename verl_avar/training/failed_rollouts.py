"""Ends a run whose rollouts fail.

A rollout fails with its vLLM server, with a reward function that raises, or with a broken image. verl logs it and goes
on: its synchronous trainer without those prompts, its asynchronous ones with others in their place, for ever if need
be (verl/trainer/ppo/v1/replay_buffer.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class FailedRollouts:
    """Counts the prompts of a replay buffer with a failed rollout, whenever the buffer looks what is done.

    most: failed prompts of one step, training and validation together, beyond which RuntimeError is raised.
    """

    def __init__(self, buffer: ReplayBuffer, most: float):
        self.buffer, self.most = buffer, most
        self.known: set[str] = set()  # uids of all failed prompts
        self.new = 0  # of this step
        self.look = buffer._sync_metadata_from_transfer_queue
        # The one place that the polls of all buffers pass, custom ones too, while they wait for rollouts.
        buffer._sync_metadata_from_transfer_queue = self.look_and_count

    def look_and_count(self) -> None:
        self.look()
        failed = set().union(*self.buffer.failure_keys.values())
        self.new += len(failed - self.known)
        self.known |= failed
        if self.new > self.most:
            raise RuntimeError(
                f"rollouts of {self.new} prompts failed in this step; why is in the lines above that begin with 'Error "
                "in _run_prompt'. avar.failed_share is the share of a step's prompts that may fail"
            )

    def of_step(self) -> int:
        """Failed prompts since the last call."""
        new, self.new = self.new, 0
        return new
