"""HTTP as uvicorn speaks it, with bounds on what comes before anybody knows who asks."""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from qaflora_edge.server.options import HEAD_S, MAX_HEAD_BYTES
from qaflora_edge.server.refusals import Refusal


class BoundedProtocol(HttpToolsProtocol):
    """A connection that is closed when a head takes too long to come, or has no end.

    uvicorn waits for a head as long as it takes, and holds all of it (0.54, httptools_impl.py).
    A connection on which nothing was asked yet waits for a head too. And where several requests
    were sent at once, uvicorn tells only the last one that the client is gone.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._n_head = 0  # bytes since a head, a part of a body or a whole request
        self._patience: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None  # what is answered now

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_come()
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._n_head += len(data)
        super().data_received(data)
        if self._n_head > MAX_HEAD_BYTES:
            self.transport.abort()
        elif self._n_head and self._patience is None and not self.transport.is_closing():
            self._wait_for_head()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_headers_complete(self) -> None:
        self._has_come()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._has_come()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._has_come()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP as all else is refused; uvicorn's own answer is plain text."""
        body = json.dumps(Refusal(400, msg, code="invalid_http").body).encode()
        head = (
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        )
        self.transport.write(head + body)
        self.transport.close()

    def _wait_for_head(self) -> None:
        self._patience = self.loop.call_later(HEAD_S, self.transport.abort)

    def _has_come(self) -> None:
        self._n_head = 0
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
