"""A table of labelled rows -> a folder of prepared data: checked, with derived columns, splits and tokens.

One pass over the source. A thread reads the next chunk, checks it, derives its columns and writes them to Parquet,
while the tokenizer, which takes nearly all the time, has the other cores; so the whole runs at about the tokenizer's
own speed. Only a few numbers per row (line, label, date, hash of the text) stay in memory until the splits are made.

The folder appears under its name when it is complete, and not before. It is keyed by a fingerprint of the source's
bytes and the options: preparing the same thing again returns at once, and another model's tokens are added to it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from bertforge.artifact import MANIFEST, fresh_directory, hash_file, read_manifest, write_manifest
from bertforge.data.chunks import Chunk
from bertforge.data.dialect import Dialect
from bertforge.data.features import FEATURES
from bertforge.data.prepared import SPLITS, PreparedData, tokens_key
from bertforge.data.row_writer import KeptRows, RowWriter
from bertforge.data.schema import QUESTIONS, choose_schema
from bertforge.data.splits import PARTS, Groups, split_at_random, split_by_time
from bertforge.data.streaming import ahead, progress
from bertforge.data.tables import read_chunks
from bertforge.data.tokens import Tokenizer, TokenWriter
from bertforge.errors import DataError, UsageError

FORMAT_VERSION = 2  # raise it when the meaning of a prepared file changes: older folders are then made again


@dataclass(frozen=True)
class PrepareOptions:
    """What, besides the source, decides the result."""

    splits: tuple[str, ...] = ()
    """"random", "time" or both; none named: random, and time when there is a date column."""
    text_columns: tuple[str, ...] = ()
    """None named: the Stack Overflow questions table."""
    label_column: str | None = None
    date_column: str | None = None
    seed: int = 42
    """Of the random split."""
    encoding: str = ""
    """Of a text table; "": detected."""
    separator: str = ""
    """Between its columns; "": detected."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.splits if name not in SPLITS]
        if unknown:
            raise UsageError(f"unknown split {unknown[0]!r} in --split; known: {', '.join(SPLITS)}")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} is negative; name 0 or more")

    @property
    def dialect(self) -> Dialect:
        return Dialect(self.encoding, self.separator)


def prepare(table: Path, out: Path, tokenizer: Tokenizer, options: PrepareOptions | None = None) -> PreparedData:
    """Prepares `table` into the folder `out`, or opens `out` when it holds just that already.

    Raises DataError (the table), UsageError (the options) or ArtifactError (`out` holds something else).
    """
    options = options or PrepareOptions()
    named = [*options.text_columns, *filter(None, (options.label_column, options.date_column))]
    # Refuses a missing or unknown file before anything is hashed.
    chunks = read_chunks(table, named=named or QUESTIONS.required_columns, dialect=options.dialect)
    source_hash = hash_file(table)
    settled = json.dumps([FORMAT_VERSION, list(FEATURES), source_hash, asdict(options)], sort_keys=True)
    fingerprint = "sha256:" + hashlib.sha256(settled.encode()).hexdigest()
    ours = (out / MANIFEST).is_file()
    if ours and read_manifest(out, "data")["fingerprint"] == fingerprint:
        data = PreparedData.open(out)
        data.tokens(tokenizer)
        return replace(data, reused=True)
    with fresh_directory(out, replace=ours) as folder:
        source = {"name": table.name, "bytes": table.stat().st_size, "hash": source_hash}
        facts = _build(chunks, folder, tokenizer, options)
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(_core_files(folder))}
        write_manifest(
            folder, "data", fingerprint=fingerprint, source=source, options=asdict(options), **facts, files=files
        )
    _remove_abandoned(out)
    return PreparedData.open(out)


def _remove_abandoned(out: Path) -> None:
    """Removes what processes that were killed had made of `out`: `.NAME.PID.partial` beside it."""
    out = out.resolve()
    for path in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        pid = path.name.removeprefix(f".{out.name}.").removesuffix(".partial")
        if pid.isdecimal() and not _runs(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def _core_files(folder: Path) -> list[Path]:
    """The files without which the folder is damaged; tokens can be made again from them."""
    return [path for path in (*folder.iterdir(), *(folder / "splits").iterdir()) if path.is_file()]


def _build(chunks: Iterator[Chunk], folder: Path, tokenizer: Tokenizer, options: PrepareOptions) -> dict[str, Any]:
    """Writes every file but the manifest, and returns what the manifest says about them."""
    first = next(chunks)
    schema = choose_schema(first.table.column_names, options.text_columns, options.label_column, options.date_column)
    splits = options.splits or (SPLITS if schema.date_column else SPLITS[:1])
    if "time" in splits and not schema.date_column:
        raise UsageError("a split by time needs a column of dates: name it with --date-column")
    with (
        RowWriter(folder, schema) as rows,
        TokenWriter(folder / "tokens" / tokens_key(tokenizer), tokenizer) as tokens,
        progress("preparing") as report,
    ):
        taken = ((rows.take(chunk), chunk.done) for chunk in chain([first], chunks))
        with closing(ahead(taken)) as batches:
            for texts, done in batches:
                tokens.append(texts)
                report(tokens.rows, done)
    kept, facts = rows.finish()
    return {**facts, **_write_splits(folder, kept, splits, options.seed)}


def _write_splits(folder: Path, rows: KeptRows, splits: Iterable[str], seed: int) -> dict[str, Any]:
    groups = Groups.from_hashes(rows.hashes)
    (folder / "splits").mkdir()
    counts: dict[str, dict[str, int]] = {}
    for name in splits:
        part = split_at_random(groups, rows.labels, seed) if name == "random" else split_by_time(groups, rows.dates)
        counts[name] = dict(zip(PARTS, np.bincount(part, minlength=3).tolist(), strict=True))
        if min(counts[name].values()) == 0:
            raise DataError(
                f"{len(part)} good rows are too few for a {name} split into {', '.join(PARTS)}: got {counts[name]}; "
                "10 different texts are needed, and 3 of a label before any of it is held out at random"
            )
        np.save(folder / "splits" / f"{name}.npy", part)
    duplicates = {"rows": len(rows.labels) - len(groups.size), "conflicting_texts": groups.count_conflicts(rows.labels)}
    return {"duplicates": duplicates, "splits": counts}
