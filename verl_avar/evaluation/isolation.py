"""Batches in which one bad row does not take others with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def isolated(items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> Iterator[tuple]:
    """Each item with its result, or with the reason (one line of text) why it has none.

    work: a batch of items to a result for each, which is not a str unless it is a reason. A batch that raises is done
    again item by item.
    """
    try:
        results = list(work(items))
    except Exception as error:  # whatever a processor or a model raises on this input; the row is named and counted
        if len(items) > 1:
            for item in items:
                yield from isolated([item], work)
            return
        text = " ".join(str(error).split())[:300]
        expected = isinstance(error, ValueError | OSError) and text
        yield items[0], text if expected else f"{type(error).__name__}: {text}"
        return
    yield from zip(items, results, strict=True)
