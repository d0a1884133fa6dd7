"""Columns of one name a row, such as a country. Each known name has an embedding; rare, unseen and missing ones share
another. A number in such a column is a name too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bertforge.columns.kind import Kind
from bertforge.columns.vocabulary import names, numbers_of, vocabulary

if TYPE_CHECKING:
    import pandas as pd

    from bertforge.columns.parts import Part


@dataclass(frozen=True)
class CategoricalSettings:
    """Of the `[tabular]` section."""

    categorical: tuple[str, ...] = ()
    """Columns of names; numbers are taken as names too."""


@dataclass(frozen=True)
class CategoricalLearnt:
    """Of the train rows."""

    vocabularies: tuple[tuple[str, ...], ...]
    """Known names of each column; a name's number is its place + 1."""


@dataclass(frozen=True)
class CategoricalShape:
    """Of the embeddings."""

    categorical: tuple[int, ...] = ()
    """Number of known values of each column, the 0 for missing and unseen ones included."""


class Categorical(Kind[CategoricalSettings, CategoricalLearnt, CategoricalShape]):
    """The array holds each row's names by their numbers, `[rows, columns]`."""

    name = "categorical"
    dtype = np.int64
    holds = "name"
    Settings, Learnt, Shape = CategoricalSettings, CategoricalLearnt, CategoricalShape

    def fit(self, train: pd.DataFrame, settings: CategoricalSettings, min_count: int) -> CategoricalLearnt:
        return CategoricalLearnt(tuple(vocabulary(names(train[name]), min_count) for name in settings.categorical))

    def encode(self, frame: pd.DataFrame, settings: CategoricalSettings, learnt: CategoricalLearnt) -> np.ndarray:
        encoded = np.empty((len(frame), len(settings.categorical)), self.dtype)
        for column, name in enumerate(settings.categorical):
            number = numbers_of(learnt.vocabularies[column])
            encoded[:, column] = [number.get(value, 0) for value in names(frame[name])]
        return encoded

    def shape(self, settings: CategoricalSettings, learnt: CategoricalLearnt) -> CategoricalShape:
        return CategoricalShape(tuple(len(known) + 1 for known in learnt.vocabularies))

    def names(self, learnt: CategoricalLearnt) -> tuple[tuple[str, ...], ...]:
        return learnt.vocabularies

    def width(self, shape: CategoricalShape) -> int:
        return len(shape.categorical)

    def every_name(self, shape: CategoricalShape) -> np.ndarray:
        numbers = np.arange(max(shape.categorical, default=0))[:, None]  # [rows, 1]
        return np.minimum(numbers, np.array(shape.categorical, self.dtype) - 1)  # [rows, columns]

    def modules(self, shape: CategoricalShape, embedding_size: int) -> dict[str, Part]:
        from bertforge.columns.parts import Embeddings

        return {"categorical": Embeddings(shape.categorical, embedding_size)} if shape.categorical else {}
