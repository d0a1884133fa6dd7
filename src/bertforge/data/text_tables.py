"""Tables that are lines of text: CSV with any separator and JSON lines, as they are, gzipped or alone in a zip file.

The encoding and separator of a CSV are detected (`dialect`), for which its bytes are read once before its rows. What
was found is logged unless it is the usual: UTF-8, and commas (tabs in a .tsv). JSON is UTF-8 (RFC 8259, section 8.1).
"""

from __future__ import annotations

import gzip
import json
import logging
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import IO, Any

from bertforge.data.chunks import BadRow, Chunk, cell_text, is_text, make_chunk
from bertforge.data.csv_records import CsvRecords
from bertforge.data.dialect import (
    SEPARATORS,
    UTF8,
    Dialect,
    detect_encoding,
    detect_newline,
    detect_separator,
    encoding_name,
    open_text,
    read_head,
)
from bertforge.errors import DataError

log = logging.getLogger(__name__)

_DELIMITED, _JSON = (".csv", ".tsv", ".txt"), (".jsonl", ".ndjson", ".json")
SUFFIXES = (*_DELIMITED, *_JSON)
PACKED = (".gz", ".zip")


@dataclass(frozen=True)
class _Source:
    """A text table of which everything is known."""

    path: Path
    lines: Iterator[str]
    encoding: str
    """For people."""
    separator: str
    done: Callable[[], float]
    """Share of the file read so far."""
    chunk_rows: int


def read(path: Path, chunk_rows: int, dialect: Dialect) -> Iterator[Chunk]:
    """The rows of a text table; what `dialect` leaves open is detected."""
    kind = PurePath(_name_inside(path)).suffix.lower()
    encoding, separator, found = dialect.codec or UTF8, dialect.separator, list[str]()
    if not dialect.codec and kind in _DELIMITED:
        with _opened(path) as (stream, _):
            encoding = detect_encoding(stream)
        found += [encoding_name(encoding)] if encoding != UTF8 else []
    with _opened(path) as (stream, _):
        head = read_head(stream, encoding)
    if not separator and kind in _DELIMITED:
        usual = "\t" if kind == ".tsv" else ","
        separator = detect_separator(head, detect_newline(head), usual)
        found += [f"columns separated by {SEPARATORS[separator]}"] if separator != usual else []
    if found:
        log.warning("%s is read as %s", path, ", ".join(found))
    size = path.stat().st_size
    with _opened(path) as (stream, file):
        source = _Source(
            path=path,
            lines=open_text(stream, encoding, detect_newline(head)),
            encoding=encoding_name(encoding),
            separator=separator,
            done=lambda: min(1.0, file.tell() / size),
            chunk_rows=chunk_rows,
        )
        yield from _csv(source) if kind in _DELIMITED else _json_lines(source, head)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The table's bytes, and the file on disk whose position tells how far they are read."""
    kind = path.suffix.lower().removeprefix(".")
    try:
        with path.open("rb") as file:
            if kind == "gz":
                with gzip.open(file) as unpacked:
                    yield unpacked, file  # type: ignore[misc]  # GzipFile reads bytes as any file does
            elif kind == "zip":
                with zipfile.ZipFile(file) as archive, archive.open(_member(path, archive)) as unpacked:
                    yield unpacked, file
            else:
                yield file, file
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path} is not a readable {kind} file ({error})") from error
    except UnicodeError as error:  # UTF-16 that does not say which byte comes first, say
        raise DataError(f"{path} is not in the encoding named ({error}); name another with --encoding") from error


def _name_inside(path: Path) -> str:
    if path.suffix.lower() == ".gz":
        inside = path.stem if PurePath(path.stem).suffix.lower() in SUFFIXES else ""
        if not inside:
            raise DataError(f"{path} does not say what it holds; name it like {path.stem}.csv.gz")
        return inside
    if path.suffix.lower() == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                return _member(path, archive)
        except zipfile.BadZipFile as error:
            raise DataError(f"{path} is not a readable zip file ({error})") from error
    return path.name


def _member(path: Path, archive: zipfile.ZipFile) -> str:
    """The one table in a zip file: the one CSV, or the one text table of any kind."""
    names = [n for n in archive.namelist() if n.lower().endswith(SUFFIXES) and not n.startswith("__MACOSX/")]
    tables = [n for n in names if n.lower().endswith(".csv")] or names
    if len(tables) != 1:
        raise DataError(
            f"{path} must hold exactly one table ({', '.join(SUFFIXES)}), but holds {len(tables)}: {', '.join(tables)}"
        )
    return tables[0]


# ------------------------------------------------------------------------------------------------- CSV


def _csv(source: _Source) -> Iterator[Chunk]:
    records = CsvRecords(source.lines, str(source.path), source.separator)
    rows: list[list[str]] = []
    lines: list[int] = []
    bad: list[BadRow] = []
    for record in records:
        if record.problem:
            bad.append(BadRow(record.line, record.problem, record.raw))
        else:
            rows.append(record.fields)
            lines.append(record.line)
        if len(rows) + len(bad) >= source.chunk_rows:
            yield make_chunk(records.header, rows, lines, bad, source.done(), encoding=source.encoding)
            rows, lines, bad = [], [], []
    yield make_chunk(records.header, rows, lines, bad, 1.0, encoding=source.encoding)


# ------------------------------------------------------------------------------------------ JSON lines


def _json_lines(source: _Source, head: str) -> Iterator[Chunk]:
    """The columns are the keys met in the first chunk; what a later row has under another key is left out, and said."""
    path, columns = source.path, list[str]()
    late: Counter[str] = Counter()  # rows with a key that is no column
    if head.lstrip(" \t\r\n").startswith("["):
        raise DataError(f"{path} is one JSON array, not one object per line; convert it: jq -c '.[]' {path}")
    numbered = enumerate(source.lines, start=1)
    while group := list(islice(numbered, source.chunk_rows)):
        parsed = [(line, raw, _json_object(raw, source.encoding)) for line, raw in group if raw.strip()]
        if not columns:
            columns = list(dict.fromkeys(key for _, _, row in parsed if isinstance(row, dict) for key in row))
            if not columns:
                raise DataError(f"{path} holds no JSON object in its first {len(group)} lines; one per line is needed")
            if broken := [column for column in columns if not is_text([column])]:
                raise DataError(f"{path} has a key that is no text (a lone surrogate): {broken[0]!a}; rename it")
        rows: list[list[str]] = []
        lines: list[int] = []
        bad: list[BadRow] = []
        declared: set[str] = set()
        known = set(columns)
        for line, raw, row in parsed:
            if isinstance(row, str):
                bad.append(BadRow(line, row, raw.rstrip("\r\n")))
                continue
            late.update(row.keys() - known)
            declared.update(name for name, value in row.items() if isinstance(value, str))
            rows.append([cell_text(row.get(column)) for column in columns])
            lines.append(line)
        yield make_chunk(columns, rows, lines, bad, source.done(), declared_text=frozenset(declared))
    for key, count in sorted(late.items()):
        log.warning(
            "%s: key %a of %d rows is left out: it is not in the first %d lines", path, key, count, source.chunk_rows
        )


def _json_object(raw: str, encoding: str) -> dict[str, Any] | str:
    """The object on a line, or the reason why there is none."""
    if not is_text([raw]):
        return f"not {encoding}"
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return "broken JSON"
    return value if isinstance(value, dict) else "not a JSON object"
