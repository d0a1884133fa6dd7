"""Names as whole numbers: each name seen often enough in the train rows has one, and all others share 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def names(column: pd.Series[Any]) -> list[str]:
    """The values as text; "" where one is missing."""
    return ["" if value is None or value != value else str(value) for value in column.tolist()]  # NaN != NaN


def vocabulary(seen: Iterable[str], min_count: int) -> tuple[str, ...]:
    """The names that occur at least `min_count` times, sorted; "" is none."""
    counts = Counter(name for name in seen if name)
    return tuple(sorted(name for name, count in counts.items() if count >= min_count))


def numbers_of(known: tuple[str, ...]) -> dict[str, int]:
    """A name's number is its place in the vocabulary + 1."""
    return {name: index + 1 for index, name in enumerate(known)}
