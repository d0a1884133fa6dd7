"""`inputs` of a request -> rows that a model reads, all of one kind: texts, or objects with the columns of its table.

What `Predictor.predict` takes of a frame, an object may say: the text columns and the columns from which the model's
own are made. Numbers become the strings that a CSV would hold, so that a row means the same whatever rows it is
prepared beside. A column that the model's table does not have is refused, for most such names
are misspelt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bertforge.data.chunks import cell_text
from bertforge.data.features import FEATURES
from bertforge.data.schema import STACK_OVERFLOW
from bertforge.inference.codec import Codec
from bertforge.serving.requests import RequestError, kind_of
from bertforge.serving.settings import Limits

Row = str | dict[str, str]
"""A text, or its cells by their columns."""


@dataclass(frozen=True)
class Columns:
    """Those of a model's table, as an object names them."""

    texts: tuple[str, ...]
    """Joined by one space, they are the text."""
    needed: tuple[str, ...]
    """Others that the model reads."""
    others: tuple[str, ...]
    """Of the table, but not read: a whole row may be sent as it is."""
    beside: bool
    """Whether the model reads columns beside the text, so that a text is too little."""

    @classmethod
    def of(cls, codec: Codec) -> Columns:
        """What a model reads of its training table."""
        schema = codec.schema
        read = () if codec.transform is None else codec.transform.spec.columns
        sources = (FEATURES[name].sources if schema.kind == STACK_OVERFLOW else (name,) for name in read)
        named = dict.fromkeys(source for several in sources for source in several)
        needed = tuple(name for name in named if name not in schema.text_columns)
        known = {*schema.text_columns, *needed}
        others = tuple(name for name in schema.required_columns if name not in known)
        return cls(schema.text_columns, needed, others, codec.transform is not None)

    @cached_property
    def known(self) -> frozenset[str]:
        """All that an object may name."""
        return frozenset((*self.texts, *self.needed, *self.others))

    def __str__(self) -> str:
        return ", ".join((*self.texts, *self.needed))


def read_inputs(given: Any, columns: Columns, limits: Limits, name: str = "inputs") -> list[Row]:
    """The rows of a field, one or a list; raises RequestError naming what is wrong, `inputs[3].Title`."""
    if given is None:
        raise RequestError(422, f"{name} is missing; send a text or a list of texts", name)
    if isinstance(given, str | dict):
        return [_row(given, columns, limits, name)]
    if not isinstance(given, list):
        raise RequestError(422, f"{name} is {kind_of(given)}; send a text, an object or a list of them", name)
    if not given:
        raise RequestError(422, f"{name} is empty; send one text at least", name)
    if len(given) > limits.max_texts:
        raise RequestError(413, f"{name} has {len(given):,} entries; the limit is {limits.max_texts:,}", name)
    rows = [_row(value, columns, limits, f"{name}[{place}]") for place, value in enumerate(given)]
    kind = type(rows[0])
    for place, row in enumerate(rows):
        if type(row) is not kind:
            field = f"{name}[{place}]"
            raise RequestError(
                422, f"{field} is {kind_of(row)}, but {name}[0] is {kind_of(rows[0])}; send one kind", field
            )
    return rows


def _row(value: Any, columns: Columns, limits: Limits, name: str) -> Row:
    if isinstance(value, str):
        if columns.beside:
            raise RequestError(422, f"{name} is a text, but the model reads {columns}; send an object with these", name)
        return _text(value, limits, name)
    if not isinstance(value, dict):
        raise RequestError(422, f"{name} is {kind_of(value)}; send a text, or an object with {columns}", name)
    for column in (*columns.texts, *columns.needed):
        if column not in value:
            raise RequestError(422, f"{name} lacks {column}; {_instead(column, value, columns)}", f"{name}.{column}")
    cells = {column: _cell(cell, column, columns, limits, name) for column, cell in value.items()}
    return {column: cells[column] for column in (*columns.texts, *columns.needed)}


def _instead(column: str, sent: dict[str, Any], columns: Columns) -> str:
    """What to do about a column that is not there: most often it has another name, title for Title."""
    strangers = (name for name in sent if name not in columns.known)
    found = min(strangers, key=lambda name: name.casefold() != column.casefold(), default=None)
    if found is None:
        return "send null where there is none"
    return f"{found:.60} was sent, which is no column of the model's table; it reads {columns}"


def _cell(value: Any, column: str, columns: Columns, limits: Limits, name: str) -> str:
    field = f"{name}.{column:.60}"
    if column not in columns.known:
        raise RequestError(422, f"the model's table has no column {field}; it reads {columns}", field)
    if isinstance(value, str):
        return _text(value, limits, field)
    if isinstance(value, dict | list):
        raise RequestError(422, f"{field} is {kind_of(value)}; send a text, a number, true, false or null", field)
    if value is not None and column in columns.texts:
        raise RequestError(422, f"{field} is {kind_of(value)}; send a text, or null where there is none", field)
    if isinstance(value, float) and not math.isfinite(value):  # 1e999
        raise RequestError(422, f"{field} is a number too large to hold; send null for a missing one", field)
    return cell_text(value)


def _text(text: str, limits: Limits, name: str) -> str:
    if len(text) > limits.max_characters:
        raise RequestError(413, f"{name} has {len(text):,} characters; the limit is {limits.max_characters:,}", name)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                422, f"{name} holds half a character at {error.start + 1:,}; send it whole, or U+FFFD for it", name
            ) from error
    return text
