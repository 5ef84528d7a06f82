"""Where a prompt's text lies in its processed ids: a processor expands each image into many tokens, and nothing else.

A rendered prompt reads `t0 P t1 P … tn`: pieces of text around one placeholder P per image or video. The processed ids
hold the same pieces around something longer: visual ids, with the family's own markers, row and tile tokens, newlines
or timestamps between and beside them. Nothing is assumed about these. Each piece is tokenised as it stands between its
placeholders and has to be found in the ids. Where the tokenizer merges it with what the expansion wrote beside it
(Gemma 3 puts newlines around an image), the neighbouring text is spelled out from the ids, and piece and neighbours
together have to give exactly these ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from verl_avar.roles import Role

Placed = tuple[int, np.ndarray]  # the position of a piece's first token, and the roles of its tokens


def expanded_roles(
    text: str,
    holes: Sequence[tuple[int, int]],
    chars: np.ndarray,
    ids: np.ndarray,
    tokenizer: Any,
    visual: Sequence[int],
) -> np.ndarray:
    """Roles of the processed ids of a prompt, from the roles of the characters of its text.

    text: the rendered prompt. holes: the spans of its placeholders, in order. chars: uint8 [len(text)], the role of
    each character. ids: int [P], unpadded. tokenizer: a fast one. visual: the ids that carry image or video embeddings.
    Returns uint8 [P]: a token has the role of its first character that is not white space, a token of an expansion the
    role of the turn that holds the image, and each visual id VISUAL. Raises ValueError, with the neighbourhood decoded,
    where ids and text don't belong together, or where it can't be said between which images a turn ends.
    """
    is_visual = np.isin(ids, list(visual))
    if is_visual.any() != bool(holes):
        raise ValueError(
            f"template: the messages hold {len(holes)} images and videos, the processed ids {int(is_visual.sum())} "
            f"visual placeholders (ids {sorted(visual)})"
        )
    errors = []
    # A tokenizer adds its begin token unless asked not to; the ids show which was done.
    for added in (True, False):
        pieces = _Pieces(text, holes, chars, ids, tokenizer, visual[0], is_visual, added)
        try:
            placed = pieces.placed()
        except _NotHere as error:
            errors.append(error)
            continue
        break
    else:
        raise ValueError(str(max(errors, key=lambda error: error.agreeing)))
    roles = np.full(len(ids), Role.OTHER, dtype=np.uint8)
    stop = 0
    for previous, (piece, (start, its_roles)) in zip([0, *placed], placed.items(), strict=False):
        if piece > 0:
            roles[stop:start] = chars[holes[previous][0]]
        stop = start + len(its_roles)
        roles[start:stop] = its_roles
    roles[is_visual] = Role.VISUAL
    return roles


class _NotHere(ValueError):
    """A piece is not where it has to be."""

    def __init__(self, message: str, agreeing: int):
        super().__init__(message)
        self.agreeing = agreeing  # how many ids are as expected


class _Pieces:
    """The pieces of a prompt and the gaps between the visual runs of its ids, in which they lie in order."""

    def __init__(self, text, holes, chars, ids, tokenizer, beside: int, is_visual, added: bool):
        self.text, self.holes, self.chars, self.tokenizer, self.added = text, holes, chars, tokenizer, added
        self.spans = list(zip([0, *(h[1] for h in holes)], [*(h[0] for h in holes), len(text)], strict=True))
        flips = np.flatnonzero(np.diff(is_visual.astype(np.int8), prepend=0, append=0)).tolist()
        self.starts = [0, *flips[1::2]]
        self.gaps = [ids[a:b].tolist() for a, b in zip(self.starts, [*flips[::2], len(ids)], strict=True)]
        self.beside, self.marker = beside, tokenizer.convert_ids_to_tokens(beside)
        self.last, self.last_gap = len(holes), len(self.gaps) - 1
        self.own: dict[int, tuple[list[int], np.ndarray]] = {}
        self.found: dict[tuple[int, int], list[Placed]] = {}

    def placed(self) -> dict[int, Placed]:
        """The first piece, those in which a turn ends, and the last, each at its only place."""
        ends = {piece: self._end(piece, gap) for piece, gap in {0: 0, self.last: self.last_gap}.items()}
        inner = [k for k in range(1, self.last) if self.spans[k][0] < self.spans[k][1]]
        # Every way to place the inner pieces in order lies between the earliest one and the latest.
        earliest, gap = {}, 0
        for k in inner:
            gap = next((g for g in range(gap + 1, self.last_gap) if self._find(k, g)), None)
            if gap is None:
                raise ValueError(f"template: this text is not in the processed ids, in its order: {self._show(k)}")
            earliest[k] = gap
        latest, gap = {}, self.last_gap
        for k in reversed(inner):
            latest[k] = gap = next(g for g in range(gap - 1, 0, -1) if self._find(k, g))
        turns = {}
        for k in range(1, self.last):
            between = self.chars[self.holes[k - 1][0] : self.holes[k][1]]
            if (between == between[0]).all():
                continue  # both images are in the same turn
            places = self._find(k, earliest[k]) if k in earliest and earliest[k] == latest[k] else []
            if len(places) != 1:
                raise ValueError(f"template: can't tell which images of the ids this text separates: {self._show(k)}")
            turns[k] = places[0]
        return {0: ends[0]} | turns | ends

    def _end(self, piece: int, gap: int) -> Placed:
        """The first or the last piece, at the very start or end of the ids."""
        if places := self._find(piece, gap):
            return places[0]
        ids, (want, _) = self.gaps[gap], self._tokenised(piece)
        step = 1 if piece == 0 else -1
        pairs = enumerate(zip(want[::step], ids[::step], strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(want), len(ids)))
        seen, expected = (
            repr(self.tokenizer.decode(row[::step][max(0, same - 8) : same + 8][::step])) for row in (ids, want)
        )
        where = f"{same} tokens from the {'start' if piece == 0 else 'end'}"
        raise _NotHere(
            f"template: the processed ids are not this prompt's: {where}, {seen} instead of {expected}", same
        )

    def _find(self, piece: int, gap: int) -> list[Placed]:
        """The places of a piece in a gap: as it is, or else merged with the expansion's text."""
        if (piece, gap) not in self.found:
            places = self._as_it_is(piece, gap) or self._merged(piece, gap)
            self.found[piece, gap] = [(self.starts[gap] + start, roles) for start, roles in places]
        return self.found[piece, gap]

    def _as_it_is(self, piece: int, gap: int) -> list[Placed]:
        ids, (want, roles) = self.gaps[gap], self._tokenised(piece)
        room = len(ids) - len(want)
        starts = range(room + 1)
        if piece == 0:
            starts = starts[:1]
        if piece == self.last:
            starts = [start for start in starts if start == room]
        return [(start, roles) for start in starts if ids[start : start + len(want)] == want]

    def _merged(self, piece: int, gap: int) -> list[Placed]:
        ids, (want, _) = self.gaps[gap], self._tokenised(piece)
        spelled, own = self._spell(piece, ids), self._spell(piece, want)
        starts = [i for i in range(len(spelled) - len(own) + 1) if spelled.startswith(own, i)]
        if piece == 0:
            starts = starts[:1] if starts[:1] == [0] else []
        if piece == self.last:
            starts = [start for start in starts if start == len(spelled) - len(own)]
        places = []
        for start in starts:
            whole, roles = self._tokenise(piece, spelled[:start], spelled[start + len(own) :])
            if whole == ids:
                places.append((0, roles))
        return places

    def _tokenised(self, piece: int) -> tuple[list[int], np.ndarray]:
        if piece not in self.own:
            self.own[piece] = self._tokenise(piece)
        return self.own[piece]

    def _tokenise(self, piece: int, before: str = "", after: str = "") -> tuple[list[int], np.ndarray]:
        """Ids and roles of a piece between two visual ids, with the expansion's text before and after it."""
        (start, stop), first, last = self.spans[piece], piece == 0, piece == self.last
        before, after = ("" if first else self.marker) + before, after + ("" if last else self.marker)
        string = before + self.text[start:stop] + after
        around = [Role.OTHER if first else self.chars[start - 1], Role.OTHER if last else self.chars[stop]]
        chars = [around[0]] * len(before) + self.chars[start:stop].tolist() + [around[1]] * len(after)
        encoded = self.tokenizer(string, add_special_tokens=self.added, return_offsets_mapping=True)
        ids, roles, reached = encoded["input_ids"], [], 0
        for (begin, end), sequence in zip(encoded["offset_mapping"], encoded.sequence_ids(0), strict=True):
            if sequence is None:  # the tokenizer's own: a begin token belongs to the system turn where there is one
                roles.append(Role.SYSTEM if not reached and chars[:1] == [Role.SYSTEM] else Role.OTHER)
                continue
            begin = min(begin, reached)  # some byte-level tokenizers leave the space before a word out of all spans
            words = string[begin:end].lstrip()
            roles.append(chars[end - len(words) if words else begin])
            reached = max(reached, end)
        lower = 0 if first else ids.index(self.beside) + 1
        upper = len(ids) if last else len(ids) - 1 - ids[::-1].index(self.beside)
        return ids[lower:upper], np.array(roles[lower:upper], dtype=np.uint8)

    def _spell(self, piece: int, ids: list[int]) -> str:
        """What ids at a piece's place spell, special tokens included."""
        first, last = piece == 0, piece == self.last
        framed = [self.beside] * (not first) + ids + [self.beside] * (not last)
        spelled = self.tokenizer.decode(framed, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return spelled[0 if first else len(self.marker) : len(spelled) - (0 if last else len(self.marker))]

    def _show(self, piece: int) -> str:
        return repr(self.text[slice(*self.spans[piece])])
