"""role_mass and the role bias against the naive reference, values and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from verl_avar.attention import reference
from verl_avar.attention.bias import MAX_BIAS, bias_of, biased, biased_mass, key_factors, scaled
from verl_avar.attention.mass import MASS_ROLES, output_and_mass, role_mass
from verl_avar.roles import Role

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2}


def random_qkr(batch=2, heads=4, kv_heads=2, t=33, s=None, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s = s or t
    query = torch.randn(batch, heads, t, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    key = torch.randn(batch, kv_heads, s, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return query, key, torch.randint(0, 5, (batch, s), generator=generator, dtype=torch.uint8)


def assert_same(fast, naive, query, key, tolerance):
    """Equal values, and equal gradients of a generic function of the masses."""
    torch.testing.assert_close(fast, naive.to(fast.dtype), atol=tolerance, rtol=tolerance)
    weights = torch.linspace(-1, 1, fast.numel()).view(fast.shape)
    ours = torch.autograd.grad((fast * weights).sum(), (query, key))
    theirs = torch.autograd.grad((naive.float() * weights).sum(), (query, key))
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("t,s", [(1, 1), (33, 33), (7, 33), (1, 33)])
def test_masses_equal_the_full_map(dtype, heads, kv_heads, t, s):
    if t == s == 1:
        query, key, roles = random_qkr(2, heads, kv_heads, t, s, dtype=dtype)
        assert role_mass(query, key, roles, of=list(Role)).sum(-1).eq(1).all()
        return
    query, key, roles = random_qkr(2, heads, kv_heads, t, s, dtype=dtype)
    naive = reference.role_mass(reference.attention_map(query, key), roles, MASS_ROLES)
    assert_same(role_mass(query, key, roles), naive, query, key, TOLERANCE[dtype])


@pytest.mark.parametrize("queries", [(0, 33), (5, 9), (20, 33), (2, 30), (33, 33), (0, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_a_query_range_returns_those_rows(queries, causal):
    query, key, roles = random_qkr()
    naive = reference.role_mass(reference.attention_map(query, key, causal=causal), roles, MASS_ROLES)
    fast = role_mass(query, key, roles, queries=queries, causal=causal)
    torch.testing.assert_close(fast, naive[:, :, slice(*queries)], atol=1e-6, rtol=1e-5)


def test_a_long_query_range_is_cut_into_blocks(monkeypatch):
    monkeypatch.setattr("verl_avar.attention.mass._ROWS", 4)
    query, key, roles = random_qkr()
    naive = reference.role_mass(reference.attention_map(query, key), roles, MASS_ROLES)[:, :, 22:33]
    assert_same(role_mass(query, key, roles, queries=(22, 33)), naive, query, key, 1e-5)


@pytest.mark.parametrize("side", ["left", "right", "both", "one empty"])
@pytest.mark.parametrize("queries", [None, (10, 30)])
def test_padding_is_not_attended(side, queries):
    query, key, roles = random_qkr()
    key_mask = torch.ones(roles.shape, dtype=torch.bool)
    if side in ("left", "both"):
        key_mask[0, :6] = False
    if side in ("right", "both"):
        key_mask[1, 20:] = False
    if side == "one empty":
        key_mask[1] = False
    weights = reference.attention_map(query, key, key_mask=key_mask) * key_mask[:, None, :, None]
    naive = reference.role_mass(weights, roles, MASS_ROLES)[:, :, slice(*(queries or (0, 33)))]
    assert_same(role_mass(query, key, roles, key_mask=key_mask, queries=queries), naive, query, key, 1e-5)


@pytest.mark.parametrize("queries", [None, (8, 25)])
def test_packed_sequences_do_not_see_each_other(queries):
    query, key, roles = random_qkr(batch=1)
    borders = torch.tensor([0, 5, 6, 20, 33])
    segments = torch.bucketize(torch.arange(33), borders[1:], right=True)[None]
    weights = reference.attention_map(query, key, segments=segments)
    naive = reference.role_mass(weights, roles, MASS_ROLES)[:, :, slice(*(queries or (0, 33)))]
    assert_same(role_mass(query, key, roles, cu_seqlens=borders, queries=queries), naive, query, key, 1e-5)


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("of", [MASS_ROLES, list(Role)])
def test_masses_that_ride_with_the_output(heads, kv_heads, of):
    query, key, roles = random_qkr(2, heads, kv_heads)
    value = torch.randn_like(key).requires_grad_()

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=heads > kv_heads)

    out, mass = output_and_mass(query, key, value, roles, attend, of)
    weights = reference.attention_map(query, key, scale=0.25)
    expected = weights @ value.repeat_interleave(heads // kv_heads, dim=1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(x.square().sum(), value, retain_graph=True)[0] for x in (out, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert_same(mass, reference.role_mass(weights, roles, of), query, key, 1e-5)


def test_grouped_keys_are_not_copied():
    query, key, roles = random_qkr(1, 8, 2, t=64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        role_mass(query, key, roles, queries=(56, 64))
    assert (1, 2, 64, 16) in kept and (1, 8, 64, 16) not in kept


def test_all_roles_together_have_mass_one():
    query, key, roles = random_qkr()
    torch.testing.assert_close(role_mass(query, key, roles, of=list(Role)).sum(-1), torch.ones(2, 4, 33))


@pytest.mark.parametrize("queries", [None, (768, 1024)])
def test_nothing_of_the_size_of_the_map_is_kept(queries):
    """Of H × T × T weights autograd keeps none; of a restricted range at most its causal mask, shared by the heads."""
    query, key, roles = random_qkr(1, 4, 2, t=1024)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        role_mass(query, key, roles, queries=queries)
    assert max(kept) <= (1024 * 1024 / 8 if queries is None else 256 * 1024)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"roles": torch.zeros(2, 5, dtype=torch.uint8)}, "roles are"),
        ({"queries": (0, 99)}, "outside 0"),
        ({"cu_seqlens": torch.tensor([0, 33])}, "one row"),
        ({"key_mask": torch.arange(33).ne(4).expand(2, -1)}, "hole"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    query, key, roles = random_qkr()
    with pytest.raises(ValueError, match=message):
        role_mass(**{"query": query, "key": key, "roles": roles} | change)


@pytest.mark.parametrize("visual,system", [(0.14, 0.0), (0.0, -0.51), (3.0, -3.0), (-12.0, 12.0)])
def test_bias_through_values_equals_bias_on_logits(visual, system):
    query, key, roles = random_qkr(dtype=torch.float64)
    value = torch.randn_like(key)
    plain = reference.attention_map(query, key)
    logit_bias = torch.zeros(roles.shape, dtype=torch.float64)
    logit_bias[roles == Role.VISUAL] = visual
    logit_bias[roles == Role.SYSTEM] = system
    weights = reference.attention_map(query, key, bias=logit_bias)
    out = biased(lambda v: plain @ v.repeat_interleave(2, dim=1), value, key_factors(roles, visual, system))
    torch.testing.assert_close(out, weights @ value.repeat_interleave(2, dim=1), atol=1e-6, rtol=1e-6)
    naive = reference.role_mass(weights, roles, MASS_ROLES)
    ours = biased_mass(reference.role_mass(plain, roles, MASS_ROLES), MASS_ROLES, visual, system)
    torch.testing.assert_close(ours, naive, atol=1e-9, rtol=1e-6)


def test_the_papers_alphas_are_logit_biases():
    assert bias_of(0.15, 0.40) == pytest.approx((0.13976, -0.51083), abs=1e-5)
    # Multiplying post-softmax weights by 1+α and renormalising is the definition (AVAR §2.3).
    weights = torch.tensor([0.2, 0.3, 0.5])
    boosted = weights * torch.tensor([1.15, 0.6, 1.0])
    logits = weights.log() + torch.tensor([*bias_of(0.15, 0.40), 0.0])
    torch.testing.assert_close(logits.softmax(0), boosted / boosted.sum())


@pytest.mark.parametrize("beta", [math.nan, math.inf, MAX_BIAS + 1])
def test_senseless_biases_are_refused(beta):
    with pytest.raises(ValueError, match="finite"):
        key_factors(torch.zeros(1, 3, dtype=torch.uint8), visual=beta)


def test_a_bias_beyond_half_precision_is_refused():
    _, key, roles = random_qkr(dtype=torch.float16)
    factors = key_factors(roles, visual=12.0)
    with pytest.raises(ValueError, match=r"too large for torch\.float16"):
        biased(lambda v: v, key, factors)


def test_mass_under_a_bias_needs_the_biased_roles():
    with pytest.raises(ValueError, match="SYSTEM"):
        biased_mass(torch.rand(2, 1), [Role.VISUAL], visual=1.0, system=1.0)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("beta", [0.01, 0.05, 0.14, -0.51, 1.0, -3.0])
def test_half_precision_keeps_the_whole_of_a_small_bias(beta, normalised):
    """Rounded to bfloat16, exp(0.002) is 1 and exp(0.01) is 1.0078: the change itself must not be rounded away."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 8, 64, 64, generator=generator).bfloat16() for _ in range(3))
    roles = torch.randint(1, 4, (1, 64), generator=generator, dtype=torch.uint8)

    def effect(dtype):
        def attend(v):
            return F.scaled_dot_product_attention(query.to(dtype), key.to(dtype), v, is_causal=True)

        under = biased if normalised else scaled
        return (under(attend, value.to(dtype), key_factors(roles, visual=beta)) - attend(value.to(dtype))).double()

    exact, ours = effect(torch.float64), effect(torch.bfloat16)
    assert float((exact * ours).sum() / exact.square().sum()) == pytest.approx(1, abs=0.03)
