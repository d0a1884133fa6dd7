"""From a recipe's `[tabular]` section to arrays: fitted on the train rows, then the same for every table.

What was learnt is saved with the model, so prediction prepares columns exactly as training did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bertforge.columns.kind import Holds
from bertforge.columns.registry import KINDS, flat, records
from bertforge.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

    from bertforge.columns.encoder import TabularConfig


@dataclass(frozen=True)
class TabularSpec:
    """The `[tabular]` section of a recipe: which columns to read, and how the model joins them to the text."""

    kinds: dict[str, Any]
    """The `Settings` of each kind, by its name."""
    min_count: int = 5
    """Train rows a name must occur in to be told apart from unseen ones."""
    embedding_size: int = 16
    """Width of an embedded column."""
    hidden_size: int = 0
    """Width of the columns' hidden layers; 0 joins the scaled numbers to the text's vector directly."""
    dropout: float = 0.1
    """Dropout between the columns' hidden layers."""

    def __post_init__(self) -> None:
        if not self.columns:
            named = ", ".join(list(KINDS)[:-1]) + f" or {list(KINDS)[-1]}"
            raise UsageError(f"[tabular] names no column; set {named}, or remove the section")

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """From the section as it stands in a recipe, settings of all kinds side by side."""
        kinds, shared = records("Settings", settings)
        return cls(kinds, **shared)

    @classmethod
    def sections(cls) -> list[Any]:
        """The dataclasses whose fields are the settings; `kinds` is none."""
        return [*(kind.Settings for kind in KINDS.values()), cls]

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `of`."""
        return {**flat(self.kinds), **{name: value for name, value in vars(self).items() if name != "kinds"}}

    @property
    def columns(self) -> list[str]:
        """All columns read, each once."""
        return self.holding("number", "name", "names")

    def holding(self, *holds: Holds) -> list[str]:
        """The columns of whose cells each holds such a thing, each once."""
        found = [kind.columns(self.kinds[name]) for name, kind in KINDS.items() if kind.holds in holds]
        return list(dict.fromkeys(column for columns in found for column in columns))


@dataclass(frozen=True)
class TabularTransform:
    """What the train rows taught: vocabularies, used here, and means, deviations and quantiles, used in the model."""

    spec: TabularSpec
    learnt: dict[str, Any]
    """The `Learnt` of each kind, by its name."""

    @classmethod
    def fit(cls, train: pd.DataFrame, spec: TabularSpec) -> Self:
        """Learns from the train rows; raises DataError for a column that its kind cannot read."""
        return cls(spec, {name: kind.fit(train, spec.kinds[name], spec.min_count) for name, kind in KINDS.items()})

    def __call__(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        """Any rows, with every column of the spec -> the array of each kind, `[rows, width]`, by its name."""
        return {name: kind.encode(frame, self.spec.kinds[name], self.learnt[name]) for name, kind in KINDS.items()}

    def cells(self, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray, Sequence[str] | None]]:
        """Each column of the `arrays` that `__call__` made: its name, its numbers `[rows]` and None, or the numbers of
        its names, `[rows]`, or `[rows, width]` where a cell holds several, and these names.
        """
        for kind_name, kind in KINDS.items():
            array, columns = arrays[kind_name], kind.columns(self.spec.kinds[kind_name])
            if kind.holds == "number":
                yield from ((name, array[:, place], None) for place, name in enumerate(columns))
                continue
            for place, (name, known) in enumerate(zip(columns, kind.names(self.learnt[kind_name]), strict=False)):
                yield name, array if kind.holds == "names" else array[:, place], known

    @property
    def config(self) -> TabularConfig:
        """The shape of the model's branch for these columns."""
        from bertforge.columns.encoder import TabularConfig

        return TabularConfig(
            kinds={name: kind.shape(self.spec.kinds[name], self.learnt[name]) for name, kind in KINDS.items()},
            embedding_size=self.spec.embedding_size,
            hidden_size=self.spec.hidden_size,
            dropout=self.spec.dropout,
        )

    @property
    def buffers(self) -> dict[str, Sequence[Any]]:
        """What `TabularEncoder.learn` takes over."""
        return {
            name: value for kind, learnt in self.learnt.items() for name, value in KINDS[kind].buffers(learnt).items()
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"spec": self.spec.to_dict(), **flat(self.learnt)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        learnt, _ = records("Learnt", values)
        return cls(TabularSpec.of(**values["spec"]), learnt)
