"""VAS and VARS by hand-worked masses."""

import pytest
import torch

from verl_avar.reward import EPS, summarise, token_scores, visual_scores
from verl_avar.roles import Role
from verl_avar.vas import Vas, vas_class

S, V, U, R, O = Role.SYSTEM, Role.VISUAL, Role.USER, Role.RESPONSE, Role.OTHER  # noqa: E741
ROLES = torch.tensor([[S, V, U, O, R, R]], dtype=torch.uint8)


def per_query(*rows):
    """Masses [L=2, B=1, H=2, T=6] from four rows: layer 0 heads 0, 1 and layer 1 heads 0, 1."""
    return torch.tensor(rows, dtype=torch.float64).view(2, 2, 1, 6).transpose(1, 2)


# Queries 3 and 4 produce the two response tokens; query 2 is the user's only token after the image.
VISUAL = per_query(
    [9, 9, 0.6, 0.2, 0.4, 9], [9, 9, 0.2, 0.4, 0.0, 9], [9, 9, 0.1, 0.1, 0.1, 9], [9, 9, 0.5, 0.1, 0.3, 9]
)
SYSTEM = per_query(
    [9, 9, 0.2, 0.1, 0.1, 9], [9, 9, 0.4, 0.1, 0.1, 9], [9, 9, 0.1, 0.4, 0.2, 9], [9, 9, 0.5, 0.0, 0.2, 9]
)


def test_vas_user_scope_by_hand():
    vas = Vas("user", eps=0.0)
    vas.add(VISUAL, SYSTEM, ROLES)
    torch.testing.assert_close(vas.by_head, torch.tensor([[3.0, 0.5], [1.0, 1.0]], dtype=torch.float64))
    summary = vas.summary()
    assert summary["paper"] == pytest.approx(5.5 / 4)
    assert summary["by_layer"] == pytest.approx([0.4 / 0.3, 1.0])
    assert summary["head_mean"] == pytest.approx((0.4 / 0.3 + 1.0) / 2)
    assert summary["mass"]["visual"] == pytest.approx(1.4 / 4)
    assert (summary["samples"], summary["queries"], summary["skipped"]) == (1, 1, 0)


def test_a_head_that_ignores_the_system_moves_the_papers_mean_only():
    system = SYSTEM.clone()
    system[1, 0, 0, 2] = 0.0
    vas = Vas("user")
    vas.add(VISUAL, system, ROLES)
    assert vas.summary()["paper"] > 1e4
    assert vas.summary()["head_mean"] < 2 and vas.summary()["median"] < 2


def test_vas_accumulates_over_batches_and_skips_what_has_no_image():
    both, once = Vas("response"), Vas("response")
    both.add(VISUAL, SYSTEM, ROLES)
    both.add(VISUAL, SYSTEM, torch.tensor([[S, U, U, O, R, R]], dtype=torch.uint8))
    once.add(torch.cat([VISUAL] * 2, 1), torch.cat([SYSTEM] * 2, 1), torch.cat([ROLES] * 2))
    assert (both.samples, both.skipped, both.queries) == (1, 1, 2)
    assert once.summary()["head_mean"] == pytest.approx(both.summary()["head_mean"])


def test_vas_of_nothing_is_an_error():
    vas = Vas("user")
    vas.add(VISUAL, SYSTEM, torch.tensor([[U, V, U, O, R, R]], dtype=torch.uint8))
    with pytest.raises(ValueError, match="none of 1 samples"):
        vas.summary()


def test_masses_that_overflowed_are_an_error():
    system = SYSTEM.clone()
    system[0, 0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        Vas("user").add(VISUAL, system, ROLES)
    Vas("response").add(VISUAL, system, ROLES)  # query 2 is none of its own


def test_classes_of_the_paper():
    assert [vas_class(v) for v in (7.5, 10.1, 13.8, 15.0, 18.9)] == ["narrow", "wide", "wide", "panoramic", "panoramic"]


def test_vars_by_hand():
    (score,) = visual_scores(VISUAL, SYSTEM, ROLES, tokens=True)
    # token 1 (query 3): layer 0 0.3/0.1, layer 1 0.1/0.2; token 2 (query 4): 0.2/0.1 and 0.2/0.2
    assert score.tokens == pytest.approx([(3 + 0.5) / 2, (2 + 1) / 2], rel=1e-4)
    assert score.ratio == pytest.approx((1.75 + 1.5) / 2, rel=1e-4)
    assert score.share == pytest.approx((0.75 + 1 / 3 + 2 / 3 + 0.5) / 4, rel=1e-4)
    assert score.visual_mass == pytest.approx((0.3 + 0.1 + 0.2 + 0.2) / 4)
    assert score.system_mass == pytest.approx((0.1 + 0.2 + 0.1 + 0.2) / 4)
    assert score.n == 2


def test_vars_does_not_grow_with_the_response():
    scores = token_scores(VISUAL[:, 0], SYSTEM[:, 0])[:, 3:5]
    once, twice = summarise(scores), summarise(torch.cat([scores, scores], dim=1))
    assert twice.ratio == pytest.approx(once.ratio) and twice.n == 2 * once.n


def test_edges_have_defined_scores():
    no_system = visual_scores(VISUAL, SYSTEM * 0, torch.tensor([[U, V, U, O, R, R]], dtype=torch.uint8))[0]
    assert no_system.ratio is None and no_system.share is None and no_system.visual_mass > 0
    no_response = visual_scores(VISUAL, SYSTEM, torch.tensor([[S, V, U, O, O, O]], dtype=torch.uint8))[0]
    assert (no_response.ratio, no_response.n) == (0.0, 0)
    no_image = visual_scores(VISUAL * 0, SYSTEM, torch.tensor([[S, U, U, O, R, R]], dtype=torch.uint8))[0]
    assert no_image.ratio == no_image.share == 0.0
    assert "tokens" not in no_image.as_dict() and EPS == 1e-6
