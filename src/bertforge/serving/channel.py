"""What fronts and the engine process say to each other, over a Unix socket.

A frame is its length (uint32, little-endian, as all numbers), one byte for its kind and a body. Numbers stand in a
fixed head, texts and arrays follow as their bytes; what is said once in a while is JSON. Nothing is pickled, so nothing
that is read is ever run. Both ends are of one version of this package: frames carry no version of their own.

A front is never blocked by the engine: it sends any number of asks, and each is answered or refused under its number,
in any order. It sees the engine process die as the end of the connection.

A model has a name, which clients use, and a generation, the digest of its folder's manifest: a front made token ids for
one generation, and the answer must come from that one. `State` says which there are now. A front goes on asking the old
ones until it says that it has `Adopted` a newer state; by then the engine process may drop them.

Frames are written together once in a turn of the event loop, for a call of the system costs more than a frame.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

_LENGTH = struct.Struct("<IB")  # of what follows the kind; kind
_ASK = struct.Struct("<QdHHHHII")  # number, deadline; bytes of three texts; columns, rows, tokens
_COLUMN = struct.Struct("<H3sI")  # bytes of the name, type, width
_ANSWER = struct.Struct("<QddII")  # number, queued, computed, rows, labels
_NUMBER = struct.Struct("<Q")
_AGAIN = 0.05  # seconds between attempts to connect

Reason = Literal["full", "deadline", "failed", "unknown model", "away"]
"""`failed` is an engine that broke over this ask, `away` one that is not there; only a front says the latter."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Rows to compute, one at least."""

    number: int
    """The front's own, used once on a connection."""
    model: str
    generation: str
    client: str
    """Whose turn it takes: clients wait side by side, and one's own asks behind each other."""
    ids: np.ndarray
    """[tokens] int32, the rows' token ids one after another; the engine cuts a row that is too long."""
    lengths: np.ndarray
    """[rows] int32, tokens of each row, 1 at least."""
    columns: Mapping[str, np.ndarray] | None = None
    """The columns beside the text, [rows, width] for each kind of `columns.registry`, by its name."""
    deadline: float = math.inf
    """By `time.monotonic()`, which all processes of a machine share: who asked waits no longer."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for this ask any more; it may be answered all the same."""

    number: int


@dataclass(frozen=True, slots=True)
class Adopted:
    """The front asks no generation from now on that is not in the state of this number."""

    number: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine computed for an ask."""

    number: int
    logits: np.ndarray
    """[rows, labels] float32."""
    queued: float
    """Seconds until its first row was taken out of the queue."""
    computed: float
    """Seconds from then until its last row was done."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no answer."""

    number: int
    reason: Reason
    message: str
    """One line for the client."""
    retry_after: float | None = None
    """Seconds after which there will be room, where the queue is full."""


@dataclass(frozen=True)
class Served:
    """A model that can be asked."""

    name: str
    generation: str
    """Digest of the manifest of `folder`, which tells whether the folder is still the one that was loaded."""
    folder: str
    """From which a front reads the tokenizer, the schema, the labels and the columns."""
    precision: str
    engine: str
    device: str
    adapter_of: str | None = None
    """The name of the model on whose base this adapter runs."""
    identity: str = ""
    """The folder's, which thresholds leave as it is: `bertforge.manifest.identity`."""
    decision: Mapping[str, Any] | None = None
    """The thresholds that the folder had when it was loaded, which all fronts take, whatever it has since."""


@dataclass(frozen=True)
class State:
    """What is served; sent first on each connection, and again whenever it changes."""

    number: int
    """Counts the states of this engine process."""
    models: tuple[Served, ...] = ()


@dataclass(frozen=True)
class Load:
    """What an engine has to do and has done; sent once a second, for each engine, to every front alike."""

    engine: str
    """The name of the model that it was loaded for; adapters share the engine of theirs."""
    waiting: int
    """Tokens in the queue."""
    rate: float
    """Tokens a second that it computes when it is busy, as measured."""
    batches: int
    """Since it was loaded, as are the others."""
    rows: int
    tokens: int
    """Padding included."""
    seconds: float
    """That calls of the engine took."""


Message = Ask | Cancel | Adopted | Answer | Refusal | State | Load
_KINDS = {kind: number for number, kind in enumerate((Ask, Cancel, Adopted, Answer, Refusal, State, Load))}


def frame(message: Message) -> bytes:
    """The bytes that `Frames` turns into an equal message."""
    if isinstance(message, Ask):
        body = _ask_body(message)
    elif isinstance(message, Answer):
        head = (message.number, message.queued, message.computed, *message.logits.shape)
        body = _ANSWER.pack(*head) + np.ascontiguousarray(message.logits, "<f4").tobytes()
    elif isinstance(message, Cancel | Adopted):
        body = _NUMBER.pack(message.number)
    elif isinstance(message, Refusal):
        body = json.dumps([message.number, message.reason, message.message, message.retry_after]).encode()
    else:
        body = json.dumps(asdict(message)).encode()
    return _LENGTH.pack(len(body), _KINDS[type(message)]) + body


def _ask_body(ask: Ask) -> bytes:
    texts = [text.encode() for text in (ask.model, ask.generation, ask.client)]
    columns = ask.columns or {}
    head = _ASK.pack(ask.number, ask.deadline, *map(len, texts), len(columns), len(ask.lengths), len(ask.ids))
    parts = [head, *texts, ask.lengths.astype("<i4").tobytes(), ask.ids.astype("<i4").tobytes()]
    for name, array in columns.items():
        label, stored = name.encode(), array.astype(array.dtype.newbyteorder("<"))
        parts += [_COLUMN.pack(len(label), stored.dtype.str.encode(), array.shape[1]), label, stored.tobytes()]
    return b"".join(parts)


class Frames:
    """The messages in a stream of bytes, however it is cut."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._needed = _LENGTH.size

    def read(self, data: bytes) -> Iterator[Message]:
        """What `data` completes. Arrays of a message share the memory of the bytes they came in."""
        self._rest += data
        if len(self._rest) < self._needed:
            return
        whole, start = bytes(self._rest), 0
        while len(whole) >= start + _LENGTH.size:
            length, kind = _LENGTH.unpack_from(whole, start)
            stop = start + _LENGTH.size + length
            if len(whole) < stop:
                break
            yield _READERS[kind](whole, start + _LENGTH.size, stop)
            start = stop
        self._rest = bytearray(memoryview(whole)[start:])
        self._needed = _LENGTH.size
        if len(self._rest) >= _LENGTH.size:
            self._needed += _LENGTH.unpack_from(self._rest)[0]


def _read_ask(data: bytes, start: int, stop: int) -> Ask:
    number, deadline, *sizes, columns, rows, tokens = _ASK.unpack_from(data, start)
    texts, start = [], start + _ASK.size
    for size in sizes:
        texts.append(data[start : start + size].decode())
        start += size
    model, generation, client = texts
    lengths = np.frombuffer(data, "<i4", rows, start)  # [rows]
    start += 4 * rows
    ids = np.frombuffer(data, "<i4", tokens, start)  # [tokens]
    start += 4 * tokens
    found: dict[str, np.ndarray] = {}
    for _ in range(columns):
        size, kind, width = _COLUMN.unpack_from(data, start)
        start += _COLUMN.size
        dtype = np.dtype(kind.decode())
        array = np.frombuffer(data, dtype, rows * width, start + size).reshape(rows, width)
        found[data[start : start + size].decode()] = array
        start += size + array.nbytes
    return Ask(number, model, generation, client, ids, lengths, found or None, deadline)


def _read_answer(data: bytes, start: int, stop: int) -> Answer:
    number, queued, computed, rows, labels = _ANSWER.unpack_from(data, start)
    logits = np.frombuffer(data, "<f4", rows * labels, start + _ANSWER.size).reshape(rows, labels)
    return Answer(number, logits, queued, computed)


def _read_state(data: bytes, start: int, stop: int) -> State:
    found = json.loads(data[start:stop])
    return State(found["number"], tuple(Served(**model) for model in found["models"]))


_READERS: tuple[Callable[[bytes, int, int], Message], ...] = (
    _read_ask,
    lambda data, start, stop: Cancel(*_NUMBER.unpack_from(data, start)),
    lambda data, start, stop: Adopted(*_NUMBER.unpack_from(data, start)),
    _read_answer,
    lambda data, start, stop: Refusal(*json.loads(data[start:stop])),
    _read_state,
    lambda data, start, stop: Load(**json.loads(data[start:stop])),
)


class Connection(asyncio.Protocol):
    """One end of a connection: tells each message that comes, and in the end that it is over."""

    def __init__(
        self, received: Callable[[Connection, Message], None], opened: Callable[[Connection], None],
        lost: Callable[[Connection], None],
    ) -> None:  # fmt: skip
        self._received, self._opened, self._lost = received, opened, lost
        self._frames, self._unsent = Frames(), list[bytes]()
        self._transport: asyncio.Transport | None = None

    def send(self, message: Message) -> None:
        """Sends it with all else that is sent in this turn of the loop; to a connection that is over, nothing."""
        if self._transport is None:
            return
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(frame(message))

    def close(self) -> None:
        """Sends what is unsent, then ends the connection."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        if self._transport is not None and self._unsent:
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)
        self._opened(self)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        for message in self._frames.read(data):
            self._received(self, message)

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._transport = None
        self._lost(self)


class RefusedError(Exception):
    """An ask has no answer; `reason` says which kind of refusal it is."""

    def __init__(self, reason: Reason, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


AWAY = "the engine is starting"
"""Said to who asks while it is away."""


class EngineClient:
    """A front's way to the engine process. `start` it in a running loop; it connects by itself, again and again."""

    def __init__(self, path: Path, changed: Callable[[State | None], object] = lambda state: None) -> None:
        """`path` is that of the engine's socket, which need not exist yet.

        `changed` is told each state that the engine sends, and None when the connection is over. Who is told a state
        makes itself ready for its models, and calls `adopted` then.
        """
        self.path, self.changed = path, changed
        self.loads: dict[str, Load] = {}
        """The last load of each engine."""
        self.connection: Connection | None = None
        """None while there is none."""
        self._asks: dict[int, asyncio.Future[Answer]] = {}
        self._numbers = itertools.count()
        self._task: asyncio.Task[None] | None = None
        self._over = asyncio.Event()

    def start(self) -> None:
        """Begins to connect."""
        self._task = asyncio.get_running_loop().create_task(self._connect())

    async def close(self) -> None:
        """Ends the connection for good; what is still asked is refused."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self.connection is not None:
            self.connection.close()
            await self._over.wait()

    async def ask(
        self,
        model: str,
        generation: str,
        client: str,
        ids: np.ndarray,
        lengths: np.ndarray,
        columns: Mapping[str, np.ndarray] | None = None,
        deadline: float = math.inf,
    ) -> Answer:
        """The engine's answer; see `Ask` for the arguments.

        Raises RefusedError: at once where the engine is away, when the connection breaks, and at the deadline. When the
        task that waits here is cancelled, the engine is told.
        """
        connection, loop = self.connection, asyncio.get_running_loop()
        if connection is None:
            raise RefusedError("away", AWAY)
        number = next(self._numbers)
        answer: asyncio.Future[Answer] = loop.create_future()
        self._asks[number] = answer
        connection.send(Ask(number, model, generation, client, ids, lengths, columns, deadline))
        timer = None
        if deadline < math.inf:
            late = RefusedError("deadline", "the answer was not there by the deadline of the request")
            timer = loop.call_later(max(0.0, deadline - time.monotonic()), _fail, answer, late)
        try:
            return await answer
        finally:
            if timer is not None:
                timer.cancel()
            if self._asks.pop(number, None) is not None:  # neither answered nor refused
                connection.send(Cancel(number))

    def adopted(self, state: State) -> None:
        """From now on only generations of `state` are asked."""
        if self.connection is not None:
            self.connection.send(Adopted(state.number))

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._over = asyncio.Event()
            try:
                await loop.create_unix_connection(
                    lambda: Connection(self._receive, self._opened, self._lost), str(self.path)
                )
            except OSError:  # not there yet, or no longer
                await asyncio.sleep(_AGAIN)
                continue
            await self._over.wait()

    def _opened(self, connection: Connection) -> None:
        self.connection = connection

    def _lost(self, connection: Connection) -> None:
        self.connection = None
        waiting, self._asks = self._asks, {}
        for answer in waiting.values():
            _fail(answer, RefusedError("away", AWAY))
        self._over.set()
        self.changed(None)

    def _receive(self, connection: Connection, message: Message) -> None:
        if isinstance(message, State):
            self.changed(message)
        elif isinstance(message, Load):
            self.loads[message.engine] = message
        elif isinstance(message, Answer):
            answer = self._asks.pop(message.number, None)  # None where nobody waits any more
            if answer is not None and not answer.done():
                answer.set_result(message)
        elif isinstance(message, Refusal) and (answer := self._asks.pop(message.number, None)) is not None:
            _fail(answer, RefusedError(message.reason, message.message, message.retry_after))


def _fail(answer: asyncio.Future[Answer], error: RefusedError) -> None:
    if not answer.done():
        answer.set_exception(error)
