"""The options of every command that reads a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bertforge.data.dialect import Dialect

KINDS = "CSV, TSV, JSON lines (each in .gz or .zip too), Parquet or Excel"
Separator = Annotated[
    str, typer.Option(help="What separates the columns of a text table, e.g. ';' or tab.", show_default="detected")
]
Encoding = Annotated[
    str, typer.Option(help="Encoding of a text table, e.g. cp1252 or utf-16.", show_default="detected")
]
_TYPED = {"tab": "\t", "\\t": "\t"}  # what can be typed


def dialect(encoding: str, separator: str) -> Dialect:
    """What the two options say; raises UsageError for what they cannot be."""
    from bertforge.data.dialect import Dialect

    return Dialect(encoding, _TYPED.get(separator.lower(), separator))
