"""What a `probe` collects: the masses of one forward pass, by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from verl_avar.attention.mass import MASS_ROLES
from verl_avar.roles import Role

# (layer, row b of the batch, positions [n] int64, attention [H, n, V] float32, masses [H, n, R] float32)
VisualCallback = Callable[[int, int, torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass
class Record:
    """Masses of one forward pass, by layer; filled by the attention functions while a `probe` is open."""

    roles: torch.Tensor  # uint8 [B, T]
    queries: torch.Tensor | None  # bool [B, T]
    only_layers: frozenset[int] | None
    of: tuple[Role, ...]
    visual: VisualCallback | None = None
    _mass: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> [B, H, T, R]

    @property
    def layers(self) -> list[int]:
        """Indices of the layers that reported, ascending."""
        return sorted(self._mass)

    def wants(self, layer: int) -> bool:
        """Whether this layer was asked for."""
        return self.only_layers is None or layer in self.only_layers

    def mass(self, role: Role) -> torch.Tensor:
        """Mass of `role`: float32 [L, B, H, T], layers as in `layers`; 0 at queries that were not asked for.

        Raises RuntimeError where no layer, or not every layer asked for, reported.
        """
        if not self._mass:
            raise RuntimeError(
                "probe: no attention layer reported a mass; load the model with one of the avar_… implementations "
                "(verl_avar.attention.hf.set_attention), and check the layers asked for"
            )
        if missing := sorted((self.only_layers or frozenset()) - self._mass.keys()):
            raise RuntimeError(f"probe: no mass from layers {missing}; the model has {self.layers} of those asked for")
        column = self.of.index(role)
        return torch.stack([self._mass[layer][..., column] for layer in self.layers])


# Module state, not thread-local: under gradient checkpointing autograd's threads call the attention functions again.
_records: list[Record] = []


@contextmanager
def probe(
    roles: torch.Tensor,
    queries: torch.Tensor | None = None,
    layers: Sequence[int] | None = None,
    of: Sequence[Role] = MASS_ROLES,
    visual: VisualCallback | None = None,
) -> Iterator[Record]:
    """Collects the masses of every text layer's attention while open. One full forward pass per probe (no KV cache).

    roles: uint8 [B, T] as the model sees the tokens (padded, or packed into one row). queries: bool [B, T], the
    queries wanted, all by default. layers: indices wanted, all by default; the others pay nothing. of: roles wanted.
    visual: called with the attention of the wanted queries to each visual token, see `visual.report`.
    Under gradient checkpointing (non-reentrant only) keep it open until the backward pass is done: the recomputation
    must run the same operations. Its calls are not recorded a second time.
    In cross-attention layers (`layers.CROSS_ATTENTION`) every key is VISUAL.
    """
    if visual is not None and Role.VISUAL not in of:
        raise ValueError(f"probe: visual= needs the mass of VISUAL too; have {[role.name for role in of]}")
    record = Record(roles, queries, None if layers is None else frozenset(layers), tuple(of), visual)
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)
