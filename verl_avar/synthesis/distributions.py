"""What the figures of a run are drawn from: counts over outcomes.parquet, gathered in one pass."""

from __future__ import annotations

import re
from array import array
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
    """Over accepted rows, but for `attention_rejected`."""

    chain_words: Counter[int] = field(default_factory=Counter)  # chains of that many words, before anchoring
    anchored_words: Counter[int] = field(default_factory=Counter)
    anchors: Counter[int] = field(default_factory=Counter)  # chains with that many anchors
    positions: list[int] = field(default_factory=lambda: [0] * BINS)  # anchors in each twentieth of the chain
    attention: array = field(default_factory=lambda: array("d"))  # VAS over the chain, of rows where it was measured
    attention_rejected: array = field(default_factory=lambda: array("d"))


def words(text: str) -> int:
    """How many words a text has, its tags apart."""
    return sum(1 for _ in WORD.finditer(re.sub(r"</?(?:think|answer)>", " ", text)))


def distributions(out: Path) -> Distributions:
    """The distributions of a run's folder."""
    seen = Distributions()
    for outcome in outcomes(out, ["status", "stage", "chain", "anchored", "anchors", "attention"]):
        if outcome["status"] != ACCEPTED:
            if outcome["attention"] is not None and outcome["stage"] == "attention":
                seen.attention_rejected.append(outcome["attention"])
            continue
        seen.chain_words[words(outcome["chain"] or "")] += 1
        seen.anchored_words[words(outcome["anchored"] or "")] += 1
        seen.anchors[len(outcome["anchors"] or ())] += 1
        for anchor in outcome["anchors"] or ():
            seen.positions[min(BINS - 1, int(BINS * anchor["position"]))] += 1
        if outcome["attention"] is not None:
            seen.attention.append(outcome["attention"])
    return seen
