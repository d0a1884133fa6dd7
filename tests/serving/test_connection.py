"""Clients that say too little or too much, at a server of one process."""

import asyncio
import socket

import pytest
import uvicorn

from bertforge.serving import connection
from bertforge.serving.connection import Connection

REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n"


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


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


@pytest.mark.parametrize("said", [b"", b"GE", REQUEST, REQUEST + b"\r\n" + REQUEST])
def test_who_does_not_end_a_head_is_left(monkeypatch, said):
    monkeypatch.setattr(connection, "_SECONDS", 0.1)

    async def client(connect, server):
        reader, writer = await connect()
        writer.write(said)
        return await reader.read()

    assert talk(client).count(b"204") == said.count(b"\r\n\r\n")


def test_who_ended_a_head_has_time():
    async def client(connect, server):
        reader, writer = await connect()
        found = []
        for _ in range(2):
            writer.write(REQUEST + b"\r\n")
            assert b"204" in await reader.readuntil(b"\r\n\r\n")
            (served,) = server.server_state.connections
            found.append(served._late)
        return found

    assert talk(client) == [None, None]


@pytest.mark.parametrize("line", [b"x" * 1000, b"X-Header: " + b"y" * 1000 + b"\r\n"])
def test_a_head_without_end_is_refused(line):
    async def client(connect, server):
        reader, writer = await connect()
        writer.write(REQUEST)
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
            assert b"204" in await reader.readuntil(b"\r\n\r\n")
        return True

    assert talk(client)
