"""Connections: how long one may be silent, how many an address has, which requests are read."""

import asyncio
import itertools
import json
import re
from collections.abc import Iterable
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from qaflora_edge.server.requests import RETRY_AFTER_S, Refusal
from qaflora_edge.server.security import share_of

HEAD_S = 60.0  # the longest that a head may take to come, the first or the next
MAX_CONNECTIONS = 1000
MAX_HEAD_BYTES = 64 << 10  # of a request: its first line and its headers
_END = re.compile(rb"\n\r?\n")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_LENGTHS = {b"content-length", b"transfer-encoding"}
_numbers = itertools.count()  # a clock may give two connections one time


class Reader(h11.Connection):
    """Read requests that every proxy before us ends at the same byte.

    h11 0.16 takes lines that end with LF alone, both kinds of length in one head, and heads of any
    size where they come at once.
    """

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Return what comes next. Raises RemoteProtocolError."""
        if self.their_state is h11.IDLE:
            data, _ = self.trailing_data
            end = _END.search(data)
            head = data[: end.end()] if end else data
            if _BARE_LF.search(head) or len(head) > MAX_HEAD_BYTES:
                raise h11.RemoteProtocolError("a bare LF, or a long head")
        event = super().next_event()
        if isinstance(event, h11.Request) and {name for name, _ in event.headers} >= _LENGTHS:
            raise h11.RemoteProtocolError("two kinds of length")
        return event


class Connection(H11Protocol):
    """Serve a connection. While it asks for nothing it gives way to new ones."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, or refuse it where its address, or all together, have too many."""
        super().connection_made(transport)
        self.conn = Reader(h11.SERVER, MAX_HEAD_BYTES)
        self.address = self.client[0] if self.client else ""
        self._expect_head()
        everyone = [each for each in self.connections if isinstance(each, Connection)]
        here = [each for each in everyone if not each.transport.is_closing()]
        same = [each for each in here if each.address == self.address]
        is_crowded = len(same) > share_of(MAX_CONNECTIONS, self.address)
        if is_crowded or len(here) > MAX_CONNECTIONS:
            self._make_room(same if is_crowded else here)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._expect_head()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request."""
        message = (
            f"The request cannot be read: expected HTTP/1.1 with lines that end in CR LF, a head "
            f"of {MAX_HEAD_BYTES} bytes at most, and one of Content-Length and Transfer-Encoding."
        )
        self._refuse(Refusal(400, message, code="invalid_request"))

    @property
    def is_idle(self) -> bool:
        """Tell whether nothing that it asked for is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        self.idle_number = next(_numbers)
        self._stop_waiting()
        self._patience = self.loop.call_later(HEAD_S, self._end_idle)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()

    def _end_idle(self) -> None:
        if self.is_idle:
            self.transport.abort()  # it may never read what it was sent

    def _make_room(self, crowd: Iterable["Connection"]) -> None:
        """End the one of these that has asked for nothing for the longest, or this one."""
        idle = [each for each in crowd if each.is_idle and each is not self]
        if idle:
            min(idle, key=lambda each: each.idle_number).transport.abort()
            return
        message = "The server has too many connections; try again later."
        self._refuse(Refusal(503, message, code="too_many_connections"))

    def _refuse(self, refused: Refusal) -> None:
        """Answer without a request, unless an answer has begun, and close."""
        if self.is_idle or not self.cycle.response_started:
            body = json.dumps(refused.body).encode()
            lines = [
                f"HTTP/1.1 {refused.status} {HTTPStatus(refused.status).phrase}",
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
                "Connection: close",
            ]
            if refused.status == HTTPStatus.SERVICE_UNAVAILABLE:
                lines.append(f"Retry-After: {RETRY_AFTER_S}")
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
