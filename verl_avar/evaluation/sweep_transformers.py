"""The backend of a sweep on transformers: greedy answers under a role bias, and their masses under the same bias."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from verl_avar import families
from verl_avar.attention.hf import role_bias
from verl_avar.attention.mass import MASS_ROLES
from verl_avar.evaluation.answer import Answers, answer, answer_masses, end_tokens
from verl_avar.evaluation.checkpoint import Checkpoint
from verl_avar.evaluation.images import open_images
from verl_avar.evaluation.isolation import isolated
from verl_avar.evaluation.sweep import Backend, Task
from verl_avar.evaluation.vas_run import check_model
from verl_avar.roles import Role, query_mask
from verl_avar.vas import sample_vas


def backend(checkpoint: Checkpoint, bias: dict, max_new_tokens: int, batch_size: int = 1) -> Backend:
    """Runs tasks on a loaded checkpoint. bias: `layers`, `queries` and `mode` of `role_bias`, for all points."""

    batch_size = 1 if families.alone(checkpoint.model) else batch_size

    def run(tasks: Sequence[Task]) -> Iterator[tuple[Task, dict]]:
        for _, group in itertools.groupby(tasks, key=lambda task: task.strength.key):
            same = list(group)
            for first in range(0, len(same), batch_size):
                batch = same[first : first + batch_size]
                for task, record in isolated(batch, lambda tasks: _batch(checkpoint, tasks, bias, max_new_tokens)):
                    yield task, {"problem": record} if isinstance(record, str) else record

    return run


def check(checkpoint: Checkpoint, visual: bool, bias: dict) -> None:
    """Raises ValueError where this model can't be biased so, or a bias of visual keys would change nothing, and
    RuntimeError where it reports no masses.
    """
    check_model(checkpoint)
    with role_bias(checkpoint.model, **bias):
        pass
    if visual and bias["mode"] == "bias" and families.cross_attention_layers(checkpoint.model):
        raise ValueError(
            f"the image enters {type(checkpoint.model).__name__} through cross-attention, whose keys are all visual: a "
            "bias drops out of the normalised weights; use --mode scale_weights"
        )


def _batch(checkpoint: Checkpoint, tasks: list[Task], bias: dict, limit: int) -> list[dict]:
    strength = tasks[0].strength
    intervention = None
    if not strength.is_baseline:
        intervention = {"visual": strength.visual, "system": strength.system} | bias
    images = [open_images(task.row.images) for task in tasks]
    answers = answer(checkpoint, [task.row.messages for task in tasks], images, limit, intervention)
    record = answer_masses(checkpoint, answers, "response", intervention)
    masses, layers = families.masses(checkpoint.model, record, MASS_ROLES)
    reach = families.reach(checkpoint.model, answers.roles, layers)
    ends = torch.tensor(end_tokens(checkpoint), device=answers.roles.device)
    return [_record(answers, b, masses[:, b], reach[:, b], ends) for b in range(len(tasks))]


def _record(answers: Answers, b: int, masses: torch.Tensor, reach: torch.Tensor, ends: torch.Tensor) -> dict:
    """One sample. masses: [L, H, T, R] of MASS_ROLES; reach: bool [L, T]."""
    roles = answers.roles[b]
    written = answers.inputs["input_ids"][b][roles == Role.RESPONSE]
    asked = query_mask(roles[None], "response")[0]
    found = {
        "response": answers.texts[b],
        "tokens": len(written),
        "cut": len(written) > 0 and not bool(torch.isin(written[-1], ends)),
        "queries": int(asked.sum()),
    }
    attention = {"vas": None, "head_mean": None, "visual": None, "system": None}
    if asked.any() and (roles == Role.VISUAL).any():
        of = {role: masses[:, :, asked, MASS_ROLES.index(role)] for role in (Role.VISUAL, Role.SYSTEM)}
        vas = sample_vas(of[Role.VISUAL], of[Role.SYSTEM], reach[:, asked])
        attention |= {"visual": float(vas.visual.mean()), "system": float(vas.system.mean())}
        if (roles == Role.SYSTEM).any() and vas.reached.any():
            attention |= {"vas": vas.paper, "head_mean": vas.heads_averaged}
    return found | attention
