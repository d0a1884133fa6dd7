"""How large the parts of a table may be, so that a small or broken file cannot take the memory or the day.

Each limit is far above what tables of text hold. A row over one is counted and set aside with the reason; a file that
cannot be cut into rows is refused with the limit and what to type. Memory follows from these numbers, not from the
file: readers hold a few chunks, and a chunk holds `CHUNK_CHARACTERS`. Sizes are in characters unless they say bytes.
"""

from __future__ import annotations

CELL = 4 << 20
"""One cell. A novel has a million; the model reads 512 tokens."""
ROW = 16 << 20
"""One row of a text table, with its separators and line ends: four of the longest cells. It is also how far the reader
looks for the end of an unclosed quote."""
COLUMNS = 4096
"""Every column is an array in each chunk and in each row group of Parquet; wider tables are matrices, not text."""
NAME = 1000
"""A column's name, and a label: errors and reports print them."""
CHUNK_ROWS = 8192
CHUNK_CHARACTERS = 16 << 20
"""A chunk ends at its rows, its characters or its cells, whichever comes first. Several copies of one are held at
once: as Python strings, Arrow arrays, Parquet pages and tokens, and the next one beside it."""
CHUNK_CELLS = 4 << 20
LISTED = 4 << 20
"""Values in the lists of a column of one of Parquet's row groups, if more than 100 a row: each takes some 34 bytes."""
UNPACKED_RATIO = 100
"""A packed table may unpack to so many times its bytes. Text packs 3 to 10 times, rows that repeat 50 times; gzip can
pack 1,000 times, and Parquet's dictionaries any number."""
UNPACKED_BYTES = 64 << 20
"""But a packed table may always unpack to so many bytes, however small it is."""
WORKBOOK_BYTES = 512 << 20
"""An Excel file's parts unpacked: its strings and each cell are held whole while it is read."""
SHEET_ROWS = 1 << 20
"""Excel's own limit."""
UNREADABLE_LINES = 100_000
"""More unreadable lines than this, and than good rows, mean that the file is no such table or is read wrongly."""
SHOWN = 10_000
"""What `set_aside.jsonl` keeps of a longer cell or row."""


def chunk_rows(columns: int, most: int = CHUNK_ROWS) -> int:
    """Rows of a chunk of so many columns."""
    return max(1, min(most, CHUNK_CELLS // max(1, columns)))


def most_unpacked(packed: int) -> int:
    """Bytes that a file of `packed` bytes may unpack to."""
    return max(UNPACKED_BYTES, UNPACKED_RATIO * packed)


def shorten(text: str, most: int = SHOWN) -> str:
    """The start of a longer text, and how long it is."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"
