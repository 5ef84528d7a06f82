"""Masses by CUDA's fused kernels, against the naive reference. Skipped without a CUDA device."""

import importlib.util

import pytest
import torch

from verl_avar.attention import reference
from verl_avar.attention.mass import MASS_ROLES, role_mass

pytestmark = pytest.mark.gpu


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
