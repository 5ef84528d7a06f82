"""The training-free intervention on tensors: a factor c = exp(β) per role (AVAR §2.3, arXiv:2603.03825).

Three modes, exact and in O(T) memory for any kernel, since each is the plain kernel on other keys or values:

    bias            softmax(QKᵀ + β)·V = softmax(QKᵀ)·(c∘V) / softmax(QKᵀ)·c    weights × c, normalised
    scale_weights   softmax(QKᵀ)·(c∘V)                                          weights × c, not normalised
    scale_logits    softmax(Q(c∘K)ᵀ)·V                                          logits × c

In half precision the first two keep the digits of small β (see `_parts`); scale_logits loses a |β| below about 0.01 in
the rounding of c∘K.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from verl_avar.roles import Role

# exp(±20) keeps float32 sums of unbiased and biased weights meaningful; the paper's values lie within ±1.
MAX_BIAS = 20.0
MODES = ("bias", "scale_weights", "scale_logits")


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


# Half precision rounds a factor near 1 to 1 or to the next number: c − 1 keeps its digits, up to this |β|.
_SMALL = 0.5


def _column(factors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Factors [B, S] as [B, 1, S, 1] in a kernel's dtype."""
    column = factors[:, None, :, None].to(dtype)
    # The other dtypes hold every factor within ±MAX_BIAS, and the check waits for the device.
    if dtype == torch.float16 and not (torch.isfinite(column) & (column > 0)).all():
        raise ValueError(f"bias: too large for {dtype}; use a smaller one, or bfloat16 or float32")
    return column


def _parts(factors: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Columns [B, 1, S, 1] whose sum is c, each exact to the dtype's relative precision of c or of c − 1."""
    if dtype not in (torch.float16, torch.bfloat16):
        return [_column(factors, dtype)]
    small = factors.log().abs() <= _SMALL
    change = torch.where(small, factors - 1, 0.0)[:, None, :, None].to(dtype)
    return [_column(torch.where(small, 1.0, factors), dtype), change]


def scaled(attend: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """softmax(QKᵀ)·(c∘V): weights × c, not normalised. Arguments as of `biased`."""
    return sum(attend(value * part).float() for part in _parts(factors, value.dtype)).to(value.dtype)


def biased(attend: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Attention output under a key bias.

    attend: values [B, H_kv, S, D] -> output with D last, the unbiased kernel. factors: [B, S], from `key_factors`.
    """
    parts = _parts(factors, value.dtype)
    weighted = sum(attend(value * part).float() for part in parts)
    # The same kernel wants the same head size, so the normaliser travels in the first of D columns.
    columns = F.pad(torch.cat(parts, dim=-1), (0, value.shape[-1] - len(parts)))
    normaliser = attend(columns.expand(-1, value.shape[1], -1, -1)).float()[..., : len(parts)].sum(-1, keepdim=True)
    # Zero only for a query that sees no key: its output is 0, as the unbiased kernel's is.
    return (weighted / normaliser.masked_fill(normaliser == 0, 1)).to(value.dtype)


def biased_mass(mass: torch.Tensor, of: Sequence[Role], visual: float = 0.0, system: float = 0.0) -> torch.Tensor:
    """Masses under a bias from the unbiased ones: [..., R] with the roles `of`, VISUAL and SYSTEM among them.

    `m'_R = c_R m_R / (Σ_R' c_R' m_R' + 1 − Σ_R' m_R')`: no further attention call. Masses that a kernel rounded to
    half precision lose digits where c is far below 1 and the role has nearly all of the mass.
    """
    if visual == system == 0.0:
        return mass
    factor = {Role.VISUAL: math.exp(visual), Role.SYSTEM: math.exp(system)}
    if missing := [role.name for role, c in factor.items() if c != 1 and role not in of]:
        raise ValueError(f"bias: the mass of the biased role {missing[0]} is needed too; have {[r.name for r in of]}")
    c = mass.new_tensor([factor.get(role, 1.0) for role in of])
    rest = (1 - mass.sum(-1, keepdim=True)).clamp_min(0)
    return mass * c / ((mass * c).sum(-1, keepdim=True) + rest)


@dataclass(frozen=True)
class Effect:
    """An intervention on one attention call: keys and values [B, H_kv, S, D], queries [B, H, T, D]."""

    factors: torch.Tensor  # c of each key, float32 [B, S]
    rows: torch.Tensor | None  # bool [B, T], the queries it acts on; None for all
    visual: float
    system: float
    mode: str

    def output(self, attend: Callable, key: torch.Tensor, value: torch.Tensor) -> tuple:
        """Output [B, T, H, D] and, where the kernel gives them, weights [B, H, T, S].

        attend: (key, value) -> output and weights of the unbiased kernel; anything but a 4D tensor is no weights.
        """
        maps = []

        def call(values):
            out, weights = attend(key, values)
            maps.append(weights)
            return out

        if self.mode == "bias":
            under = biased(call, value, self.factors), maps[0]
        elif self.mode == "scale_weights":
            under = scaled(call, value, self.factors), maps[0]
        else:
            under = attend(key * _column(self.factors, key.dtype), value)
        plain = None if self.rows is None else attend(key, value)
        out = self._where(under[0], plain and plain[0], (slice(None), slice(None), None, None))
        return out, self._weights(under[1], plain and plain[1])

    def _weights(self, under, plain) -> torch.Tensor | None:
        if not isinstance(under, torch.Tensor) or under.dim() != 4:
            return None
        if self.mode != "scale_logits":
            under = under * self.factors[:, None, None, :].to(under.dtype)
        if self.mode == "bias":
            total = under.sum(-1, keepdim=True)
            under = under / total.masked_fill(total == 0, 1)
        return self._where(under, plain, (slice(None), None, slice(None), None))

    def mass(self, masses: Callable, key: torch.Tensor, of: Sequence[Role]) -> torch.Tensor:
        """Masses [B, H, T, R] of the roles `of`. masses: (key, roles) -> masses of the unbiased kernel."""
        factor = {Role.VISUAL: math.exp(self.visual), Role.SYSTEM: math.exp(self.system)}
        extra = [role for role, c in factor.items() if c != 1 and role not in of] if self.mode == "bias" else []
        plain = masses(key, [*of, *extra]) if self.mode != "scale_logits" or self.rows is not None else None
        if self.mode == "bias":
            under = biased_mass(plain, [*of, *extra], self.visual, self.system)
        elif self.mode == "scale_weights":
            under = plain * plain.new_tensor([factor.get(role, 1.0) for role in of])
        else:
            under = masses(key * _column(self.factors, key.dtype), of)
        return self._where(under, plain, (slice(None), None, slice(None), None))[..., : len(of)]

    def _where(self, under: torch.Tensor, plain: torch.Tensor | None, rows: tuple) -> torch.Tensor:
        """`under` at the chosen queries, `plain` at the others. rows: index that lays [B, T] along both."""
        return under if self.rows is None else torch.where(self.rows[rows], under, plain)
