"""Frames, and a front's end of the connection, against an engine process written out in the tests."""

import asyncio
import contextlib
import math
import time

import numpy as np
import pytest

from bertforge.serving.channel import (
    Adopted,
    Answer,
    Ask,
    Cancel,
    Connection,
    EngineClient,
    Frames,
    Load,
    Refusal,
    RefusedError,
    Served,
    State,
    frame,
)

IDS, LENGTHS = np.array([5, 6, 7, 8, 9], np.int32), np.array([2, 3], np.int32)
COLUMNS = {
    "numeric": np.array([[1.5, np.nan], [0.0, -2.0]], np.float32),
    "categorical": np.array([[3], [4]]),
    "multi": np.zeros((2, 0), np.int64),
}
MESSAGES = (
    Ask(1, "closed", "xxh3:ab", "10.0.0.1", IDS, LENGTHS),
    Ask(2**40, "naïve", "", "", IDS, LENGTHS, COLUMNS, 12.5),
    Cancel(7),
    Adopted(3),
    Answer(1, np.array([[0.1, 0.2, 0.3]], np.float32), 0.25, 0.5),
    Refusal(2, "full", "no room", 1.5),
    Refusal(3, "failed", "it broke"),
    State(4, (Served("closed", "xxh3:ab", "/models/closed", "int8", "openvino", "a CPU", "base"),)),
    State(5),
    Load("closed", 1000, 20_000.5, 3, 40, 5000, 0.25),
)


def written_out(value):
    """A message as plain values that compare."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, [repr(each) for each in value.ravel().tolist()]
    if isinstance(value, dict):
        return {name: written_out(each) for name, each in value.items()}
    if isinstance(value, tuple(type(message) for message in MESSAGES)) and not isinstance(value, State | Load):
        return type(value), [written_out(getattr(value, name)) for name in type(value).__slots__]
    return value


@pytest.mark.parametrize("cut", [1, 7, 64, 100_000])
def test_messages_come_out_of_a_stream_however_it_is_cut(cut):
    stream, frames = b"".join(map(frame, MESSAGES)), Frames()
    found = [message for at in range(0, len(stream), cut) for message in frames.read(stream[at : at + cut])]
    assert list(map(written_out, found)) == list(map(written_out, MESSAGES))


class Engine:
    """The other end: keeps what it is told, and answers when the test says so."""

    def __init__(self, path):
        self.path, self.told, self.connections = path, [], []

    async def __aenter__(self):
        self.server = await asyncio.get_running_loop().create_unix_server(
            lambda: Connection(self._told, self.connections.append, self.connections.remove), str(self.path)
        )
        return self

    async def __aexit__(self, *error):
        self.server.close()
        for connection in [*self.connections]:
            connection.close()
        await self.server.wait_closed()
        self.path.unlink(missing_ok=True)

    def _told(self, connection, message):
        self.told.append(message)

    def send(self, message):
        for connection in self.connections:
            connection.send(message)

    async def until(self, count):
        while len(self.told) < count:
            await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def client_of(path, changed=lambda state: None):
    client = EngineClient(path, changed)
    client.start()
    try:
        yield client
    finally:
        await client.close()


async def connected(client):
    while client.connection is None:
        await asyncio.sleep(0.001)


def ask(client, **changes):
    given = {"model": "m", "generation": "g", "client": "c", "ids": IDS, "lengths": LENGTHS}
    return asyncio.ensure_future(client.ask(**given | changes))


@pytest.fixture
def here(tmp_path):
    return tmp_path / "engine"


def test_answers_find_their_asks_in_any_order(here):
    async def scene():
        async with Engine(here) as engine, client_of(here) as client:
            await connected(client)
            asks = [ask(client) for _ in range(50)]
            await engine.until(50)
            for told in reversed(engine.told):
                engine.send(Answer(told.number, np.full((1, 2), told.number, np.float32), 0.0, 0.0))
            answers = await asyncio.gather(*asks)
            assert [answer.logits[0, 0] for answer in answers] == [told.number for told in engine.told]
            engine.send(
                Answer(engine.told[0].number, np.zeros((1, 2), np.float32), 0.0, 0.0)
            )  # once more: nobody waits

    asyncio.run(scene())


def test_a_refusal_is_raised_with_its_reason(here):
    async def scene():
        async with Engine(here) as engine, client_of(here) as client:
            await connected(client)
            asked = ask(client)
            await engine.until(1)
            engine.send(Refusal(engine.told[0].number, "full", "no room", 1.5))
            with pytest.raises(RefusedError, match="no room") as refused:
                await asked
            assert (refused.value.reason, refused.value.retry_after) == ("full", 1.5)

    asyncio.run(scene())


def test_whoever_hangs_up_is_cancelled_at_the_engine_and_so_is_a_deadline_that_passes(here):
    async def scene():
        async with Engine(here) as engine, client_of(here) as client:
            await connected(client)
            first = ask(client)
            await engine.until(1)
            first.cancel()
            second = ask(client, deadline=time.monotonic() - 1)
            with pytest.raises(RefusedError) as refused:
                await second
            assert refused.value.reason == "deadline"
            await engine.until(4)
            assert engine.told[1] == Cancel(engine.told[0].number)
            assert engine.told[3] == Cancel(engine.told[2].number)
            assert engine.told[0].deadline == math.inf

    asyncio.run(scene())


def test_all_that_wait_fail_when_the_connection_breaks_and_it_comes_back_by_itself(here):
    async def scene():
        states = []
        async with client_of(here, states.append) as client:
            with pytest.raises(RefusedError) as refused:  # there is no engine yet
                await ask(client)
            assert refused.value.reason == "away"
            async with Engine(here) as engine:
                await connected(client)
                asks = [ask(client) for _ in range(3)]
                await engine.until(3)
            found = await asyncio.gather(*asks, return_exceptions=True)
            assert [error.reason for error in found] == ["away"] * 3
            assert states == [None]
            async with Engine(here) as engine:
                await connected(client)
                engine.send(State(1))
                asked = ask(client)
                await engine.until(1)
                client.adopted(State(1))
                engine.send(Answer(engine.told[0].number, np.ones((1, 1), np.float32), 0.0, 0.0))
                assert (await asked).logits == 1
                await engine.until(2)
                assert engine.told[1] == Adopted(1)
                assert states == [None, State(1)]

    asyncio.run(scene())
