"""What the columns of an unknown table are for, guessed from a sample of its rows.

Used where a user named no columns: to write an example into an error message, and by `fit` to choose text and columns.
A guess may be wrong, so nothing here is silent: each column that is left out comes with the reason.

The rules, the first that fits a column decides:

1. It gives the label away: knowing its value, or only that there is one, nearly decides some class.
2. It is empty but for a few rows, or holds one value only.
3. Dates by their format; numbers by theirs. Whole numbers that are named an id, or rise from row to row, are ids.
   Numbers of ten values or fewer are categories: an embedding learns their order, a number cannot unlearn it.
4. Text is several words a row that hardly repeat; names from a small stock, never twice in a row, are tags instead.
5. A category repeats: most rows hold a value that occurs `MIN_COUNT` times, which is what `TabularSpec` asks of one.
6. Any other string hardly repeats and says nothing of the next row: an id.

Words are counted by white space; letters of scripts that write without it count as a word each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bertforge.data.rows import Floats, Rows

SAMPLE_ROWS = 8192
MIN_COUNT = 5  # TabularSpec.min_count: rows a name must occur in to be told apart
_MOSTLY = 0.95  # share of the values there are that must fit
_FEW = 10  # distinct numbers that are categories
_MANY = 50  # distinct values above which an id is looked for
_NEARLY_BLANK = 0.02  # share of rows with a value
_LEAK = 0.05  # errors in recognising a class, as a share of the errors of never (or always) naming it
_LEAK_ROWS = 20  # rows of a class below which chance could look like a leak
_CLASSES = 200  # more distinct values than this are no label to guess
_MOST_CLASSES = 1000  # more than this and a given label is none: what gives it away is not asked

_WORD = r"\S+"
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}]"
_ID_NAME = re.compile(r"(?i:(?:^|[^a-z])(?:id|ids|uuid|guid|key|index))$|[a-z](?:Id|ID|Uuid|UUID|Key|Index)$")
_LABEL_NAME = re.compile(
    r"label|class|categor|target|sentiment|intent|topic|status|spam|rating|emotion|outcome|(?:^|_)y$", re.IGNORECASE
)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class GuessedColumns:
    """What each column of a table is for; every column of it stands in exactly one place.

    `numeric`, `categorical`, `multi` and `log` are the settings of these names in a recipe's `[tabular]` section.
    """

    text: tuple[str, ...]
    """In the table's order."""
    label: str | None
    """The one given, else the likeliest; None when no column looks like classes."""
    numeric: tuple[str, ...]
    log: tuple[str, ...]
    """Those of `numeric` that a signed logarithm makes far less skewed."""
    categorical: tuple[str, ...]
    multi: str
    """A column of several names separated by spaces; "" for none."""
    dates: tuple[str, ...]
    leaks: dict[str, str]
    """Columns that give the label away -> how; they must not be read."""
    left_out: dict[str, str]
    """Columns of no use -> why."""


def guess_columns(table: pa.Table, label: str | None = None) -> GuessedColumns:
    """Guesses from the first `SAMPLE_ROWS` rows of a table of strings, such as `Chunk.table`.

    `label` is a column of the table; without it the likeliest one is taken. A table sorted by its label shows too few
    classes at its start: hand in rows drawn at random where they can be had.
    """
    rows = Rows(table.slice(0, SAMPLE_ROWS))
    columns = {name: _Column.of(rows, name) for name in rows.names}
    if label is None:
        label = _likeliest_label(columns)
    kinds = {name: column.kind for name, column in columns.items() if name != label}
    leaks: dict[str, str] = {}
    if label is not None:
        answer = columns[label].codes
        leaks = {name: how for name in kinds if (how := _leak(columns[name], answer, columns[label].values))}
    kinds = {name: kind for name, kind in kinds.items() if name not in leaks}

    text = [name for name, kind in kinds.items() if kind == "text"]
    tags = [name for name, kind in kinds.items() if kind == "multi"]
    if not text:  # nothing reads like sentences: then the longest of what else is made of words
        wordy = [name for name, kind in kinds.items() if kind == "multi" or columns[name].differs]
        text = sorted(wordy, key=lambda name: -columns[name].characters)[:1]
    tags = [name for name in tags if name not in text]
    multi = max(tags, key=lambda name: columns[name].words, default="")
    numeric = tuple(name for name, kind in kinds.items() if kind == "numeric")
    left_out = {name: columns[name].why for name, kind in kinds.items() if kind == "left out" and name not in text} | {
        name: f"tags, as in {multi}, of which one column is read" for name in tags if name != multi
    }
    return GuessedColumns(
        text=tuple(text),
        label=label,
        numeric=numeric,
        log=tuple(name for name in numeric if _has_long_tail(columns[name].numbers)),
        categorical=tuple(name for name, kind in kinds.items() if kind == "categorical"),
        multi=multi,
        dates=tuple(name for name, kind in kinds.items() if kind == "date"),
        leaks=leaks,
        left_out=left_out,
    )


@dataclass(frozen=True)
class _Column:
    """What a sample shows of one column."""

    name: str
    kind: str
    """text, multi, numeric, categorical, date or left out."""
    why: str
    """The reason, of one that is left out."""
    values: list[str]
    """Distinct values, "" among them where rows are blank."""
    codes: Ints
    """[rows] index into `values`."""
    counts: Ints
    """[values] rows of each."""
    numbers: Floats
    """[rows] NaN where there is none."""
    words: float
    """A row, on average over those that hold something."""
    characters: float

    @classmethod
    def of(cls, rows: Rows, name: str) -> _Column:
        encoded = rows.text(name).dictionary_encode()
        values: list[str] = encoded.dictionary.to_pylist()
        codes: Ints = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        counts = np.bincount(codes, minlength=len(values))
        present = rows.present(name)
        there = rows.text(name).filter(pa.array(present))
        numbers = rows.number(name)
        words = _mean(pc.count_substring_regex(there, _WORD)) + _mean(pc.count_substring_regex(there, _UNSPACED))
        kind, why = _kind(rows, name, present, values, counts, numbers, words)
        return cls(name, kind, why, values, codes, counts, numbers, words, _mean(pc.utf8_length(there)))

    @property
    def differs(self) -> bool:
        """Whether it is a column of strings that was left out only because they hardly repeat."""
        return self.kind == "left out" and self.why == _DIFFERS


_DIFFERS = "its values hardly repeat"


def _kind(
    rows: Rows,
    name: str,
    present: NDArray[np.bool_],
    values: Sequence[str],
    counts: Ints,
    numbers: Floats,
    words: float,
) -> tuple[str, str]:
    total = int(present.sum())
    filled = [value for value in values if value]
    if total < max(1.0, _NEARLY_BLANK * len(rows)):
        return "left out", f"blank in {len(rows) - total:,} of {len(rows):,} rows"
    if len(filled) == 1 and total == len(rows):
        return "left out", f"always {filled[0]!r}"
    if np.count_nonzero(~np.isnan(numbers)) >= _MOSTLY * total:
        return _kind_of_numbers(name, numbers, len(filled), filled)
    if np.count_nonzero(~np.isnat(rows.date(name))) >= _MOSTLY * total:
        return "date", ""
    tags = _are_tags(filled, words)
    if not tags and ((words >= 3 and len(filled) >= 0.5 * total) or (words >= 8 and len(filled) > _MANY)):
        return "text", ""
    repeated = sum(int(count) for value, count in zip(values, counts, strict=True) if value and count >= MIN_COUNT)
    if tags and len(filled) > _MANY:
        return "multi", ""
    if 2 * repeated >= total and not (_ID_NAME.search(name) and len(filled) > _MANY):
        return "categorical", ""
    return "left out", _DIFFERS


def _kind_of_numbers(name: str, numbers: Floats, distinct: int, values: Sequence[str]) -> tuple[str, str]:
    given = numbers[~np.isnan(numbers)]
    if distinct <= _FEW:
        return "categorical", ""
    if bool((given == np.floor(given)).all()) and distinct > _MANY:
        if _ID_NAME.search(name):
            return "left out", "numbers that its name calls an id"
        steps = np.diff(given)
        if len(steps) and (bool((steps > 0).all()) or bool((steps < 0).all())):
            return "left out", "whole numbers that rise or fall from row to row: an id"
    if distinct > _MANY and all(len(value) > 1 and value[0] == "0" and value.isdecimal() for value in values[:_MANY]):
        return "left out", "digits with leading zeros: an id"
    return "numeric", ""


def _are_tags(values: Sequence[str], words: float) -> bool:
    """Whether these distinct values are lists of names: lower-case words from a small stock, none twice in a row."""
    if not 1.2 <= words <= 6:
        return False
    lists = [value.split() for value in values]
    stock = Counter(word for names in lists for word in names)
    plain = sum(re.fullmatch(r"[\w+#.\- ]+", value) is not None and value == value.lower() for value in values)
    unique = sum(len(set(names)) == len(names) for names in lists)
    return (
        plain >= _MOSTLY * len(values)
        and unique >= 0.99 * len(values)
        and sum(stock.values()) >= 2 * MIN_COUNT * len(stock)
    )


def _leak(column: _Column, answer: Ints, labels: Sequence[str]) -> str:
    """How the column gives a class away, "" when it does not.

    Each value stands for its commonest label. Values seen once count as one, "there is one", and so does all text.
    Numbers of many values are first cut at their quantiles. A class is given away when recognising it so makes a
    twentieth of the errors that never naming it, or always, would make.
    """
    codes = column.codes.copy()
    if len(labels) > _MOST_CLASSES:
        return ""
    blank = column.values.index("") if "" in column.values else -1
    if column.kind == "text":  # a text that repeats with its label is no leak
        codes = (codes != blank).astype(np.int64)
    elif len(column.values) > _MANY and not np.isnan(column.numbers).all():
        edges = np.unique(np.nanquantile(column.numbers, np.linspace(0, 1, 33)[1:-1]))
        codes = np.where(np.isnan(column.numbers), len(edges) + 1, np.searchsorted(edges, column.numbers, side="right"))
    else:
        once = (column.counts == 1) & (np.arange(len(column.values)) != blank)
        codes[once[codes]] = len(column.values)
    labelled = np.array([bool(label) for label in labels], dtype=bool)[answer]
    codes, answer = codes[labelled], answer[labelled]
    if not len(answer):
        return ""
    table = np.zeros((int(codes.max()) + 1, len(labels)), dtype=np.int64)  # [values, labels]
    np.add.at(table, (codes, answer), 1)
    guessed = table.argmax(axis=1)[codes]  # [rows]
    sizes = table.sum(axis=0)
    for code in np.argsort(-sizes, kind="stable").tolist():  # the largest class is the one to speak of
        if sizes[code] < _LEAK_ROWS or sizes[code] == len(answer):  # or the only class
            break
        true = answer == code
        errors = np.count_nonzero(true != (guessed == code))
        if errors <= _LEAK * min(true.sum(), (~true).sum()):
            return f"it tells the label {labels[code]!r} from the others in {1 - errors / len(true):.1%} of the rows"
    return ""


def _likeliest_label(columns: dict[str, _Column]) -> str | None:
    """The column of classes: by its name first, names before numbers, then the fewest values."""

    def could_be(column: _Column) -> bool:
        values = [value for value in column.values if value]
        blank = sum(int(c) for v, c in zip(column.values, column.counts, strict=True) if not v)
        few = 2 <= len(values) <= min(_CLASSES, len(column.codes) / 2)
        return few and column.kind == "categorical" and blank <= (1 - _MOSTLY) * len(column.codes)

    def order(column: _Column) -> tuple[bool, bool, int]:
        named = _LABEL_NAME.search(column.name) is not None
        return (not named, not np.isnan(column.numbers).all(), len(column.values))

    found = sorted(filter(could_be, columns.values()), key=order)
    return found[0].name if found else None


def _has_long_tail(numbers: Floats) -> bool:
    given = numbers[~np.isnan(numbers)]
    skew = abs(_skewness(given))
    return skew > 2 and abs(_skewness(np.sign(given) * np.log1p(np.abs(given)))) < skew / 2


def _skewness(values: Floats) -> float:
    """The third standardised moment; 0 for a constant."""
    centred = values - values.mean()
    deviation = float(np.sqrt(np.mean(centred**2)))
    return float(np.mean((centred / deviation) ** 3)) if deviation > 0 else 0.0


def _mean(values: pa.Array) -> float:
    return float(pc.mean(values).as_py() or 0.0)
