"""Do the rows that are served look like those of training? Counted cheaply, and judged beside chance.

Training saves how often each quantity took which values (`Reference`): the tokens of a text, its share of unknown
tokens, the columns that the model reads, the label that the model gives. A server counts what it is asked in the same
bins (`Monitor`), over a window of rows, so that what it tells is of today. Counters of several processes are added.

The measure is the population stability index, sum((q - p) log(q / p)) over the bins, with p the share in training and q
the served one. By an old rule of banks, below 0.1 nothing has happened and above 0.25 much has. But a few rows differ
from training by chance: 100 rows of a quantity with ten bins reach 0.2. So beside each index stands the value that
chance alone exceeds in one of a hundred windows of so many rows (`by_chance`), found by drawing both counts from the
shares of training; the chi-squared distribution, the limit for many rows (Yurdakul 2018), is off by half where bins are
nearly empty. Drift is told where an index is above both.

An empty bin would make the index infinite. Training's counts get half a row a bin more; the served ones get as many
rows spread as in training, so that a bin that is empty in both counts for nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from bertforge.columns.vocabulary import names
from bertforge.errors import ArtifactError

if TYPE_CHECKING:
    import pandas as pd

TOKENS, UNKNOWN, LABEL = "tokens", "unknown tokens", "label"
COLUMN = "column "  # before a column's name
REFERENCE_ROWS = 20_000  # train rows that are counted, spread over all
WINDOW = 10_000  # rows
MISSING, OTHER = "missing", "other"
NO_REFERENCE = "the model does not tell what its train rows looked like, for an earlier version trained it"
_NAMES = 20  # of a column, that have a bin of their own
_UNKNOWN = (0.0, 0.01, 0.05, 0.2)  # upper ends of bins
_DRAWS, _RARE = 1000, 0.99
SOME, MUCH = 0.1, 0.25
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Quantity:
    """The bins of a quantity, the last one for missing values, and how many values of train rows fell into each."""

    counts: tuple[int, ...]
    edges: tuple[float, ...] = ()
    """Of numbers: ascending upper ends of all bins but the last two, which hold what is above and what is missing."""
    names: tuple[str, ...] = ()
    """Of names: one a bin; the last two bins hold all other names and what is missing."""
    several: bool = False
    """A cell holds several names, separated by spaces."""

    @classmethod
    def of_numbers(cls, values: npt.ArrayLike, edges: Sequence[float] | None = None) -> Self:
        """Bins that hold a tenth of `values` `[rows]` each, one for what is lower than all and one for higher."""
        numbers = _numbers(values)
        if edges is None:
            known = numbers[~np.isnan(numbers)]
            tenths = np.quantile(known, np.linspace(0.1, 1, 10), method="higher") if len(known) else [0.0]
            lowest = [np.nextafter(known.min(), -np.inf)] if len(known) else []
            edges = np.unique([*lowest, *tenths]).tolist()
        empty = cls((), edges=tuple(edges))
        return cls(tuple(empty.count(numbers).tolist()), edges=empty.edges)

    @classmethod
    def of_names(cls, values: Iterable[str], known: Sequence[str] | None = None, *, several: bool = False) -> Self:
        """A bin for each of the names that are most frequent, or for those that are `known`."""
        cells = list(values)
        if known is None:
            split = [name for cell in cells for name in (cell.split() if several else [cell]) if name]
            found, often = np.unique(np.array(split, dtype=str), return_counts=True)
            known = found[np.argsort(-often, kind="stable")[:_NAMES]].tolist()
        empty = cls((), names=tuple(known), several=several)
        return cls(tuple(empty.count(cells).tolist()), names=empty.names, several=several)

    @property
    def bins(self) -> list[str]:
        """What each bin holds."""
        if not self.edges:
            return [*self.names, OTHER, MISSING]
        ends = [f"up to {edge:.4g}" for edge in self.edges]
        return [*ends, f"above {self.edges[-1]:.4g}", MISSING]

    def count(self, values: Any) -> Ints:
        """How many of the values `[rows]`, numbers or cells of names, fall into each bin, `[bins]`."""
        if self.edges:
            numbers = _numbers(values)
            place = np.searchsorted(self.edges, numbers, side="left")
            place[np.isnan(numbers)] = len(self.edges) + 1
            return np.bincount(place, minlength=len(self.edges) + 2)
        number = {name: place for place, name in enumerate(self.names)}
        other, missing = len(self.names), len(self.names) + 1
        counts = np.zeros(len(self.names) + 2, np.int64)
        for cell in values:
            for name in cell.split() or [""] if self.several else [cell]:
                counts[number.get(name, other) if name else missing] += 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        bins = {"edges": list(self.edges)} if self.edges else {"names": list(self.names), "several": self.several}
        return {"counts": list(self.counts), **bins}

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        several = bool(kept.get("several", False))
        return cls(tuple(kept["counts"]), tuple(kept.get("edges", ())), tuple(kept.get("names", ())), several)


@dataclass(frozen=True)
class Reference:
    """What training looked like: a quantity by its name."""

    quantities: dict[str, Quantity]

    @classmethod
    def measure(
        cls,
        lengths: Ints,
        unknown: Ints,
        labels: Sequence[str],
        predicted: Ints,
        columns: pd.DataFrame | None = None,
        holds: Mapping[str, str] | None = None,
    ) -> Self:
        """Of train rows with `lengths` `[rows]` tokens, of which `unknown` `[rows]`, and their `columns`, of which
        `holds` tells whether a cell is a "number", a "name" or "names"; and of validation rows with the labels
        `predicted` `[validation rows]`.
        """
        found = {
            TOKENS: Quantity.of_numbers(lengths),
            UNKNOWN: Quantity.of_numbers(_share(unknown, lengths), _UNKNOWN),
            LABEL: Quantity.of_names([labels[number] for number in predicted.tolist()], labels),
        }
        for name, what in (holds or {}).items():
            assert columns is not None
            column = columns[name]
            found[COLUMN + name] = (
                Quantity.of_numbers(column)
                if what == "number"
                else Quantity.of_names(names(column), several=what == "names")
            )
        return cls(found)

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Self | None:
        """What the manifest of a folder keeps; None where an earlier version trained the model."""
        if (kept := manifest.get("reference")) is None:
            return None
        try:
            return cls({name: Quantity.from_dict(quantity) for name, quantity in kept.items()})
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"the folder's record of its train rows is damaged ({error!r}); train again") from error

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: quantity.to_dict() for name, quantity in self.quantities.items()}


class Monitor:
    """Counts served rows, those of the last half window at least and of a whole one at most. Threads may share it."""

    def __init__(self, reference: Reference, window: int = WINDOW) -> None:
        self._reference, self._half = reference, max(1, window // 2)
        self._now, self._before = self._nothing(), self._nothing()
        self._lock = threading.Lock()

    def add(
        self,
        lengths: Ints,
        unknown: Ints,
        labels: Sequence[str | None],
        columns: pd.DataFrame | None = None,
    ) -> None:
        """Some rows: their tokens as the model reads them `[rows]`, how many of these are unknown `[rows]`, the label
        that the model itself finds most probable, before any prior (None without text), and the columns it reads.
        """
        known = self._reference.quantities
        counted = {
            TOKENS: known[TOKENS].count(lengths),
            UNKNOWN: known[UNKNOWN].count(_share(unknown, lengths)),
            LABEL: known[LABEL].count([name or "" for name in labels]),
        }
        for name, quantity in known.items():
            if name.startswith(COLUMN) and columns is not None:
                column = columns[name.removeprefix(COLUMN)]
                counted[name] = quantity.count(column if quantity.edges else names(column))
        with self._lock:
            if self._now["rows"][0] >= self._half:
                self._before, self._now = self._now, self._nothing()
            self._now["rows"] += len(lengths)
            for name, counts in counted.items():
                self._now[name] += counts

    def snapshot(self) -> dict[str, list[int]]:
        """The counters, JSON-ready, for `drift`: "rows", and the bins of each quantity."""
        with self._lock:
            return {name: (self._now[name] + self._before[name]).tolist() for name in self._now}

    def _nothing(self) -> dict[str, Ints]:
        quantities = self._reference.quantities.items()
        return {"rows": np.zeros(1, np.int64), **{n: np.zeros(len(q.counts), np.int64) for n, q in quantities}}


def drift(reference: Reference | None, snapshots: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
    """How far served rows are from those of training, JSON-ready; of the counters of all processes together.

    `rows`, and for each of `quantities` by its name: `psi`, `by_chance`, `drift` ("none", "some" or "much") and the
    shares of `bins` in `training` and `served`. Without a reference, `missing` says why there is nothing to tell. What
    was not served yet is None.
    """
    if reference is None:
        return {"rows": 0, "missing": NO_REFERENCE, "quantities": {}}
    counters = list(snapshots)
    told = {}
    for name, quantity in reference.quantities.items():
        counts: Ints = np.array([snapshot[name] for snapshot in counters], np.int64).sum(axis=0)
        total = int(counts.sum())
        index = float(stability_index(np.array(quantity.counts), counts)) if total else None
        chance = by_chance(quantity.counts, total) if total else None
        told[name] = {
            "psi": index,
            "by_chance": chance,
            "drift": _judged(index, chance),
            "bins": quantity.bins,
            "training": _shares(np.array(quantity.counts)),
            "served": _shares(counts) if total else None,
        }
    return {"rows": sum(snapshot["rows"][0] for snapshot in counters), "quantities": told}


def stability_index(training: Ints, served: Ints) -> npt.NDArray[np.float64]:
    """The population stability index of counts `[..., bins]`, `[...]`."""
    bins = training.shape[-1]
    p = (training + 0.5) / (training.sum(-1, keepdims=True) + bins / 2)
    q = (served + p * bins / 2) / (served.sum(-1, keepdims=True) + bins / 2)
    index: npt.NDArray[np.float64] = ((q - p) * np.log(q / p)).sum(-1)
    return index


def by_chance(training: tuple[int, ...], rows: int) -> float:
    """The index that so many rows of the same kind exceed once in a hundred times."""
    return _drawn(training, int(2 ** (np.floor(2 * np.log2(rows)) / 2)))  # few sizes, so that it is drawn rarely


@lru_cache(maxsize=4096)
def _drawn(training: tuple[int, ...], rows: int) -> float:
    generator = np.random.default_rng(0)
    shares = np.array(training) / sum(training)
    then, now = (generator.multinomial(size, shares, _DRAWS) for size in (sum(training), rows))
    return float(np.quantile(stability_index(then, now), _RARE))


def _judged(index: float | None, chance: float | None) -> str:
    if index is None or chance is None or index <= max(chance, SOME):
        return "none"
    return "some" if index <= MUCH else "much"


def _numbers(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """float64, NaN where there is no finite number."""
    import pandas as pd

    found = pd.to_numeric(pd.Series(values), errors="coerce").to_numpy(np.float64, na_value=np.nan)  # type: ignore[arg-type]
    return np.where(np.isfinite(found), found, np.nan)


def _share(unknown: Ints, lengths: Ints) -> npt.NDArray[np.float64]:
    """Of the tokens between [CLS] and [SEP]."""
    return np.asarray(unknown) / np.maximum(np.asarray(lengths) - 2, 1)


def _shares(counts: Ints) -> list[float]:
    return [round(float(count) / max(1, int(counts.sum())), 6) for count in counts]
