"""The kinds of column there are; a new one is a line here.

Recipes, `bertforge.json` and `config.json` each hold the records of all kinds as one flat table, beside settings that
the kinds share. The two functions at the end go from the table to the records and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Literal

from bertforge.columns.categorical import Categorical
from bertforge.columns.kind import Kind
from bertforge.columns.numeric import Numeric
from bertforge.columns.several_names import SeveralNames

KINDS: dict[str, Kind[Any, Any, Any]] = {kind.name: kind for kind in (Numeric(), Categorical(), SeveralNames())}


def records(
    record: Literal["Settings", "Learnt", "Shape"], table: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record of every kind, by the kind's name, and the entries of `table` that belong to none.

    Raises TypeError for a record of which the table lacks a field without default.
    """
    left, found = dict(table), {}
    for name, kind in KINDS.items():
        cls = getattr(kind, record)
        found[name] = cls(**{field.name: _frozen(left.pop(field.name)) for field in fields(cls) if field.name in left})
    return found, left


def flat(found: Mapping[str, Any]) -> dict[str, Any]:
    """The records of every kind as one table, JSON-ready."""
    return {field: value for record in found.values() for field, value in asdict(record).items()}


def _frozen(value: Any) -> Any:
    """JSON's lists as tuples, nested ones too."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
