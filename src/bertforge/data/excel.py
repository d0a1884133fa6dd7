"""Excel workbooks: the first sheet, whose first row names the columns.

openpyxl streams the sheet's rows (`read_only`), so a large one is never held whole, and gives the values that formulas
had when the file was saved (`data_only`).
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from bertforge.data.chunks import Chunk, cell_text, make_chunk
from bertforge.errors import DataError, MachineError

log = logging.getLogger(__name__)


def read(path: Path, chunk_rows: int) -> Iterator[Chunk]:
    """The rows of the first sheet that are not blank; `line` is the sheet's row number.

    Raises MachineError without openpyxl, DataError for a file that is no workbook or has no header.
    """
    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise MachineError("Excel files need openpyxl: pip install 'bertforge[excel]'") from error
    try:
        book = load_workbook(path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise DataError(f"{path} is not a readable Excel file ({error})") from error
    try:
        if len(book.sheetnames) > 1:
            log.warning("%s: the first of %d sheets is read, %r", path, len(book.sheetnames), book.sheetnames[0])
        sheet = book.worksheets[0]
        total = max(1, sheet.max_row or 1)
        rows = sheet.iter_rows(values_only=True)
        columns = _header(path, next(rows, ()))
        filled = ((line, row) for line, row in enumerate(rows, start=2) if any(cell is not None for cell in row))
        empty = True
        while group := list(islice(filled, chunk_rows)):
            yield _chunk(columns, group, total)
            empty = False
        if empty:
            yield make_chunk(columns, [], [], [], 1.0)
    finally:
        book.close()


def _header(path: Path, cells: tuple[Any, ...]) -> list[str]:
    named = [cell_text(cell).strip() for cell in cells]
    if not any(named):
        raise DataError(f"{path} has no header: the first row of its first sheet is empty, but must name the columns")
    columns = [column or f"column {place}" for place, column in enumerate(named, start=1)]
    if repeated := sorted({column for column in columns if columns.count(column) > 1}):
        raise DataError(f"{path} names a column twice in its header: {', '.join(repeated)}")
    return columns


def _chunk(columns: list[str], group: list[tuple[int, tuple[Any, ...]]], total: int) -> Chunk:
    rows = [[_cell(row[place]) if place < len(row) else "" for place in range(len(columns))] for _, row in group]
    declared = {name for _, row in group for name, cell in zip(columns, row, strict=False) if isinstance(cell, str)}
    lines = [line for line, _ in group]
    return make_chunk(columns, rows, lines, [], min(1.0, lines[-1] / total), declared_text=frozenset(declared))


def _cell(value: Any) -> str:
    """Dates as ISO 8601, without the quotes of JSON."""
    return str(value) if hasattr(value, "isoformat") else cell_text(value)
