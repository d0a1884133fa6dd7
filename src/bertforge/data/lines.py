"""Lines of text of which none is longer than a limit, however long those of the file are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TextIO


def bounded_lines(text: TextIO, most: int, end: str = "\n") -> Iterator[str]:
    """Lines with their `end`; of a longer line only its first `most` + 1 characters, and the rest is passed over.

    So a line of more than `most` characters is one that was too long.
    """
    while line := text.readline(most + 1):
        yield line
        while len(line) > most and not line.endswith(end):
            line = text.readline(most + 1)
