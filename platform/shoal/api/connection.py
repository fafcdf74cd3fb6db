"""A connection of the server of one process: uvicorn's, which ends where the next request does not come, or its client reads
nothing.

uvicorn itself waits without end for the first request of a connection, for the rest of one whose headers have begun, and for a
client to read an answer that was sent in one piece.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 20.0  # for all headers of a request, from the connection's beginning or the answer before
KEEP_ALIVE_SECONDS = 5  # without a byte, after an answer
READ_SECONDS = 60.0  # for a client to read something of what was answered


class Connection(H11Protocol):
    """As `H11Protocol`, with these times."""

    _late: asyncio.TimerHandle | None = None  # ends it
    _unread: asyncio.TimerHandle | None = None  # of an answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:  # the headers of a request are here
            self._stop_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_headers()
        self._await_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        self._stop_waiting()
        if not self.transport.is_closing():
            self._late = self.loop.call_later(HEADER_SECONDS, self._end)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _await_reader(self, before: int = 0) -> None:
        """Cut it where nothing was read of what was left `before`; look again while some is."""
        left = self.transport.get_write_buffer_size()
        if left and left == before:
            self.transport.abort()
        elif left:
            if self._unread is not None:
                self._unread.cancel()
            self._unread = self.loop.call_later(READ_SECONDS, self._await_reader, left)

    def _end(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()
