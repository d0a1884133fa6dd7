"""Rows that wait for an engine, and whose turn it is.

Fair by tokens, between clients: each has a clock that runs by the tokens it was given, and next comes the oldest row of
the client whose clock is furthest behind (start-time fair queueing: Goyal, Vin and Cheng 1996, "Start-Time Fair
Queuing"). So one with a thousand rows waits for itself, and a single row waits for no more than the pack under way. A
client that comes, or comes back, starts where the row that was served last began: nothing can be saved up, and who was
just served comes after it.

With that row goes what suits it. An engine that takes packs takes rows in turn of all clients. One that pads takes rows
of the same padded length first, whoever waits longest, and then of those hardly shorter; rows that go along before
their client's turn move its clock as any others do, so it waits longer for the next. Deficit round robin, which serves
clients in a fixed round, would have to choose between its round and batches of like length.

The queue is bounded in tokens, and so that nobody fills it for others: once it is full a client may still hold its part
of it, which is the same for all that wait.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bertforge.engines.base import BatchShape
from bertforge.serving.channel import Answer, Ask, Refusal

_SHORTER = 8  # a batch takes rows that are shorter by an eighth of its length, or by the step of padded lengths


@dataclass(eq=False, slots=True)
class Request:
    """An ask and what became of it. Rows are taken one by one, and answered together."""

    ask: Ask
    lane: str
    """Rows of one lane go together: they are of one model."""
    reply: Callable[[Answer | Refusal], None]
    arrived: float
    """By the monotonic clock, as all times."""
    offsets: np.ndarray
    """[rows + 1]: where each row begins in the ask's ids."""
    costs: Sequence[int]
    """Tokens that each row takes in its batch, padding included."""
    waiting: int
    """Rows in the queue."""
    tokens: int
    """What these cost."""
    started: float = 0.0
    """When the first row was taken."""
    computing: int = 0
    """Rows that were taken and are not done."""
    logits: np.ndarray | None = None
    """[rows, labels] float32, once a row is done."""
    over: bool = False
    """Nothing is to be done any more: it is answered, refused or cancelled."""


Row = tuple[Request, int]
"""A request and the number of its row."""
_Key = tuple[str, int]  # lane and padded length; 0 where the engine takes packs


class _Client:
    """The rows of one client, in the order in which they came, those of a key together."""

    def __init__(self, clock: int) -> None:
        self.clock = clock
        self.tokens = 0
        self.rows: dict[_Key, deque[tuple[int, Request, int]]] = {}  # arrival, request, row


class Queue:
    """What waits for one engine. It is not for several threads at once."""

    def __init__(self, shape: BatchShape, packed: bool) -> None:
        self.shape, self.packed = shape, packed
        self.tokens = 0
        """What waits, padding included."""
        self._clients: dict[str, _Client] = {}
        self._clock = self._arrivals = 0

    def costs(self, lengths: Sequence[int]) -> Sequence[int]:
        """Tokens that rows of these lengths take."""
        return lengths if self.packed else [self.shape.padded(length) for length in lengths]

    def full(self, client: str, limit: float) -> bool:
        """Whether `client` has to wait outside, where `limit` tokens may wait in all."""
        if self.tokens < limit:
            return False
        own = self._clients[client].tokens if client in self._clients else 0
        others = sum(each.tokens > 0 for name, each in self._clients.items() if name != client)
        return own * (others + 1) >= limit

    def put(self, request: Request) -> None:
        """Behind all that its client has here."""
        client = self._clients.setdefault(request.ask.client, _Client(self._clock))
        for row, cost in enumerate(request.costs):
            self._arrivals += 1
            key = (request.lane, 0 if self.packed else cost)
            client.rows.setdefault(key, deque()).append((self._arrivals, request, row))
        client.tokens += request.tokens
        self.tokens += request.tokens

    def drop(self, request: Request) -> None:
        """Takes out what is left of a request."""
        request.over = True
        if request.waiting:
            self._count(request, request.waiting, request.tokens)

    def take(self, most: int, now: float) -> tuple[list[Row], list[Request]]:
        """The next rows to compute together, `most` tokens of them or a single row; and requests that are too late,
        which are dropped. No rows when nothing waits.
        """
        late: list[Request] = []
        while self._clients:
            name, client = min(self._clients.items(), key=lambda item: item[1].clock)
            firsts = [(entry[0], key) for key in list(client.rows) if (entry := self._first(client, key, now, late))]
            if firsts:
                head = min(firsts)[1]
                rows = self._fill(head, most, now, late)
                last = [made.costs[row] for made, row in rows if made.ask.client == name][-1]
                self._clock = max(self._clock, client.clock - (head[1] or last))  # where its last row began
                return rows, late
            del self._clients[name]
        return [], late

    def _fill(self, head: _Key, most: int, now: float, late: list[Request]) -> list[Row]:
        """Rows of one batch, of `head` first; those of each key in turn of the clients."""
        rows: list[Row] = []
        left, places = most, self.shape.rows or most
        for key in self._suiting(head):
            turns = [(each.clock, place, each) for place, each in enumerate(self._clients.values()) if key in each.rows]
            heapq.heapify(turns)
            while turns and places:
                _, place, client = turns[0]
                entry = self._first(client, key, now, late)
                cost = 0 if entry is None else entry[1].costs[entry[2]] if self.packed else head[1]
                if entry is None or (rows and cost > left):
                    heapq.heappop(turns)
                    continue
                client.rows[key].popleft()
                rows.append(entry[1:])
                self._count(entry[1], 1, entry[1].costs[entry[2]])
                client.clock += cost
                left, places = left - cost, places - 1
                heapq.heapreplace(turns, (client.clock, place, client))
        return rows

    def _suiting(self, head: _Key) -> list[_Key]:
        """The keys whose rows may go along, the longest first."""
        lane, width = head
        least = width - max(self.shape.multiple, width // _SHORTER)
        found = {key for client in self._clients.values() for key in client.rows if key[0] == lane}
        return sorted((key for key in found if least <= key[1] <= width), reverse=True)

    def _first(self, client: _Client, key: _Key, now: float, late: list[Request]) -> tuple[int, Request, int] | None:
        """The first row of a key that is still wanted; what stands before it goes, and so does an empty key."""
        line = client.rows[key]
        while line:
            request = line[0][1]
            if not request.over and request.ask.deadline > now:
                return line[0]
            if not request.over:
                self.drop(request)
                late.append(request)
            line.popleft()
        del client.rows[key]
        return None

    def _count(self, request: Request, rows: int, tokens: int) -> None:
        request.waiting -= rows
        request.tokens -= tokens
        self.tokens -= tokens
        self._clients[request.ask.client].tokens -= tokens
