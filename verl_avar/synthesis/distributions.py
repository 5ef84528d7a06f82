"""What the figures of a run are drawn from: counts over outcomes.parquet, gathered in one pass."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from verl_avar.synthesis.joined import outcomes
from verl_avar.synthesis.outcomes import ACCEPTED

# A word; Chinese, Japanese and Korean are written without spaces, so that each of their signs is one.
_SIGN = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{_SIGN}]|[^\s{_SIGN}]+")
BINS = 20  # of the chain's length


@dataclass
class Distributions:
    """Over accepted rows."""

    chain_words: Counter[int] = field(default_factory=Counter)  # chains of that many words, before anchoring
    anchored_words: Counter[int] = field(default_factory=Counter)
    anchors: Counter[int] = field(default_factory=Counter)  # chains with that many anchors
    positions: list[int] = field(default_factory=lambda: [0] * BINS)  # anchors in each twentieth of the chain


def words(text: str) -> int:
    """How many words a text has, its tags apart."""
    return sum(1 for _ in WORD.finditer(re.sub(r"</?(?:think|answer)>", " ", text)))


def distributions(out: Path) -> Distributions:
    """The distributions of a run's folder."""
    seen = Distributions()
    for outcome in outcomes(out, ["status", "chain", "anchored", "anchors"]):
        if outcome["status"] != ACCEPTED:
            continue
        seen.chain_words[words(outcome["chain"] or "")] += 1
        seen.anchored_words[words(outcome["anchored"] or "")] += 1
        seen.anchors[len(outcome["anchors"] or ())] += 1
        for anchor in outcome["anchors"] or ():
            seen.positions[min(BINS - 1, int(BINS * anchor["position"]))] += 1
    return seen
