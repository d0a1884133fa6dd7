"""The door before an app that answers each request with the size of its body."""

import asyncio
import json

import pytest

from bertforge.serving import door as doors
from bertforge.serving.door import Door
from bertforge.serving.settings import Limits

MIB = 1 << 20


async def app(scope, receive, send):
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


@pytest.fixture
def door():
    return Door(app, Limits(max_body_mb=1), None, {}, log=lambda line: None)


async def asked(door, parts, method="POST", path="/", headers=()):
    """Status and body of the response to a request whose body comes in these parts; a future is waited for."""
    left, said = [*parts], []

    async def receive():
        if not left:
            await asyncio.Event().wait()
        part = left.pop(0)
        return {
            "type": "http.request",
            "body": part if isinstance(part, bytes) else await part,
            "more_body": bool(left),
        }

    async def send(message):
        said.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [*headers], "client": ("127.0.0.1", 1)}
    await door(scope, receive, send)
    return said[0]["status"], b"".join(message.get("body", b"") for message in said)


def message(answer):
    return json.loads(answer[1])["error"]["message"]


@pytest.mark.parametrize("parts", [[], [b"begun"]])
def test_a_body_that_does_not_come_is_not_waited_for(door, monkeypatch, parts):
    monkeypatch.setattr(doors, "_BODY_SECONDS", 0.05)

    async def run():
        return await asyncio.wait_for(asked(door, [*parts, asyncio.get_running_loop().create_future()]), 30)

    answer = asyncio.run(run())
    assert answer[0] == 408
    assert "was not there after" in message(answer)


@pytest.mark.parametrize("headers", [[(b"content-length", b"7")], [(b"transfer-encoding", b"chunked")]])
def test_a_get_has_no_body_so_who_has_no_key_sends_none(door, headers):
    answer = asyncio.run(asked(door, [b"7 bytes"], "GET", "/healthz", headers))
    assert (answer[0], message(answer)) == (413, "a request with the method GET has no body; leave it out")
    assert asyncio.run(asked(door, [b""], "GET", "/healthz")) == (200, b"0")


def test_who_has_too_much_waiting_is_refused_before_the_body_is_read(door):
    door.full = lambda client: client == "127.0.0.1"

    async def run():
        unread = asyncio.get_running_loop().create_future()
        return await asyncio.wait_for(asked(door, [unread]), 30), await asked(door, [b""], "GET", "/healthz")

    refused, health = asyncio.run(run())
    assert (refused[0], message(refused)) == (429, "too many requests are waiting; try again in 1 s")
    assert health == (200, b"0")


def test_large_bodies_have_a_size_together_and_small_ones_go_on(door, monkeypatch):
    monkeypatch.setattr(doors, "_BODIES", 2)

    async def run():
        rest = asyncio.get_running_loop().create_future()
        large = [b"x", b"x" * (MIB - 10), rest]
        slow = [asyncio.create_task(asked(door, large)) for _ in range(2)]
        await asyncio.sleep(0.05)
        during = await asked(door, [b"x", b"x" * (MIB - 10)]), await asked(door, [b"x" * 1000])
        rest.set_result(b"")
        return during, await asyncio.gather(*slow), await asked(door, [b"x", b"x" * (MIB - 10)])

    (refused, small), slow, later = asyncio.run(run())
    assert (refused[0], message(refused)) == (429, "too many large requests are under way; try again in 1 s")
    assert small == (200, b"1000")
    assert [*slow, later] == [(200, str(MIB - 9).encode())] * 3
    assert door.held == 0
