"""One column of several names a row, separated by spaces, such as tags: the mean of their embeddings.

Its key in files and its array are called `multi`. A name that is rare or was never seen is left out of the
mean, and so are those of a row after the first 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from bertforge.columns.kind import VALUES, Kind
from bertforge.columns.vocabulary import names, numbers_of, vocabulary

if TYPE_CHECKING:
    import pandas as pd

    from bertforge.columns.parts import Part

MOST_NAMES = 64
"""Of a row that are read, the first ones: all rows of a batch are as wide as its widest."""


@dataclass(frozen=True)
class SeveralNamesSettings:
    """Of the `[tabular]` section."""

    multi: str = ""
    """One column of several names, separated by spaces."""


@dataclass(frozen=True)
class SeveralNamesLearnt:
    """Of the train rows."""

    multi_vocabulary: tuple[str, ...]
    """Known names; a name's number is its place + 1."""


@dataclass(frozen=True)
class SeveralNamesShape:
    """Of the embedding."""

    multi: int = 0
    """Number of known values, 0 included; 0 when there is no such column."""


class SeveralNames(Kind[SeveralNamesSettings, SeveralNamesLearnt, SeveralNamesShape]):
    """The array holds each row's known names by their numbers, `[rows, most names in a row]`; 0 fills the end."""

    name = "multi"
    dtype = np.int64
    holds = "names"
    Settings, Learnt, Shape = SeveralNamesSettings, SeveralNamesLearnt, SeveralNamesShape

    def fit(self, train: pd.DataFrame, settings: SeveralNamesSettings, min_count: int) -> SeveralNamesLearnt:
        if not settings.multi:
            return SeveralNamesLearnt(())
        seen = (name for row in names(train[settings.multi]) for name in row.split())
        return SeveralNamesLearnt(vocabulary(seen, min_count))

    def encode(self, frame: pd.DataFrame, settings: SeveralNamesSettings, learnt: SeveralNamesLearnt) -> np.ndarray:
        if not settings.multi:
            return np.zeros((len(frame), 0), self.dtype)
        number = numbers_of(learnt.multi_vocabulary)
        rows = [
            [number[name] for name in row.split() if name in number][:MOST_NAMES]
            for row in names(frame[settings.multi])
        ]
        encoded = np.zeros((len(rows), max([1, *map(len, rows)])), self.dtype)
        for index, row in enumerate(rows):
            encoded[index, : len(row)] = row
        return encoded

    def shape(self, settings: SeveralNamesSettings, learnt: SeveralNamesLearnt) -> SeveralNamesShape:
        return SeveralNamesShape(len(learnt.multi_vocabulary) + 1 if settings.multi else 0)

    def names(self, learnt: SeveralNamesLearnt) -> tuple[tuple[str, ...], ...]:
        return (learnt.multi_vocabulary,)

    def width(self, shape: SeveralNamesShape) -> int | Literal["values"]:
        return VALUES if shape.multi else 0

    def every_name(self, shape: SeveralNamesShape) -> np.ndarray:
        return np.arange(shape.multi, dtype=self.dtype)[:, None]  # [rows, 1]

    def modules(self, shape: SeveralNamesShape, embedding_size: int) -> dict[str, Part]:
        from bertforge.columns.parts import MeanEmbedding

        return {"multi": MeanEmbedding(shape.multi, embedding_size)} if shape.multi else {}
