"""One connection of a client, which has to say in time what it wants.

uvicorn waits for the head of a request for ever and keeps all of it: connections that say nothing use up a front's file
descriptors, and one that never ends its head uses up the memory. Here a head has a time and a size. Bodies have theirs
in `door`, and idle connections between requests in uvicorn itself.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_SECONDS = 30.0  # from the connection, or the first byte of a further request, to the end of the head
_BYTES = 1 << 16  # of a head, and it may go over by one read


class Connection(HttpToolsProtocol):
    """uvicorn's, with a limit for heads."""

    _late: asyncio.TimerHandle | None = None
    _head: int | None = 0
    """Bytes of the head so far; None while there is none to come."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._late = self.loop.call_later(_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._head is not None:
            self._head += len(data)
        super().data_received(data)
        if self._head is not None and self._head > _BYTES:
            self.send_400_response("The head of this request is too long.")

    def on_message_begin(self) -> None:
        """See httptools."""
        if self._late is None:
            self._late = self.loop.call_later(_SECONDS, self.transport.close)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._head = None
        self._in_time()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """See httptools."""
        self._head = 0
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._in_time()
        super().connection_lost(exc)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
