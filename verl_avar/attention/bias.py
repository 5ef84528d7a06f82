"""The training-free intervention: a bias on the logits of a role (AVAR §2.3, arXiv:2603.03825).

Adding b to a key's logit multiplies its weight by c = exp(b) before normalisation. So biased attention is
`softmax(QKᵀ)·(c∘V) / softmax(QKᵀ)·c`: the plain kernel on other values, exact, in O(T) memory, for any kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from verl_avar.roles import Role

# exp(±20) keeps float32 sums of unbiased and biased weights meaningful; the paper's values lie within ±1.
MAX_BIAS = 20.0


def bias_of(alpha_img: float = 0.0, alpha_sys: float = 0.0) -> tuple[float, float]:
    """(β_visual, β_system) of the paper's α_img ≥ 0 and α_sys in [0, 1): log(1+α_img), log(1−α_sys)."""
    if alpha_img <= -1 or alpha_sys >= 1:
        raise ValueError(f"bias: α_img must be > -1 and α_sys < 1, got {alpha_img} and {alpha_sys}")
    return math.log1p(alpha_img), math.log1p(-alpha_sys)


def key_factors(roles: torch.Tensor, visual: float = 0.0, system: float = 0.0) -> torch.Tensor:
    """c = exp(bias of the key's role): float32 [B, S] of roles uint8 [B, S]. Raises ValueError beyond ±MAX_BIAS."""
    for name, beta in (("visual", visual), ("system", system)):
        if not math.isfinite(beta) or abs(beta) > MAX_BIAS:
            raise ValueError(f"bias: the {name} bias must be finite and within ±{MAX_BIAS:g}, got {beta}")
    factors = torch.ones(roles.shape, dtype=torch.float32, device=roles.device)
    factors[roles == Role.VISUAL] = math.exp(visual)
    factors[roles == Role.SYSTEM] = math.exp(system)
    return factors


def biased(attend: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Attention output under a key bias.

    attend: values [B, H_kv, S, D] -> output with D last, the unbiased kernel. factors: [B, S], from `key_factors`.
    """
    scaled = factors[:, None, :, None].to(value.dtype)
    if not (torch.isfinite(scaled) & (scaled > 0)).all():
        raise ValueError(f"bias: too large for {value.dtype}; use a smaller one, or bfloat16 or float32")
    weighted = value * scaled
    # The same kernel wants the same head size, so the normaliser travels in the first of D columns.
    column = F.pad(scaled, (0, value.shape[-1] - 1))
    normaliser = attend(column.expand(-1, value.shape[1], -1, -1))[..., :1]
    # Zero only for a query that sees no key: its output is 0, as the unbiased kernel's is.
    return attend(weighted) / normaliser.masked_fill(normaliser == 0, 1)


def biased_mass(mass: torch.Tensor, of: Sequence[Role], visual: float = 0.0, system: float = 0.0) -> torch.Tensor:
    """Masses under a bias from the unbiased ones: [..., R] with the roles `of`, VISUAL and SYSTEM among them.

    `m'_R = c_R m_R / (1 + Σ_R' (c_R' − 1) m_R')`: no further attention call. Masses that a kernel rounded to half
    precision lose digits where c is far below 1 and the role has nearly all of the mass.
    """
    if visual == system == 0.0:
        return mass
    factor = {Role.VISUAL: math.exp(visual), Role.SYSTEM: math.exp(system)}
    if missing := [role.name for role, c in factor.items() if c != 1 and role not in of]:
        raise ValueError(f"bias: the mass of the biased role {missing[0]} is needed too; have {[r.name for r in of]}")
    c = mass.new_tensor([factor.get(role, 1.0) for role in of])
    return mass * c / (1 + (mass * (c - 1)).sum(-1, keepdim=True))
