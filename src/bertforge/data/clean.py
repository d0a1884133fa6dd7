"""Which rows of a chunk are good, and why the others are not: the first reason found is the one reported."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from bertforge.data import limits
from bertforge.data.rows import DATE_FORMATS, Bools, Rows
from bertforge.data.schema import CLOSED_DATE, NUMBERS, OWNER_DATE, STACK_OVERFLOW, Schema
from bertforge.errors import DataError

UNPARSABLE_DATE = "unparsable date"  # how the reason begins; the column follows
_DAY_FIRST = r"^(?:1[3-9]|2\d|3[01])/(?:0?[1-9]|1[0-2])/\d{4}\b"


def find_problems(rows: Rows, schema: Schema, *, labelled: bool, numbers: Sequence[str] = ()) -> NDArray[np.object_]:
    """[rows] the reason why a row can't be used, "" for a good one.

    Stack Overflow: title and body must be there; dates and numbers that are there must be readable. An owner's date or
    a number that is absent is a missing feature and no fault. Other tables: some text must be there.
    With `labelled` the label must be there and known, and the date may not be absent; rows that are only to be
    predicted are asked for neither. Dates and numbers are looked at only in columns that the table has; `numbers` are
    columns that must hold numbers besides those of the schema.

    Raises DataError with `labelled` when dates of another table are written day first: of a part of them no one could
    see it, and those would be taken month first.
    """
    problems = np.full(len(rows), "", dtype=object)

    def mark(bad: Bools, reason: str) -> None:
        problems[bad & (problems == "")] = reason

    questions = schema.kind == STACK_OVERFLOW
    absent = [~rows.present(column) for column in schema.text_columns]
    if questions:
        for column, missing in zip(schema.text_columns, absent, strict=True):
            mark(missing, f"missing {column}")
    else:
        mark(np.logical_and.reduce(absent), "missing text (" + ", ".join(schema.text_columns) + ")")
    if schema.date_column in rows.names:
        if labelled:
            mark(~rows.present(schema.date_column), f"missing {schema.date_column}")
            if not questions:
                _refuse_day_first(rows, schema.date_column)
        mark(_unreadable_date(rows, schema.date_column), f"{UNPARSABLE_DATE} in {schema.date_column}")
    if questions:
        for column in (OWNER_DATE, CLOSED_DATE) if labelled else (OWNER_DATE,):
            if column in rows.names:
                mark(_unreadable_date(rows, column), f"{UNPARSABLE_DATE} in {column}")
    for column in (*(NUMBERS if questions else ()), *numbers):
        if column in rows.names:
            mark(rows.present(column) & np.isnan(rows.number(column)), f"unparsable number in {column}")
    if labelled:
        mark(~rows.present(schema.label_column), f"missing {schema.label_column}")
        long = pc.greater(pc.utf8_length(rows.text(schema.label_column)), limits.NAME).to_numpy(zero_copy_only=False)
        mark(long, f"{schema.label_column} of more than {limits.NAME:,} characters")
        if schema.label_names:
            mark(schema.encode_labels(rows) < 0, f"unknown {schema.label_column}")
    return problems


def _unreadable_date(rows: Rows, column: str) -> Bools:
    unreadable: Bools = rows.present(column) & np.isnat(rows.date(column))
    return unreadable


def _refuse_day_first(rows: Rows, column: str) -> None:
    day_first = rows.text(column).filter(pc.match_substring_regex(rows.text(column), _DAY_FIRST))
    if len(day_first):
        raise DataError(
            f"column {column} holds dates with the day first, such as {day_first[0].as_py()!r}; "
            f"write them as {DATE_FORMATS}"
        )
