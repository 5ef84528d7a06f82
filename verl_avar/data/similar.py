"""Rows that repeat another row, and rows that repeat a benchmark's question."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace

from verl_avar.data.fingerprints import Fingerprint, alike, plain, same_wording
from verl_avar.errors import ConfigError

BITS = 64
MOST_DISTANCE = 15  # bands of 4 bits; beyond, nearly all images are candidates
LONG = 12  # words of a question that is told by its text alone


@dataclass(frozen=True, slots=True)
class Match:
    """Why a row is left out."""

    reason: str  # duplicate, near_duplicate or benchmark_overlap
    detail: str  # one line, naming what it repeats


class Bands:
    """Finds stored 64-bit hashes within `distance` bits, without comparing with all.

    A hash is cut into distance + 1 bands: if two hashes differ in at most `distance` bits, one band at least is the
    same in both, so that looking in the buckets of equal bands misses none. `key` narrows the search further: only
    items stored with an equal one are found.
    """

    def __init__(self, distance: int):
        if not 0 <= distance <= MOST_DISTANCE:
            raise ConfigError(f"image_distance must be 0 to {MOST_DISTANCE} bits of {BITS}, it is {distance}")
        edges = [BITS * band // (distance + 1) for band in range(distance + 2)]
        self.bands = [(low, (1 << (high - low)) - 1) for low, high in itertools.pairwise(edges)]
        self.distance = distance
        self._buckets: dict[int, int | list[int]] = {}  # most hold one item, which needs no list

    def _places(self, value: int, key: Hashable) -> Iterator[int]:
        # The hash of the triple in its place: a collision only adds a candidate.
        return (hash((number, value >> low & mask, key)) for number, (low, mask) in enumerate(self.bands))

    def add(self, value: int, item: int, key: Hashable = None) -> None:
        """Stores an item under a hash."""
        for place in self._places(value, key):
            held = self._buckets.get(place)
            if held is None:
                self._buckets[place] = item
            elif isinstance(held, list):
                held.append(item)
            else:
                self._buckets[place] = [held, item]

    def candidates(self, value: int, key: Hashable = None) -> Iterator[int]:
        """Items whose hashes may be near, each once, in the order of their buckets."""
        given = set()
        for place in self._places(value, key):
            held = self._buckets.get(place)
            for item in held if isinstance(held, list) else () if held is None else (held,):
                if item not in given:
                    given.add(item)
                    yield item


class Seen:
    """The rows kept so far, and what a further one repeats of them.

    A duplicate has the same question, answer, choices and image files. A near-duplicate has the same answer, choices,
    numbers and capital letters, nearly the same question (`same_wording`), and as many images, each of which looks like
    the one in its place (`alike`). Scenes that differ only in colour or in a small thing have equal hashes now and
    then; the thumbnails tell most of them apart, and another answer always does.

    Memory: about 1.1 KB a row of one image and 120 characters of question, measured.
    """

    def __init__(
        self, exact: bool = True, near: bool = True, question_similarity: float = 90.0, image_distance: int = 3
    ):
        self.exact, self.near, self.similarity = exact, near, question_similarity
        self._bands = Bands(image_distance)
        self._ids: dict[str, tuple[str, int]] = {}
        self._rows: list[Fingerprint] = []

    def look(self, row: Fingerprint) -> Match | None:
        """The first row that this one repeats, or None."""
        if self.exact and row.id in self._ids:
            source, number = self._ids[row.id]
            return Match("duplicate", f"the same as row {number} of {source}")
        if not self.near:
            return None
        found = [item for item in self._bands.candidates(row.hashes[0], _key(row)) if self._repeats(row, item)]
        if not found:
            return None
        first = self._rows[min(found)]
        return Match("near_duplicate", f"nearly the same as row {first.source_row} of {first.source}")

    def _repeats(self, row: Fingerprint, item: int) -> bool:
        other = self._rows[item]
        looks = zip(row.hashes, row.thumbnails, other.hashes, other.thumbnails, strict=True)
        return same_wording(row.question, other.question, self.similarity) and all(
            alike((a, b), (c, d), self._bands.distance) for a, b, c, d in looks
        )

    def add(self, row: Fingerprint) -> None:
        """Remembers a row that is kept."""
        if self.exact:
            self._ids[row.id] = sys.intern(row.source), row.source_row
        if self.near:
            self._bands.add(row.hashes[0], len(self._rows), _key(row))
            # Questions from a template and answers from a few are held once.
            self._rows.append(replace(row, question=sys.intern(row.question), stem="", answer=sys.intern(row.answer)))


def _key(row: Fingerprint) -> Hashable:
    """What two near-duplicates have exactly the same: with plain images, which say nothing, the whole question too."""
    blank = all(plain(thumbnail) for thumbnail in row.thumbnails)
    return row.answer, row.labels, row.choices, len(row.hashes), row.question if blank else None


@dataclass(frozen=True, slots=True)
class Question:
    """A benchmark's question."""

    benchmark: str
    row: int
    stem: str  # as fingerprints.stem; "" where the question is in the image
    hashes: tuple[int, ...]  # none for a question without an image
    thumbnails: tuple[bytes, ...]


class Benchmarks:
    """Questions that must not be trained on, and whether a row repeats one of them, whatever its answer.

    It does where the images are the benchmark's (each image of the row or question that has fewer looks like one of
    the other's) and the questions are similar by RapidFuzz's ratio, options aside; or where the benchmark's question
    stands in the image. By its text alone a question is recognised if it has at least 12 words and no image in the
    benchmark. A copy in other colours is not recognised, nor is one that was cropped or turned.
    """

    def __init__(self, questions: Iterable[Question], question_similarity: float = 90.0, image_distance: int = 3):
        self.similarity = question_similarity
        self._bands = Bands(image_distance)
        self._questions: list[Question] = []
        self._texts: dict[int, str] = {}
        for question in questions:
            number = len(self._questions)
            self._questions.append(question)
            for hashed in set(question.hashes):
                self._bands.add(hashed, number)
            if not question.hashes and len(question.stem.split()) >= LONG:
                self._texts[number] = question.stem

    def __len__(self) -> int:
        return len(self._questions)

    def look(self, row: Fingerprint) -> Match | None:
        """The first of the questions that the row repeats, or None."""
        candidates = {item for hashed in set(row.hashes) for item in self._bands.candidates(hashed)}
        found = [item for item in candidates if self._repeats(row, self._questions[item])]
        found += self._by_text(row)
        if not found:
            return None
        first = self._questions[min(found)]
        return Match("benchmark_overlap", f"repeats row {first.row} of the benchmark {first.benchmark}")

    def _repeats(self, row: Fingerprint, question: Question) -> bool:
        from rapidfuzz import fuzz

        if not question.stem:
            asked = not all(plain(thumbnail) for thumbnail in question.thumbnails)
        else:
            asked = fuzz.ratio(row.stem, question.stem, score_cutoff=self.similarity) > 0
        return asked and self._shown(row, question)

    def _shown(self, row: Fingerprint, question: Question) -> bool:
        """Whether each image of the one that has fewer looks like one of the other's."""
        ours = list(zip(row.hashes, row.thumbnails, strict=True))
        theirs = list(zip(question.hashes, question.thumbnails, strict=True))
        fewer, more = sorted((ours, theirs), key=len)
        return all(any(alike(image, other, self._bands.distance) for other in more) for image in fewer)

    def _by_text(self, row: Fingerprint) -> list[int]:
        from rapidfuzz import fuzz, process

        if not self._texts or len(row.stem.split()) < LONG:
            return []
        found = process.extractOne(row.stem, self._texts, scorer=fuzz.ratio, score_cutoff=self.similarity)
        return [found[2]] if found else []
