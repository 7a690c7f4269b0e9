"""Listen, until a signal ends it."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from qaflora_edge.errors import OptionError, os_errors
from qaflora_edge.server.app import expire_all, make_app
from qaflora_edge.server.connections import HEAD_S, MAX_CONNECTIONS, Connection
from qaflora_edge.server.served_models import ServerOptions

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
DRAIN_S = 30.0  # running requests may take as long to end when the server is told to
CUT_S = 5.0  # and then as long to say that they were cut


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
    """Return how an app is served."""
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
    app.state.on_ready = lambda: logging.getLogger(__name__).info("%s", ready)
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
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Of a name with both, such as localhost, the one that programs try where they try one.
        family, kind, protocol, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    return listener
