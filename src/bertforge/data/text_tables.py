"""Tables that are lines of text: CSV with any separator and JSON lines, as they are, gzipped or alone in a zip file.

The encoding and separator of a CSV are detected (`dialect`), for which its bytes are read once before its rows. What
was found is logged unless it is the usual: UTF-8, and commas (tabs in a .tsv). JSON is UTF-8 (RFC 8259, section 8.1).
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import lzma
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

from bertforge.data import limits
from bertforge.data.chunks import BadRow, Chunk, abbreviate, cell_text, check_names, is_text, make_chunk
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
from bertforge.data.lines import bounded_lines
from bertforge.errors import DataError

log = logging.getLogger(__name__)

_DELIMITED, _JSON = (".csv", ".tsv", ".txt"), (".jsonl", ".ndjson", ".json")
SUFFIXES = (*_DELIMITED, *_JSON)
PACKED = (".gz", ".zip")
_PIECE = (
    1 << 12
)  # bytes unpacked at once: zipfile unpacks what it reads of bzip2 and LZMA whole, a million times as much
_LATE_KEYS = 20  # of JSON lines that are named


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
        newline = detect_newline(head)
        text = open_text(stream, encoding, newline)  # closes the file when it is forgotten
        source = _Source(
            path=path,
            lines=bounded_lines(text, limits.ROW, newline),
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
                    yield _Unpacked.of(unpacked, path), file
            elif kind == "zip":
                with zipfile.ZipFile(file) as archive, archive.open(_member(path, archive)) as unpacked:
                    yield _Unpacked.of(unpacked, path), file
            else:
                yield file, file
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        OSError,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as error:
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
            f"{path} must hold exactly one table ({', '.join(SUFFIXES)}), but holds {len(tables)}: {abbreviate(tables)}"
        )
    return tables[0]


class _Unpacked(io.RawIOBase):
    """The bytes that a packed file unpacks to; raises DataError once they are more than its size may hold."""

    def __init__(self, packed: IO[bytes], path: Path) -> None:
        self._packed, self._path = packed, path
        self._left = self._most = limits.most_unpacked(path.stat().st_size)

    @classmethod
    def of(cls, packed: Any, path: Path) -> IO[bytes]:
        return io.BufferedReader(cls(packed, path), 1 << 16)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._packed.read(min(len(buffer), _PIECE))
        buffer[: len(content)] = content
        self._left -= len(content)
        if self._left < 0:
            raise DataError(
                f"{self._path} unpacks to more than {self._most:,} bytes, {limits.UNPACKED_RATIO} times its size; if "
                "that is meant, unpack it and name the file in it"
            )
        return len(content)


# ------------------------------------------------------------------------------------------------- CSV


def _csv(source: _Source) -> Iterator[Chunk]:
    records = CsvRecords(source.lines, str(source.path), source.separator)
    most = limits.chunk_rows(len(records.header), source.chunk_rows)
    rows: list[list[str]] = []
    lines: list[int] = []
    bad: list[BadRow] = []
    characters = 0
    for record in records:
        if record.problem:
            bad.append(BadRow(record.line, record.problem, record.raw))
        else:
            rows.append(record.fields)
            lines.append(record.line)
        characters += record.characters
        if len(rows) + len(bad) >= most or characters >= limits.CHUNK_CHARACTERS:
            yield make_chunk(records.header, rows, lines, bad, source.done(), encoding=source.encoding)
            rows, lines, bad, characters = [], [], [], 0
    yield make_chunk(records.header, rows, lines, bad, 1.0, encoding=source.encoding)


# ------------------------------------------------------------------------------------------ JSON lines


def _json_lines(source: _Source, head: str) -> Iterator[Chunk]:
    """The columns are the keys met in the first chunk; what a later row has under another key is left out, and said."""
    path, columns = source.path, list[str]()
    late: Counter[str] = Counter()  # rows with a key that is no column
    if head.lstrip(" \t\r\n").startswith("["):
        raise DataError(f"{path} is one JSON array, not one object per line; convert it: jq -c '.[]' {path}")
    numbered = enumerate(source.lines, start=1)
    most = first = source.chunk_rows
    while group := list(_json_group(numbered, most, source.encoding)):
        if not columns:
            columns = list(dict.fromkeys(key for row in group if not isinstance(row, BadRow) for key in row.cells))
            if not columns:
                raise DataError(
                    f"{path} holds no JSON object in its first {group[-1].line} lines; one per line is needed"
                )
            if broken := [column for column in columns if not is_text([column])]:
                raise DataError(f"{path} has a key that is no text (a lone surrogate): {broken[0]!a}; rename it")
            check_names(columns, str(path))
            most, first = limits.chunk_rows(len(columns), source.chunk_rows), group[-1].line
        known = set(columns)
        good = [row for row in group if not isinstance(row, BadRow)]
        for row in good:
            late.update(key if key in late or len(late) < _LATE_KEYS else "" for key in row.cells.keys() - known)
        for start in range(0, len(group), most):
            part = group[start : start + most]
            rows = [row for row in part if not isinstance(row, BadRow)]
            yield make_chunk(
                columns,
                [[row.cells.get(column, "") for column in columns] for row in rows],
                [row.line for row in rows],
                [row for row in part if isinstance(row, BadRow)],
                source.done(),
                declared_text=frozenset[str]().union(*(row.texts for row in rows)),
            )
    for key, count in sorted(late.items()):
        which = f"key {limits.shorten(key, 60)!a}" if key else "every other late key"
        log.warning("%s: %s of %d rows is left out: it is not in the first %d lines", path, which, count, first)


@dataclass(frozen=True)
class _JsonRow:
    line: int
    cells: dict[str, str]
    texts: frozenset[str]
    """Keys whose value is text."""


def _json_group(numbered: Iterator[tuple[int, str]], most: int, encoding: str) -> Iterator[_JsonRow | BadRow]:
    """The next rows, as many as one chunk holds; blank lines are none."""
    rows = characters = 0
    for line, raw in numbered:
        if not raw.strip():
            continue
        yield _json_row(line, raw, encoding)
        rows += 1
        characters += len(raw)
        if rows >= most or characters >= limits.CHUNK_CHARACTERS:
            return


def _json_row(line: int, raw: str, encoding: str) -> _JsonRow | BadRow:
    problem = "broken JSON"
    try:
        if len(raw) > limits.ROW:
            problem = f"row of more than {limits.ROW:,} characters: shorten it"
        elif not is_text([raw]):
            problem = f"not {encoding}"
        elif isinstance(row := json.loads(raw), dict):
            texts = frozenset(key for key, value in row.items() if isinstance(value, str))
            return _JsonRow(line, {key: cell_text(value) for key, value in row.items()}, texts)
        else:
            problem = "not a JSON object"
    except (ValueError, RecursionError):
        pass
    return BadRow(line, problem, raw.rstrip("\r\n"))
