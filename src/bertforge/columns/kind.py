"""What a kind of column owns. A new kind is one file with a subclass of `Kind`, and a line in `registry`.

A kind goes through a run in three steps. Each leaves a record, a frozen dataclass of plain values:

    record      made by         kept in                               tells
    Settings    the user        `[tabular]` in a recipe               which columns are read
    Learnt      `Kind.fit`      `bertforge.json`, under `tabular`     what the train rows taught
    Shape       `Kind.shape`    `config.json`, `bertforge_tabular`    how large the modules are

Each of the three holds the fields of all kinds side by side, so a field's name belongs to one kind. A kind that is new
gives every field a default that stands for "no such column", since folders made before it lack them.

A kind makes one array of its columns (`encode`). Its modules read that array one after the other, and so do the nodes
of the graph. Pandas is imported inside functions only: a model needs no tables.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Literal, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from bertforge.columns.parts import Part

S = TypeVar("S")
L = TypeVar("L")
H = TypeVar("H")

Holds = Literal["number", "name", "names"]
VALUES: Final = "values"
"""Width of an array that is as wide as its fullest row; 0 fills the other rows. It is also the name of the graph's
axis, of which `engines.tensorrt_build` says how wide it may be."""


def stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """`[rows, width]` of all, arrays of one kind of column: the fullest row sets the width, and 0 fills the others."""
    joined = np.zeros((sum(map(len, arrays)), max(array.shape[1] for array in arrays)), arrays[0].dtype)
    start = 0
    for array in arrays:
        joined[start : start + len(array), : array.shape[1]] = array
        start += len(array)
    return joined


class Kind(ABC, Generic[S, L, H]):
    """A kind of column, without state: what differs from run to run is in the records."""

    name: ClassVar[str]
    """Of the setting that names the columns, of the array in a batch and of the graph's input."""
    dtype: ClassVar[type[np.generic]]
    """Of the array."""
    holds: ClassVar[Holds]
    """What stands in a cell of the table, for whoever reads the table otherwise than through `encode`."""
    Settings: type[S]
    """The dataclasses of the three records."""
    Learnt: type[L]
    Shape: type[H]

    def columns(self, settings: S) -> tuple[str, ...]:
        """Names of the columns, none where the recipe has no column of this kind."""
        named = getattr(settings, self.name)
        if isinstance(named, str):
            return (named,) if named else ()
        return tuple(named)

    @abstractmethod
    def fit(self, train: pd.DataFrame, settings: S, min_count: int) -> L:
        """Learns from the train rows; a name counts as known if it occurs in `min_count` of them.

        Raises DataError for a column that this kind cannot read.
        """

    @abstractmethod
    def encode(self, frame: pd.DataFrame, settings: S, learnt: L) -> np.ndarray:
        """Any rows -> `[rows, width]` of `dtype`; a missing value is an array's value too, and raises nothing."""

    @abstractmethod
    def shape(self, settings: S, learnt: L) -> H:
        """How large the modules must be."""

    @abstractmethod
    def width(self, shape: H) -> int | Literal["values"]:
        """Width of the array: 0 where there is no column of this kind, VALUES where it depends on the rows."""

    @abstractmethod
    def modules(self, shape: H, embedding_size: int) -> dict[str, Part]:
        """The first reads the array `[sequences, width]`, each other one what the one before it made.

        Names are those in a checkpoint, below `tabular.`: no two kinds have the same.
        """

    def buffers(self, learnt: L) -> dict[str, Sequence[Any]]:
        """Those numbers of `learnt` that stand in the modules' buffers, by `module.buffer`."""
        return {}

    def names(self, learnt: L) -> Sequence[Sequence[str]]:
        """The names that each column may hold, by their numbers from 1 on; none where cells hold numbers."""
        return ()

    def every_name(self, shape: H) -> np.ndarray:
        """`[rows, columns]` of `dtype`: rows that together hold every name that the modules know."""
        return np.zeros((0, 0), self.dtype)

    def is_plain(self, shape: H) -> bool:
        """Whether the result may join the text's vector directly, without hidden layers."""
        return self.width(shape) == 0


class Nodes(Protocol):
    """What a part needs of `export.graph.Graph`, which imports onnx and so may not be imported here."""

    def constant(self, name: str, value: np.ndarray) -> str: ...
    def ints(self, *values: int) -> str: ...
    def add(self, op: str, *inputs: str, **attributes: Any) -> str: ...
    def cast(self, value: str, dtype: np.dtype[Any]) -> str: ...
    def dense(self, value: str, name: str, weight: np.ndarray, bias: np.ndarray) -> str: ...
    def input(self, name: str, dtype: Any, shape: Sequence[str | int]) -> str: ...
