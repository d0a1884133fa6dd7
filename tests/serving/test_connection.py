"""Clients that say too little or too much, or do not read, at a server of one process."""

import asyncio
import json
import socket

import pytest
import uvicorn

from bertforge.serving import connection
from bertforge.serving.connection import Connection

REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
LARGE = b"x" * 20_000_000
ENDED = []


async def app(scope, receive, send):
    """Answers at once, /large at length, and /wait only who hangs up."""
    while scope["path"] == "/wait":
        if (await receive())["type"] == "http.disconnect":
            ENDED.append(scope["path"])
            return
    body = LARGE if scope["path"] == "/large" else b""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def talk(client):
    """Runs `client(connect, server)` beside a server; `connect` gives a reader and a writer."""

    async def run():
        listening = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(app, http=Connection, lifespan="off", log_config=None, ws="none", timeout_keep_alive=60)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            return await asyncio.wait_for(client(lambda: asyncio.open_connection(*listening.getsockname()), server), 60)
        finally:
            server.should_exit = True
            await serving

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("said", "later"),
    [
        (b"", b""),
        (b"GE", b""),
        (REQUEST, b""),
        (REQUEST + b"\r\n" + REQUEST, b""),
        (REQUEST + b"\r\n", b"\r\n"),  # of which no head begins
        (CHUNKED, b"1\r\nx\r\n"),  # a body that goes on after the answer
        (CHUNKED, b"0\r\nA: b\r\n"),  # and trailers that do
    ],
)
def test_who_does_not_end_what_was_begun_is_left(monkeypatch, said, later):
    monkeypatch.setattr(connection, "_SECONDS", 0.1)

    async def client(connect, server):
        reader, writer = await connect()
        writer.write(said)
        answer = await reader.readuntil(b"\r\n\r\n") if later else b""
        writer.write(later)
        return answer + await reader.read()

    assert talk(client).count(b"200") == said.count(b"\r\n\r\n")


def test_who_ended_a_head_has_time():
    async def client(connect, server):
        reader, writer = await connect()
        found = []
        for _ in range(2):
            writer.write(REQUEST + b"\r\n")
            assert b"200" in await reader.readuntil(b"\r\n\r\n")
            (served,) = server.server_state.connections
            found.append(served._late)
        return found

    assert talk(client) == [None, None]


@pytest.mark.parametrize(
    "begun", [REQUEST, CHUNKED + b"1\r\nx\r\n0\r\n", CHUNKED.replace(b"/", b"/wait", 1) + b"0\r\n"]
)
@pytest.mark.parametrize("line", [b"x" * 1000, b"X-Header: " + b"y" * 1000 + b"\r\n"])
def test_a_head_and_trailers_without_end_are_refused(begun, line):
    async def client(connect, server):
        reader, writer = await connect()
        writer.write(begun)
        sent = 0
        while not reader.at_eof() and sent < 10_000:
            writer.write(line)
            sent += 1
            try:
                await writer.drain()
            except ConnectionError:
                break
            await asyncio.sleep(0)
        return sent

    assert 60 < talk(client) < 10_000


def test_a_long_body_is_none_of_the_head():
    async def client(connect, server):
        reader, writer = await connect()
        for _ in range(3):
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000)
            assert b"200" in await reader.readuntil(b"\r\n\r\n")
        return True

    assert talk(client)


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
def test_who_does_not_read_an_answer_is_left(monkeypatch, close):
    monkeypatch.setattr(connection, "_SECONDS", 0.1)

    async def client(connect, server):
        _, writer = await connect()
        writer.transport.pause_reading()
        writer.write(REQUEST.replace(b"/", b"/large", 1) + close + b"\r\n")
        while not server.server_state.total_requests:
            await asyncio.sleep(0.01)
        while server.server_state.connections:
            await asyncio.sleep(0.01)
        return True

    assert talk(client)


def test_who_reads_a_long_answer_gets_all_of_it():
    async def client(connect, server):
        reader, writer = await connect()
        writer.write(REQUEST.replace(b"/", b"/large", 1) + b"\r\n")
        await reader.readuntil(b"\r\n\r\n")
        found = await reader.readexactly(len(LARGE))
        (served,) = server.server_state.connections
        return found == LARGE and served._unread is None

    assert talk(client)


def test_who_sends_a_second_request_and_hangs_up_ends_the_first():
    ENDED.clear()

    async def client(connect, server):
        _, writer = await connect()
        waiting = REQUEST.replace(b"/", b"/wait", 1) + b"\r\n"
        writer.write(waiting + waiting)
        while not server.server_state.tasks:
            await asyncio.sleep(0.01)
        writer.close()
        while server.server_state.tasks:
            await asyncio.sleep(0.01)
        return True

    assert talk(client)
    assert ENDED == ["/wait"]


def test_what_is_no_http_is_refused_in_the_form_of_the_service(caplog):
    async def client(connect, server):
        reader, writer = await connect()
        writer.write(b"\x16\x03\x01 a secret\r\n\r\n")
        return await reader.read()

    head, _, body = talk(client).partition(b"\r\n\r\n")
    told = json.loads(body)
    assert head.startswith(b"HTTP/1.1 400 ")
    assert told["error"]["code"] == "bad_request"
    assert f"x-request-id: {told['id']}".encode() in head
