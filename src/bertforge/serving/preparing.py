"""Rows -> token ids and arrays, those of all waiting requests together.

To tokenize one text takes 0.15 ms, and 16 texts 0.3 ms; to derive the columns of one row 6 ms, and of 16 as much. So
what came in during one turn of the event loop is prepared in one go, in lots of a bounded number of rows and
characters, some of each client: one with 1,000 texts lets single ones pass. Preparing takes as long as the loop took
for all else, so that it neither keeps others waiting nor waits for them under overload. All of it happens in the event
loop's own thread, for most of the work holds the interpreter: a thread would only wait for its turn.

What waits is bounded as the engine's queue is, for a front may be slower than its engine. Once the line is `full`, a
client may still hold its part of it, which is the same for all that wait. The door asks before it reads a body: under
overload most of a front's time goes into requests that it refuses.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from bertforge.columns.kind import stacked
from bertforge.data.tokens import MAX_TOKENS
from bertforge.inference.codec import Codec
from bertforge.serving.inputs import Row
from bertforge.serving.requests import RequestError

_LOT = 1 << 16  # characters, and it may go over by one row
_ROW = 1 << 10  # characters that a row counts as at least, for short ones take their time too
_SHARE = 16 * _ROW  # of one client in a turn, while others wait
_LINE = 1 << 22  # characters that may wait, and it may go over by one request
_REQUEST = 1 << 14  # characters that a request counts as at least in the line: its HTTP takes longer than a short text


@dataclass(frozen=True)
class Prepared:
    """Rows as the engine takes them, in the order of the request."""

    texts: list[str]
    ids: np.ndarray
    """[tokens] int32."""
    lengths: np.ndarray
    """[rows] int32."""
    whole: np.ndarray
    """[rows] int64: tokens of the texts before anything was cut."""
    columns: dict[str, np.ndarray] | None
    """[rows, width] of each kind; None where the model reads the text alone."""
    problems: list[str]
    """What is wrong with each row, "" for a good one."""


@dataclass(slots=True)
class _Job:
    rows: Sequence[Row]
    deadline: float
    done: asyncio.Future[Prepared]
    characters: int
    """That it takes of the line."""
    parts: list[Prepared] = field(default_factory=list)
    taken: int = 0
    """Rows that wait no longer."""
    prepared: int = 0


@dataclass(slots=True)
class _Line:
    """The requests of one client, the oldest first."""

    jobs: deque[_Job] = field(default_factory=deque)
    characters: int = 0
    """That wait."""


class Preparation:
    """That of one model."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._lines: dict[str, _Line] = {}  # of clients that wait; whose turn comes next is first
        self._characters = 0  # that wait in all of them
        self._called = 0.0  # when a turn was last asked for

    def full(self, client: str) -> bool:
        """Whether `client` has to wait outside."""
        own = self._lines[client].characters if client in self._lines else 0
        clients = len(self._lines) + (client not in self._lines)
        return self._characters >= _LINE and own * clients >= _LINE

    async def __call__(self, rows: Sequence[Row], client: str = "", deadline: float = math.inf) -> Prepared:
        """Raises DataError for columns that cannot be read, and RequestError once `deadline` is over."""
        loop = asyncio.get_running_loop()
        if not self._lines:
            self._called = time.monotonic()
            loop.call_soon(self._turn)
        job = _Job(rows, deadline, loop.create_future(), max(_REQUEST, sum(map(_characters, rows))))
        line = self._lines.setdefault(client, _Line())
        line.jobs.append(job)
        self._count(line, job.characters)
        return await job.done

    def _turn(self) -> None:
        """Prepares lots for as long as the loop took for all else since the last turn, one at least."""
        now = time.monotonic()
        until = 2 * now - self._called
        while self._lines and now <= until:
            self._lot(now)
            now = time.monotonic()
        self._called = now
        if self._lines:  # after those who have their rows by now went on
            asyncio.get_running_loop().call_soon(self._turn)

    def _lot(self, now: float) -> None:
        lots = {str: list[tuple[_Job, Sequence[Row]]](), dict: list[tuple[_Job, Sequence[Row]]]()}
        left = _LOT
        while self._lines and left > 0:
            client, line = next(iter(self._lines.items()))
            del self._lines[client]
            job = line.jobs.popleft()
            if job.deadline < now and not job.done.done():
                job.done.set_exception(RequestError(504, "the answer was not there by the deadline of the request"))
            if not job.done.done():  # as it is too where the client hung up
                start, room = job.taken, min(left, _SHARE)
                while job.taken < len(job.rows) and room > 0:
                    room -= _characters(job.rows[job.taken])
                    left -= _characters(job.rows[job.taken])
                    job.taken += 1
                lots[type(job.rows[0])].append((job, job.rows[start : job.taken]))
            if job.taken < len(job.rows) and not job.done.done():
                line.jobs.append(job)
            else:
                self._count(line, -job.characters)
            if line.jobs:
                self._lines[client] = line  # behind the others
        for lot in lots.values():
            if lot:
                self._prepare(lot)

    def _count(self, line: _Line, characters: int) -> None:
        line.characters += characters
        self._characters += characters

    def _prepare(self, lot: list[tuple[_Job, Sequence[Row]]]) -> None:
        try:
            found = _prepare(self._codec, [row for _, rows in lot for row in rows])
        except Exception as error:
            if len(lot) > 1:  # one request's rows are to blame
                for one in lot:
                    self._prepare([one])
            elif not lot[0][0].done.done():
                lot[0][0].done.set_exception(error)
            return
        start = 0
        for job, rows in lot:
            job.parts.append(_part(found, start, start + len(rows)))
            start += len(rows)
            job.prepared += len(rows)
            if job.prepared == len(job.rows) and not job.done.done():
                job.done.set_result(joined(job.parts))


def _prepare(codec: Codec, rows: list[Row]) -> Prepared:
    given = codec.read(rows if isinstance(rows[0], str) else pd.DataFrame(rows, dtype=object))  # type: ignore[arg-type]
    ids, offsets = codec.tokenizer.encode(given.texts)
    lengths = np.diff(offsets)
    whole = lengths.copy()
    for row in np.flatnonzero(lengths == MAX_TOKENS):  # all that the tokenizer reads
        whole[row] = codec.tokenizer.count(given.texts[row])
    return Prepared(
        texts=given.texts,
        ids=ids.astype(np.int32),
        lengths=lengths.astype(np.int32),
        whole=whole,
        columns=codec.arrays(given.columns),
        problems=given.problems or [""] * len(rows),
    )


def _part(found: Prepared, start: int, stop: int) -> Prepared:
    if (start, stop) == (0, len(found.texts)):
        return found
    first, last = (int(found.lengths[:row].sum()) for row in (start, stop))
    return Prepared(
        found.texts[start:stop],
        found.ids[first:last],
        found.lengths[start:stop],
        found.whole[start:stop],
        found.columns and {name: array[start:stop] for name, array in found.columns.items()},
        found.problems[start:stop],
    )


def joined(parts: list[Prepared]) -> Prepared:
    """The rows of all parts, which is not empty."""
    if len(parts) == 1:
        return parts[0]
    columns = None
    if parts[0].columns is not None:
        columns = {name: stacked([part.columns[name] for part in parts if part.columns]) for name in parts[0].columns}
    return Prepared(
        [text for part in parts for text in part.texts],
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.whole for part in parts]),
        columns,
        [problem for part in parts for problem in part.problems],
    )


def _characters(row: Row) -> int:
    return max(_ROW, len(row) if isinstance(row, str) else sum(map(len, row.values())))
