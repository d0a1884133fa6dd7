"""Reading a folder that `bertforge prepare` wrote.

bertforge.json          kind "data": schema, counts, fingerprint, options (artifact.py)
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

from collections.abc import Sequence
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

from bertforge.artifact import fresh_directory, read_manifest
from bertforge.data.schema import Schema
from bertforge.data.splits import PARTS
from bertforge.data.streaming import ahead, progress
from bertforge.data.tokens import Tokenizer, TokenStore, TokenWriter
from bertforge.errors import ArtifactError, DataError, UsageError

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
        """Raises ArtifactError when the folder is not prepared data or a file of it is missing or cut short."""
        manifest = read_manifest(directory, "data")
        for name, size in manifest["files"].items():
            path = directory / name
            if not path.is_file() or path.stat().st_size != size:
                what = "is missing" if not path.is_file() else f"has {path.stat().st_size} bytes instead of {size}"
                raise ArtifactError(
                    f"{path} {what}; prepare the data again: rm -r {directory}, then `bertforge prepare`"
                )
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
        wanted = np.asarray(rows, dtype=np.int64)
        found: dict[int, str] = {}
        with pq.ParquetFile(self.directory / TABLE_FILE) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            starts = np.cumsum([0, *sizes])
            group_of = np.searchsorted(starts, wanted, side="right") - 1
            for group in np.unique(group_of):
                here = np.unique(wanted[group_of == group])
                table = file.read_row_group(int(group), columns=list(self.schema.text_columns))
                found.update(zip(here.tolist(), join_texts(table.take(here - starts[group]), self.schema), strict=True))
        return [found[row] for row in wanted.tolist()]

    def tokens(self, tokenizer: Tokenizer) -> TokenStore:
        """The ids of all rows under `tokenizer`; tokenizes the table first when that was not done before."""
        directory = self.directory / "tokens" / tokens_key(tokenizer)
        if not directory.is_dir():
            with (
                fresh_directory(directory) as beside,
                TokenWriter(beside, tokenizer) as writer,
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
        store = TokenStore.open(directory)
        if len(store) != len(self):
            raise ArtifactError(
                f"{directory} holds {len(store)} rows instead of {len(self)}; remove it: rm -r {directory}"
            )
        return store

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
