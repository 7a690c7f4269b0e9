"""Listen, until a signal ends it."""

import asyncio
import logging
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from qaflora_edge.errors import OptionError, os_errors
from qaflora_edge.server.app import expire_all, make_app
from qaflora_edge.server.options import CUT_S, DRAIN_S, ServerOptions
from qaflora_edge.server.protocol import BoundedProtocol

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class _Server(uvicorn.Server):
    """Whose second signal ends it at once, whichever it is."""

    is_interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.is_interrupted = sig == signal.SIGINT
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let end what runs; what takes too long for that is cut."""
        loop = asyncio.get_running_loop()
        end = loop.call_later(DRAIN_S, expire_all, self.config.app)
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()


def config_of(app: Starlette) -> uvicorn.Config:
    """How an app is served."""
    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=60,
        timeout_graceful_shutdown=int(DRAIN_S + CUT_S),
    )


def run(places: Sequence[Path], host: str, port: int, options: ServerOptions) -> None:
    """Serve bundles until SIGINT or SIGTERM; what runs then has some seconds to end.

    Raises BundleError for a bundle that cannot be read, OptionError where it cannot listen, and
    KeyboardInterrupt at its end where that was SIGINT.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    app = make_app(places, options)
    listener = _listener(host, port)
    shown = f"[{host}]" if ":" in host else host
    logging.getLogger(__name__).info("http://%s:%d/", shown, listener.getsockname()[1])
    server = _Server(config_of(app))
    with listener:
        server.run(sockets=[listener])
    if server.is_interrupted:
        raise KeyboardInterrupt


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
