"""What every request passes before it reaches a route, and its response on the way out.

A plain ASGI callable around the app, for all routes alike: it knows the client by its key, gives the request an id,
reads the body within its limit, and afterwards counts and logs the request. A line of the log is a JSON object; it
names the route, never the address as it was asked for, and holds nothing that the client wrote but its request id.

A client that hangs up ends the work on its request wherever that is: the task is cancelled, and with it the question to
the engine, whose rows leave the queue.

What a front holds is bounded: a body has a size and a time, a GET has none, and large bodies have a size together, past
which the next is refused while small ones go on. How much may wait in it, `preparing` says.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bertforge.serving import events, metrics, page
from bertforge.serving.keys import Keys
from bertforge.serving.requests import Form, RequestError
from bertforge.serving.settings import Limits

_ID = re.compile(r"[!-~]{1,128}")
_HEALTH = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
_OPEN = (*_HEALTH, "/openapi.json", *page.PATHS)  # without a key
_BARE = ("GET", "HEAD")  # methods whose requests have no body
_BODY_SECONDS = 30.0  # from the head of a request to the end of its body
_BODIES = 32  # of the largest size, that a front holds together
_GONE = 499  # nginx's status for a client that hung up; nobody is sent it


@dataclass(slots=True)
class Call:
    """One request on its way through a front."""

    id: str
    client: str
    """The name of its API key, otherwise its address: whose turn it is in the queue."""
    arrived: float
    """By `time.monotonic()`."""
    form: Form | None = None
    """Of errors, where the address speaks another protocol than ours."""
    held: int = 0
    """Bytes of its body, where that is large."""
    rows: int = 0
    """That a model was asked for."""
    status: int = 0
    """Of the response, once it has begun."""
    ended: bool = False
    """Whether all of the response was sent."""

    def refuse(self, error: RequestError) -> Response:
        """The response to a request that is refused."""
        return error.response(self.id, self.form)


def call_of(request: Request) -> Call:
    """What the door noted of a request."""
    call: Call = request.scope["bertforge.call"]
    return call


@dataclass
class Door:
    """The app as the server calls it."""

    app: ASGIApp
    limits: Limits
    keys: Keys | None
    """None lets everybody in."""
    forms: Mapping[str, Form]
    """Of errors, by the first part of the address; elsewhere they have our own."""
    full: Callable[[str], bool] = lambda client: False
    """Whether a client's requests are refused, for too many wait already."""
    draining: bool = False
    """Every response then ends its connection, so that none is idle when the front ends."""
    log: Callable[[str], object] = field(default=lambda line: sys.stderr.write(line + "\n"))
    held: int = 0
    """Bytes of all `Call.held` under way."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        address = (scope.get("client") or ("",))[0]
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        form = self.forms.get("/" + scope["path"].lstrip("/").partition("/")[0])
        call = Call(request_id, address, time.monotonic(), form)
        scope["bertforge.call"] = call

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", call.id.encode())]
                if self.draining:
                    message["headers"].append((b"connection", b"close"))
            elif not message.get("more_body"):
                call.ended = True
            await send(message)

        try:
            call.client = self._client(scope, headers) or address
            if not _is_open(scope) and self.full(call.client):
                raise RequestError(429, "too many requests are waiting", retry_after=1)
            body = await self._body(call, scope["method"], headers, receive)
            metrics.stage("read", time.monotonic() - call.arrived)
            await self._while_connected(call, scope, body, receive, answer)
        except RequestError as error:
            await call.refuse(error)(scope, receive, answer)
        except Exception as error:  # a defect of ours: where it is, without what it says, which may be a text
            frames = traceback.extract_tb(error.__traceback__)
            where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
            self._log(event="defect", error=type(error).__name__, where=where[-6:], id=call.id)
            if not call.status:
                failed = RequestError(500, "the service failed over this request")
                await call.refuse(failed)(scope, receive, answer)
        finally:
            self.held -= call.held
        self._account(call, scope)

    def _client(self, scope: Scope, headers: Headers) -> str | None:
        if self.keys is None or _is_open(scope):
            return None
        if found := self.keys.client(headers.get("authorization", "")):
            return found
        raise RequestError(401, "no key, or one that is not known; send the header Authorization: Bearer KEY")

    async def _body(self, call: Call, method: str, headers: Headers, receive: Receive) -> bytes:
        """All of it; raises RequestError for one that is too large, compressed or too slow."""
        most = self.limits.body
        too_large = RequestError(
            413, f"the body is larger than {self.limits.max_body_mb:g} MiB; send fewer texts at a time"
        )
        if method in _BARE:
            most, too_large = 0, RequestError(413, f"a request with the method {method} has no body; leave it out")
        if headers.get("content-encoding", "identity") != "identity":
            raise RequestError(415, "the body is compressed; send it as it is, without Content-Encoding")
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        parts, size, more = list[bytes](), 0, True
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while more:
                    message = await receive()
                    parts.append(_checked(message, most - size, too_large))
                    size, more = size + len(parts[-1]), message.get("more_body", False)
                    if len(parts) > 1:  # what comes at once is small
                        self._hold(call, len(parts[-1]))
        except TimeoutError as error:
            raise RequestError(408, f"the body was not there after {_BODY_SECONDS:g} s") from error
        return b"".join(parts)

    def _hold(self, call: Call, size: int) -> None:
        if self.held + size > _BODIES * self.limits.body:
            raise RequestError(429, "too many large requests are under way", retry_after=1)
        self.held += size
        call.held += size

    async def _while_connected(self, call: Call, scope: Scope, body: bytes, receive: Receive, answer: Send) -> None:
        """Runs the app, and cancels it when the client hangs up."""
        task, unread = asyncio.current_task(), [body]
        never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        assert task is not None

        async def read() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await never

        async def watch() -> None:
            await receive()
            if not call.ended:
                call.status = _GONE
                task.cancel()

        watching = asyncio.create_task(watch())
        try:
            await self.app(scope, read, answer)
        except asyncio.CancelledError:
            if call.status != _GONE:
                raise
            task.uncancel()
        finally:
            watching.cancel()

    def _account(self, call: Call, scope: Scope) -> None:
        seconds = time.monotonic() - call.arrived
        asked = str(scope["path"])
        route: str = getattr(scope.get("route"), "path", asked if asked in _OPEN else "unknown")
        metrics.request(route, call.status)
        self._log(
            method=scope["method"], path=route, status=call.status, ms=round(seconds * 1000, 2), client=call.client,
            rows=call.rows, id=call.id,
        )  # fmt: skip

    def _log(self, **fields: Any) -> None:
        self.log(events.line(**fields))


def _is_open(scope: Scope) -> bool:
    return scope["method"] in _BARE and scope["path"] in _OPEN


def _checked(message: Message, room: int, too_large: RequestError) -> bytes:
    if message["type"] == "http.disconnect":
        raise RequestError(_GONE, "the client hung up")
    body: bytes = message.get("body", b"")
    if len(body) > room:
        raise too_large
    return body
