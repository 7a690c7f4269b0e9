"""Listen until a signal ends it; how silent a connection may be, and how many there may be."""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import re
import signal
import socket
import struct
import threading
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from pathlib import Path
from types import FrameType

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from qaflora_edge.errors import OptionError, os_errors
from qaflora_edge.server.app import expire_all, make_app
from qaflora_edge.server.refusals import RETRY_AFTER_S, Refusal
from qaflora_edge.server.security import REFUSALS, Refusals, client_of, share_of
from qaflora_edge.server.served_models import ServerOptions

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
DRAIN_S = 30.0  # running requests may take as long to end when the server is told to
CUT_S = 5.0  # and then as long to say that they were cut
HEAD_S = 60.0  # the longest that a head may take to come, the first or the next
READ_S = 60.0  # and that a client may take to read what was sent
MAX_CONNECTIONS = 1000
CONNECTION_SHARE = 16  # one address may have this part of them
SEND_BUFFER_BYTES = 64 << 10  # that the system takes of a connection before its client does
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
    """Serve a connection. While it waits for its client it gives way to new ones.

    It does so where the next head has not come, or where what was sent is not read.
    """

    _patience: asyncio.TimerHandle | None = None
    _is_read_awaited = False  # what it asks next waits until it has read the last answer
    is_leaving = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, or refuse it where its address, or all together, have too many."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        self.conn = Reader(h11.SERVER, MAX_HEAD_BYTES)
        self.app_state = {**self.app_state, REFUSALS: Refusals()}  # copied for each request
        self.address = client_of(self.client[0]) if self.client else ""
        self._wait_for_client(HEAD_S)
        everyone = [other for other in self.connections if isinstance(other, Connection)]
        here = [other for other in everyone if not other.is_leaving]
        same = [other for other in here if other.address == self.address]
        n_share = share_of(MAX_CONNECTIONS, self.address, CONNECTION_SHARE)
        if n_share < MAX_CONNECTIONS and len(same) > n_share:
            # A crowd that does not read is not let in again before it is cut.
            self._make_room([other for other in same if not other.flow.write_paused])
        elif len(here) > MAX_CONNECTIONS:
            self._make_room(here)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Wait for the client to read, for the system's buffer is full."""
        super().pause_writing()
        self._wait_for_client(READ_S)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_waiting()
        if self._is_read_awaited:
            self._is_read_awaited = False
            self.on_response_complete()

    def on_response_complete(self) -> None:
        if self.flow.write_paused:
            self._is_read_awaited = True
            return
        self._wait_for_client(HEAD_S)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        message = (
            f"The request cannot be read: expected HTTP/1.1 with lines that end in CR LF, a head "
            f"of {MAX_HEAD_BYTES} bytes at most, and one of Content-Length and Transfer-Encoding."
        )
        self._refuse(Refusal(400, message, code="invalid_request"))

    @property
    def is_answered(self) -> bool:
        """Tell whether nothing that it asked for is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def is_waiting(self) -> bool:
        """Tell whether it waits for its client, and not its client for us."""
        return self.is_answered or self.flow.write_paused

    def _wait_for_client(self, seconds: float) -> None:
        self.waiting_number = next(_numbers)
        self._stop_waiting()
        self._patience = self.loop.call_later(seconds, self._end_waiting)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()

    def _end_waiting(self) -> None:
        if self.is_waiting:
            self._leave()

    def _leave(self) -> None:
        """End it, and what it has not read, which the system would go on to send."""
        self.is_leaving = True
        if self.flow.write_paused:
            at_once = struct.pack("ii", 1, 0)
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        self.transport.abort()

    def _make_room(self, crowd: Iterable["Connection"]) -> None:
        """End the one of these that has waited for its client for the longest, or this one."""
        waiting = [other for other in crowd if other.is_waiting and other is not self]
        if waiting:
            min(waiting, key=lambda other: other.waiting_number)._leave()
            return
        self.is_leaving = True
        message = "The server has too many connections; try again later."
        self._refuse(Refusal(503, message, code="too_many_connections"))

    def _refuse(self, refused: Refusal) -> None:
        if self.is_answered or not self.cycle.response_started:
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


class _Server(uvicorn.Server):
    """Serve until a signal; a second one ends at once."""

    is_interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.is_interrupted = sig == signal.SIGINT
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running requests end; cut those that take too long, and end in any case."""
        end = asyncio.get_running_loop().call_later(DRAIN_S, expire_all, self.config.app)
        self.last_resort = threading.Timer(DRAIN_S + 2 * CUT_S, os._exit, [1])
        self.last_resort.daemon = True
        self.last_resort.start()
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()


def config_of(app: Starlette) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Connection,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=int(HEAD_S),
        timeout_graceful_shutdown=int(DRAIN_S + CUT_S),
    )


def run(places: Sequence[Path], host: str, port: int, options: ServerOptions) -> None:
    """Serve bundles until SIGINT or SIGTERM; running requests then have some seconds to end.

    Raises BundleError for a bundle that cannot be read, OptionError where it cannot listen,
    and KeyboardInterrupt at its end where that was SIGINT.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    allow_files(2 * MAX_CONNECTIONS)
    app = make_app(places, options)
    listener = _listener(host, port)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listener.getsockname()[1]}"
    names = ", ".join(app.state.models.listed)
    ready = f"Page: {url}/  API: {url}/v1  Models: {names}"
    server = _Server(config_of(app))
    log = logging.getLogger(__name__)
    for model in app.state.models.by_name.values():
        if note := model.about.get("note"):
            log.warning("%s", note)
    app.state.on_ready = lambda: log.info("%s", ready)
    with listener:
        server.run(sockets=[listener])
    if server.is_interrupted:
        raise KeyboardInterrupt


def allow_files(n_file: int) -> None:
    """Let this process open so many files, where the system lets it: connections are files.

    macOS allows 256 at first, systemd 1,024.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < n_file:
            n_most = n_file if hard == resource.RLIM_INFINITY else min(n_file, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (n_most, hard))


def _listener(host: str, port: int) -> socket.socket:
    advice = "Choose an address of this machine and a free port (--host, --port)."
    with os_errors(OptionError, f"Cannot listen at {host} port {port}", advice):
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Of a name with both, such as localhost, the one that programs try where they try one.
        family, kind, protocol, _, address = min(
            addresses, key=lambda address_info: address_info[0] != socket.AF_INET
        )
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            listener.bind(address)
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    return listener
