"""Masses by CUDA's fused kernels, against the naive reference. Skipped without a CUDA device."""

import importlib.util

import pytest
import torch

from verl_avar.attention import reference
from verl_avar.attention.mass import MASS_ROLES, role_mass

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def random_qkr(dtype, t=257, heads=8, kv_heads=2, dim=128):
    generator = torch.Generator("cuda").manual_seed(0)
    shape = {"generator": generator, "device": "cuda", "dtype": dtype}
    query = torch.randn(2, heads, t, dim, **shape).requires_grad_()
    key = torch.randn(2, kv_heads, t, dim, **shape).requires_grad_()
    return query, key, torch.randint(0, 5, (2, t), generator=generator, device="cuda").to(torch.uint8)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("queries", [None, (200, 257), (3, 40)])
def test_masses_and_gradients_equal_the_full_map(dtype, tolerance, queries):
    query, key, roles = random_qkr(dtype)
    fast = role_mass(query, key, roles, queries=queries)
    naive = reference.role_mass(reference.attention_map(query.float(), key.float()), roles, MASS_ROLES)
    naive = naive[:, :, slice(*(queries or (0, 257)))]
    torch.testing.assert_close(fast, naive, atol=tolerance, rtol=tolerance)
    ours = torch.autograd.grad(fast.square().sum(), (query, key))
    theirs = torch.autograd.grad(naive.square().sum(), (query, key))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")
def test_flash_attention_2_reports_the_masses_of_eager(tmp_path):
    from verl_avar.attention.hf import probe, set_attention
    from verl_avar.miniature.model import build_model
    from verl_avar.miniature.tokenizer import build_tokenizer
    from verl_avar.roles import Role

    model = build_model(build_tokenizer(samples=200)).to("cuda", torch.bfloat16).eval()
    ids = torch.randint(0, 200, (2, 64), device="cuda")
    roles = torch.randint(1, 5, ids.shape, device="cuda").to(torch.uint8)
    masses = {}
    for name in ("avar_eager", "avar_flash_attention_2"):
        set_attention(model, name)
        with torch.no_grad(), probe(roles) as record:
            model(input_ids=ids)
        masses[name] = record.mass(Role.VISUAL)
    torch.testing.assert_close(masses["avar_flash_attention_2"], masses["avar_eager"], atol=2e-2, rtol=5e-2)


def test_compiled_flex_attention_under_probe_and_role_bias():
    """Compiled even under role_bias, which turns other compiled code off: uncompiled it would hold the map."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from verl_avar.attention.hf import probe, role_bias, set_attention
    from verl_avar.roles import Role

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=40, initializer_range=0.2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).to(DEVICE).eval()
    ids = torch.randint(3, 200, (2, 160), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    roles = torch.randint(1, 5, ids.shape, device=DEVICE).to(torch.uint8) * mask.to(torch.uint8)
    results = {}
    for name in ("avar_eager", "avar_flex_attention"):
        set_attention(model, name)
        with torch.no_grad(), probe(roles) as plain:
            model(input_ids=ids, attention_mask=mask)
        with torch.no_grad(), probe(roles) as biased, role_bias(model, visual=1.0, system=-1.0, roles=roles):
            logits = model(input_ids=ids, attention_mask=mask).logits
        masses = (record.mass(Role.VISUAL).transpose(2, 3)[:, mask.bool()] for record in (plain, biased))
        results[name] = (*masses, logits[mask.bool()])
    for ours, theirs in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)
