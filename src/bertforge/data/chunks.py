"""What every reader of tables yields: consecutive rows as columns of strings, with the rows that could not be read.

Chunks are pyarrow tables: their string columns cost one allocation each, and counting words or matching a pattern in
them runs in C++ without the interpreter lock, beside the tokenizer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bertforge.data import limits
from bertforge.errors import DataError

STRING = pa.large_string()  # 64-bit offsets: a chunk of long documents may pass 2 GiB


@dataclass(frozen=True)
class BadRow:
    """A row set aside: where it starts, why, and what stood there (text, or the row's columns)."""

    line: int
    reason: str
    raw: str | dict[str, str]


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a source."""

    table: pa.Table
    """Columns of `large_string`, no nulls."""
    line: NDArray[np.int64]
    """[rows] where each row starts."""
    bad: list[BadRow]
    """Rows between these that could not be read."""
    done: float
    """Share of the source read so far, 0 to 1, for progress bars."""
    declared_text: frozenset[str] = frozenset()
    """Columns that the source says are text, so that a "1" in them is no number. A CSV says nothing of the kind."""


def name_columns(header: list[str], source: str) -> list[str]:
    """The columns that a table's first row names; one without a name is called by its place, `column 3`.

    Tables that were saved with an index or with commas at the ends of lines have such. Raises DataError when nothing is
    named, or one name twice, or there are too many or too long names.
    """
    named = [name.strip() for name in header]
    if not any(named):
        raise DataError(f"{source} has no header: its first row is empty, but must name the columns")
    columns = [name or f"column {place}" for place, name in enumerate(named, start=1)]
    check_names(columns, source)
    if repeated := [name for name, count in Counter(columns).items() if count > 1]:
        raise DataError(f"{source} names a column twice in its header: {abbreviate(sorted(repeated))}")
    return columns


def check_names(columns: Sequence[str], source: str) -> None:
    """Raises DataError for more columns, or a longer name, than a table may have."""
    if len(columns) > limits.COLUMNS:
        raise DataError(
            f"{source} has {len(columns):,} columns; a table may have {limits.COLUMNS:,}: take out those not needed"
        )
    for place, name in enumerate(columns, start=1):
        if len(name) > limits.NAME:
            raise DataError(
                f"column {place} of {source} has a name of {len(name):,} characters, {name[:20]!r}...; a name may have "
                f"{limits.NAME:,}: the first row must name the columns"
            )


def abbreviate(names: Sequence[str], most: int = 20) -> str:
    """The first of some names, each shortened, and how many more there are."""
    shown = ", ".join(limits.shorten(name, 60) for name in names[:most])
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")


def make_chunk(
    columns: list[str],
    rows: list[list[str]],
    lines: list[int],
    bad: list[BadRow],
    done: float,
    *,
    encoding: str = "UTF-8",
    declared_text: frozenset[str] = frozenset(),
) -> Chunk:
    """Rows of strings -> a chunk; rows with a lone surrogate, a byte that is not of the encoding, go to `bad`."""
    try:
        table = make_table(columns, rows)
    except UnicodeEncodeError:
        encodable = [is_text(row) for row in rows]
        broken = [
            BadRow(line, f"not {encoding}", dict(zip(columns, row, strict=True)))
            for line, row, good in zip(lines, rows, encodable, strict=True)
            if not good
        ]
        bad = sorted(bad + broken, key=lambda row: row.line)
        lines = [line for line, good in zip(lines, encodable, strict=True) if good]
        table = make_table(columns, [row for row, good in zip(rows, encodable, strict=True) if good])
    return Chunk(table, np.array(lines, dtype=np.int64), bad, done, declared_text)


def make_table(columns: list[str], rows: list[list[str]]) -> pa.Table:
    """Rows of strings -> columns of `large_string`; raises UnicodeEncodeError for a lone surrogate."""
    values = list(zip(*rows, strict=True)) if rows else [()] * len(columns)
    return pa.table([pa.array(column, STRING) for column in values], names=columns)


def is_text(row: list[str]) -> bool:
    """Whether no string of the row has a lone surrogate."""
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return False
    return True


def without_long_cells(chunk: Chunk) -> Chunk:
    """`chunk` with the rows that have a cell over the limit moved to `bad`, their cells shortened."""
    good = np.ones(len(chunk.line), dtype=bool)
    reasons: dict[int, str] = {}
    for name in chunk.table.column_names:
        column = chunk.table[name]
        if (pc.max(pc.binary_length(column)).as_py() or 0) <= limits.CELL:  # bytes, of which no character has less
            continue
        long = pc.greater(pc.utf8_length(column), limits.CELL).to_numpy()
        good &= ~long
        for row in np.flatnonzero(long).tolist():
            reasons.setdefault(row, f"field of more than {limits.CELL:,} characters: shorten {name}")
    if not reasons:
        return chunk
    bad = [
        BadRow(
            int(chunk.line[row]),
            reason,
            {name: limits.shorten(value) for name, value in chunk.table.slice(row, 1).to_pylist()[0].items()},
        )
        for row, reason in reasons.items()
    ]
    return replace(
        chunk,
        table=chunk.table.filter(pa.array(good)),
        line=chunk.line[good],
        bad=sorted([*chunk.bad, *bad], key=lambda row: row.line),
    )


def cell_text(value: Any) -> str:
    """A value of JSON or of a spreadsheet as the string that a CSV would hold."""
    if value is None or value != value:  # null or NaN
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str).removesuffix(".0")
