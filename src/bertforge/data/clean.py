"""Which rows of a chunk are good, and why the others are not: the first reason found is the one reported."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bertforge.data.rows import Bools, Rows
from bertforge.data.schema import CLOSED_DATE, NUMBERS, OWNER_DATE, STACK_OVERFLOW, Schema


def find_problems(rows: Rows, schema: Schema, *, labelled: bool) -> NDArray[np.object_]:
    """[rows] the reason why a row can't be used, "" for a good one.

    Stack Overflow: title and body must be there; dates and numbers that are there must be readable. An owner's date or
    a number that is absent is a missing feature and no fault. Other tables: some text must be there.
    With `labelled` the label must be there and known, and the date may not be absent; rows that are only to be
    predicted are asked for neither. Dates and numbers are looked at only in columns that the table has.
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
        mark(_unreadable_date(rows, schema.date_column), f"unparsable date in {schema.date_column}")
    if questions:
        for column in (OWNER_DATE, CLOSED_DATE) if labelled else (OWNER_DATE,):
            if column in rows.names:
                mark(_unreadable_date(rows, column), f"unparsable date in {column}")
        for column in NUMBERS:
            if column in rows.names:
                mark(rows.present(column) & np.isnan(rows.number(column)), f"unparsable number in {column}")
    if labelled:
        mark(~rows.present(schema.label_column), f"missing {schema.label_column}")
        if schema.label_names:
            mark(schema.encode_labels(rows) < 0, f"unknown {schema.label_column}")
    return problems


def _unreadable_date(rows: Rows, column: str) -> Bools:
    unreadable: Bools = rows.present(column) & np.isnat(rows.date(column))
    return unreadable
