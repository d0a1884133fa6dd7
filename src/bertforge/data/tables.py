"""Streaming readers: CSV, zipped CSV, Parquet, JSON lines or a pandas frame -> chunks of string columns.

Every source gives the same thing, so all that follows sees one kind of table: columns of strings, "" where a value is
absent (null, NaN, a missing JSON key), whole numbers without ".0". A row that can't be read is not dropped: it comes
along as a `BadRow` with its line. `line` is the 1-based line of the file on which a row starts (CSV, JSON lines) or
the 1-based row number (Parquet, frames).

Chunks are pyarrow tables: their string columns cost one allocation each, and counting words or matching a pattern in
them runs in C++ without the interpreter lock, beside the tokenizer.
"""

from __future__ import annotations

import json
import logging
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bertforge.data.csv_records import CsvRecords
from bertforge.errors import DataError

log = logging.getLogger(__name__)

CHUNK_ROWS = 8192
STRING = pa.large_string()  # 64-bit offsets: a chunk of long documents may pass 2 GiB
FORMATS = ".csv, .zip (one CSV inside), .parquet, .jsonl, .ndjson, .json (one object per line)"


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


def read_chunks(
    source: Path | pd.DataFrame, chunk_rows: int = CHUNK_ROWS, *, named: Sequence[str] = ()
) -> Iterator[Chunk]:
    """Yields the rows of `source` in order, at least one chunk (empty when there is only a header).

    A Parquet column of bytes (images, say) counts as absent unless it is among the `named`, which hold text.
    Raises DataError, before the first chunk, when the source is missing, empty, of unknown format or damaged.
    """
    if isinstance(source, pd.DataFrame):
        return _numbered(_frame_batches(source, chunk_rows))
    if source.is_dir():
        raise DataError(f"{source} is a folder; name the table file in it ({FORMATS})")
    if not source.is_file():
        raise DataError(f"{source} does not exist; name a table ({FORMATS})")
    parquet = partial(_parquet, named=named)
    readers: dict[str, Callable[[Path, int], Iterator[Chunk]]]
    readers = {".csv": _csv, ".zip": _zipped_csv, ".parquet": parquet, ".pq": parquet}
    readers |= dict.fromkeys((".jsonl", ".ndjson", ".json"), _json_lines)
    reader = readers.get(source.suffix.lower())
    if reader is None:
        raise DataError(f"{source} has the unknown format {source.suffix!r}; known: {FORMATS}")
    if source.stat().st_size == 0:
        raise DataError(f"{source} is empty")
    return reader(source, chunk_rows)


# ------------------------------------------------------------------------------------------------- CSV


def _csv(path: Path, chunk_rows: int) -> Iterator[Chunk]:
    with path.open("rb") as file:
        yield from _csv_stream(file, path, chunk_rows, file)


def _zipped_csv(path: Path, chunk_rows: int) -> Iterator[Chunk]:
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            names = [n for n in archive.namelist() if n.lower().endswith(".csv") and not n.startswith("__MACOSX/")]
            if len(names) != 1:
                raise DataError(f"{path} must hold exactly one .csv file, but holds {len(names)}: {', '.join(names)}")
            with archive.open(names[0]) as member:
                yield from _csv_stream(member, path, chunk_rows, file)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path} is not a readable zip file ({error})") from error


def _csv_stream(stream: IO[bytes], path: Path, chunk_rows: int, file: IO[bytes]) -> Iterator[Chunk]:
    """`file` is the file on disk under `stream`: its position tells how far we are."""
    size = path.stat().st_size
    records = CsvRecords(stream, str(path))
    rows: list[list[str]] = []
    lines: list[int] = []
    bad: list[BadRow] = []
    for record in records:
        if record.problem:
            bad.append(BadRow(record.line, record.problem, record.raw))
        else:
            rows.append(record.fields)
            lines.append(record.line)
        if len(rows) + len(bad) >= chunk_rows:
            yield _chunk(records.header, rows, lines, bad, min(1.0, file.tell() / size))
            rows, lines, bad = [], [], []
    yield _chunk(records.header, rows, lines, bad, 1.0)


def _chunk(columns: list[str], rows: list[list[str]], lines: list[int], bad: list[BadRow], done: float) -> Chunk:
    """Rows of strings -> a chunk; rows that are no UTF-8 (lone surrogates in a Python string) go to `bad`."""
    try:
        table = _to_table(columns, rows)
    except UnicodeEncodeError:
        encodable = [_is_utf8(row) for row in rows]
        broken = [
            BadRow(line, "not UTF-8", dict(zip(columns, row, strict=True)))
            for line, row, good in zip(lines, rows, encodable, strict=True)
            if not good
        ]
        bad = sorted(bad + broken, key=lambda row: row.line)
        lines = [line for line, good in zip(lines, encodable, strict=True) if good]
        table = _to_table(columns, [row for row, good in zip(rows, encodable, strict=True) if good])
    return Chunk(table, np.array(lines, dtype=np.int64), bad, done)


def _to_table(columns: list[str], rows: list[list[str]]) -> pa.Table:
    values = list(zip(*rows, strict=True)) if rows else [()] * len(columns)
    return pa.table([pa.array(column, STRING) for column in values], names=columns)


def _is_utf8(row: list[str]) -> bool:
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return False
    return True


# ------------------------------------------------------------------------------------------ JSON lines


def _json_lines(path: Path, chunk_rows: int) -> Iterator[Chunk]:
    """The columns are the keys met in the first chunk; what a later row has under another key is left out, and said."""
    size = path.stat().st_size
    columns: list[str] = []
    late: Counter[str] = Counter()  # rows with a key that is no column
    with path.open("rb") as file:
        if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            raise DataError(f"{path} is one JSON array, not one object per line; convert it: jq -c '.[]' {path}")
        file.seek(0)
        numbered = enumerate(file, start=1)
        while group := list(islice(numbered, chunk_rows)):
            parsed = [(line, raw, _json_object(raw)) for line, raw in group if raw.strip()]
            if not columns:
                columns = list(dict.fromkeys(key for _, _, row in parsed if isinstance(row, dict) for key in row))
                if not columns:
                    raise DataError(
                        f"{path} holds no JSON object in its first {len(group)} lines; one per line is needed"
                    )
                if broken := [column for column in columns if not _is_utf8([column])]:
                    raise DataError(f"{path} has a key that is no text (a lone surrogate): {broken[0]!a}; rename it")
            rows: list[list[str]] = []
            lines: list[int] = []
            bad: list[BadRow] = []
            known = set(columns)
            declared = frozenset(
                name for *_, row in parsed if isinstance(row, dict) for name in row if isinstance(row[name], str)
            )
            for line, raw, row in parsed:
                if isinstance(row, str):
                    bad.append(BadRow(line, row, raw.decode(errors="surrogateescape").rstrip("\r\n")))
                    continue
                late.update(row.keys() - known)
                rows.append([_json_value(row.get(column)) for column in columns])
                lines.append(line)
            chunk = _chunk(columns, rows, lines, bad, min(1.0, file.tell() / size))
            yield replace(chunk, declared_text=declared)
    for key, count in sorted(late.items()):
        log.warning("%s: key %a of %d rows is left out: it is not in the first %d lines", path, key, count, chunk_rows)


def _json_object(raw: bytes) -> dict[str, Any] | str:
    """The object on a line, or the reason why there is none."""
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "broken JSON"
    return value if isinstance(value, dict) else "not a JSON object"


def _json_value(value: Any) -> str:
    if value is None or value != value:  # null or NaN
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str).removesuffix(".0")


# ------------------------------------------------------------------------------------ Parquet and frames


def _parquet(path: Path, chunk_rows: int, *, named: Sequence[str]) -> Iterator[Chunk]:
    try:
        # A small read buffer and no pre-buffering: a row group of a million rows is then never held whole.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            total = max(1, file.metadata.num_rows)
            names = file.schema_arrow.names
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise DataError(f"{path} has two columns of one name: {', '.join(repeated)}; rename one")
            schema = pa.schema([f for f in file.schema_arrow if f.name in named or not _is_bytes(f.type)])
            for chunk in _numbered(file.iter_batches(chunk_rows, columns=schema.names), schema):
                yield replace(chunk, done=chunk.line[-1] / total if len(chunk.line) else 1.0)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({str(error).splitlines()[0]})") from error


def _frame_batches(frame: pd.DataFrame, chunk_rows: int) -> Iterator[pa.RecordBatch]:
    try:
        table = pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowException, TypeError) as error:
        raise DataError(f"a column of the frame mixes types ({str(error).splitlines()[0]})") from error
    return iter(table.to_batches(max_chunksize=chunk_rows) or [pa.RecordBatch.from_pylist([], schema=table.schema)])


def _numbered(batches: Iterator[pa.RecordBatch], schema: pa.Schema | None = None) -> Iterator[Chunk]:
    """Typed batches -> chunks of strings numbered from 1; with `schema`, an empty source gives one empty chunk."""
    start = 1
    for batch in batches:
        table, line, bad = _typed_to_strings(batch, start)
        declared_text = frozenset(field.name for field in batch.schema if _is_text(_value_type(field.type)))
        start += batch.num_rows
        yield Chunk(table, line, bad, 1.0, declared_text)
    if start == 1 and schema is not None:
        yield Chunk(_to_table(schema.names, []), np.array([], dtype=np.int64), [], 1.0)


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
        good &= np.array([_is_utf8([text]) for text in texts])
        columns.append(texts)
    rows = list(zip(*columns, strict=True))
    names = batch.schema.names
    bad = [BadRow(int(line[i]), "not UTF-8", dict(zip(names, rows[i], strict=True))) for i in np.flatnonzero(~good)]
    return _to_table(names, [list(rows[i]) for i in np.flatnonzero(good)]), line[good], bad


def _strings(column: pa.Array) -> pa.Array:
    """One column of any type -> strings, "" for null; raises ArrowInvalid where text is no UTF-8."""
    kind = _value_type(column.type)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text(kind):  # Parquet does not promise that its strings are UTF-8, and only a cast from binary looks
        column = column.cast(pa.large_binary()).cast(STRING)
    elif pa.types.is_floating(kind):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column).cast(STRING)
        column = pc.replace_substring_regex(column, r"\.0$", "")
    elif pa.types.is_nested(kind):
        column = pa.array([_json_value(value) for value in column.to_pylist()], STRING)
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
