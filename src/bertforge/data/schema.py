"""What a table's columns mean: which hold the text, the label and the date.

The Stack Overflow questions table is recognised by its columns. Any other table is described by naming its text and
label columns. The schema is saved in `bertforge.json`, so a run knows what it may expect of a table to predict.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bertforge.data.chunks import abbreviate
from bertforge.data.guess import guess_columns
from bertforge.data.rows import Rows
from bertforge.errors import DataError, UsageError

STACK_OVERFLOW = "stackoverflow"
TABLE = "table"
TEXT, INTEGER, BOOLEAN = "text", "integer", "boolean"  # kinds of labels
STATUSES = ("open", "not a real question", "off topic", "not constructive", "too localized")
OWNER_DATE, CLOSED_DATE = "OwnerCreationDate", "PostClosedDate"
NUMBERS = ("ReputationAtPostCreation", "OwnerUndeletedAnswerCountAtPostTime")
TAGS = ("Tag1", "Tag2", "Tag3", "Tag4", "Tag5")
MAX_LABELS = 1000  # more distinct values than this and the column is no label


@dataclass(frozen=True)
class Schema:
    """The meaning of a table's columns."""

    kind: str
    """"stackoverflow" or "table"."""
    text_columns: tuple[str, ...]
    """Joined by one space, in this order, they are the text the model reads."""
    label_column: str
    """Absent from tables that are only to be predicted."""
    label_names: tuple[str, ...] = ()
    """Class 0, 1, ...; of a "table" they are known once all its rows were read."""
    date_column: str | None = None
    """Orders the rows for the split by time."""
    label_kind: str = "text"
    """What the labels were in the table: "text", "integer" or "boolean"."""

    def original_labels(self) -> tuple[str | int | bool, ...]:
        """`label_names` as values of the type they had in the table: 0 rather than "0", True rather than "true"."""
        if self.label_kind == INTEGER:
            return tuple(int(name) for name in self.label_names)
        if self.label_kind == BOOLEAN:
            return tuple(name == "true" for name in self.label_names)
        return self.label_names

    @property
    def required_columns(self) -> tuple[str, ...]:
        """The columns that `prepare` needs."""
        named = (*self.text_columns, self.label_column, *([self.date_column] if self.date_column else []))
        return (*named, OWNER_DATE, *NUMBERS, *TAGS) if self.kind == STACK_OVERFLOW else named

    def label_values(self, rows: Rows) -> pa.Array:
        """The label column's values as compared with `label_names`; for Stack Overflow "open", "closed" or ""."""
        text = rows.text(self.label_column)
        if self.kind != STACK_OVERFLOW:
            return text
        known = pc.is_in(pc.utf8_lower(text), value_set=pa.array(STATUSES, text.type))
        name = pc.if_else(pc.equal(pc.utf8_lower(text), "open"), "open", "closed")
        return pc.if_else(known, name, "").cast(text.type)

    def encode_labels(self, rows: Rows) -> NDArray[np.int64]:
        """[rows] index into `label_names`, -1 where the value is none of them.

        Where all names are whole numbers or booleans and none is spelled so, 1.0 is 1 and True is true, so that a model
        of a Parquet table reads the CSV that pandas writes of it.
        """
        kind = kind_of_labels(self.label_names)
        values = self.label_values(rows)
        names = pa.array(self.label_names, values.type)
        alike = pc.index_in(spell_labels(values, kind), value_set=spell_labels(names, kind))
        found = pc.coalesce(pc.index_in(values, value_set=names), alike)
        codes: NDArray[np.int64] = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        return codes

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "text_columns": list(self.text_columns),
            "label_column": self.label_column,
            "label_names": list(self.label_names),
            "date_column": self.date_column,
            "label_kind": self.label_kind,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Schema:
        return cls(
            kind=saved["kind"],
            text_columns=tuple(saved["text_columns"]),
            label_column=saved["label_column"],
            label_names=tuple(saved["label_names"]),
            date_column=saved["date_column"],
            label_kind=saved.get("label_kind", TEXT),  # models made before there was the field
        )


QUESTIONS = Schema(STACK_OVERFLOW, ("Title", "BodyMarkdown"), "OpenStatus", ("open", "closed"), "PostCreationDate")


def choose_schema(
    table: pa.Table, text_columns: tuple[str, ...], label_column: str | None, date_column: str | None
) -> Schema:
    """The schema of a table that begins like `table`: the one the caller names, else Stack Overflow's questions.

    Raises UsageError when columns must be named or are named in part, with an example guessed from the rows; DataError
    when a column is missing.
    """
    columns = list(table.column_names)
    named = bool(text_columns or label_column or date_column)
    if not named and 2 * len(set(columns) & set(QUESTIONS.required_columns)) > len(QUESTIONS.required_columns):
        require_columns(QUESTIONS.required_columns, columns, "a table of Stack Overflow questions needs")
        return QUESTIONS
    if not text_columns or not label_column:
        if label_column:
            require_columns((label_column,), columns)
        cut = "" if len(columns) > 1 else "; if that should be several, name what stands between them with --separator"
        raise UsageError(
            f"name the columns to read with --text-columns and --label-column{_example(table, label_column)}; "
            f"the table has {abbreviate(columns)}{cut}"
        )
    schema = Schema(TABLE, text_columns, label_column, (), date_column)
    require_columns(schema.required_columns, columns)
    if label_column in text_columns:
        raise UsageError(f"--label-column {label_column} is also a text column, so the text would give the answer away")
    return schema


def _example(table: pa.Table, label: str | None) -> str:
    """Options that would fit the table, as far as its first rows show."""
    guessed = guess_columns(table, label)
    if not guessed.text or not guessed.label:
        return ""
    text, label = shlex.quote(",".join(guessed.text)), shlex.quote(guessed.label)
    return f", for example --text-columns {text} --label-column {label}"


def require_columns(needed: Iterable[str], found: Sequence[str], who: str = "") -> None:
    """Raises DataError naming what is missing, what it may be a slip for and what is there.

    `who` needs the columns, as in "the model needs"; "" where the user named them.
    """
    missing = [column for column in needed if column not in found]
    if not missing:
        return
    plural = "columns" if len(missing) > 1 else "column"
    lower = {column.lower(): column for column in found}
    close = [lower[match] for name in missing for match in difflib.get_close_matches(name.lower(), lower, n=1)]
    meant = f"did you mean {', '.join(dict.fromkeys(close))}? " if close and not who else ""
    which = f", which {who}" if who else ""
    raise DataError(f"the table has no {plural} {', '.join(missing)}{which}; {meant}it has {abbreviate(found)}")


def kind_of_labels(values: Iterable[str]) -> str:
    """What labels are by their spelling: all of them whole numbers, all of them true or false, or text."""
    names = list(values)
    if names and all(re.fullmatch(r"(0|-?[1-9]\d*)(\.0+)?", name) for name in names):  # 007 is no number: it is a name
        return INTEGER
    if names and all(name.lower() in ("true", "false") for name in names):
        return BOOLEAN
    return TEXT


def spell_labels(values: pa.Array, kind: str) -> pa.Array:
    """Labels of a kind in the one spelling that `label_names` have: 1 for 1.0, true for True."""
    if kind == INTEGER:
        return pc.replace_substring_regex(values, r"\.0+$", "")
    return pc.utf8_lower(values) if kind == BOOLEAN else values


def look_alikes(names: Iterable[str]) -> list[list[str]]:
    """Groups of labels that differ only by case or by white space."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(" ".join(name.casefold().split()), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def sort_labels(values: Iterable[str]) -> tuple[str, ...]:
    """Label names in order: by value when all are whole numbers, else alphabetically."""
    names = list(values)
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))
