"""CSV records that survive broken quoting: one bad quote costs one row, never the rest of the table.

Python's csv module parses (strictly: a quote in the wrong place is an error), but a reader that meets an opening quote
without its closing one swallows line after line until some later quote ends the field. So the lines of the record at
hand are remembered. When the record turns out broken, or has a wrong number of fields, only its first line is set
aside and the others are given back, to be parsed as records of their own.

That would read a line again for each unclosed quote before it: quadratic time. But a record that runs on into a line
stands between quotes there, so where and how it ends does not depend on where it began. This is kept of each line given
back, and a line is read three times at most.

A line that is cut off (`lines.py`), a field and a record over their limits break a record as a wrong quote does, which
bounds the memory. A carriage return outside quotes that ends no line breaks its own line and no other.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from bertforge.data import limits
from bertforge.data.chunks import name_columns
from bertforge.errors import DataError

_BLANK, _UNPAIRED = "blank line", "broken quoting: unpaired quote"
_RETURN = "carriage return outside quotes: take it out, or put quotes around the field"
_EMPTY = ("\n", "\r\n", "\r")
_LONGEST = 10_000  # lines of one set-aside record, so that a file that is no CSV at all does not become one record


class _KnownEnd(csv.Error):
    """A record that is known to be no good one without reading up to its end; says why."""


@dataclass
class Record:
    """One record, good (`fields`) or set aside (`problem`, `raw`); `line` is the 1-based line on which it starts."""

    line: int
    fields: list[str] = field(default_factory=list)
    problem: str = ""
    raw: str = ""
    torn: bool = False
    """Set aside in the middle: what follows may be the rest of it."""
    characters: int = 0
    """Of its lines."""


class _Lines:
    """The file's lines, with those of the record at hand kept in `taken`."""

    def __init__(self, text: Iterable[str], separator: str) -> None:
        self._text = iter(text)
        self._separator = separator
        self._given_back: deque[str] = deque()
        # Of each line given back, what a record that runs on into it passes until it ends: separators and quotes.
        self._passed: deque[tuple[int, int] | None] = deque()  # None where it breaks
        self.taken: list[str] = []
        self.characters = 0  # of those taken
        self.blank = 0  # blank lines passed over before those
        self.width = 0  # fields of a good record; 0 before the header is read
        self.searching = False  # for the next good record after a torn one
        self._problem = ""  # of the record whose lines were given back, when it did not come to an end

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        """Raises csv.Error where the record at hand is known to be broken."""
        if self._given_back:
            if self.taken:
                self._check_end()
            line = self._given_back.popleft()
            self._passed.popleft()
        else:
            line = next(self._text)
            while line in _EMPTY and self.width and not self.taken and not self.searching:
                self.blank += 1
                line = next(self._text)
        self.taken.append(line)
        self.characters += len(line)
        if self.characters > limits.ROW:
            raise _KnownEnd(f"row of more than {limits.ROW:,} characters: shorten it, or close its quote")
        return line

    def start(self) -> None:
        """The next line taken is the first of a record."""
        self.taken.clear()
        self.characters = self.blank = 0

    def give_back_all_but_first(self, problem: str) -> str:
        """`problem` is what kept the record from coming to an end, "" when it came to one."""
        separators = quotes = 0
        if len(self.taken) > 1:
            self._problem = problem
        for line in reversed(self.taken[1:]):
            self._given_back.appendleft(line)
            if problem:
                self._passed.appendleft(None)
                continue
            separators += self._separators('"' + line)
            quotes += line.count('"')
            self._passed.appendleft((separators, quotes))
        del self.taken[1:]
        return self.taken[0]

    def is_unpaired(self, more: int = 0) -> bool:
        """Whether the lines taken, with `more` quotes, are rather the tail of a torn record, `end of text",x,y` say.

        That can look like a row, but not with its quotes in pairs.
        """
        return self.searching and (sum(line.count('"') for line in self.taken) + more) % 2 == 1

    def _check_end(self) -> None:
        """Raises _KnownEnd when the record at hand, which runs on, will be no good one."""
        if self._passed[0] is None:
            raise _KnownEnd(self._problem)
        if len(self.taken) == 1:
            separators, quotes = self._passed[0]
            fields = 1 + self._separators(self.taken[0]) + separators
            if self.is_unpaired(quotes):
                raise _KnownEnd(_UNPAIRED)
            if fields != self.width:
                raise _KnownEnd(_wrong_width(fields, self.width))

    def _separators(self, line: str) -> int:
        """Those outside quotes, in a line whose last quote may be open."""
        return len(next(csv.reader([line], delimiter=self._separator))) - 1


class CsvRecords:
    """Iterates over the records below the header, of lines that keep their ends; blank lines are no records.

    Raises DataError when there is no header, or a header that is no text or names a column twice.
    """

    def __init__(self, text: Iterable[str], name: str, separator: str = ",") -> None:
        csv.field_size_limit(limits.CELL)
        self._separator = separator
        self._lines = _Lines(text, separator)
        self._reader = csv.reader(self._lines, strict=True, delimiter=separator)
        try:
            named = next(self._reader, [])
        except csv.Error as error:
            raise DataError(f"{name} has a header line that is no CSV ({_explained(error)})") from error
        if any("\udc80" <= character <= "\udcff" or character == "\0" for character in "".join(named)):
            raise DataError(f"{name} has a header that is no text in its encoding; name another with --encoding")
        self.header = name_columns(named, name)
        self._lines.width = len(self.header)

    def __iter__(self) -> Iterator[Record]:
        """A broken record and the pieces of it that follow are one set-aside record: the lines after a broken quote
        join it until a record can be read again, unless a line has separators enough to be a row of its own.
        """
        width = len(self.header)
        pending: list[Record] = []  # a set-aside record and what may be the rest of it
        characters = 0  # of those
        for record in self._attempts():
            if record.problem:
                whole_row = record.raw.count(self._separator) >= width - 1 and record.problem != _UNPAIRED
                if pending and not whole_row and len(pending) < _LONGEST and characters < limits.ROW:
                    pending.append(record)
                    characters += record.characters
                    continue
            yield from _joined(pending)
            pending, characters = ([record], record.characters) if record.torn else ([], 0)
            if not record.torn and record.problem != _BLANK:
                yield record
        yield from _joined(pending)

    def _attempts(self) -> Iterator[Record]:
        """What starts on each line, after the last good record or the last broken line."""
        line, lines, width = 1 + len(self._lines.taken), self._lines, len(self.header)
        while True:
            lines.start()
            fields: list[str] = []
            problem = ""
            try:
                fields = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                problem = _explained(error)
            spanned = len(lines.taken)
            line += lines.blank
            unended = problem
            if not problem and lines.is_unpaired():
                problem = _UNPAIRED
            if not problem and len(fields) == width:
                lines.searching = False
                yield Record(line, fields, characters=lines.characters)
                line += spanned
                continue
            torn = (bool(problem) or spanned > 1) and not (problem == _RETURN and spanned == 1)
            lines.searching = lines.searching or torn
            characters = len(lines.taken[0])
            first = lines.give_back_all_but_first(unended)
            problem = problem or (_wrong_width(len(fields), width) if first.strip() else _BLANK)
            yield Record(line, problem=problem, raw=first, torn=torn, characters=characters)
            line += 1


def _wrong_width(fields: int, width: int) -> str:
    return f"{fields} fields instead of {width}"


def _explained(error: csv.Error) -> str:
    said = str(error)
    if isinstance(error, _KnownEnd):
        return said
    if said.startswith("field larger"):
        return f"field of more than {limits.CELL:,} characters: shorten it, or close its quote"
    return _RETURN if said.startswith("new-line character") else f"broken quoting: {said}"


def _joined(pieces: list[Record]) -> Iterator[Record]:
    """The pieces of one set-aside record as one; nothing for none."""
    if pieces:
        raw = "".join(piece.raw for piece in pieces)
        yield replace(pieces[0], raw=raw, characters=len(raw))
