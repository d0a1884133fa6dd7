"""Columns beside the text -> the arrays a model reads, by what was learnt from the train rows alone.

Numeric columns are read and no more: the model scales them (`model.tabular.ColumnScaler`), with the means, deviations
and quantiles that are learnt here. An optional signed log, then (value - mean) / standard deviation; a missing value
becomes the mean, and a column that had one in the train rows gets a second column that says where. Categorical columns:
each value seen often enough gets a number, all others and missing ones share 0. One column may hold several values,
separated by spaces. The fitted transform is saved as JSON with the model, so prediction prepares columns exactly as
training did.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import pandas as pd

from bertforge.data.features import FEATURES
from bertforge.data.schema import QUESTIONS
from bertforge.errors import DataError, UsageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TabularSpec:
    """The `[tabular]` section of a recipe: which columns to read, and how the model joins them to the text."""

    numeric: tuple[str, ...] = ()
    """Columns of numbers."""
    log: tuple[str, ...] = ()
    """Those of `numeric` with a long tail: sign(x) log(1 + |x|) before scaling."""
    categorical: tuple[str, ...] = ()
    """Columns of names; numbers are taken as names too."""
    multi: str = ""
    """One column of several names, separated by spaces."""
    min_count: int = 5
    """Train rows a name must occur in to be told apart from unseen ones."""
    bins: int = 0
    """Bins of the piecewise-linear encoding of numbers; 0 for none."""
    embedding_size: int = 16
    """Width of an embedded column."""
    hidden_size: int = 0
    """Width of the columns' hidden layers; 0 joins the scaled numbers to the text's vector directly."""
    dropout: float = 0.1
    """Dropout between the columns' hidden layers."""

    def __post_init__(self) -> None:
        if not (self.numeric or self.categorical or self.multi):
            raise UsageError("[tabular] names no column; set numeric, categorical or multi, or remove the section")
        if extra := set(self.log) - set(self.numeric):
            raise UsageError(f"[tabular] log names {sorted(extra)}, which are not among numeric")

    @property
    def columns(self) -> list[str]:
        """All columns read, each once."""
        return list(dict.fromkeys([*self.numeric, *self.categorical, *([self.multi] if self.multi else [])]))


@dataclass(frozen=True)
class TabularArrays:
    """A table's columns as arrays, one row a question; `batch.TabularBatch` is a slice of it."""

    numeric: np.ndarray
    """[rows, numeric] float32, NaN where there is no finite number."""
    categorical: np.ndarray
    """[rows, categorical] int64."""
    multi: np.ndarray
    """[rows, most values in a row] int64, 0 fills the end."""

    def __getitem__(self, rows: np.ndarray) -> TabularArrays:
        return TabularArrays(self.numeric[rows], self.categorical[rows], self.multi[rows])

    def among(self, rows: np.ndarray, total: int) -> TabularArrays:
        """A table of `total` rows in which these stand at `rows`; the others are zeros, which take no memory."""

        def place(values: np.ndarray) -> np.ndarray:
            table = np.zeros((total, values.shape[1]), values.dtype)
            table[rows] = values
            return table

        return TabularArrays(place(self.numeric), place(self.categorical), place(self.multi))


@dataclass(frozen=True)
class TabularTransform:
    """What the train rows taught: vocabularies, used here, and means, deviations and quantiles, used in the model."""

    spec: TabularSpec
    mean: tuple[float, ...]
    """Of each numeric column, of its logarithm where there is one; missing values left out."""
    std: tuple[float, ...]
    indicators: tuple[str, ...]
    """Numeric columns that had missing values, each with an indicator column after the numbers."""
    edges: tuple[tuple[float, ...], ...]
    """Per numeric input of the model, `bins + 1` ascending quantiles of its scaled train values; empty without bins."""
    vocabularies: tuple[tuple[str, ...], ...]
    """Known names of each categorical column; a name's number is its place + 1."""
    multi_vocabulary: tuple[str, ...]

    @classmethod
    def fit(cls, train: pd.DataFrame, spec: TabularSpec) -> Self:
        """Learns from the train rows.

        Raises DataError for a numeric column that is empty or mostly holds something else; where it is the lesser part
        that can't be read, a warning is logged and it counts as missing.
        """
        numbers = [_numbers(train[name]) for name in spec.numeric]
        for name, values in zip(spec.numeric, numbers, strict=True):
            _check_numbers(train[name], values)
        raw = [_signed_log(v) if n in spec.log else v for n, v in zip(spec.numeric, numbers, strict=True)]
        mean = [float(np.nanmean(values, dtype=np.float64)) for values in raw]
        std = [_deviation(values) for values in raw]
        gaps = [np.isnan(values) for values in raw]
        edges: list[tuple[float, ...]] = []
        if spec.bins:
            scaled = [np.nan_to_num((v - m) / s) for v, m, s in zip(raw, mean, std, strict=True)]
            edges = [_quantiles(values, spec.bins) for values in [*scaled, *(gap for gap in gaps if gap.any())]]
        return cls(
            spec=spec,
            mean=tuple(mean),
            std=tuple(std),
            indicators=tuple(name for name, gap in zip(spec.numeric, gaps, strict=True) if gap.any()),
            edges=tuple(edges),
            vocabularies=tuple(_vocabulary(_names(train[name]), spec.min_count) for name in spec.categorical),
            multi_vocabulary=(
                _vocabulary([value for row in _names(train[spec.multi]) for value in row.split()], spec.min_count)
                if spec.multi
                else ()
            ),
        )

    def __call__(self, frame: pd.DataFrame) -> TabularArrays:
        """Transforms any rows; raises DataError naming a column that is not there."""
        if absent := [name for name in self.spec.columns if name not in frame.columns]:
            raise DataError(_describe_absent(absent[0], list(frame.columns)))
        numeric = np.empty((len(frame), len(self.spec.numeric)), np.float32)
        for column, name in enumerate(self.spec.numeric):
            numeric[:, column] = _numbers(frame[name])
        categorical = np.empty((len(frame), len(self.spec.categorical)), np.int64)
        for column, name in enumerate(self.spec.categorical):
            categorical[:, column] = _numbered(_names(frame[name]), self.vocabularies[column])
        return TabularArrays(
            numeric=numeric,
            categorical=categorical,
            multi=self._multi(frame),
        )

    @property
    def category_sizes(self) -> tuple[int, ...]:
        """Numbers each categorical column can take, 0 included."""
        return tuple(len(vocabulary) + 1 for vocabulary in self.vocabularies)

    @property
    def multi_size(self) -> int:
        """Numbers the multi-valued column can take, 0 included; 0 when there is no such column."""
        return len(self.multi_vocabulary) + 1 if self.spec.multi else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        saved: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values["spec"].items()}
        nested: dict[str, Any] = {n: tuple(tuple(row) for row in values[n]) for n in ("edges", "vocabularies")}
        flat: dict[str, Any] = {n: tuple(values[n]) for n in ("mean", "std", "indicators", "multi_vocabulary")}
        return cls(spec=TabularSpec(**saved), **nested, **flat)

    def _multi(self, frame: pd.DataFrame) -> np.ndarray:
        if not self.spec.multi:
            return np.zeros((len(frame), 0), np.int64)
        number = {name: index + 1 for index, name in enumerate(self.multi_vocabulary)}
        rows = [[number[v] for v in row.split() if v in number] for row in _names(frame[self.spec.multi])]
        filled = np.zeros((len(rows), max([1, *map(len, rows)])), np.int64)
        for index, row in enumerate(rows):
            filled[index, : len(row)] = row
        return filled


def _describe_absent(name: str, columns: list[str]) -> str:
    if name in FEATURES and set(QUESTIONS.text_columns) <= set(columns):
        missing = [source for source in FEATURES[name].sources if source not in columns]
        found = ", ".join(column for column in columns if column not in FEATURES)
        return f"the model reads {name!r}, made from {', '.join(missing)}, which the table lacks; it has {found}"
    return f"the model reads column {name!r}, but the table has {', '.join(columns)}"


def _numbers(column: pd.Series[Any]) -> np.ndarray:
    """float32, NaN where there is no finite number."""
    values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    with np.errstate(over="ignore"):  # past float32's range it becomes an infinity
        numbers = values.astype(np.float32)
    numbers[~np.isfinite(numbers)] = np.nan
    return numbers


def _signed_log(values: np.ndarray) -> np.ndarray:
    logs: np.ndarray = np.sign(values) * np.log1p(np.abs(values))
    return logs


def _deviation(values: np.ndarray) -> float:
    """The standard deviation; 1 for a constant column, which becomes all zeros."""
    constant = np.nanmin(values) == np.nanmax(values)
    return 1.0 if constant else float(np.nanstd(values, dtype=np.float64))


def _quantiles(values: np.ndarray, bins: int) -> tuple[float, ...]:
    """`bins + 1` of them, ascending."""
    return tuple(np.quantile(values.astype(np.float64), np.linspace(0, 1, bins + 1)).tolist())


def _check_numbers(column: pd.Series[Any], values: np.ndarray) -> None:
    """Looks at what stands in `column` where `values` has no number."""
    unreadable = [text for text in _names(column[np.isnan(values)]) if text.strip()]
    given = len(unreadable) + int((~np.isnan(values)).sum())
    if not given:
        raise DataError(f"column {column.name!r} holds no number in the train rows; remove it from numeric")
    if not unreadable:
        return
    found = f"{len(unreadable):,} of {given:,} values of column {column.name!r} are no numbers: {unreadable[0]!r}"
    if 2 * len(unreadable) > given:
        raise DataError(f"{found}; write plain numbers (14013, not 14,013), or declare it under categorical")
    log.warning("%s; such values count as missing", found)


def _names(column: pd.Series[Any]) -> list[str]:
    return ["" if value is None or value != value else str(value) for value in column.tolist()]  # NaN != NaN


def _vocabulary(names: list[str], min_count: int) -> tuple[str, ...]:
    counts = Counter(name for name in names if name)
    return tuple(sorted(name for name, count in counts.items() if count >= min_count))


def _numbered(names: list[str], vocabulary: tuple[str, ...]) -> np.ndarray:
    number = {name: index + 1 for index, name in enumerate(vocabulary)}
    return np.array([number.get(name, 0) for name in names], np.int64)
