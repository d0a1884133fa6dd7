"""Streaming readers: text tables, Parquet, Excel or a pandas frame -> chunks of string columns.

Every source gives the same thing, so all that follows sees one kind of table: columns of strings, "" where a value is
absent (null, NaN, a missing JSON key), whole numbers without ".0". A row that can't be read is not dropped: it comes
along as a `BadRow` with its line. `line` is the 1-based line of the file on which a row starts (text) or the 1-based
row number (Parquet, frames; in a spreadsheet the header is row 1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bertforge.data import excel, limits, text_tables
from bertforge.data.chunks import (
    STRING,
    BadRow,
    Chunk,
    abbreviate,
    cell_text,
    check_names,
    is_text,
    make_table,
    without_long_cells,
)
from bertforge.data.dialect import Dialect
from bertforge.errors import DataError

_PIECE_ROWS = 64  # read at once, of which a chunk is then put together: no slower than all at once
FORMATS = ".csv, .tsv, .txt, .jsonl, .ndjson, .json (one object per line), any of them in .gz or .zip; .parquet, .xlsx"


def read_chunks(
    source: Path | pd.DataFrame,
    chunk_rows: int = limits.CHUNK_ROWS,
    *,
    named: Sequence[str] = (),
    dialect: Dialect | None = None,
) -> Iterator[Chunk]:
    """Yields the rows of `source` in order, at least one chunk (empty when there is only a header).

    A Parquet column of bytes (images, say) counts as absent unless it is among the `named`, which hold text.
    `dialect` is what is known of a text table; the rest is detected, and said where it is not usual.
    A row with a cell over the limit is bad; `limits.py` has them all.
    Raises DataError, before the first chunk, when the source is missing, empty, of unknown format or damaged, and once
    most of it cannot be read.
    """
    return _checked(_chunks(source, chunk_rows, named=named, dialect=dialect), source)


def _checked(chunks: Iterator[Chunk], source: Path | pd.DataFrame) -> Iterator[Chunk]:
    good = bad = 0  # lines of a bad row: one with a broken quote may have thousands
    for chunk in map(without_long_cells, chunks):
        good += len(chunk.line)
        bad += sum(1 if isinstance(row.raw, dict) else max(1, row.raw.count("\n")) for row in chunk.bad)
        if bad > limits.UNREADABLE_LINES and bad > good:
            first = chunk.bad[0]
            raise DataError(
                f"{bad:,} lines of {source} cannot be read, and {good:,} rows can; line {first.line:,} has: "
                f"{first.reason}; correct them, or say how the table is written with --separator and --encoding"
            )
        yield chunk


def _chunks(
    source: Path | pd.DataFrame, chunk_rows: int, *, named: Sequence[str], dialect: Dialect | None
) -> Iterator[Chunk]:
    if isinstance(source, pd.DataFrame):
        return _numbered(_frame_batches(source, chunk_rows))
    if source.is_dir():
        raise DataError(f"{source} is a folder; name the table file in it ({FORMATS})")
    if not source.is_file():
        raise DataError(f"{source} does not exist; name a table ({FORMATS})")
    suffix = source.suffix.lower()
    if suffix not in (*text_tables.SUFFIXES, *text_tables.PACKED, ".parquet", ".pq", ".xlsx"):
        raise DataError(f"{source} has the unknown format {source.suffix!r}; known: {FORMATS}")
    if source.stat().st_size == 0:
        raise DataError(f"{source} is empty")
    if suffix in (".parquet", ".pq"):
        return _parquet(source, chunk_rows, named=named)
    if suffix == ".xlsx":
        return excel.read(source, chunk_rows)
    return text_tables.read(source, chunk_rows, dialect or Dialect())


def _parquet(path: Path, chunk_rows: int, *, named: Sequence[str]) -> Iterator[Chunk]:
    try:
        # A small read buffer and no pre-buffering: a row group of a million rows is then never held whole.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            total = max(1, file.metadata.num_rows)
            names = file.schema_arrow.names
            check_names(names, str(path))
            if repeated := [name for name, count in Counter(names).items() if count > 1]:
                raise DataError(f"{path} has two columns of one name: {abbreviate(sorted(repeated))}; rename one")
            schema = pa.schema([f for f in file.schema_arrow if f.name in named or not _is_bytes(f.type)])
            if not len(schema):
                raise DataError(f"{path} has columns of bytes alone ({abbreviate(names)}); name those that hold text")
            _check_lists(path, file, schema)
            most = limits.chunk_rows(len(schema), chunk_rows)
            read = file.iter_batches(min(most, _rows_at_once(path, file, schema)), columns=schema.names)
            pieces = _within_limit(map(_decoded, read), path)
            for chunk in _numbered(_joined(pieces, most), schema):
                yield replace(chunk, done=chunk.line[-1] / total if len(chunk.line) else 1.0)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: of values inside lists
        raise DataError(f"{path} is not a readable Parquet file ({str(error).splitlines()[0]})") from error


def _check_lists(path: Path, file: pq.ParquetFile, schema: pa.Schema) -> None:
    """Raises DataError for lists so long that one row of them, the least that is read, may take the memory."""
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        for column in map(metadata.column, range(metadata.num_columns)):
            name = column.path_in_schema.partition(".")[0]
            if name in schema.names and column.num_values > max(limits.LISTED, 100 * metadata.num_rows):
                raise DataError(
                    f"{path} has {column.num_values:,} values in lists in {metadata.num_rows:,} rows of column {name}, "
                    f"more than {limits.LISTED:,} and 100 a row; leave that column out"
                )


def _rows_at_once(path: Path, file: pq.ParquetFile, schema: pa.Schema) -> int:
    """So many that they fit into memory even if all are the longest text of a dictionary, which a short file can name
    any number of times.
    """
    longest = 0  # of a row: the longest text of each column
    texts = [field.name for field in schema if _is_text(_value_type(field.type))]
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, read_dictionary=texts) as coded:
        for group in range(file.num_row_groups if texts else 0):
            if file.metadata.row_group(group).total_byte_size > limits.CELL:
                for batch in islice(coded.iter_batches(1, row_groups=[group], columns=texts), 1):
                    row = sum(pc.max(pc.binary_length(c.dictionary)).as_py() or 0 for c in batch.columns)
                    longest = max(longest, row)
    return max(1, min(_PIECE_ROWS, _PIECE_ROWS * limits.CELL // max(1, longest)))


def _decoded(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Dictionaries as the values they stand for."""
    columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _within_limit(batches: Iterator[pa.RecordBatch], path: Path) -> Iterator[pa.RecordBatch]:
    left = most = limits.most_unpacked(path.stat().st_size)
    for batch in batches:
        left -= batch.nbytes
        if left < 0:
            raise DataError(
                f"{path} unpacks to more than {most:,} bytes, {limits.UNPACKED_RATIO} times its size; if that is "
                "meant, write it as CSV"
            )
        yield batch


def _joined(pieces: Iterator[pa.RecordBatch], most_rows: int) -> Iterator[pa.RecordBatch]:
    """Small batches as batches that fill a chunk."""
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for piece in chain(chain.from_iterable(map(_split, pieces)), [None]):
        if held and (piece is None or rows + len(piece) > most_rows or size + piece.nbytes > limits.CHUNK_CHARACTERS):
            yield pa.Table.from_batches(held).combine_chunks().to_batches()[0]
            held, rows, size = [], 0, 0
        if piece is not None:
            held.append(piece)
            rows += len(piece)
            size += piece.nbytes


def _split(piece: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Parts of one row, or that fit into a chunk."""
    if len(piece) > 1 and piece.nbytes > limits.CHUNK_CHARACTERS:
        half = len(piece) // 2
        yield from _split(piece.slice(0, half))
        yield from _split(piece.slice(half))
    else:
        yield piece


def _frame_batches(frame: pd.DataFrame, chunk_rows: int) -> Iterator[pa.RecordBatch]:
    try:
        table = pa.Table.from_pandas(frame, preserve_index=False).combine_chunks()  # of frames that were concatenated
    except (pa.ArrowException, TypeError) as error:
        raise DataError(f"a column of the frame mixes types ({str(error).splitlines()[0]})") from error
    if not len(table):
        return iter([pa.RecordBatch.from_pylist([], schema=table.schema)])
    return _joined(map(_decoded, table.to_batches(max_chunksize=min(chunk_rows, _PIECE_ROWS))), chunk_rows)


def _numbered(batches: Iterator[pa.RecordBatch], schema: pa.Schema | None = None) -> Iterator[Chunk]:
    """Typed batches -> chunks of strings numbered from 1; with `schema`, an empty source gives one empty chunk."""
    start = 1
    for batch in batches:
        table, line, bad = _typed_to_strings(batch, start)
        declared_text = frozenset(field.name for field in batch.schema if _is_text(field.type))
        start += batch.num_rows
        yield Chunk(table, line, bad, 1.0, declared_text)
    if start == 1 and schema is not None:
        yield Chunk(make_table(schema.names, []), np.array([], dtype=np.int64), [], 1.0)


def _typed_to_strings(batch: pa.RecordBatch, start: int) -> tuple[pa.Table, NDArray[np.int64], list[BadRow]]:
    line = np.arange(start, start + batch.num_rows, dtype=np.int64)
    try:
        return pa.table([_strings(c) for c in batch.columns], names=batch.schema.names), line, []
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
    columns, good = [], np.ones(batch.num_rows, dtype=bool)
    for column in batch.columns:
        values = column.cast(pa.large_binary()).to_pylist() if _is_text(column.type) else _strings(column).to_pylist()
        texts = [v.decode(errors="surrogateescape") if isinstance(v, bytes) else v or "" for v in values]
        good &= np.array([is_text([text]) for text in texts])
        columns.append(texts)
    rows = list(zip(*columns, strict=True))
    names = batch.schema.names
    bad = [BadRow(int(line[i]), "not UTF-8", dict(zip(names, rows[i], strict=True))) for i in np.flatnonzero(~good)]
    return make_table(names, [list(rows[i]) for i in np.flatnonzero(good)]), line[good], bad


def _strings(column: pa.Array) -> pa.Array:
    """One column of any type -> strings, "" for null; raises ArrowInvalid where text is no UTF-8."""
    kind = column.type
    if _is_text(kind):  # Parquet does not promise that its strings are UTF-8, and only a cast from binary looks
        column = column.cast(pa.large_binary()).cast(STRING)
    elif pa.types.is_floating(kind):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column).cast(STRING)
        column = pc.replace_substring_regex(column, r"\.0$", "")
    elif pa.types.is_nested(kind):
        column = pa.array([cell_text(value) for value in column.to_pylist()], STRING)
    elif pa.types.is_timestamp(kind):  # as UTC, without the zone
        column = column.cast(pa.timestamp(kind.unit)).cast(STRING)
    else:
        column = column.cast(STRING)
    return pc.fill_null(column, "")


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    t = pa.types
    return bool(t.is_string(kind) or t.is_large_string(kind) or t.is_binary(kind) or t.is_large_binary(kind))
