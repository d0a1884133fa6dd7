"""What `Predictor.predict` is given -> the texts, the model's columns and the index of the answer.

A frame goes through data/raw.py like the table of `bertforge predict`: its text columns are joined and its columns
derived as `prepare` did it for training. Of its columns only those that the model may need are looked at, so that what
else lies in a user's frame does no harm.

Python would take almost anything for a list of texts: a frame is a list of its column names, and a dict one of its
keys. Whatever is no row of text is therefore refused, with its place and what to pass instead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from bertforge.columns.transform import TabularTransform
from bertforge.data.raw import read_raw
from bertforge.data.schema import STACK_OVERFLOW, Schema, require_columns
from bertforge.errors import DataError, UsageError

log = logging.getLogger(__name__)

Given = Iterable[str] | pd.Series | pd.DataFrame
"""A list of texts, a Series of them, or a frame with the text columns of the model's table."""
_WANTED = "predict takes a list of texts, a pandas Series or a pandas DataFrame"


@dataclass(frozen=True)
class Inputs:
    """Rows to predict."""

    texts: list[str]
    """What the tokenizer reads; blank where a row has no text."""
    columns: pd.DataFrame | None
    """The columns that the model reads beside the text, one row a text; None when none were given."""
    index: pd.Index
    """Of a Series or frame its own, else 0, 1, ..."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with each row's columns, "" for a good one; empty where no columns are read from a frame."""

    def warn(self) -> None:
        """Says which dates and numbers cannot be read: they count as missing."""
        if rows := [row for row, problem in enumerate(self.problems) if problem.startswith("unparsable")]:
            log.warning(
                "%d of %d rows have a value that cannot be read and counts as missing; the first is row %d: %s",
                len(rows), len(self.problems), rows[0], self.problems[rows[0]],
            )  # fmt: skip


def read_inputs(
    given: Given, columns: pd.DataFrame | None, schema: Schema, transform: TabularTransform | None
) -> Inputs:
    """Raises UsageError for something other than a list, Series or frame, and DataError naming a row without text in a
    list, a row that is no text, and a column that the frame lacks.

    In a Series or frame a missing value is a row without text, as it is in a table.
    """
    if isinstance(given, pd.DataFrame):
        if columns is not None:
            raise UsageError("columns= belongs to a list of texts; a DataFrame brings its own columns: leave it out")
        return _read_frame(given, schema, transform)
    if isinstance(given, str):
        raise UsageError("predict takes a list of texts, not one text; write predict([text])")
    if isinstance(given, Mapping):
        raise UsageError(f"{_WANTED}, not a dict; write predict(pd.DataFrame([row])) for one row of columns")
    if isinstance(given, bytes | Set) or not isinstance(given, Iterable):
        raise UsageError(f"{_WANTED}, not {type(given).__name__}; write predict([text, ...])")
    index: pd.Index
    if isinstance(given, pd.Series):
        texts, index = _checked(given.tolist(), missing_is_blank=True), given.index
        if columns is not None and not columns.index.equals(index):
            raise UsageError("the index of columns= is not that of the texts; pass both from one frame, in one order")
    else:
        texts = _checked(given, missing_is_blank=False)
        index = pd.RangeIndex(len(texts))
    if columns is not None and len(columns) != len(texts):
        raise UsageError(f"{len(texts)} texts, but columns of {len(columns)} rows; pass one row a text")
    return Inputs(texts, columns, index)


def _read_frame(frame: pd.DataFrame, schema: Schema, transform: TabularTransform | None) -> Inputs:
    names = [str(name) for name in frame.columns]
    wanted = set(schema.required_columns) - {schema.label_column}
    require_columns(schema.text_columns, names, "the model needs")
    if transform is not None:
        wanted |= set(transform.spec.columns)
        if schema.kind != STACK_OVERFLOW:  # whose columns are derived from others
            require_columns(transform.spec.columns, names, "the model needs")
    kept = frame.loc[:, [name in wanted for name in names]].rename(columns=str)
    if repeated := kept.columns[kept.columns.duplicated()].tolist():
        raise DataError(f"the frame has two columns named {repeated[0]}; rename one")
    for name in schema.text_columns:
        if kept[name].dtype == object:  # may hold anything
            _checked(kept[name].tolist(), missing_is_blank=True, column=f" of column {name}")
    numbers = () if transform is None else transform.spec.holding("number")
    chunks = list(read_raw(kept, schema, require_labels=False, numbers=numbers))
    return Inputs(
        texts=[text for chunk in chunks for text in chunk.texts],
        columns=None if transform is None else pd.concat([chunk.frame for chunk in chunks], ignore_index=True),
        index=frame.index,
        problems=[] if transform is None else [problem for chunk in chunks for problem in chunk.problems],
    )


def _checked(values: Iterable[Any], *, missing_is_blank: bool, column: str = "") -> list[str]:
    """`values` as texts; raises DataError naming the first that is none, rows counted from 0."""
    texts = []
    for row, value in enumerate(values):
        if isinstance(value, str):
            texts.append(_valid(value, row))
        elif missing_is_blank and _is_missing(value):
            texts.append("")
        else:
            shown = f"{value!r:.40}" if _is_missing(value) else f"{value!r:.40} ({type(value).__name__})"
            raise DataError(f"row {row}{column} is {shown}, not a text; {_advice(value)}")
    return texts


def _valid(text: str, row: int) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"row {row} holds half a character, {text[error.start]!a}; "
            "replace such halves: text.encode('utf-8', 'replace').decode()"
        ) from error
    return text


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)


def _advice(value: Any) -> str:
    if _is_missing(value):
        return 'pass "" for a row without text'
    if isinstance(value, bytes):
        return "decode it: value.decode()"
    if isinstance(value, Mapping):
        return "pass rows with columns as a frame: predict(pd.DataFrame(rows))"
    return "pass texts, such as str(value)"
