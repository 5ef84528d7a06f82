"""AGTO against the formula of AVAR §3.2 written out by loops, and by hand."""

import math

import pytest
import torch

from verl_avar.objective import EPS, agto_counts, agto_loss, agto_terms
from verl_avar.roles import Role

S, V, U, R, O = Role.SYSTEM, Role.VISUAL, Role.USER, Role.RESPONSE, Role.OTHER  # noqa: E741
ROLES = torch.tensor(
    [
        [S, S, V, V, V, U, O, R, R],
        [S, U, V, U, O, R, R, R, O],
        [S, S, U, O, R, R, R, R, R],  # no image
        [U, V, V, U, O, R, R, O, O],  # no system turn
    ],
    dtype=torch.uint8,
)


@pytest.fixture
def masses():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 4, 2, 9, generator=generator, dtype=torch.float64).requires_grad_()  # R, L, B, H, T


def naive(mass, role, eps=EPS):
    """Mean over the samples that have the role of the mean over layers and heads of the log."""
    terms = []
    for b in range(4):
        # The queries that produce the response tokens: one position before each.
        queries = [i for i in range(8) if ROLES[b, i + 1] == R]
        keys = int((ROLES[b] == role).sum())
        if keys == 0:
            continue
        logs = [
            torch.log(sum(mass[layer, b, h, q] for q in queries) / (len(queries) * keys) + eps)
            for layer in range(3)
            for h in range(2)
        ]
        terms.append(sum(logs) / len(logs))
    return sum(terms) / len(terms)


def test_terms_equal_the_formula(masses):
    visual, system = masses
    terms = agto_terms(visual, system, ROLES)
    assert (terms.enhance_count, terms.suppress_count) == (3, 3) == agto_counts(ROLES)
    torch.testing.assert_close(terms.enhance_sum / 3, -naive(visual, V))
    torch.testing.assert_close(terms.suppress_sum / 3, naive(system, S))
    loss = agto_loss(visual, system, ROLES, 0.15, 0.3)
    torch.testing.assert_close(loss, -0.15 * naive(visual, V) + 0.3 * naive(system, S))


def test_one_sample_by_hand():
    roles = torch.tensor([[S, V, V, O, R]], dtype=torch.uint8)
    visual = torch.tensor([0.9, 0.9, 0.9, 0.4, 0.9]).view(1, 1, 1, 5)  # only query 3 produces the response token
    system = torch.tensor([0.9, 0.9, 0.9, 0.2, 0.9]).view(1, 1, 1, 5)
    loss = agto_loss(visual, system, roles, alpha=1.0, beta=1.0)
    assert float(loss) == pytest.approx(-math.log(0.4 / 2 + EPS) + math.log(0.2 / 1 + EPS))


def test_micro_batches_sum_to_the_batch(masses):
    visual, system = masses
    whole = agto_loss(visual, system, ROLES)
    parts = [
        agto_terms(visual[:, rows], system[:, rows], ROLES[rows]).loss(0.15, 0.15, *agto_counts(ROLES))
        for rows in (slice(0, 1), slice(1, 3), slice(3, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)
    ours = torch.autograd.grad(whole, masses, retain_graph=True)[0]
    theirs = torch.autograd.grad(sum(parts), masses)[0]
    torch.testing.assert_close(ours, theirs)


def test_gradients_raise_visual_and_lower_system_attention(masses):
    agto_loss(*masses, ROLES).backward()
    queries = torch.zeros(4, 9, dtype=torch.bool)
    queries[:, :-1] = ROLES[:, 1:] == R
    visual, system = masses.grad[:, :, :, :, :].transpose(3, 4)[:, :, queries]
    assert (visual <= 0).all() and (visual < 0).any()
    assert (system >= 0).all() and (system > 0).any()


def test_below_the_floor_the_system_is_left_alone(masses):
    agto_terms(*masses, ROLES, system_floor=10.0).loss(1.0, 1.0).backward()
    assert masses.grad[1].eq(0).all() and masses.grad[0].ne(0).any()


def test_a_batch_without_images_or_responses_is_worth_zero(masses):
    text = torch.tensor([[S, U, O, R]], dtype=torch.uint8)
    prompt = torch.tensor([[S, V, U, O]], dtype=torch.uint8)
    visual, system = masses[:, :, :1, :, :4]
    assert agto_terms(visual, system, text).enhance_sum.item() == 0
    terms = agto_terms(visual, system, prompt)
    assert terms.loss(1.0, 1.0).item() == 0 and (terms.enhance_count, terms.suppress_count) == (0, 0)
    assert torch.isfinite(torch.autograd.grad(terms.loss(1.0, 1.0), masses)[0]).all()


def test_user_scope_uses_the_users_tokens(masses):
    visual, system = masses
    other = agto_loss(visual, system, ROLES, queries="user")
    assert not torch.isclose(other, agto_loss(visual, system, ROLES))
    assert agto_counts(ROLES, "user") == (3, 2)
