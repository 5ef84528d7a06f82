"""What a student model looks at while it reads each synthesised chain: measured once, kept in OUT/attention.

The chain is the response to the row's images and question, given and not written (teacher forcing), and its number is

    share = mean over response tokens t, mean over layers l of v[l, t] / (v[l, t] + s[l, t] + ε)

at the positions that predict the response's tokens, with v and s the masses on the image and on the system turn,
averaged over heads: the `share` of VARS (AVAR §3.3, arXiv:2603.03825). It stays within 0 and 1, where the ratio v / s
of AVAR §2.2 has no upper bound and one chain could outweigh all others; the ratio is recorded beside it. Roles, masses
and reach are those of `avar vas`.

OUT/attention/MODEL/part-….parquet    MODEL: hash of the student; a file for each batch, whole or not there

A measurement is known by the hash of prompt, images and text, so that a rerun measures what is missing. Chains come in
a stream; of each that was measured its hash and its number stay in memory, some 200 bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_avar.errors import ConfigError

if TYPE_CHECKING:
    from verl_avar.evaluation.checkpoint import Checkpoint

WINDOW = 16  # batches in which chains are sorted by length, for less padding
NO_SYSTEM = "no system turn that the response reaches: give the rows one with `system`"


@dataclass(frozen=True)
class Chain:
    """One candidate as a student reads it."""

    system: str  # empty: no system turn, and then no share either
    question: str  # with an <image> for each image
    images: Sequence[bytes]
    text: str  # the response

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.question}]

    @property
    def key(self) -> str:
        """32 hexadecimal digits of SHA-256 over all that the number depends on beside the student."""
        digest = hashlib.sha256(json.dumps([self.system, self.question, self.text]).encode())
        for image in self.images:
            digest.update(hashlib.sha256(image).digest())
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Measurement:
    """A row of a part. Either the numbers are there, means over the chain's tokens and layers, or `problem` is."""

    key: str
    share: float | None = None  # v / (v + s), heads averaged before
    ratio: float | None = None  # v / s, heads averaged before: `head_mean` of `avar vas` in the response scope
    visual: float | None = None  # mass on the image
    system: float | None = None  # mass on the system turn
    tokens: int | None = None  # of the response
    problem: str | None = None  # why it could not be measured, one line
    # False: a failure of the machine more than of the chain (out of memory, say), tried again by the next run.
    final: bool = True


@dataclass
class Attention:
    """What is known of a student's attention, by `Chain.key`."""

    shares: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  # of chains that could not be measured

    def add(self, found: Measurement) -> None:
        if found.share is not None:
            self.shares[found.key] = found.share
            self.problems.pop(found.key, None)
        elif found.key not in self.shares:
            self.problems[found.key] = found.problem or "not measured"


def folder(out: Path | str, model: Path | str, device: str = "cpu") -> Path:
    """Where the measurements of one student lie: a checkpoint that changes, or another number format, is another."""
    from verl_avar.evaluation.partial import fingerprint

    identity = json.dumps([fingerprint(model), _dtype(device)])
    return Path(out) / "attention" / hashlib.sha256(identity.encode()).hexdigest()[:16]


def stored(parts: Path) -> tuple[Attention, set[str]]:
    """The measurements in a folder, and the keys that a run need not measure again."""
    import pyarrow.parquet as pq

    known, done = Attention(), set()
    for part in sorted(parts.glob("part-*.parquet")):
        for record in pq.ParquetFile(part).read().to_pylist():
            found = Measurement(**record)
            known.add(found)
            if found.final:
                done.add(found.key)
    return known, done


def score(
    model: Path | str,
    chains: Iterable[Chain],
    out: Path | str,
    *,
    batch_size: int = 4,
    device: str = "cpu",
    progress: Callable[[int], Any] = lambda done: None,
) -> Attention:
    """Measures the chains that OUT/attention does not hold yet; returns all that is known of this student.

    model: folder or hub name; it is loaded when there is something to measure. progress: told of each batch how many
    chains it had. A chain beyond the student's context, or with an image that it refuses, is recorded with the reason.
    Batches are drawn from the whole stream, measured or not: after a killed run the rest comes in the same company, and
    so to the same digits. Raises ConfigError for a student that can't be loaded or has no attention to measure.
    """
    parts = folder(out, model, device)
    known, done = stored(parts)
    checkpoint = None
    for batch in _batches(chains, batch_size):
        missing = list({chain.key: chain for chain in batch if chain.key not in done}.values())
        if missing:
            if checkpoint is None:
                checkpoint = _load(model, device)
            found = list(measure_chains(checkpoint, missing))
            _write(parts, found)
            for measurement in found:
                known.add(measurement)
            done |= {measurement.key for measurement in found}
        progress(len(batch))
    return known


def measure_chains(checkpoint: Checkpoint, chains: Sequence[Chain]) -> Iterator[Measurement]:
    """The measurements of a batch; one that fails as a whole is measured chain by chain."""
    from verl_avar import families
    from verl_avar.evaluation.isolation import isolated

    def work(batch: Sequence[Chain]) -> list[Measurement]:
        try:
            return _measure(checkpoint, batch)
        except (ValueError, OSError) as error:  # what the chain itself is to blame for
            if len(batch) > 1:
                raise
            return [Measurement(batch[0].key, problem=" ".join(str(error).split())[:300])]

    size = 1 if families.alone(checkpoint.model) else max(1, len(chains))
    for first in range(0, len(chains), size):
        for chain, found in isolated(chains[first : first + size], work):
            yield Measurement(chain.key, problem=found, final=False) if isinstance(found, str) else found


def _measure(checkpoint: Checkpoint, chains: Sequence[Chain]) -> list[Measurement]:
    from verl_avar import families
    from verl_avar.attention.mass import MASS_ROLES
    from verl_avar.evaluation.answer import answer_masses, given
    from verl_avar.evaluation.images import open_images
    from verl_avar.roles import Role, query_mask
    from verl_avar.vas import EPS, sample_vas

    images = [open_images(chain.images) for chain in chains]
    answers = given(checkpoint, [chain.messages for chain in chains], images, [chain.text for chain in chains])
    masses, layers = families.masses(checkpoint.model, answer_masses(checkpoint, answers, "response"), MASS_ROLES)
    reach = families.reach(checkpoint.model, answers.roles, layers)  # [L, B, T]
    asked = query_mask(answers.roles, "response")
    found = []
    for b, chain in enumerate(chains):
        seen, roles = reach[:, b, asked[b]], answers.roles[b]
        if not asked[b].any() or not (roles == Role.VISUAL).any():
            found.append(Measurement(chain.key, problem="no image" if asked[b].any() else "an empty text"))
            continue
        if not ((roles == Role.SYSTEM).any() and seen.any()):
            found.append(Measurement(chain.key, problem=NO_SYSTEM))
            continue
        # [L, H, n] of the response's tokens
        of = {r: masses[:, b, :, asked[b], MASS_ROLES.index(r)].double() for r in (Role.VISUAL, Role.SYSTEM)}
        vas = sample_vas(of[Role.VISUAL], of[Role.SYSTEM], seen)
        v, s = of[Role.VISUAL].mean(1), of[Role.SYSTEM].mean(1)  # [L, n]
        share = (v / (v + s + EPS)).masked_fill(~seen, float("nan")).nanmean(-1).nanmean()
        found.append(
            Measurement(
                chain.key,
                share=float(share),
                ratio=vas.heads_averaged,
                visual=float(vas.visual.mean()),
                system=float(vas.system.mean()),
                tokens=int((roles == Role.RESPONSE).sum()),
            )
        )
    return found


def _batches(chains: Iterable[Chain], size: int) -> Iterator[list[Chain]]:
    """Batches of chains of like length, the order within a window decided by the chains alone."""
    stream = iter(chains)
    while window := list(islice(stream, WINDOW * size)):
        window.sort(key=lambda chain: (len(chain.text), chain.key))
        for first in range(0, len(window), size):
            yield window[first : first + size]


def _write(parts: Path, found: Sequence[Measurement]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = {name: pa.float64() for name in ("share", "ratio", "visual", "system")}
    types = {"key": pa.string(), **numbers, "tokens": pa.int64(), "problem": pa.string(), "final": pa.bool_()}
    parts.mkdir(parents=True, exist_ok=True)
    name = secrets.token_hex(8)  # no two runs write the same file
    unfinished = parts / f"unfinished-{name}"
    pq.write_table(pa.Table.from_pylist([asdict(m) for m in found], schema=pa.schema(types.items())), unfinished)
    os.replace(unfinished, parts / f"part-{name}.parquet")


def _dtype(device: str) -> str:
    return "float32" if device.startswith("cpu") else "auto"


def _load(model: Path | str, device: str) -> Checkpoint:
    import torch

    from verl_avar.evaluation.checkpoint import load_checkpoint
    from verl_avar.evaluation.vas_run import check_model

    try:
        dtype = _dtype(device)
        checkpoint = load_checkpoint(model, dtype=dtype if dtype == "auto" else getattr(torch, dtype), device=device)
        check_model(checkpoint)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"attention.model (on {device}): {' '.join(str(error).split())}") from error
    return checkpoint
