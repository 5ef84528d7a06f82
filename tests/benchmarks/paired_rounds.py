"""Statistics of paired rounds: what `serving.py` makes of its batches."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap


@dataclass
class Batch:
    """One server's answers to a batch of requests. processor_ms: of the server's processes, per generated token."""

    variant: str
    concurrency: int
    round: int
    tokens_per_s: float
    processor_ms: float
    first_token_s: list[float]


FIGURES: dict[str, Callable[[Batch], float]] = {
    "tokens/s": lambda batch: batch.tokens_per_s,
    "processor": lambda batch: batch.processor_ms,
    "first token": lambda batch: float(np.median(batch.first_token_s)),
}


def ratios(batches: list[Batch], variant: str, reference: str, concurrency: int, figure: str) -> list[float]:
    """A figure over the reference's in the same round, for each round."""
    value = {(b.variant, b.round): FIGURES[figure](b) for b in batches if b.concurrency == concurrency}
    return [value[variant, number] / value[reference, number] for name, number in value if name == variant]


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Median and the bootstrap 95 % interval of it."""
    found = bootstrap((values,), np.median, n_resamples=5000, method="percentile", rng=np.random.default_rng(0))
    return float(np.median(values)), *map(float, found.confidence_interval)


def table(batches: list[Batch], cache: dict[str, float]) -> str:
    """Markdown: a row per concurrency and variant. cache: bytes per token of each variant, the reference first."""
    heads = ["requests at a time", "server", "tokens/s", "ratio (95 %)", "processor ms/token", "ratio (95 %)"]
    heads += ["first token ms, median / p90", "ratio (95 %)", "KV cache B/token"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    reference = next(iter(cache))
    for concurrency in sorted({b.concurrency for b in batches}):
        for variant in cache:
            own = [b for b in batches if (b.variant, b.concurrency) == (variant, concurrency)]
            first = 1000 * np.array([seconds for b in own for seconds in b.first_token_s])
            figures = [
                f"{np.median([b.tokens_per_s for b in own]):,.0f}",
                f"{np.median([b.processor_ms for b in own]):.3g}",
                f"{np.median(first):.0f} / {np.percentile(first, 90):.0f}",
            ]
            row = [str(concurrency), variant]
            for name, figure in zip(FIGURES, figures, strict=True):
                middle, low, high = median_interval(ratios(batches, variant, reference, concurrency, name))
                row += [figure, "1" if variant == reference else f"{middle:.2f}× ({low:.2f}–{high:.2f})"]
            lines.append(f"| {' | '.join(row)} | {cache[variant]:,.0f} |")
    return "\n".join(lines)
