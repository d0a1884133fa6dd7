"""Reading a folder that `bertforge prepare` wrote.

bertforge.json          kind "data": schema, counts, fingerprint, options (manifest.py)
table.parquet           the good rows: the source's columns as strings, then the derived columns
labels.npy              int64 [rows], index into the schema's label names
lines.npy               int64 [rows], where each row stands in the source
dates.npy               datetime64[s] [rows], when the schema has a date column
splits/random.npy       int8 [rows], 0 train, 1 validation, 2 test, -1 none of them; time, given and fold-N.npy alike
tokens/<tokenizer>/     ids.npy, offsets.npy and the tokenizer's files (tokens.py), one folder per tokenizer
baselines/              what word counts and columns alone predict (evaluation/baselines.py), made by the first run
set_aside.jsonl         the other rows: line, reason, raw; the file, of those that came with --validation or --test
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bertforge.artifact import fresh_directory
from bertforge.data.features import named_as_derived
from bertforge.data.schema import Schema
from bertforge.data.splits import PARTS
from bertforge.data.streaming import ahead, progress
from bertforge.data.tokens import Tokenizer, TokenStore, TokenWriter
from bertforge.errors import DataError, UsageError
from bertforge.locks import locked, tidy_inside
from bertforge.manifest import read_manifest

TABLE_FILE, SET_ASIDE_FILE = "table.parquet", "set_aside.jsonl"
SPLITS = ("random", "time")  # those that can be asked for by name
GIVEN = "given"


@dataclass(frozen=True)
class PreparedData:
    """A prepared table; arrays have one entry per good row, in the source's order."""

    directory: Path
    manifest: dict[str, Any]
    reused: bool = False
    """True when `prepare` found its work done already."""

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Raises ArtifactError when the folder is not prepared data or a file of it is missing or changed."""
        manifest = read_manifest(directory, "data")
        tidy_inside(directory / "tokens")
        return cls(directory, manifest)

    @classmethod
    def of(cls, directory: Path, model: Path | str, manifest: dict[str, Any], *, other_tables: bool = False) -> Self:
        """The prepared data that the `model` with this `manifest` was trained on: the one door for all that judges it.

        With `other_tables`, data of another table will do as well, and that of an earlier run, which does not say what
        table it was trained on. Raises DataError for other data, and always for
        another split of the same table: its validation and test rows may be rows that the model was trained on, and
        judging or calibrating by those proves nothing.
        """
        found = cls.open(directory)
        trained_on = manifest["data"]
        if found.fingerprint == trained_on["fingerprint"]:
            return found
        if not set(found.tables) & set(trained_on.get("tables", ())) and other_tables:
            return found
        raise DataError(
            f"{model} was trained on other data than {directory}, or on another split of it, whose train rows may be "
            "test rows here; name the folder it was trained on with --data"
        )

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    @property
    def schema(self) -> Schema:
        return Schema.from_dict(self.manifest["schema"])

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.schema.label_names

    @property
    def fingerprint(self) -> str:
        """Hash of the source's bytes and the options: equal fingerprints, equal rows, labels and splits."""
        return str(self.manifest["fingerprint"])

    @property
    def tables(self) -> list[str]:
        """Hashes of the tables it was prepared from."""
        return [source["hash"] for source in (self.manifest["source"], *self.manifest.get("more_sources", ()))]

    @property
    def labels(self) -> NDArray[np.int64]:
        """[rows] index into `label_names`."""
        return self._array("labels.npy")

    @property
    def lines(self) -> NDArray[np.int64]:
        """[rows] line (Parquet: row) of the source, from 1."""
        return self._array("lines.npy")

    @property
    def dates(self) -> NDArray[np.datetime64] | None:
        """[rows] datetime64[s], or None when the table has no date column."""
        return self._array("dates.npy") if self.schema.date_column else None

    @property
    def made_up(self) -> bool:
        """Whether any row comes from `bertforge sample-data`: whatever shows this data has to say so."""
        return bool(self.manifest["made_up"])

    def split_name(self, name: str = "") -> str:
        """`name`, or for "" the split that was made first: the given one, else the random one, else that by time.

        Raises UsageError for a split that was not made.
        """
        made = list(self.manifest["splits"])
        if name and name not in made:
            options = {GIVEN: "--split-column, or --test", **{known: f"--split {known}" for known in SPLITS}}
            raise UsageError(
                f"{self.directory} has no split {name!r}, but {', '.join(made)}; "
                f"prepare with {options.get(name, '--folds')} for others"
            )
        return name or made[0]

    def split(self, name: str = "") -> NDArray[np.int8]:
        """[rows] 0 train, 1 validation, 2 test, -1 in none of them; "" is the split that was made first."""
        return self._array(f"splits/{self.split_name(name)}.npy")

    def rows(self, split: str, part: str) -> NDArray[np.int64]:
        """Row numbers of a part ("train", "validation" or "test") of a split, ascending."""
        if part not in PARTS:
            raise UsageError(f"unknown part {part!r} of a split; known: {', '.join(PARTS)}")
        return np.flatnonzero(self.split(split) == PARTS.index(part))

    def columns(self, names: Sequence[str]) -> pd.DataFrame:
        """The named columns, one row per good row: source columns as strings ("" where absent), derived ones as float64
        or strings (NaN where missing).
        """
        there: dict[str, str] = self.manifest["columns"]
        missing = [name for name in names if name not in there]
        if missing:
            raise DataError(f"no column {', '.join(missing)} in {self.directory}; there are: {', '.join(there)}")
        frame: pd.DataFrame = pq.read_table(self.directory / TABLE_FILE, columns=list(names)).to_pandas()
        return frame

    def texts(self, rows: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """The texts of some rows, in the order asked for; reads only the parts of the table that hold them."""
        found: dict[int, str] = {}
        for here, table in self._taken(rows, self.schema.text_columns):
            found.update(zip(here, join_texts(table, self.schema), strict=True))
        return [found[row] for row in np.asarray(rows, np.int64).tolist()]

    def raw(self, rows: NDArray[np.int64], read: Sequence[str]) -> dict[str, list[str]]:
        """Some rows as the source has them, in the order asked for, a list a column: what `predict` asks of a table for
        a model that reads the columns `read` beside the text.
        """
        wanted = dict.fromkeys((*self.schema.required_columns, *read))
        source = set(self.manifest["columns"]) - set(named_as_derived(self.manifest["columns"], self.schema))
        names = [name for name in wanted if name in source and name != self.schema.label_column]
        found: dict[int, dict[str, str]] = {}
        for here, table in self._taken(rows, names):
            found.update(zip(here, table.to_pylist(), strict=True))
        return {name: [found[row][name] for row in rows.tolist()] for name in names}

    def _taken(
        self, rows: Sequence[int] | NDArray[np.int64], columns: Sequence[str]
    ) -> Iterator[tuple[list[int], pa.Table]]:
        """The different ones of `rows`, ascending, part of the table by part, with their columns."""
        wanted = np.unique(np.asarray(rows, dtype=np.int64))
        with pq.ParquetFile(self.directory / TABLE_FILE) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            starts = np.cumsum([0, *sizes])
            group_of = np.searchsorted(starts, wanted, side="right") - 1
            for group in np.unique(group_of):
                here = wanted[group_of == group]
                table = file.read_row_group(int(group), columns=list(columns))
                yield here.tolist(), table.take(here - starts[group])

    def tokens(self, tokenizer: Tokenizer) -> TokenStore:
        """The ids of all rows under `tokenizer`; tokenizes the table first when that was not done before.

        Of two commands that need the same tokens at once, one makes them and the other waits.
        """
        directory = self.directory / "tokens" / tokens_key(tokenizer)
        if not directory.is_dir():
            with locked(directory, patience=math.inf):
                if not directory.is_dir():
                    self._tokenize(directory, tokenizer)
        return TokenStore.open(directory, tokenizer, self.fingerprint)

    def _tokenize(self, directory: Path, tokenizer: Tokenizer) -> None:
        with (
            fresh_directory(directory) as beside,
            TokenWriter(beside, tokenizer, self.fingerprint) as writer,
            pq.ParquetFile(self.directory / TABLE_FILE) as file,
            progress("tokenizing") as report,
        ):
            wanted = list(self.schema.text_columns)
            groups = (file.read_row_group(group, columns=wanted) for group in range(file.num_row_groups))
            read = (join_texts(group, self.schema) for group in groups)  # as large as the chunks they were
            with closing(ahead(read)) as chunks:
                for texts in chunks:
                    writer.append(texts)
                    report(writer.rows, writer.rows / len(self))

    def _array(self, name: str) -> NDArray[Any]:
        stored: NDArray[Any] = np.load(self.directory / name, mmap_mode="r", allow_pickle=False)
        return stored


def join_texts(table: pa.Table, schema: Schema) -> list[str]:
    """The text columns of each row joined by one space: what the tokenizer reads."""
    columns = [table[name] for name in schema.text_columns]
    texts: list[str] = pc.binary_join_element_wise(*columns, pa.scalar(" ", columns[0].type)).to_pylist()
    return texts


def tokens_key(tokenizer: Tokenizer) -> str:
    """The name of a tokenizer's folder under `tokens/`."""
    return tokenizer.fingerprint.removeprefix("sha256:")[:12]
