"""Broken requests as bytes on the socket, and good ones among them whose answers are known.

Every input is made from its number alone, so one that did harm is made again with `attack(texts, seed, number)`. After
what it sends, a client that is still there asks for /healthz and has the connection closed: a server that is in step
answers at once, and one that waits for the rest of a body is left after a moment.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any
from urllib.parse import urlsplit

ALLOWED = (503, 504)
"""Of all 5xx: the engine is away or the service ends, and a deadline that passed."""
CLOSE = 0.01
_WAIT = 0.5  # seconds for a server that has nothing to say
_GOOD_EVERY = 20  # inputs
_LAST = b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
_PATHS = (
    "/v1/classify", "/v1/models", "/v1/explain", "/v2", "/v2/health/ready", "/predict", "/metrics", "/healthz", "/",
    "/readyz", "/openapi.json", "/v1/monitor", "/%00", "/../../etc/passwd", "//", "/v1/classify?a=%ff", "*",
)  # fmt: skip
_METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "get", "X" * 40)
_HEADERS = (
    b"transfer-encoding: chunked", b"content-length: 3", b"content-length: -1", b"content-length: 1e3", b"no colon",
    b"content-length: 99999999999999999999", b"content-length: ", b"expect: 100-continue", b"upgrade: h2c", b"a:\x00b",
    b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: x\r\nsec-websocket-version: 13", b"\x00: b",
    b"content-type: text/plain", b"content-type: application/json; charset=utf-16", b"content-encoding: gzip",
    b"x-request-id: \xff\xfe", b"x-request-id: a\tb", b" folded: line", b"host: b", b"authorization: Bearer \xe9", b":",
    b"transfer-encoding: gzip, chunked", b"transfer-encoding: identity", b"connection: close", b"accept: \x7f",
    b"origin: http://example.org\r\naccess-control-request-method: POST",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1e999, 10**400, 0.5, "", " ", "\0", "a\0b", "\ud800", "\U0001f600", "\u202e", "x" * 3000, [],
    {}, [[]], [None], [""], ["a", 1], {"a": "b"}, {"": None}, [{}], [["a"]], "\ufeff", "\r\n\r\nHTTP/1.1 200 OK", -0.0,
)  # fmt: skip


@dataclass(frozen=True)
class Attack:
    """What one client does on one connection."""

    kind: str
    parts: Sequence[bytes]
    pause: float = 0.0
    """Seconds between the parts."""
    leaves: bool = False
    """Without waiting for an answer."""


@dataclass
class Told:
    """What came of it."""

    inputs: int = 0
    good: int = 0
    """Good requests that were answered rightly."""
    busy: int = 0
    """Good requests that were refused as the service was full."""
    answers: Counter[int] = field(default_factory=Counter)
    """By status."""
    silent: int = 0
    """Inputs without any answer, from clients that waited for one."""
    failures: list[str] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """JSON-ready."""
        answers = {str(status): number for status, number in sorted(self.answers.items())}
        return {
            "inputs": self.inputs, "good": self.good, "busy": self.busy, "answers": answers, "silent": self.silent,
            "failures": self.failures[:20],
        }  # fmt: skip


def attack(texts: Sequence[str], seed: int, number: int) -> Attack:
    """The input of this number."""
    rng = Random(f"{seed}-{number}")
    kind = rng.choice(_KINDS)
    return kind(rng, _body(rng, texts))


class Fuzz:
    """A service at `address`, and the known answers for `texts`."""

    def __init__(self, address: str, texts: Sequence[str], seed: int) -> None:
        parts = urlsplit(address)
        assert parts.hostname
        assert parts.port
        self._address, self._texts, self._seed = (parts.hostname, parts.port), texts, seed

    def run(
        self, count: float = math.inf, *, seconds: float = math.inf, together: int = 32, pause: float = 0.0
    ) -> Told:
        """Sends inputs from so many clients at a time, until one of both ends is reached; each rests for `pause`."""
        return asyncio.run(self._run(count, time.monotonic() + seconds, together, pause))

    async def _run(self, count: float, until: float, together: int, pause: float) -> Told:
        found = Told()
        known = [await self._ask(text) for text in self._texts]
        assert all(chances is not None for chances in known), "the service answers before anything is broken"

        async def client() -> None:
            while found.inputs < count and time.monotonic() < until:
                number, found.inputs = found.inputs, found.inputs + 1
                if number % _GOOD_EVERY == 0:
                    await self._check(found, number, known)
                else:
                    await self._one(found, number)
                await asyncio.sleep(pause)

        await asyncio.gather(*(client() for _ in range(together)))
        return found

    async def _check(self, found: Told, number: int, known: Sequence[Any]) -> None:
        place = number // _GOOD_EVERY % len(self._texts)
        told = await self._ask(self._texts[place])
        if told is None:
            found.busy += 1
        elif told.keys() == known[place].keys() and all(abs(told[name] - known[place][name]) < CLOSE for name in told):
            found.good += 1
        else:
            found.failures.append(f"good request {number}: {str(told)[:200]}")

    async def _ask(self, text: str) -> dict[str, float] | None:
        """Probabilities; None from a service that is full."""
        body = json.dumps({"inputs": text}).encode()
        answer = await self._send(Attack("good", [_request(body, [b"connection: close"])]), wait=60.0)
        head, _, rest = answer.partition(b"\r\n\r\n")
        if head.startswith(b"HTTP/1.1 429"):
            return None
        if not head.startswith(b"HTTP/1.1 200"):
            return {"status": -1.0, head[:60].decode("latin-1"): 0.0}
        chances: dict[str, float] = json.loads(rest)["results"][0]["probabilities"]
        return chances

    async def _one(self, found: Told, number: int) -> None:
        made = attack(self._texts, self._seed, number)
        answer = await self._send(made, wait=_WAIT)
        statuses = [int(status) for status in _STATUS.findall(answer)]
        found.answers.update(statuses)
        found.silent += not (answer or made.leaves)
        if bad := [status for status in statuses if status >= 500 and status not in ALLOWED]:
            found.failures.append(f"{made.kind} {number}: {bad}")
        if answer and not answer.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")):
            found.failures.append(f"{made.kind} {number}: {answer[:60]!r}")

    async def _send(self, made: Attack, wait: float) -> bytes:
        """All that comes back."""
        answer = b""
        try:
            reader, writer = await asyncio.open_connection(*self._address)
        except OSError as error:
            return repr(error).encode()
        with suppress(OSError, TimeoutError):
            for part in made.parts:
                writer.write(part)
                if made.pause:
                    await asyncio.sleep(made.pause)
            if made.leaves:
                linger = struct.pack("ii", 1, 0)  # the connection is reset
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            else:
                async with asyncio.timeout(wait):
                    await writer.drain()
                    while more := await reader.read(1 << 16):
                        answer += more
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        return answer


def _body(rng: Random, texts: Sequence[str]) -> bytes:
    inputs: Any = rng.choice(texts) if rng.random() < 0.7 else rng.sample(texts, min(3, len(texts)))
    return json.dumps({"inputs": inputs}).encode()


def _request(body: bytes, headers: Sequence[bytes] = (), line: bytes = b"POST /v1/classify HTTP/1.1") -> bytes:
    lines = [line, b"host: a", b"content-type: application/json", b"content-length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _flipped(rng: Random, body: bytes) -> Attack:
    request = bytearray(_request(body))
    for _ in range(rng.choice((1, 2, 8, 64))):
        request[rng.randrange(len(request))] = rng.randrange(256)
    return Attack("flipped", [bytes(request), _LAST])


def _cut(rng: Random, body: bytes) -> Attack:
    request = _request(body)
    return Attack("cut", [request[: rng.randrange(len(request))]], leaves=rng.random() < 0.7)


def _noise(rng: Random, body: bytes) -> Attack:
    return Attack("noise", [rng.randbytes(rng.choice((1, 10, 1000, 100_000))), _LAST])


def _odd_headers(rng: Random, body: bytes) -> Attack:
    headers = rng.sample(_HEADERS, rng.randint(1, 4))
    return Attack("headers", [_request(body, headers), _LAST])


def _large_head(rng: Random, body: bytes) -> Attack:
    size = rng.choice((1000, 20_000, 70_000, 1_000_000))
    many = [b"x%d: y" % number for number in range(size // 10)]
    headers, path = rng.choice(
        ((many, b""), ([b"x: " + b"y" * size], b""), ([b"y" * size + b": x"], b""), ([], b"?" + b"y" * size))
    )
    return Attack("large head", [_request(body, headers, b"POST /v1/classify" + path + b" HTTP/1.1"), _LAST])


def _odd_line(rng: Random, body: bytes) -> Attack:
    method, path = rng.choice(_METHODS), rng.choice(_PATHS)
    version = rng.choice(("HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/0.9", "", "HTTP/1.1 x"))
    return Attack("line", [_request(body, (), f"{method} {path} {version}".encode()), _LAST])


def _chunks(rng: Random, body: bytes) -> Attack:
    step = rng.choice((1, 7, 100, len(body)))
    chunks = [b"%x\r\n%b\r\n" % (len(part := body[i : i + step]), part) for i in range(0, len(body), step)]
    chunks.append(rng.choice((b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\ntrailer: x\r\n\r\n", b"", b"0\r\n")))
    if rng.random() < 0.6:
        odd = (
            b"g\r\n",
            b"-1\r\n",
            b"ffffffffffffffffff\r\n",
            b"7fffffffffffffff\r\nab",
            b"3\r\nabcdef\r\n",
            b"3;x=" + b"y" * 9000,
        )
        chunks.insert(rng.randrange(len(chunks)), rng.choice(odd))
    head = (
        b"POST /v1/classify HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    return Attack("chunks", [head, b"".join(chunks), _LAST])


def _wrong_length(rng: Random, body: bytes) -> Attack:
    length = rng.choice((0, 1, len(body) - 1, len(body) + 1, 2 * len(body), 10**6, 10**7, 10**18, 2**63, 2**64))
    head = f"POST /v1/classify HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n"
    return Attack("length", [head.encode() + body, _LAST], leaves=rng.random() < 0.2)


def _pipelined(rng: Random, body: bytes) -> Attack:
    requests = [
        _request(body) if rng.random() < 0.8 else _odd_line(rng, body).parts[0] for _ in range(rng.randint(2, 20))
    ]
    return Attack("pipelined", [b"".join(requests), _LAST], leaves=rng.random() < 0.3)


def _slow(rng: Random, body: bytes) -> Attack:
    request = _request(body)
    places = sorted(rng.sample(range(1, len(request)), rng.randint(1, 6)))
    parts = [request[i:j] for i, j in zip([0, *places], [*places, None], strict=True)]
    return Attack("slow", [*parts, _LAST], pause=0.02)


def _hang_up(rng: Random, body: bytes) -> Attack:
    return Attack("hang-up", [_request(body)], pause=rng.choice((0.0, 0.001, 0.02)), leaves=True)


def _odd_json(rng: Random, body: bytes) -> Attack:
    depth = rng.choice((10, 17, 1000, 100_000))
    text = rng.choice(_JSON)(rng, depth)
    path = rng.choice(("/v1/classify", "/v1/classify", "/v1/explain", "/predict", "/v2/models/a/infer"))
    return Attack("json", [_request(text, (), f"POST {path} HTTP/1.1".encode()), _LAST])


def _object(rng: Random, depth: int) -> bytes:
    fields = {"inputs": "a", rng.choice(("inputs", "model", "timeout_ms", "x\0", "")): rng.choice(_VALUES)}
    if rng.random() < 0.3:
        fields["inputs"] = [rng.choice(_VALUES) for _ in range(rng.randint(0, 5))]
    return json.dumps(fields).encode()


_JSON: Sequence[Callable[[Random, int], bytes]] = (
    _object,
    _object,
    _object,
    lambda rng, depth: b'{"inputs": ' + b"[" * depth + b"]" * depth + b"}",
    lambda rng, depth: b'{"inputs": ' * depth,
    lambda rng, depth: b'{"inputs": "' + b"\\" * depth + b'"}',
    lambda rng, depth: b'{"inputs": ' + b"9" * depth + b"}",
    lambda rng, depth: b'{"inputs": 1e' + b"9" * depth + b"}",
    lambda rng, depth: json.dumps({"inputs": "a"}).encode(rng.choice(("utf-16", "utf-32", "utf-8-sig"))),
    lambda rng, depth: b'{"inputs": "\xed\xa0\x80"}',
    lambda rng, depth: b'{"inputs": "a", "inputs": "b"}',
    lambda rng, depth: b'{"inputs": NaN}',
    lambda rng, depth: json.dumps({"inputs": ["a"] * min(depth, 3000)}).encode(),
    lambda rng, depth: json.dumps({"inputs": "a" * 30 * min(depth, 5000)}).encode(),
    lambda rng, depth: json.dumps({"inputs": "a", "timeout_ms": rng.choice((1, 2, 5))}).encode(),
    lambda rng, depth: rng.choice((b"", b"null", b"[]", b'"a"', b"{", b"}", b"{}}", b'{"inputs"', b"\x00", b"{\x00}")),
)
_KINDS: Sequence[Callable[[Random, bytes], Attack]] = (
    _flipped, _cut, _noise, _odd_headers, _large_head, _odd_line, _chunks, _wrong_length, _pipelined, _slow, _hang_up,
    _odd_json, _odd_json,
)  # fmt: skip
