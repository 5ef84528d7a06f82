"""Thresholds of the checks, as the block `checks` of a config has them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TextChecks:
    """Of one stage's text."""

    min_words: int = 20
    max_words: int = 4000
    # Writing systems that letters may be of, as Unicode names them: latin, han, hiragana, cyrillic, …; empty: any.
    scripts: list[str] = field(default_factory=lambda: ["latin"])
    max_foreign: float = 0.1  # share of letters of other writing systems
    max_repeated: float = 0.5  # share of repeated runs of 4 words, of 6 characters in Chinese
    refusals: bool = True


@dataclass
class AnchorChecks(TextChecks):
    """Of the anchored chain."""

    min_anchors: int = 2
    # 0 to 1: how far apart the first and the last anchor begin, as a share of the chain; 0 switches the check off.
    # One anchor alone is not checked.
    min_spread: float = 0.2
    # Share of anchors that must name something that the description names.
    min_grounded: float = 0.5
    max_length_ratio: float = 2.0  # of words, anchored chain to chain, and its inverse
    # Regular expressions beside the built-in ones, in any case; leaks in the whole reply, anchors in each sentence.
    leak_phrases: list[str] = field(default_factory=list)
    anchor_phrases: list[str] = field(default_factory=list)


@dataclass
class Checks:
    describe: TextChecks = field(default_factory=TextChecks)
    reason: TextChecks = field(default_factory=TextChecks)
    anchor: AnchorChecks = field(default_factory=AnchorChecks)
