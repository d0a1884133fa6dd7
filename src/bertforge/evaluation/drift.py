"""Do the rows that are served look like those of training? Counted cheaply, and judged beside chance.

Training saves how often each quantity took which values (`Reference`): the tokens of a text, the share of them that the
tokenizer does not know, the columns that the model reads, the label that the model gives. A server counts what it is
asked in the same bins (`Monitor`), over a window of rows, so that what it tells is of today. Both count what the model
reads, after all preparing, so one is the other's likeness. Counters are sums: those of several processes are added.

The measure is the population stability index, sum((q - p) log(q / p)) over the bins, with p the share in training and q
the served one. By an old rule of banks, below 0.1 nothing has happened and above 0.25 much has. But a few rows differ
from training by chance: 100 rows of a quantity with ten bins reach 0.2. So beside each index stands the value that
chance alone exceeds in one of a hundred windows of so many rows (`by_chance`), found by drawing both counts from the
shares of training; the chi-squared distribution, the limit for many rows (Yurdakul 2018), is off by half where bins are
nearly empty. Drift is told where an index is above both.

Nothing is told of the first rows (`fewest`). One text longer than any of training lies in a bin that held nothing, and
its index is above both, though such a text comes now and then. Rows are enough once no single one can make an index
that counts as drift, and chance hardly makes one that counts as much.

An empty bin would make the index infinite. Training's counts get half a row a bin more; the served ones get as many
rows spread as in training, so that a bin that is empty in both counts for nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from bertforge.errors import ArtifactError

if TYPE_CHECKING:
    from bertforge.columns.transform import TabularTransform

TOKENS, UNKNOWN, LABEL = "tokens", "unknown tokens", "label"
COLUMN = "column "  # before a column's name
REFERENCE_ROWS = 20_000  # train rows that are counted, spread over all
WINDOW = 10_000  # rows
NO_REFERENCE = "the model does not tell what its train rows looked like, for an earlier version trained it"
_NAMES = 20  # of a column, that have a bin of their own
_UNKNOWN = (0.0, 0.01, 0.05, 0.2)  # upper ends of bins
_DRAWS, _RARE = 1000, 0.99
_SOME, _MUCH = 0.1, 0.25
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Quantity:
    """The bins of a quantity, and how many values of training fell into each.

    Numbers have a bin up to each of `edges`, one above, and one for missing values. Names, which are numbers from 1 on
    as `Kind.names` has them, have a bin for each of `names`, and one for others, new ones and missing ones.
    """

    counts: tuple[int, ...] = ()
    edges: tuple[float, ...] = ()
    """Ascending."""
    names: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    """Of the names."""

    @classmethod
    def of_numbers(cls, values: npt.NDArray[Any], edges: Sequence[float] = ()) -> Self:
        """Bins that hold a tenth of `values` `[rows]` each, and one for what is lower than all."""
        if not edges:
            known = np.sort(values[~np.isnan(values)]).astype(np.float64) if not np.isnan(values).all() else np.zeros(1)
            tenths = np.quantile(known, np.linspace(0.1, 1, 10), method="higher")
            edges = np.unique([np.nextafter(known[0], -np.inf), *tenths]).tolist()
        return cls(edges=tuple(edges))._counted(values)

    @classmethod
    def of_names(cls, values: Ints, known: Sequence[str]) -> Self:
        """Of names by their numbers, `[rows]` or `[rows, width]` with 0 for none: those that are most frequent."""
        often = np.bincount(values[values > 0].ravel(), minlength=len(known) + 1)[1:]
        most = np.sort(np.argsort(-often, kind="stable")[:_NAMES])
        return cls(names=tuple(known[name] for name in most), numbers=tuple((most + 1).tolist()))._counted(values)

    def _counted(self, values: npt.NDArray[Any]) -> Self:
        return type(self)(tuple(self.count(values).tolist()), self.edges, self.names, self.numbers)

    @property
    def bins(self) -> list[str]:
        """What each bin holds."""
        if not self.edges:
            return [*self.names, "other or missing"]
        return [*(f"up to {edge:.4g}" for edge in self.edges), f"above {self.edges[-1]:.4g}", "missing"]

    @cached_property
    def _places(self) -> Ints:
        """The bin of each name, by its number; the last is that of all higher numbers."""
        places = np.full(max(self.numbers, default=0) + 2, len(self.numbers))
        places[list(self.numbers)] = np.arange(len(self.numbers))
        return places

    def count(self, values: npt.NDArray[Any]) -> Ints:
        """How many of the values fall into each bin, `[bins]`; a row of several names counts for each of them."""
        if self.edges:
            places = np.searchsorted(self.edges, values, side="left")  # NaN comes last
            return np.bincount(places + np.isnan(values), minlength=len(self.edges) + 2)
        if values.ndim == 2:
            values = np.concatenate([values[values > 0], np.zeros(int((values == 0).all(axis=1).sum()), values.dtype)])
        return np.bincount(self._places[np.minimum(values, len(self._places) - 1)], minlength=len(self.names) + 1)


@dataclass(frozen=True)
class Reference:
    """What training looked like."""

    quantities: dict[str, Quantity]
    """By name."""

    @classmethod
    def measure(
        cls,
        lengths: Ints,
        unknown: Ints,
        labels: Sequence[str],
        predicted: Ints,
        columns: Mapping[str, npt.NDArray[Any]] | None,
        transform: TabularTransform | None,
    ) -> Self:
        """Of train rows with `lengths` `[rows]` tokens, of which `unknown` `[rows]` are unknown, and with `columns` as
        `transform` made them; and of validation rows with the labels `predicted` `[validation rows]`.
        """
        found = {
            TOKENS: Quantity.of_numbers(lengths),
            UNKNOWN: Quantity.of_numbers(_share(unknown, lengths), _UNKNOWN),
            LABEL: Quantity.of_names(predicted + 1, labels),
        }
        if transform is not None and columns is not None:
            for name, array, names in transform.cells(columns):
                found[COLUMN + name] = Quantity.of_numbers(array) if names is None else Quantity.of_names(array, names)
        return cls(found)

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Self | None:
        """What the manifest of a folder keeps; None where an earlier version trained the model."""
        if (kept := manifest.get("reference")) is None:
            return None
        try:
            return cls(
                {
                    name: Quantity(**{field: tuple(values) for field, values in quantity.items()})
                    for name, quantity in kept.items()
                }
            )
        except (TypeError, AttributeError) as error:
            raise ArtifactError(f"the folder's record of its train rows is damaged ({error!r}); train again") from error

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            name: {field: list(values) for field, values in asdict(quantity).items() if values}
            for name, quantity in self.quantities.items()
        }


class Monitor:
    """Counts served rows, those of the last half window at least and of a whole one at most. Threads may share it."""

    def __init__(self, reference: Reference, transform: TabularTransform | None, window: int = WINDOW) -> None:
        """Of a model that reads columns by way of `transform`."""
        self._known, self._transform, self._half = reference.quantities, transform, max(1, window // 2)
        self._now, self._before = self._nothing(), self._nothing()
        self._lock = threading.Lock()

    def add(
        self, lengths: Ints, unknown: Ints, predicted: Ints, columns: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> None:
        """Some rows: their tokens `[rows]`, how many of these are unknown `[rows]`, the number of the label that the
        model itself finds most probable, before any prior (-1 without text), and the columns as it reads them.
        """
        known = self._known
        counted = {
            TOKENS: known[TOKENS].count(lengths),
            UNKNOWN: known[UNKNOWN].count(_share(unknown, lengths)),
            LABEL: known[LABEL].count(predicted + 1),
        }
        if self._transform is not None and columns is not None:
            for name, array, _ in self._transform.cells(columns):
                counted[COLUMN + name] = known[COLUMN + name].count(array)
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
        empty = {name: np.zeros(len(quantity.counts), np.int64) for name, quantity in self._known.items()}
        return {"rows": np.zeros(1, np.int64), **empty}


def drift(reference: Reference | None, snapshots: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
    """How far served rows are from those of training, JSON-ready; of the counters of all processes together.

    `rows`, the `fewest` that are compared, and for each of `quantities` by its name: `psi`, `by_chance`, `drift`
    ("none", "some" or "much"; None for fewer rows) and the shares of `bins` in `training` and `served`. Without a
    reference, `missing` says why there is nothing to tell. What was not served yet is None.
    """
    if reference is None:
        return {"rows": 0, "fewest": 0, "missing": NO_REFERENCE, "quantities": {}}
    counters = list(snapshots)
    rows = sum(snapshot["rows"][0] for snapshot in counters)
    least = max(fewest(quantity.counts) for quantity in reference.quantities.values())
    told = {}
    for name, quantity in reference.quantities.items():
        training = np.array(quantity.counts)
        served: Ints = np.array([snapshot[name] for snapshot in counters], np.int64).sum(axis=0)
        total = int(served.sum())
        index = float(stability_index(training, served)) if total else None
        chance = by_chance(quantity.counts, total) if total else None
        told[name] = {
            "psi": index,
            "by_chance": chance,
            "drift": None if index is None or chance is None or rows < least else _judged(index, chance),
            "bins": quantity.bins,
            "training": _shares(training),
            "served": _shares(served) if total else None,
        }
    return {"rows": rows, "fewest": least, "quantities": told}


def stability_index(training: Ints, served: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The population stability index of counts `[..., bins]`, `[...]`."""
    bins = training.shape[-1]
    p = (training + 0.5) / (training.sum(-1, keepdims=True) + bins / 2)
    q = (served + p * bins / 2) / (served.sum(-1, keepdims=True) + bins / 2)
    index: npt.NDArray[np.float64] = ((q - p) * np.log(q / p)).sum(-1)
    return index


def by_chance(training: tuple[int, ...], rows: int) -> float:
    """The index that so many rows of the same kind exceed once in a hundred times.

    It is drawn for a few numbers of rows, so rarely, and the wider of the two next to `rows` counts: mostly that of
    fewer rows, but where bins are empty in training, served rows by themselves take the index up.
    """
    steps = 2 * np.log2(rows)
    return max(_drawn(training, int(2 ** (step / 2))) for step in (np.floor(steps), np.ceil(steps)))


@lru_cache(maxsize=4096)
def fewest(training: tuple[int, ...]) -> int:
    """The rows that it takes to compare them with `training`, and never more than were counted there.

    One row in the rarest bin, with all others as in training, then stays within the index that counts as drift, and
    `by_chance` within the one that counts as much.
    """
    counts, most, rows = np.array(training), sum(training), 1
    odd = np.arange(len(counts)) == counts.argmin()
    while rows < most:
        one = stability_index(counts, (rows - 1) * counts / most + odd)
        if one <= _SOME and by_chance(training, rows) <= _MUCH:
            break
        rows = ceil(rows * sqrt(2))
    return min(rows, most)


@lru_cache(maxsize=4096)
def _drawn(training: tuple[int, ...], rows: int) -> float:
    generator = np.random.default_rng(0)
    shares = np.array(training) / sum(training)
    then, now = (generator.multinomial(size, shares, _DRAWS) for size in (sum(training), rows))
    return float(np.quantile(stability_index(then, now), _RARE))


def _judged(index: float, chance: float) -> str:
    if index <= max(chance, _SOME):
        return "none"
    return "some" if index <= _MUCH else "much"


def _share(unknown: Ints, lengths: Ints) -> npt.NDArray[np.float64]:
    """Of the tokens between [CLS] and [SEP]."""
    share: npt.NDArray[np.float64] = unknown / np.maximum(lengths - 2, 1)
    return share


def _shares(counts: Ints) -> list[float]:
    return [round(float(count) / max(1, int(counts.sum())), 6) for count in counts]
