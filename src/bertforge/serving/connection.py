"""One connection of a client, which has to say in time what it wants and to take in time what it is told.

uvicorn waits for ever for the head of a request, for the rest of a body that it has answered, and for a client that
does not read; and it keeps all of a head, and of the trailers behind a body. Such connections use up a front's file
descriptors and its memory. Here each of these has a time, and what is no body has a size. Bodies have theirs in `door`,
and idle connections between requests in uvicorn itself.
"""

from __future__ import annotations

import asyncio
import uuid

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from bertforge.serving import metrics
from bertforge.serving.requests import RequestError

_SECONDS = 30.0  # to end a head, and to take an answer
_BYTES = 1 << 16  # of a head or of trailers, and they may go over by one read


class Connection(HttpToolsProtocol):
    """uvicorn's, with limits, and with refusals in the form of the service."""

    _late: asyncio.TimerHandle | None = None
    """While the client owes a head."""
    _unread: asyncio.TimerHandle | None = None
    """While it owes to read."""
    _bytes: int = 0
    """That came since the last end of a request and the last part of a body."""
    _under_way: RequestResponseCycle | None = None
    """What is being answered; `cycle` is what was read last."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._hurry()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._bytes += len(data)
        super().data_received(data)
        answered = self.cycle is None or self.cycle.response_complete
        if self._bytes > _BYTES and not self.transport.is_closing():
            if answered:
                self.send_400_response("the head of this request is too long; send fewer or shorter headers")
            else:
                self.transport.close()
        if answered:  # uvicorn's own time for idle connections ended with the first byte
            self._hurry()

    def on_message_begin(self) -> None:
        """See httptools."""
        self._bytes += 1  # for the read in which it begins may have brought the end of another
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._at_ease()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self._bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See httptools."""
        self._bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """See uvicorn."""
        super().on_response_complete()
        if self._bytes:  # of another head
            self._hurry()
        self._abort_soon()

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        self._unread = self.loop.call_later(_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._was_read()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """See uvicorn, which would wait for what the client did not read in all that time."""
        self.transport.abort()

    def shutdown(self) -> None:
        """See uvicorn."""
        super().shutdown()
        self._abort_soon()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is refused as everything is."""
        response = RequestError(400, msg).response(request_id := uuid.uuid4().hex)
        told = (*response.raw_headers, (b"x-request-id", request_id.encode()), (b"connection", b"close"))
        head = b"".join(b"%s: %s\r\n" % header for header in told)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n%s\r\n%s" % (head, response.body))
        self.transport.close()
        metrics.request("unknown", 400)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._at_ease()
        self._was_read()
        if self._under_way is not None:  # uvicorn tells the request that was read last, which may not have begun
            self.cycle = self._under_way
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._under_way = cycle
        super()._start_asgi_task(cycle, app)

    def _hurry(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(_SECONDS, self.transport.close)

    def _at_ease(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _was_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _abort_soon(self) -> None:
        """A connection that is closing waits for its client to read what was sent, but not for ever."""
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self.loop.call_later(_SECONDS, self.transport.abort)
