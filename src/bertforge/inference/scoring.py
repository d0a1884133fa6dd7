"""A model over labelled rows, prepared or raw: logits and labels, with what a report wants to know of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from bertforge.data.dialect import Dialect
from bertforge.data.limits import shorten
from bertforge.data.prepared import PreparedData
from bertforge.data.raw import read_raw
from bertforge.data.streaming import progress
from bertforge.data.tokens import TokenStore
from bertforge.errors import DataError, UsageError
from bertforge.evaluation.prior import rows_with_shares
from bertforge.inference.predictor import Predictor
from bertforge.manifest import MANIFEST

_MAY_BE_KNOWN = " (rows which the run may have been trained on: they are not of its own prepared data)"
_SHOWN = 5  # unknown labels that an error lists


@dataclass(frozen=True)
class Scored:
    """Everything metrics and reports are made of, one entry a row."""

    logits: np.ndarray
    """[rows, labels] float32."""
    labels: np.ndarray
    """[rows] int64."""
    lengths: np.ndarray
    """[rows] tokens."""
    lines: np.ndarray
    """[rows] line of the source table."""
    dates: np.ndarray | None
    """[rows] datetime64, or None without a date column."""
    texts: list[str]
    left_out: int
    """Rows of a raw table without a usable label or text."""
    source: str
    """What was scored, for people; says so where train rows of the run may be among the rows."""
    fingerprint: str
    """Of the prepared data; empty for a raw table."""
    made_up: bool

    def having(self, shares: Sequence[float], told: str) -> Self:
        """Those of the rows that have these shares of the labels, `told` so; see `rows_with_shares`."""
        kept = rows_with_shares(self.labels, shares)
        return replace(
            self,
            logits=self.logits[kept],
            labels=self.labels[kept],
            lengths=self.lengths[kept],
            lines=self.lines[kept],
            dates=None if self.dates is None else self.dates[kept],
            texts=[self.texts[row] for row in kept.tolist()],
            source=f"{len(kept):,} of {len(self.labels):,} rows, for shares of {told}, of {self.source}",
        )


def score(predictor: Predictor, data: Path, part: str | None = None, dialect: Dialect | None = None) -> Scored:
    """Scores a part of a prepared folder's split (None: test), or the whole of a raw table, written in `dialect`.

    Raises DataError for another split of the table that the model was trained on, when the labels are not those the
    model knows or no row can be scored, UsageError for a part of a
    raw table, and for an encoding or separator of prepared data.
    """
    dialect = dialect or Dialect()
    if (data / MANIFEST).is_file():
        if dialect != Dialect():
            raise UsageError(
                f"{data} is prepared already; leave --encoding and --separator out, they are of a raw table"
            )
        prepared = PreparedData.of(data, "the model", predictor.manifest, other_tables=True)
        return _score_prepared(predictor, prepared, part or "test")
    if part is not None and data.is_file():
        raise UsageError(f"{data} is a raw table and scored whole; leave --split {part} out, or prepare it first")
    return _score_raw(predictor, data, dialect)


def _score_prepared(predictor: Predictor, prepared: PreparedData, part: str) -> Scored:
    split = predictor.manifest["recipe"]["split"]
    rows = prepared.rows(split, part)
    examples = predictor.examples(prepared, rows)
    with progress(f"scoring {part}") as report:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            report(done, done / len(rows))

        logits = predictor.example_logits(examples, rows, advance)
    dates = prepared.dates
    source = f"the {part} part of the {split} split of {prepared.manifest['source']['name']}"
    return Scored(
        logits=logits,
        labels=prepared.labels[rows],
        lengths=examples.lengths(rows),
        lines=prepared.lines[rows],
        dates=None if dates is None else dates[rows],
        texts=prepared.texts(rows),
        left_out=0,
        source=source if prepared.fingerprint == predictor.manifest["data"]["fingerprint"] else source + _MAY_BE_KNOWN,
        fingerprint=prepared.fingerprint,
        made_up=prepared.made_up,
    )


def _score_raw(predictor: Predictor, table: Path, dialect: Dialect) -> Scored:
    logits, labels, lengths, lines, dates = [], [], [], [], []
    texts: list[str] = []
    left_out, made_up = 0, False
    schema, unknown = predictor.schema, dict[str, None]()  # a set in the order of the table
    with progress(f"scoring {table.name}") as report:
        for chunk in read_raw(table, predictor.schema, require_labels=True, dialect=dialect):
            assert chunk.labels is not None
            usable = np.array([not problem for problem in chunk.problems], dtype=bool) & (chunk.labels >= 0)
            left_out += int((~usable).sum())
            made_up = made_up or predictor.made_up(chunk.frame)
            if len(unknown) < _SHOWN:
                unknown |= dict.fromkeys(chunk.frame.loc[chunk.labels < 0, schema.label_column])
            kept = [text for text, good in zip(chunk.texts, usable, strict=True) if good]
            if kept:
                store = TokenStore(*predictor.tokenizer.encode(kept))
                frame = chunk.frame[usable]
                arrays = None if predictor.transform is None else predictor.transform(frame)
                logits.append(predictor.token_logits(store, np.arange(len(kept)), arrays))
                labels.append(chunk.labels[usable])
                lengths.append(np.minimum(store.lengths, predictor.max_length))
                lines.append(chunk.lines[usable])
                if chunk.dates is not None:
                    dates.append(chunk.dates[usable])
                texts += kept
            report(len(texts) + left_out, chunk.done)
    if not texts:
        others = (
            f"; unknown: {', '.join(repr(shorten(label, 60)) for label in list(unknown)[:_SHOWN])}" if unknown else ""
        )
        raise DataError(
            f"{table} holds no row with a text and a known {schema.label_column}; "
            f"known: {', '.join(predictor.label_names)}{others}"
        )
    return Scored(
        logits=np.concatenate(logits),
        labels=np.concatenate(labels),
        lengths=np.concatenate(lengths),
        lines=np.concatenate(lines),
        dates=np.concatenate(dates) if dates else None,
        texts=texts,
        left_out=left_out,
        source=table.name + _MAY_BE_KNOWN,
        fingerprint="",
        made_up=made_up,
    )
