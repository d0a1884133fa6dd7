"""CSV records that survive broken quoting: one bad quote costs one row, never the rest of the table.

Python's csv module parses (strictly: a quote in the wrong place is an error), but a reader that meets an opening quote
without its closing one swallows line after line until some later quote ends the field. So the lines of the record at
hand are remembered. When the record turns out broken, or has a wrong number of fields, only its first line is set
aside and the others are given back, to be parsed as records of their own.

A field longer than `_LONGEST_FIELD` is set aside too, which bounds what is read again after an unclosed quote.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from bertforge.data.chunks import name_columns
from bertforge.errors import DataError

_BLANK, _UNPAIRED = "blank line", "broken quoting: unpaired quote"
_LONGEST_FIELD = 4 << 20  # characters; Python's own limit of 131,072 is less than a long document
_TOO_LONG = f"field of more than {_LONGEST_FIELD:,} characters: shorten it, or close its quote"
_LONGEST = 10_000  # lines of one set-aside record, so that a file that is no CSV at all does not become one record


@dataclass
class Record:
    """One record, good (`fields`) or set aside (`problem`, `raw`); `line` is the 1-based line on which it starts."""

    line: int
    fields: list[str] = field(default_factory=list)
    problem: str = ""
    raw: str = ""
    torn: bool = False
    """Set aside in the middle: what follows may be the rest of it."""


class _Lines:
    """The file's lines, with those of the record at hand kept in `taken`."""

    def __init__(self, text: Iterable[str]) -> None:
        self._text = iter(text)
        self._given_back: deque[str] = deque()
        self.taken: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._given_back.popleft() if self._given_back else next(self._text)
        self.taken.append(line)
        return line

    def give_back_all_but_first(self) -> str:
        self._given_back.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]
        return self.taken[0]


class CsvRecords:
    """Iterates over the records below the header, of lines that keep their ends; blank lines are no records.

    Raises DataError when there is no header, or a header that is no text or names a column twice.
    """

    def __init__(self, text: Iterable[str], name: str, separator: str = ",") -> None:
        csv.field_size_limit(_LONGEST_FIELD)
        self._separator = separator
        self._lines = _Lines(text)
        self._reader = csv.reader(self._lines, strict=True, delimiter=separator)
        try:
            named = next(self._reader, [])
        except csv.Error as error:
            raise DataError(f"{name} has a header line that is no CSV ({error})") from error
        if any("\udc80" <= character <= "\udcff" or character == "\0" for character in "".join(named)):
            raise DataError(f"{name} has a header that is no text in its encoding; name another with --encoding")
        self.header = name_columns(named, name)

    def __iter__(self) -> Iterator[Record]:
        """A broken record and the pieces of it that follow are one set-aside record: the lines after a broken quote
        join it until a record can be read again, unless a line has separators enough to be a row of its own.
        """
        width = len(self.header)
        pending: list[Record] = []  # a set-aside record and what may be the rest of it
        for record in self._attempts():
            whole_row = record.raw.count(self._separator) >= width - 1 and record.problem != _UNPAIRED
            if pending and record.problem and not whole_row and len(pending) < _LONGEST:
                pending.append(record)
                continue
            yield from _joined(pending)
            pending = [record] if record.torn else []
            if not record.torn and record.problem != _BLANK:
                yield record
        yield from _joined(pending)

    def _attempts(self) -> Iterator[Record]:
        """What starts on each line, after the last good record or the last broken line."""
        line, lines = 1 + len(self._lines.taken), self._lines
        searching = False  # for the next good record after a torn one
        while True:
            lines.taken.clear()
            fields: list[str] = []
            problem = ""
            try:
                fields = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                problem = _TOO_LONG if str(error).startswith("field larger") else f"broken quoting: {error}"
            spanned = len(lines.taken)
            # The tail of a torn record can look like a row, say `end of text",x,y`, but not with its quotes in pairs.
            if searching and not problem and sum(taken.count('"') for taken in lines.taken) % 2:
                problem = _UNPAIRED
            if not problem and len(fields) == len(self.header):
                searching = False
                yield Record(line, fields)
                line += spanned
                continue
            torn = bool(problem) or spanned > 1
            searching = searching or torn
            first = lines.give_back_all_but_first()
            problem = problem or (f"{len(fields)} fields instead of {len(self.header)}" if first.strip() else _BLANK)
            yield Record(line, problem=problem, raw=first, torn=torn)
            line += 1


def _joined(pieces: list[Record]) -> Iterator[Record]:
    """The pieces of one set-aside record as one; nothing for none."""
    if pieces:
        yield replace(pieces[0], raw="".join(piece.raw for piece in pieces))
