"""The threads of one engine: each takes a batch out of the queue the moment it is free, computes it and answers.

There is no timer that waits for a batch to fill. While an engine computes, asks gather, and the busier it is the fuller
are its batches; an ask that finds it idle is computed at once.

How much a batch may hold follows from the latency that is wanted and from the rate at which the engine has computed
batches of that size. So a GPU gets packs of thousands of rows and a slow CPU a handful, and a row that comes waits for
no more than the batches under way. A batch may always hold as much as the longest text, which takes its time anyway: a
row at a time, a busy CPU computes a tenth less. The same rate says how much may wait.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from threading import Condition, Thread, current_thread

import numpy as np

from bertforge.columns.kind import stacked
from bertforge.data.loader import Examples
from bertforge.data.tokens import TokenStore
from bertforge.engines.base import Engine
from bertforge.engines.run import batch_of
from bertforge.errors import BertforgeError, is_out_of_memory
from bertforge.serving.channel import Answer, Ask, Load, Reason, Refusal
from bertforge.serving.queue import Queue, Request, Row
from bertforge.serving.settings import Pace

log = logging.getLogger(__name__)
_KEPT = 0.9  # of the rate, when another batch is measured
_FULL = 60.0  # seconds after which a batch that did not fit into memory is tried again

Reply = Callable[[Answer | Refusal], None]
Sent = tuple[Reply, Answer | Refusal]


@dataclass(frozen=True)
class Lane:
    """One model of an engine: the model itself, or one of its adapters."""

    engine: Engine
    sep_id: int
    max_length: int
    """Tokens that a row is cut to."""


class Batcher:
    """The queue and the threads of the engines in `lanes`, which compute one in place of the other."""

    def __init__(
        self,
        lanes: Mapping[str, Lane],
        pace: Pace,
        deliver: Callable[[list[Sent]], object],
        broken: Callable[[Exception], object],
    ) -> None:
        """`deliver` is given what there is to say, by any thread; `broken` the exception of an engine that failed."""
        self.lanes, self.pace, self._deliver, self._broken = lanes, pace, deliver, broken
        engine = next(iter(lanes.values())).engine
        self._shape, self._queue = engine.shape, Queue(engine.shape, engine.packed)
        self._most, self._shrunk = self._shape.tokens, 0.0  # tokens that fit into memory, and when they became fewer
        self._least = max(lane.max_length for lane in lanes.values())
        self._rate = 0.0  # tokens a second of one thread while all compute; 0 until it is measured
        self._batches = self._rows = self._tokens = 0
        self._seconds = 0.0
        self._begun: dict[Thread, float] = {}  # calls of the engine that have not returned
        self._changed, self._closed = Condition(), False
        self._threads = [Thread(target=self._work, name=engine.name, daemon=True) for _ in range(engine.streams)]
        for thread in self._threads:
            thread.start()

    def submit(self, ask: Ask, lane: str, reply: Reply) -> Request | None:
        """Puts an ask into the queue; None when it is full, which is said by `reply` at once."""
        arrived, longest = time.monotonic(), self.lanes[lane].max_length
        offsets = np.concatenate([[0], np.cumsum(ask.lengths)])  # [rows + 1]
        costs = self._queue.costs(np.minimum(ask.lengths, longest).tolist())
        request = Request(ask, lane, reply, arrived, offsets, costs, waiting=len(costs), tokens=sum(costs))
        with self._changed:
            rate = self._rate * len(self._threads)
            if rate and self._queue.full(ask.client, self.pace.queue * rate):
                after = self._queue.tokens / rate
                refusal = Refusal(ask.number, "full", "too many requests are waiting", after)
            else:
                self._queue.put(request)
                self._changed.notify(len(costs))  # each may be a batch
                return request
        reply(refusal)
        return None

    def cancel(self, request: Request) -> None:
        """Nobody waits for it: what is not begun is left."""
        with self._changed:
            self._queue.drop(request)

    def load(self, name: str) -> Load:
        """What there is to do and was done, under the engine's name."""
        with self._changed:
            rate = self._rate * len(self._threads)
            return Load(name, self._queue.tokens, rate, self._batches, self._rows, self._tokens, self._seconds)

    def longest(self) -> float:
        """Seconds for which the oldest batch under way has been computed; 0 while there is none."""
        now = time.monotonic()
        return now - min([*self._begun.values()], default=now)

    def close(self) -> None:
        """Waits until all that was submitted is answered, then closes the engines."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for lane in self.lanes.values():
            lane.engine.close()

    def _work(self) -> None:
        try:
            while rows := self._next():
                self._compute(rows)
        except Exception as error:
            self._broken(error)

    def _next(self) -> list[Row]:
        """A batch; none when there will be no more."""
        while True:
            with self._changed:
                now = time.monotonic()
                rows, late = self._queue.take(self._batch_tokens(), now)
                if not rows and not late:
                    if self._closed:
                        return []
                    self._changed.wait()
                    continue
                for request, _ in rows:
                    request.started = request.started or now
                    request.computing += 1
            self._deliver([(each.reply, _late(each)) for each in late])
            if rows:
                return rows

    def _batch_tokens(self) -> int:
        if not self._rate:
            return self._most
        if self._most < self._shape.tokens and time.monotonic() - self._shrunk > _FULL:  # what filled it may be gone
            self._most, self._shrunk = min(self._shape.tokens, 2 * self._most), time.monotonic()
        return int(min(self._most, max(self._least, self.pace.latency * self._rate)))

    def _compute(self, rows: list[Row]) -> None:
        """Computes a batch and answers what it completes. Raises what a broken engine raises, once rows are refused."""
        cost, begun, thread = sum(request.costs[row] for request, row in rows), time.monotonic(), current_thread()
        self._begun[thread] = begun
        try:
            logits = self._logits(rows)
        except Exception as error:
            full = is_out_of_memory(error)
            if len(rows) > 1 and full:
                self._most, self._shrunk = max(1, min(self._most, cost) // 2), begun
                log.warning("a batch of %d tokens does not fit into memory; batches have %d now", cost, self._most)
            if len(rows) > 1 and (full or isinstance(error, BertforgeError)):  # so that one row spoils no other
                for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
                    self._compute(half)
                return
            self._refuse([request for request, _ in rows], "failed", "the engine failed over this request")
            if isinstance(error, BertforgeError):  # the batch is at fault, not the engine
                log.error("a batch was refused by its engine: %s", error)
                return
            raise
        finally:
            self._begun.pop(thread, None)
        now = time.monotonic()
        with self._changed:
            self._note(len(rows), cost, now - begun)
            whole = _filled_in(rows, logits)
        self._deliver([(request.reply, _answer(request, now)) for request in whole])

    def _note(self, rows: int, tokens: int, seconds: float) -> None:
        self._batches, self._rows, self._tokens = self._batches + 1, self._rows + rows, self._tokens + tokens
        self._seconds += seconds
        found = tokens / seconds
        if not self._rate:
            self._rate = found
            return
        # Small batches say little of a GPU, unless they are faster than was thought: the first rate is of kernels that
        # were yet to be made. A thread that computes alone may have had the cores of the others.
        faster = found > self._rate and len(self._begun) + 1 >= len(self._threads)
        if faster or 2 * tokens >= self._batch_tokens():
            self._rate = _KEPT * self._rate + (1 - _KEPT) * found

    def _logits(self, rows: list[Row]) -> np.ndarray:
        """`[rows, labels]` float32."""
        lane = self.lanes[rows[0][0].lane]
        examples = Examples(
            TokenStore(*_laid_out(rows)), np.full(len(rows), -1), lane.sep_id, lane.max_length, _columns(rows)
        )
        return lane.engine.logits(batch_of(examples, np.arange(len(rows)), self._queue.packed, self._shape))

    def _refuse(self, requests: Iterable[Request], why: Reason, message: str) -> None:
        with self._changed:
            refused = {request: Refusal(request.ask.number, why, message) for request in requests if not request.over}
            for request in refused:
                self._queue.drop(request)
        self._deliver([(request.reply, refusal) for request, refusal in refused.items()])


def _filled_in(rows: list[Row], logits: np.ndarray) -> list[Request]:
    """Gives requests the logits of their rows, and returns those that have them all now."""
    whole = []
    for place, (request, row) in enumerate(rows):
        if request.logits is None:
            request.logits = np.empty((len(request.costs), logits.shape[1]), np.float32)
        request.logits[row] = logits[place]
        request.computing -= 1
        if not request.computing and not request.waiting and not request.over:
            request.over = True
            whole.append(request)
    return whole


def _late(request: Request) -> Refusal:
    return Refusal(request.ask.number, "deadline", "the deadline of the request passed before its turn came")


def _answer(request: Request, now: float) -> Answer:
    assert request.logits is not None
    return Answer(request.ask.number, request.logits, request.started - request.arrived, now - request.started)


def _laid_out(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Flat ids, and offsets [rows + 1]."""
    parts = [request.ask.ids[request.offsets[row] : request.offsets[row + 1]] for request, row in rows]
    return np.concatenate(parts).view(np.uint32), np.cumsum([0, *map(len, parts)])


def _columns(rows: list[Row]) -> dict[str, np.ndarray] | None:
    """The columns of rows, [rows, width] for each kind."""
    given = [(request.ask.columns, row) for request, row in rows if request.ask.columns is not None]
    if not given:
        return None
    return {name: stacked([columns[name][row : row + 1] for columns, row in given]) for name in given[0][0]}
