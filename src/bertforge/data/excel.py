"""Excel workbooks: the first sheet, whose first row names the columns.

openpyxl streams the sheet's rows (`read_only`), so a large one is never held whole, and gives the values that formulas
had when the file was saved (`data_only`).
"""

from __future__ import annotations

import logging
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from bertforge.data import limits
from bertforge.data.chunks import BadRow, Chunk, cell_text, make_chunk, name_columns
from bertforge.errors import DataError, MachineError, reason

log = logging.getLogger(__name__)

Row = tuple[int, tuple[Any, ...]]
"""Its number in the sheet, and its cells."""
# What zipfile and openpyxl raise for a damaged file; a SyntaxError is XML's ParseError.
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, SyntaxError),
    *(LookupError, ValueError, ArithmeticError, TypeError, AttributeError),
)


def read(path: Path, chunk_rows: int) -> Iterator[Chunk]:
    """The rows of the first sheet that are not blank; `line` is the sheet's row number.

    A row with more cells than the header is set aside. Raises MachineError without openpyxl, DataError for a file that
    is no workbook, has no header or is over a limit.
    """
    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise MachineError("Excel files need openpyxl: pip install 'bertforge[excel]'") from error
    try:
        _check_size(path)
        with closing(load_workbook(path, read_only=True, data_only=True)) as book:
            sheets = book.worksheets
            if len(sheets) > 1:
                log.warning("%s: the first of %d sheets is read, %r", path, len(sheets), sheets[0].title)
            yield from _chunks(path, sheets[0], chunk_rows)
    except _DAMAGED as error:
        raise DataError(f"{path} is not a readable Excel file ({reason(error)})") from error


def _check_size(path: Path) -> None:
    """Raises DataError for a file that unpacks to too much; zipfile reads no more of a part than that says it holds."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())
    most = min(limits.WORKBOOK_BYTES, limits.most_unpacked(path.stat().st_size))
    if unpacked > most:
        raise DataError(
            f"{path} unpacks to {unpacked:,} bytes, more than the {most:,} that an Excel file of its size may; "
            "save the sheet as CSV"
        )


def _chunks(path: Path, sheet: Any, chunk_rows: int) -> Iterator[Chunk]:
    total = max(1, sheet.max_row or 1)
    numbered: Iterator[Row] = enumerate(sheet.iter_rows(values_only=True), start=1)
    _, header = next(numbered, (1, ()))
    columns = name_columns([cell_text(cell) for cell in header], str(path))
    most = limits.chunk_rows(len(columns), chunk_rows)
    group: list[Row] = []
    characters = 0
    empty = True
    for line, row in _within_limits(path, numbered, len(columns)):
        group.append((line, row))
        characters += sum(len(cell) for cell in row if isinstance(cell, str))
        if len(group) == most or characters > limits.CHUNK_CHARACTERS:
            yield _chunk(columns, group, total)
            group, characters, empty = [], 0, False
    if group or empty:
        yield _chunk(columns, group, total)


def _within_limits(path: Path, rows: Iterator[Row], width: int) -> Iterator[Row]:
    """The rows that hold something; raises DataError past the last row of a sheet, or for too much beside the table."""
    beside = 0  # cells
    for line, row in rows:
        beside += max(0, len(row) - width)
        if line > limits.SHEET_ROWS or beside > limits.CHUNK_CELLS:
            what = f"more than {limits.SHEET_ROWS:,} rows" if line > limits.SHEET_ROWS else "much beside its columns"
            raise DataError(f"{path} has {what}; save the sheet as CSV, or delete what does not belong to the table")
        if any(cell is not None for cell in row):
            yield line, row


def _chunk(columns: list[str], group: list[Row], total: int) -> Chunk:
    rows: list[list[str]] = []
    lines: list[int] = []
    bad: list[BadRow] = []
    declared: set[str] = set()
    for line, cells in group:
        texts = [_cell(cell) for cell in cells]
        if any(texts[len(columns) :]):
            bad.append(BadRow(line, f"{len(texts)} fields instead of {len(columns)}", "\t".join(texts)))
            continue
        rows.append((texts + [""] * len(columns))[: len(columns)])
        lines.append(line)
        declared.update(name for name, cell in zip(columns, cells, strict=False) if isinstance(cell, str))
    done = min(1.0, group[-1][0] / total) if group else 1.0
    return make_chunk(columns, rows, lines, bad, done, declared_text=frozenset(declared))


def _cell(value: Any) -> str:
    """Dates, times and durations as Python writes them (ISO 8601), not in the quotes of JSON."""
    return cell_text(value) if value is None or isinstance(value, str | int | float) else str(value)
