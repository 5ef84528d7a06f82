"""Which rows a person is shown, and how a chain is divided for showing: into reasoning and answer, anchors marked."""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Sequence
from pathlib import Path

from verl_avar.evaluation.scoring import FORMAT, TAGS, is_well_formed
from verl_avar.synthesis.joined import key, outcomes
from verl_avar.synthesis.outcomes import ACCEPTED, PENDING, REJECTED, STAGES

ORDER = ("intake", *STAGES, "attention")
Group = tuple[str, str | None, str | None]  # status, stage, reason
Piece = tuple[str, str]  # "text", "anchor" or "tag", and its characters
_THINKING = re.compile(r"<think>(.*?)(?:</think>|$)", re.DOTALL)
_TAG = re.compile("|".join(map(re.escape, TAGS)))


def choose(out: Path, count: int, seed: int) -> dict[tuple[str, int], Group]:
    """At most `count` source rows by key, spread evenly over the accepted ones, each stage's reasons, and the pending.

    Within a group the seed decides, by a hash of the row's key: the same rows are chosen whatever their order.
    """
    drawn: dict[Group, list] = {}  # heaps of the `count` smallest hashes of each group, negated
    sizes: dict[Group, int] = {}
    for outcome in outcomes(out, ["source", "source_row", "status", "stage", "reason"]):
        group = outcome["status"], outcome["stage"], outcome["reason"]
        sizes[group] = sizes.get(group, 0) + 1
        source, number = key(outcome)
        rank = int.from_bytes(hashlib.sha256(f"{seed}\0{source}\0{number}".encode()).digest()[:8], "big")
        heap = drawn.setdefault(group, [])
        if len(heap) < count:
            heapq.heappush(heap, (-rank, source, number))
        else:
            heapq.heappushpop(heap, (-rank, source, number))
    groups = sorted(drawn, key=lambda group: _place(group, sizes[group]))
    chosen: dict[tuple[str, int], Group] = {}
    for group, share in zip(groups, shares([sizes[group] for group in groups], count), strict=True):
        for _, source, number in sorted(drawn[group], reverse=True)[:share]:
            chosen[source, number] = group
    return chosen


def shares(sizes: Sequence[int], count: int) -> list[int]:
    """`count` given out one by one to groups in turn, to none more than it has."""
    given = [0] * len(sizes)
    while count > 0 and any(g < s for g, s in zip(given, sizes, strict=True)):
        for index, size in enumerate(sizes):
            if count > 0 and given[index] < size:
                given[index] += 1
                count -= 1
    return given


def _place(group: Group, size: int) -> tuple:
    """Accepted rows first, then the reasons by stage and the frequent ones before the rare, pending rows last."""
    status, stage, reason = group
    stages = ORDER.index(stage) if stage in ORDER else len(ORDER)
    return (ACCEPTED, REJECTED, PENDING).index(status), stages, -size, reason or ""


def divided(text: str, anchors: Sequence[dict] = ()) -> list[tuple[str, list[Piece]]]:
    """A stage's text as blocks (heading, pieces).

    <think>…</think><answer>…</answer> gives "reasoning" and "answer". Any other text is one block without a heading, in
    which such tags are pieces of their own: where they stand is what is wrong with it.
    """
    marked = marks(text, anchors)
    found = FORMAT.fullmatch(text)
    if found and is_well_formed(text):
        return [("reasoning", _pieces(text, *found.span(1), marked)), ("answer", _pieces(text, *found.span(2), marked))]
    pieces, at = [], 0
    for tag in _TAG.finditer(text):
        pieces += [*_pieces(text, at, tag.start(), marked), ("tag", tag.group())]
        at = tag.end()
    return [("", [*pieces, *_pieces(text, at, len(text), marked)])]


def marks(text: str, anchors: Sequence[dict]) -> list[tuple[int, int]]:
    """Where the anchors {text, position} stand: (start, end), in order, none over another.

    Of several places with an anchor's words, the free one nearest to its position, a share of what <think> holds. White
    space may be another. Words that are nowhere are left out.
    """
    thinking = _THINKING.search(text)
    start, end = thinking.span(1) if thinking else (0, len(text))
    found: list[tuple[int, int]] = []
    for anchor in anchors:
        words = r"\s+".join(map(re.escape, anchor["text"].split()))
        if not words:
            continue
        places = [match.span() for match in re.finditer(words, text)]
        free = [place for place in places if all(place[1] <= a or place[0] >= b for a, b in found)]
        if free:
            wanted = start + anchor["position"] * (end - start)
            found.append(min(free, key=lambda place, wanted=wanted: abs(place[0] - wanted)))
    return sorted(found)


def _pieces(text: str, start: int, end: int, marked: Sequence[tuple[int, int]]) -> list[Piece]:
    pieces, at = [], start
    for low, high in marked:
        low, high = max(low, at), min(high, end)
        if low < high:
            pieces += [("text", text[at:low]), ("anchor", text[low:high])]
            at = high
    pieces.append(("text", text[at:end]))
    return [piece for piece in pieces if piece[1]]
