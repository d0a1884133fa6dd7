"""A load generator for HTTP/1.1, cheap enough to run on the cores of the server that it measures.

`run` starts a process for each `Plan`, has them all begin at the same moment, and returns what became of every request.
A request costs 30 to 40 µs of CPU: raw sockets on uvloop, requests that are bytes before the clock starts, and no
parsing but of the status and the length. What a process took is in its `Outcome`, for on few cores it is taken from the
server.

A plan without a rate is a closed loop: every connection sends its next request when the last one is answered, which
finds the most a server can do. A plan with a rate is an open loop: requests are due at random moments (Poisson), like
those of many people, whether the server keeps up or not, and each latency counts from the moment its request was due.
A closed loop would send less to a slow server, and hide its latency (Gil Tene's "coordinated omission").
"""

from __future__ import annotations

import asyncio
import pickle
import random
import resource
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from tempfile import TemporaryFile
from typing import cast

import numpy as np

LOST, HUNG = 0, -1
"""In the place of a status: the connection ended before the response did, and there was none in time."""
_START = 1.0  # seconds for the processes to come up
_FIRST, _MOST = 16, 4096  # connections of an open loop
_REFUSED = 0.1  # seconds that a connection of a closed loop rests after 429
_AGAIN = 0.5  # seconds until a connection that was refused is tried again


@dataclass(frozen=True)
class Plan:
    """What one process sends."""

    host: str
    port: int
    bodies: Sequence[bytes]
    """JSON, sent in turn, and again from the first."""
    seconds: float
    connections: int = _MOST
    """At the same time; the most of an open loop."""
    rate: float | None = None
    """Requests a second of an open loop; None is a closed one."""
    requests: int | None = None
    """Ends the plan earlier."""
    first: int = 0
    """The body to begin with."""
    path: str = "/v1/classify"
    source: str | None = None
    """Address to connect from: servers tell clients apart by it."""
    patience: float = 30.0
    """Seconds to wait for answers after the last request."""
    name: str = "load"
    """First part of every request's id, and the seed of the moments."""


@dataclass(frozen=True)
class Outcome:
    """What became of requests, in the order in which they were due; all arrays `[requests]`."""

    due: np.ndarray
    """By the monotonic clock, as all times; when it was sent, in a closed loop."""
    done: np.ndarray
    """NaN where there was no answer."""
    status: np.ndarray
    """Of HTTP, or LOST or HUNG."""
    body: np.ndarray
    """Which of the plan's bodies it was."""
    ids: list[str]
    answers: list[bytes]
    """Bodies of the responses."""
    strays: int
    """Responses that no request was waiting for."""
    began: float
    cpu: float
    """Seconds of CPU that the generator took."""

    @property
    def seconds(self) -> float:
        """From the first request to the last answer."""
        return float(np.nanmax(self.done) - self.began)

    def rate(self, seconds: float, settle: float = 0.0) -> float:
        """Requests answered with 200 a second, between `settle` and `seconds` after the beginning."""
        inside = (self.status == 200) & (self.done > self.began + settle) & (self.done < self.began + seconds)
        return float(inside.sum() / (seconds - settle))

    def latencies_ms(self, status: int = 200) -> np.ndarray:
        """Of the requests that were answered so."""
        found: np.ndarray = 1000 * (self.done - self.due)[self.status == status]
        return found

    def statuses(self) -> dict[str, int]:
        """How often each came."""
        values, counts = np.unique(self.status, return_counts=True)
        names = {LOST: "lost", HUNG: "hung"}
        pairs = zip(values.tolist(), counts.tolist(), strict=True)
        return {names.get(value, str(value)): number for value, number in pairs}


def run(*plans: Plan) -> list[Outcome]:
    """Carries out all plans at once, each in a process of its own."""
    start = time.monotonic() + _START
    command = [sys.executable, __file__]
    with ExitStack() as stack:
        processes, files = [], []
        for plan in plans:
            files.append(stack.enter_context(TemporaryFile()))  # a pipe would have to be read in time
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=files[-1]))
            stack.callback(processes[-1].kill)
            processes[-1].stdin.write(pickle.dumps((start, plan)))
            processes[-1].stdin.close()
        for process, file in zip(processes, files, strict=True):
            if process.wait():
                raise RuntimeError("the load generator failed")
            file.seek(0)
        return [pickle.load(file) for file in files]


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome of all processes."""
    arrays = {
        name: np.concatenate([getattr(each, name) for each in outcomes]) for name in ("due", "done", "status", "body")
    }
    return Outcome(
        **arrays,
        ids=[name for each in outcomes for name in each.ids],
        answers=[answer for each in outcomes for answer in each.answers],
        strays=sum(each.strays for each in outcomes),
        began=min(each.began for each in outcomes),
        cpu=sum(each.cpu for each in outcomes),
    )


def spread(plan: Plan, processes: int) -> list[Plan]:
    """The same load from several processes, each beginning with another body."""
    return [
        replace(
            plan,
            first=len(plan.bodies) * number // processes,
            connections=max(1, plan.connections // processes),
            rate=plan.rate and plan.rate / processes,
            name=f"{plan.name}{number}",
        )
        for number in range(processes)
    ]


class _Generator:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.due: list[float] = []
        self.done: list[float] = []
        self.status: list[int] = []
        self.answers: list[bytes] = []
        self.strays = 0
        self.idle: list[_Connection] = []
        self.opened = 0
        self.waiting = deque[int]()  # requests that are due and have no connection
        self.under_way = 0
        self.until = 0.0  # and nothing is sent until it is known
        head = f"POST {plan.path} HTTP/1.1\r\nhost: {plan.host}:{plan.port}\r\ncontent-type: application/json\r\n"
        self._heads = [f"{head}content-length: {len(body)}\r\nx-request-id: ".encode() for body in plan.bodies]

    async def run(self, start: float) -> Outcome:
        plan = self.plan
        for _ in range(plan.connections if plan.rate is None else min(plan.connections, _FIRST)):
            await self._connect()
        await asyncio.sleep(start - time.monotonic())
        began, cpu = time.monotonic(), time.process_time()
        self.until = began + plan.seconds
        if plan.rate is None:
            ready, self.idle = self.idle, []
            for connection in ready:
                self.next(connection)
        else:
            await self._open_loop(began, plan.rate)
        left = max(0.0, self.until - time.monotonic()) + plan.patience
        try:
            async with asyncio.timeout(left):
                while self.under_way or (plan.rate is None and self.more()):
                    await asyncio.sleep(0.01)
        except TimeoutError:
            pass
        sent = len(self.due)
        return Outcome(
            due=np.array(self.due),
            done=np.array(self.done),
            status=np.array(self.status, np.int16),
            body=(plan.first + np.arange(sent)) % len(plan.bodies),
            ids=[self._id(number) for number in range(sent)],
            answers=self.answers,
            strays=self.strays,
            began=began,
            cpu=time.process_time() - cpu,
        )

    def more(self) -> bool:
        """Whether there is another request to send."""
        most = self.plan.requests
        return (most is None or len(self.due) < most) and time.monotonic() < self.until

    def next(self, connection: _Connection) -> None:
        """An idle connection: what was due and waits, or the next of a closed loop."""
        if self.waiting:
            connection.send(self.waiting.popleft())
        elif self.plan.rate is None and self.more():
            connection.send(self.made(time.monotonic()))
        else:
            self.idle.append(connection)

    def made(self, due: float) -> int:
        """The number of a new request."""
        self.due.append(due)
        self.done.append(np.nan)
        self.status.append(HUNG)
        self.answers.append(b"")
        self.under_way += 1
        return len(self.due) - 1

    def over(self, number: int, status: int, answer: bytes) -> None:
        """A request has its answer, or its connection is lost."""
        self.done[number], self.status[number], self.answers[number] = time.monotonic(), status, answer
        self.under_way -= 1

    def request(self, number: int) -> bytes:
        """As it is sent."""
        body = (self.plan.first + number) % len(self.plan.bodies)
        return b"%b%b\r\n\r\n%b" % (self._heads[body], self._id(number).encode(), self.plan.bodies[body])

    def _id(self, number: int) -> str:
        return f"{self.plan.name}-{number}"

    async def _open_loop(self, began: float, rate: float) -> None:
        moments = random.Random(self.plan.name)
        due = began
        while True:
            due += moments.expovariate(rate)
            if due > self.until or len(self.due) == self.plan.requests:
                return
            if (ahead := due - time.monotonic()) > 0:
                await asyncio.sleep(ahead)
            elif len(self.due) % 16 == 0:
                await asyncio.sleep(0)  # late: answers are read all the same
            number = self.made(due)
            if self.idle:
                self.idle.pop().send(number)
            else:
                self.waiting.append(number)
                if self.opened < self.plan.connections:
                    self.reopen()

    def reopen(self) -> None:
        """Another connection, soon."""
        self.opened += 1
        task = asyncio.get_running_loop().create_task(self._connect(counted=True))
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)

    async def _connect(self, *, counted: bool = False) -> None:
        self.opened += not counted
        local = None if self.plan.source is None else (self.plan.source, 0)
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self), self.plan.host, self.plan.port, local_addr=local
            )
        except OSError:  # nobody listens at the moment
            await asyncio.sleep(_AGAIN)
            self.opened -= 1
            if self.waiting or self.plan.rate is None:
                self.reopen()


_tasks: set[asyncio.Task[None]] = set()


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, generator: _Generator) -> None:
        self._generator, self._number, self._buffer = generator, -1, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._generator.next(self)

    def send(self, number: int) -> None:
        self._number = number
        self._transport.write(self._generator.request(number))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head, begin = self._buffer[:end].lower(), end + 4
            if (place := head.find(b"\r\ncontent-length:")) >= 0:
                stop = begin + int(head[place + 17 :].partition(b"\r\n")[0])
                body, left = self._buffer[begin:stop], self._buffer[stop:]
                if len(self._buffer) < stop:
                    return
            else:  # Ray Serve
                chunks, last, left = self._buffer[begin:].partition(b"0\r\n\r\n")
                if not last:
                    return
                body = b"".join(chunks.split(b"\r\n")[1::2])
            status, self._buffer = int(head[9:12]), left
            number, self._number = self._number, -1
            if number < 0:
                self._generator.strays += 1
                continue
            self._generator.over(number, status, body)
            if status == 429 and self._generator.plan.rate is None:
                asyncio.get_running_loop().call_later(_REFUSED, self._go_on)
            else:
                self._go_on()

    def _go_on(self) -> None:
        if not self._transport.is_closing():
            self._generator.next(self)

    def connection_lost(self, error: Exception | None) -> None:
        generator = self._generator
        generator.opened -= 1
        if self in generator.idle:
            generator.idle.remove(self)
        if self._number >= 0:
            generator.over(self._number, LOST, b"")
        if generator.waiting or (generator.plan.rate is None and generator.more()):
            generator.reopen()


def _main() -> None:
    import uvloop

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    start, plan = pickle.load(sys.stdin.buffer)
    sys.stdout.buffer.write(pickle.dumps(uvloop.run(_Generator(plan).run(start))))


if __name__ == "__main__":
    sys.modules["load"] = sys.modules["__main__"]  # whose classes are those of the process that reads the answer
    for each in (Plan, Outcome):
        each.__module__ = "load"
    _main()
