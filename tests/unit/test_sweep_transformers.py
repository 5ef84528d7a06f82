"""One sample of a sweep: which figures of its attention there are."""

import pytest
import torch

from verl_avar.evaluation.answer import Answers
from verl_avar.evaluation.sweep_transformers import _record
from verl_avar.roles import Role

S, V, U, O, R = Role.SYSTEM, Role.VISUAL, Role.USER, Role.OTHER, Role.RESPONSE  # noqa: E741
ENDS = torch.tensor([9])


def record(roles: list[Role], reached: bool = True) -> dict:
    roles = torch.tensor([roles], dtype=torch.uint8)
    answers = Answers({"input_ids": torch.tensor([[1] * (roles.shape[1] - 1) + [9]])}, roles, 4, ["red"])
    masses = torch.tensor([0.2, 0.1]).expand(3, 2, roles.shape[1], 2)  # of VISUAL and SYSTEM
    return _record(answers, 0, masses, torch.full((3, roles.shape[1]), reached), ENDS)


def test_a_sample_has_its_vas_and_masses():
    found = record([S, V, U, O, R, R])
    assert (found["tokens"], found["queries"], found["cut"]) == (2, 2, False)
    assert found["vas"] == pytest.approx(2.0, rel=1e-4) and found["head_mean"] == pytest.approx(2.0, rel=1e-4)
    assert (found["visual"], found["system"]) == pytest.approx((0.2, 0.1))


@pytest.mark.parametrize(("roles", "reached"), [([U, V, U, O, R, R], True), ([S, V, U, O, R, R], False)])
def test_without_a_system_turn_in_reach_there_are_masses_but_no_vas(roles, reached):
    found = record(roles, reached)
    assert found["vas"] is None and found["head_mean"] is None and found["visual"] == pytest.approx(0.2)
