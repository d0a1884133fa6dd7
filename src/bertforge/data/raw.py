"""Reading a raw table for `evaluate` and `predict`: every row in the file's order, bad ones with the reason."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from bertforge.data.chunks import STRING, Chunk
from bertforge.data.clean import find_problems
from bertforge.data.dialect import Dialect
from bertforge.data.features import derive, named_as_derived
from bertforge.data.prepared import join_texts
from bertforge.data.rows import Rows
from bertforge.data.schema import Schema, require_columns
from bertforge.data.streaming import ahead
from bertforge.data.tables import read_chunks


@dataclass(frozen=True)
class RawRows:
    """Consecutive rows of a raw table, nothing dropped."""

    frame: pd.DataFrame
    """Source columns as strings, then the wanted derived columns whose sources the table has. No source column has the
    name of a derived one; a row that could not be read (broken quoting, wrong encoding) is all "" here."""
    texts: list[str]
    """What the tokenizer reads."""
    labels: NDArray[np.int64] | None
    """[rows] index into the schema's label names, -1 where there is none or an unknown one; None when not asked for."""
    problems: list[str]
    """[rows] why `prepare` would set the row aside, or which of the `numbers` is none; "" for a good row."""
    dates: NDArray[np.datetime64] | None
    """[rows] of the schema's date column, NaT where it can't be read; None when there is no such column."""
    lines: NDArray[np.int64]
    """[rows] line (Parquet, frames: row number) of the source, from 1."""
    done: float
    """Share of the source read so far."""


def read_raw(
    table: Path | pd.DataFrame,
    schema: Schema,
    *,
    require_labels: bool,
    numbers: Sequence[str] = (),
    derived: Container[str] | None = None,
    dialect: Dialect | None = None,
) -> Iterator[RawRows]:
    """Yields the whole table in order, in chunks; a file is read a chunk ahead, in a thread.

    `numbers` are the columns that a model reads as numbers, and `derived` the derived ones that are wanted (None: all).
    `dialect` is what is known of how a text table is written.

    Raises DataError when a text column is missing, or the label column with `require_labels`. Other columns may be
    missing: the derived columns that need them are then not in `frame`.
    """
    chunks = read_chunks(table, named=schema.required_columns, dialect=dialect)
    with closing(ahead(chunks)) if isinstance(table, Path) else nullcontext(chunks) as read:
        for number, chunk in enumerate(read):
            if number == 0:
                labels = (schema.label_column,) if require_labels else ()
                require_columns((*schema.text_columns, *labels), chunk.table.column_names, "the model needs")
            yield _with_problems(chunk, schema, require_labels, numbers, derived)


def _with_problems(
    chunk: Chunk, schema: Schema, require_labels: bool, numbers: Sequence[str], wanted: Container[str] | None
) -> RawRows:
    lines = np.concatenate([chunk.line, np.array([bad.line for bad in chunk.bad], dtype=np.int64)])
    order = np.argsort(lines, kind="stable")
    unreadable = np.array([""] * len(chunk.line) + [bad.reason for bad in chunk.bad], dtype=object)[order]
    table = chunk.table
    if chunk.bad:
        blank = pa.array([""] * len(chunk.bad), STRING)
        blanks = pa.table([blank] * table.num_columns, names=table.column_names)
        table = pa.concat_tables([table, blanks]).take(order).combine_chunks()
    rows = Rows(table)
    found = find_problems(rows, schema, labelled=require_labels, numbers=numbers)
    problems = np.where(unreadable != "", unreadable, found)
    derived = derive(rows, schema, wanted)
    source = table.drop_columns(named_as_derived(table.column_names, schema))
    joined = pa.table([*source.columns, *derived.columns], names=[*source.column_names, *derived.column_names])
    return RawRows(
        frame=joined.to_pandas(),
        texts=join_texts(table, schema),
        labels=schema.encode_labels(rows) if require_labels else None,
        problems=problems.tolist(),
        dates=rows.date(schema.date_column) if schema.date_column in rows.names else None,
        lines=lines[order],
        done=chunk.done,
    )
