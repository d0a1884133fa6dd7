"""A chunk's columns as text, numbers and dates, each parsed once and shared by the checks and the features."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Dates = NDArray[np.datetime64]

DATE_FORMATS = "MM/DD/YYYY HH:MM:SS, MM/DD/YYYY or ISO 8601 (YYYY-MM-DD, with or without a time)"


class Rows:
    """Parsed views of a table of strings (`Chunk.table`); every array has one entry per row."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self._trimmed: dict[str, pa.Array] = {}
        self._dates: dict[str, Dates] = {}
        self._made: dict[str, pa.Array] = {}

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def names(self) -> list[str]:
        return list(self.table.column_names)

    def raw(self, name: str) -> pa.Array:
        """The column as it stands in the source."""
        column = self.table[name]
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def text(self, name: str) -> pa.Array:
        """The column without white space around each value."""
        if name not in self._trimmed:
            self._trimmed[name] = pc.utf8_trim_whitespace(self.raw(name))
        return self._trimmed[name]

    def present(self, name: str) -> Bools:
        """Where the column holds anything but white space."""
        found: Bools = pc.not_equal(self.text(name), "").to_numpy(zero_copy_only=False)
        return found

    def number(self, name: str) -> Floats:
        """float64; NaN where the value is absent or not a finite number."""
        text = pc.if_else(pc.equal(self.text(name), ""), pa.scalar(None, pa.large_string()), self.text(name))
        try:
            values = text.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
        except pa.ArrowInvalid:  # some value is not a number: the slow way finds which
            values = pd.to_numeric(pd.Series(text.to_pylist(), dtype=object), errors="coerce").to_numpy(np.float64)
        return np.where(np.isfinite(values), values, np.nan)

    def once(self, name: str, make: Callable[[], pa.Array]) -> pa.Array:
        """What `make` returns, made at the first call under this name: a column that several features start from."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def date(self, name: str) -> Dates:
        """datetime64[s], in UTC; NaT where the value is absent or in none of DATE_FORMATS."""
        if name not in self._dates:
            self._dates[name] = _parse_dates(self.text(name))
        return self._dates[name]


def _parse_dates(text: pa.Array) -> Dates:
    values = np.array(text.to_pylist(), dtype=object)
    is_iso = pc.match_substring_regex(text, r"^\d{4}-\d{2}-\d{2}").to_numpy(zero_copy_only=False)
    dates = np.full(len(values), np.datetime64("NaT"), dtype="datetime64[s]")
    for pattern, among in (("%m/%d/%Y %H:%M:%S", ~is_iso), ("%m/%d/%Y", ~is_iso), ("ISO8601", is_iso)):
        left = among & np.isnat(dates)
        if left.any():
            parsed = pd.to_datetime(values[left], format=pattern, errors="coerce", utc=True)
            dates[left] = parsed.tz_localize(None).to_numpy("datetime64[s]")
    return dates
