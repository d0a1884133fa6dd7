"""Columns of numbers: scaled inside the model, and if asked for, encoded piece by piece.

The array holds the numbers as the table has them, NaN where there is none. What the train rows taught of them, means,
deviations and quantiles, is part of the weights, so that an engine takes what the table holds. An optional signed log,
then (value - mean) / standard deviation; a missing value becomes the mean, and a column that had one in the train rows
gets a second column that says where. With `bins`, a piecewise-linear encoding turns each into how far it lies through
each of its bins, bounded by quantiles of the train rows (Gorishniy et al. 2022, arXiv 2203.05556, section 3.2), so that
a small network can bend at thresholds as a decision tree does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bertforge.columns.kind import Kind
from bertforge.columns.vocabulary import names
from bertforge.errors import ArtifactError, DataError, UsageError

if TYPE_CHECKING:
    import pandas as pd

    from bertforge.columns.parts import Part

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NumericSettings:
    """Of the `[tabular]` section."""

    numeric: tuple[str, ...] = ()
    """Columns of numbers."""
    log: tuple[str, ...] = ()
    """Those of `numeric` with a long tail: sign(x) log(1 + |x|) before scaling."""
    bins: int = 0
    """Bins of the piecewise-linear encoding of numbers; 0 for none."""

    def __post_init__(self) -> None:
        if extra := set(self.log) - set(self.numeric):
            raise UsageError(f"[tabular] log names {sorted(extra)}, which are not among numeric")


@dataclass(frozen=True)
class NumericLearnt:
    """Of the train rows."""

    mean: tuple[float, ...]
    """Of each column, of its logarithm where there is one; missing values left out."""
    std: tuple[float, ...]
    indicators: tuple[str, ...]
    """Columns that had missing values, each with an indicator column after the numbers."""
    edges: tuple[tuple[float, ...], ...]
    """Per input of the model, `bins + 1` ascending quantiles of its scaled train values; empty without bins."""


@dataclass(frozen=True)
class NumericShape:
    """Of the scaler and the bins."""

    numeric: int
    """Numeric columns."""
    log: tuple[int, ...] = ()
    """Those of them, counted from 0, whose signed logarithm is read."""
    indicators: tuple[int, ...] = ()
    """Those with another input that says where they are missing."""
    bins: int = 0
    """Bins of each column's piecewise-linear encoding; 0 passes the scaled value itself."""

    def __post_init__(self) -> None:
        if unknown := {*self.log, *self.indicators} - set(range(self.numeric)):
            raise ArtifactError(
                f"log and indicators name {sorted(unknown)}, but numeric columns are 0 to {self.numeric - 1}"
            )

    @property
    def inputs(self) -> int:
        """Columns with their indicators."""
        return self.numeric + len(self.indicators)


class Numeric(Kind[NumericSettings, NumericLearnt, NumericShape]):
    """The array is `[rows, columns]` float32, NaN where there is no finite number."""

    name = "numeric"
    dtype = np.float32
    holds = "number"
    Settings, Learnt, Shape = NumericSettings, NumericLearnt, NumericShape

    def fit(self, train: pd.DataFrame, settings: NumericSettings, min_count: int) -> NumericLearnt:
        """Raises DataError for a column that is empty or mostly holds something else.

        Where it is the lesser part that can't be read, a warning is logged and it counts as missing.
        """
        numbers = [_numbers(train[name]) for name in settings.numeric]
        for name, values in zip(settings.numeric, numbers, strict=True):
            _check_numbers(train[name], values)
        raw = [_signed_log(v) if n in settings.log else v for n, v in zip(settings.numeric, numbers, strict=True)]
        mean = [float(np.nanmean(values, dtype=np.float64)) for values in raw]
        std = [_deviation(values) for values in raw]
        gaps = [np.isnan(values) for values in raw]
        edges: list[tuple[float, ...]] = []
        if settings.bins:
            scaled = [np.nan_to_num((v - m) / s) for v, m, s in zip(raw, mean, std, strict=True)]
            edges = [_quantiles(values, settings.bins) for values in [*scaled, *(gap for gap in gaps if gap.any())]]
        return NumericLearnt(
            mean=tuple(mean),
            std=tuple(std),
            indicators=tuple(name for name, gap in zip(settings.numeric, gaps, strict=True) if gap.any()),
            edges=tuple(edges),
        )

    def encode(self, frame: pd.DataFrame, settings: NumericSettings, learnt: NumericLearnt) -> np.ndarray:
        encoded = np.empty((len(frame), len(settings.numeric)), self.dtype)
        for column, name in enumerate(settings.numeric):
            encoded[:, column] = _numbers(frame[name])
        return encoded

    def shape(self, settings: NumericSettings, learnt: NumericLearnt) -> NumericShape:
        return NumericShape(
            numeric=len(settings.numeric),
            log=tuple(settings.numeric.index(name) for name in settings.log),
            indicators=tuple(settings.numeric.index(name) for name in learnt.indicators),
            bins=settings.bins if settings.numeric else 0,
        )

    def width(self, shape: NumericShape) -> int:
        return shape.numeric

    def modules(self, shape: NumericShape, embedding_size: int) -> dict[str, Part]:
        """The scaler is there without columns too: every checkpoint has its buffers."""
        from bertforge.columns.parts import ColumnScaler, PiecewiseLinear

        modules: dict[str, Part] = {"scaler": ColumnScaler(shape)}
        if shape.bins:
            modules["numeric"] = PiecewiseLinear(shape, embedding_size)
        return modules

    def buffers(self, learnt: NumericLearnt) -> dict[str, Sequence[Any]]:
        bins = {"numeric.edges": learnt.edges} if learnt.edges else {}
        return {"scaler.mean": learnt.mean, "scaler.std": learnt.std, **bins}

    def is_plain(self, shape: NumericShape) -> bool:
        return shape.bins == 0


def _numbers(column: pd.Series[Any]) -> np.ndarray:
    """float32, NaN where there is no finite number."""
    import pandas as pd

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
    unreadable = [text for text in names(column[np.isnan(values)]) if text.strip()]
    given = len(unreadable) + int((~np.isnan(values)).sum())
    if not given:
        raise DataError(f"column {column.name!r} holds no number in the train rows; remove it from numeric")
    if not unreadable:
        return
    found = f"{len(unreadable):,} of {given:,} values of column {column.name!r} are no numbers: {unreadable[0]!r}"
    if 2 * len(unreadable) > given:
        raise DataError(f"{found}; write plain numbers (14013, not 14,013), or declare it under categorical")
    log.warning("%s; such values count as missing", found)
