"""What `fit` reads of a table of which it knows the label alone: the text, columns beside it, and what it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from bertforge.columns.transform import TabularSpec
from bertforge.data.chunks import abbreviate
from bertforge.data.dialect import Dialect
from bertforge.data.guess import SAMPLE_ROWS, GuessedColumns, guess_columns
from bertforge.data.prepare import PrepareOptions
from bertforge.data.schema import QUESTIONS, require_columns
from bertforge.data.tables import read_chunks
from bertforge.errors import DataError
from bertforge.training.config import load_recipe

_CHUNKS = 32  # of 8,192 rows, from which the sample is drawn: a table may be sorted
_BYTES = 256 << 20  # of these chunks at most
_BRANCH = {"bins": 16, "embedding_size": 16, "hidden_size": 64, "dropout": 0.2}  # of the model, as `columns` has it


@dataclass(frozen=True)
class Columns:
    """What is read, and what to tell of it."""

    options: PrepareOptions
    beside: TabularSpec | None
    """Columns beside the text; None where there is none of use."""
    told: tuple[str, ...]
    """One line for each thing that was decided."""


def choose_columns(
    table: Path, label: str | None, text: tuple[str, ...], seed: int, dialect: Dialect | None = None
) -> Columns:
    """The columns of `table` that a model may read; without a label it has to be the Stack Overflow questions table.

    Raises DataError where a named column is missing, where there are no rows, and where no column reads like text.
    """
    dialect = dialect or Dialect()
    sample = _sample(table, (*text, *([label] if label else [])), seed, dialect)
    names = sample.column_names
    if not len(sample):
        raise DataError(f"{table} holds no rows but a header")
    encoding, separator = dialect.encoding, dialect.separator
    if label is None:  # `prepare` says what is missing, and proposes columns, where this is another table
        beside = load_recipe("columns").tabular if set(QUESTIONS.required_columns) <= set(names) else None
        options = PrepareOptions(text_columns=text, seed=seed, encoding=encoding, separator=separator)
        return Columns(options, beside, ())
    require_columns((label, *text), names)
    guessed = guess_columns(sample, label)
    chosen = text or guessed.text
    if not chosen:
        raise DataError(f"no column of the table reads like text; name one with --text-columns: {abbreviate(names)}")
    beside = _beside(guessed, chosen)
    told = [f"text: {', '.join(chosen)}; label: {label}"]
    if beside:
        told.append(f"columns that may help: {', '.join(beside.columns)}")
    told += [f"column {name} is left out: {how}" for name, how in guessed.leaks.items() if name not in chosen]
    told += [f"column {name} is left out: {why}" for name, why in guessed.left_out.items() if name not in chosen]
    told += [f"column {name} is left out: dates are not read" for name in guessed.dates if name not in chosen]
    options = PrepareOptions(
        splits=("random",),
        text_columns=chosen,
        label_column=label,
        seed=seed,
        encoding=encoding,
        separator=separator,
    )
    return Columns(options, beside, tuple(told))


def _beside(guessed: GuessedColumns, text: tuple[str, ...]) -> TabularSpec | None:
    numeric, log, categorical = (
        tuple(name for name in names if name not in text)
        for names in (guessed.numeric, guessed.log, guessed.categorical)
    )
    multi = "" if guessed.multi in text else guessed.multi
    if not (numeric or categorical or multi):
        return None
    return TabularSpec.of(numeric=numeric, log=log, categorical=categorical, multi=multi, **_BRANCH)


def _sample(table: Path, named: tuple[str, ...], seed: int, dialect: Dialect) -> pa.Table:
    """Rows drawn at random from the first `_CHUNKS` chunks."""
    chunks: list[pa.Table] = []
    for chunk in islice(read_chunks(table, named=named, dialect=dialect), _CHUNKS):
        chunks.append(chunk.table)
        if sum(part.nbytes for part in chunks) > _BYTES:
            break
    rows = pa.concat_tables(chunks)
    if len(rows) <= SAMPLE_ROWS:
        return rows.combine_chunks()
    drawn = np.sort(np.random.default_rng(seed).choice(len(rows), SAMPLE_ROWS, replace=False))
    return rows.take(drawn).combine_chunks()
