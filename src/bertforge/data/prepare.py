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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertforge.artifact import MANIFEST, fresh_directory, hash_file, read_manifest, write_manifest
from bertforge.data.chunks import Chunk, abbreviate
from bertforge.data.dialect import Dialect
from bertforge.data.features import FEATURES
from bertforge.data.prepared import GIVEN, SPLITS, PreparedData, tokens_key
from bertforge.data.row_writer import KeptRows, RowWriter
from bertforge.data.schema import QUESTIONS, choose_schema, require_columns
from bertforge.data.splits import (
    NO_PART,
    PARTS,
    Groups,
    complete_given,
    split_at_random,
    split_by_time,
    split_into_folds,
)
from bertforge.data.streaming import ahead, progress
from bertforge.data.tables import read_chunks
from bertforge.data.tokens import Tokenizer, TokenWriter
from bertforge.errors import DataError, UsageError

FORMAT_VERSION = 2  # raise it when the meaning of a prepared file changes: older folders are then made again


@dataclass(frozen=True)
class PrepareOptions:
    """What, besides the source, decides the result."""

    splits: tuple[str, ...] = ()
    """"random", "time" or both. None named: the given one if there is one, else random, and time with a date column."""
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
    split_column: str | None = None
    """Holds train, validation or test: the split `given`."""
    folds: int = 0
    """Splits `fold-1`, `fold-2`, ... for cross-validation, besides the others; 0 for none."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.splits if name not in SPLITS]
        if unknown:
            raise UsageError(f"unknown split {unknown[0]!r} in --split; known: {', '.join(SPLITS)}")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} is negative; name 0 or more")
        if self.folds < 0 or self.folds == 1:
            raise UsageError(f"--folds {self.folds} cannot be; name 2 or more, or 0 for none")

    @property
    def dialect(self) -> Dialect:
        return Dialect(self.encoding, self.separator)


def prepare(
    table: Path,
    out: Path,
    tokenizer: Tokenizer,
    options: PrepareOptions | None = None,
    *,
    validation: Path | None = None,
    test: Path | None = None,
) -> PreparedData:
    """Prepares `table` into the folder `out`, or opens `out` when it holds just that already.

    The rows of `validation` and `test` are those parts of the split `given`; `table` then holds the train rows.
    Raises DataError (the tables), UsageError (the options) or ArtifactError (`out` holds something else).
    """
    options = options or PrepareOptions()
    files = [_File(part, path) for part, path in enumerate((table, validation, test)) if path]
    if len(files) > 1 and options.split_column:
        raise UsageError("--split-column and --validation or --test both give a split; name one of them")
    named = [*options.text_columns, *filter(None, (options.label_column, options.date_column, options.split_column))]
    # Refuses a missing or unknown file before anything is hashed.
    read = [read_chunks(f.path, named=named or QUESTIONS.required_columns, dialect=options.dialect) for f in files]
    sources = [{"name": f.path.name, "bytes": f.path.stat().st_size, "hash": hash_file(f.path)} for f in files]
    hashes = [[PARTS[f.part], source["hash"]] for f, source in zip(files, sources, strict=True)]
    settled = json.dumps([FORMAT_VERSION, list(FEATURES), hashes, asdict(options)], sort_keys=True)
    fingerprint = "sha256:" + hashlib.sha256(settled.encode()).hexdigest()
    ours = (out / MANIFEST).is_file()
    if ours and read_manifest(out, "data")["fingerprint"] == fingerprint:
        data = PreparedData.open(out)
        data.tokens(tokenizer)
        return replace(data, reused=True)
    with fresh_directory(out, replace=ours) as folder:
        facts = _build(list(zip(files, read, strict=True)), folder, tokenizer, options)
        written = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(_core_files(folder))}
        write_manifest(
            folder,
            "data",
            fingerprint=fingerprint,
            source=sources[0],
            more_sources=sources[1:],
            options=asdict(options),
            **facts,
            files=written,
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


@dataclass(frozen=True)
class _File:
    """A table and the part of a split that its rows are."""

    part: int
    path: Path


def _build(
    tables: list[tuple[_File, Iterator[Chunk]]], folder: Path, tokenizer: Tokenizer, options: PrepareOptions
) -> dict[str, Any]:
    """Writes every file but the manifest, and returns what the manifest says about them."""
    first = next(tables[0][1])
    schema = choose_schema(first.table, options.text_columns, options.label_column, options.date_column)
    if options.split_column:
        require_columns((options.split_column,), first.table.column_names)
    given = (GIVEN,) if len(tables) > 1 or options.split_column else ()
    splits = (*given, *(options.splits or (() if given else SPLITS if schema.date_column else SPLITS[:1])))
    if "time" in splits and not schema.date_column:
        raise UsageError("a split by time needs a column of dates: name it with --date-column")
    tables[0] = (tables[0][0], chain([first], tables[0][1]))
    with (
        RowWriter(folder, schema, options.split_column) as rows,
        TokenWriter(folder / "tokens" / tokens_key(tokenizer), tokenizer) as tokens,
        progress("preparing") as report,
        closing(ahead(_taken(rows, tables, first.table.column_names))) as batches,
    ):
        for texts, done in batches:
            tokens.append(texts)
            report(tokens.rows, done)
    kept, facts = rows.finish()
    return {**facts, **_write_splits(folder, kept, facts["schema"]["label_names"], splits, options)}


def _taken(
    rows: RowWriter, tables: list[tuple[_File, Iterator[Chunk]]], columns: list[str]
) -> Iterator[tuple[list[str], float]]:
    """The texts of each chunk of each table, whose rows are written by then, and the share of all that is done."""
    for number, (file, chunks) in enumerate(tables):
        for chunk in chunks:
            there = set(chunk.table.column_names)
            if missing := [name for name in columns if name not in there]:
                raise DataError(f"{file.path} has no column {abbreviate(missing)}, which the table of train rows has")
            same = replace(chunk, table=chunk.table.select(columns))
            yield rows.take(same, file.part, file.path.name if number else ""), (number + chunk.done) / len(tables)


def _write_splits(
    folder: Path, rows: KeptRows, label_names: Sequence[str], splits: Iterable[str], options: PrepareOptions
) -> dict[str, Any]:
    groups = Groups.from_hashes(rows.hashes)
    (folder / "splits").mkdir()
    counts: dict[str, dict[str, int]] = {}
    facts: dict[str, Any] = {"splits": counts}
    for name, part in _make_splits(groups, rows, label_names, splits, options):
        counts[name] = dict(zip(PARTS, np.bincount(part[part != NO_PART], minlength=3).tolist(), strict=True))
        if name == GIVEN:
            _check_given(part, rows, label_names)
        if min(counts[name].values()) == 0:
            raise DataError(
                f"{len(part)} good rows are too few for a {name} split into {', '.join(PARTS)}: got {counts[name]}; "
                "10 different texts are needed, and 3 of a label before any of it is held out at random"
            )
        np.save(folder / "splits" / f"{name}.npy", part)
        if name == GIVEN:
            repeated = np.bincount(rows.given[part == NO_PART], minlength=3).tolist()
            drawn = [which for code, which in enumerate(PARTS) if code not in rows.given]
            facts["given"] = {"repeated": dict(zip(PARTS, repeated, strict=True)), "drawn": drawn}
    duplicates = {"rows": len(rows.labels) - len(groups.size), "conflicting_texts": groups.count_conflicts(rows.labels)}
    return {**facts, "duplicates": duplicates}


def _check_given(part: NDArray[np.int8], rows: KeptRows, label_names: Sequence[str]) -> None:
    """Raises DataError for a split given by the user that leaves no row, or none of a label, to train on."""
    train = part == 0
    if not train.any():
        repeated = int((rows.given == 0).sum())
        why = f"each of its {repeated:,} train rows repeats a text of a later part" if repeated else "it names none"
        raise DataError(f"the split given leaves no row to train on: {why}; add train rows with texts of their own")
    learnt = set(rows.labels[train].tolist())
    for label, count in enumerate(np.bincount(rows.labels[~train], minlength=len(label_names)).tolist()):
        if label not in learnt:
            raise DataError(
                f"the split given has no train row of label {label_names[label]!r}, but {count:,} other rows of it; "
                "add train rows of it, or take those rows out"
            )


def _make_splits(
    groups: Groups, rows: KeptRows, label_names: Sequence[str], splits: Iterable[str], options: PrepareOptions
) -> Iterator[tuple[str, NDArray[np.int8]]]:
    for name in splits:
        if name == GIVEN:
            yield name, complete_given(groups, rows.labels, rows.given, options.seed)
        elif name == "random":
            yield name, split_at_random(groups, rows.labels, options.seed)
        else:
            yield name, split_by_time(groups, rows.dates)
    if options.folds:
        if options.folds > len(groups.size):
            raise DataError(f"--folds {options.folds} is more than the {len(groups.size)} different texts; name fewer")
        texts = np.bincount(rows.labels[groups.first_row], minlength=len(label_names))
        if texts.min() < 2:
            raise DataError(
                f"label {label_names[int(texts.argmin())]!r} has no two different texts, so one of the {options.folds} "
                "folds could not learn it; leave its rows out, or leave out --folds"
            )
        for number, part in enumerate(split_into_folds(groups, rows.labels, options.folds, options.seed), start=1):
            yield f"fold-{number}", part
