"""A server: its app with a client, listening in a thread, and as the command."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2 as httpx
import uvicorn
from patience import PATIENCE_S, wait_until
from starlette.applications import Starlette
from starlette.testclient import TestClient

from qaflora_edge.ask import Sampling
from qaflora_edge.server.app import make_app
from qaflora_edge.server.run import config_of
from qaflora_edge.server.served_models import ServerOptions

ENGINE = {"n_ctx": 512, "n_parallel": 3, "threads": 1, "kv_type": "f32"}


def wait_until_open(status: Callable[[], str]) -> None:
    """Until the first bundle is loaded, or could not be."""
    wait_until(lambda: status() != "loading")


def make_options(sampling: Mapping[str, Any] | None = None, **more: Any) -> ServerOptions:
    how = {"engine": ENGINE, "hosts": frozenset({"localhost"}), **more}
    return ServerOptions(sampling=Sampling().updated(sampling or {}), **how)


@contextlib.contextmanager
def client_of(*places: Path, **options: Any) -> Iterator[TestClient]:
    """A client of the app, without a network."""
    app = make_app(places, make_options(**options))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        wait_until_open(lambda: client.get("/health").json()["status"])
        yield client


@contextlib.contextmanager
def listening(*places: Path, **options: Any) -> Iterator[str]:
    """The address of a server that listens on this machine, in a thread."""
    with listening_app(make_app(places, make_options(**options))) as url:
        yield url


@contextlib.contextmanager
def listening_app(app: Starlette, *, send_buffer: int = 0) -> Iterator[str]:
    """The address of an app that listens on this machine, in a thread; see running."""
    config = config_of(app)
    config.lifespan = "on"
    with running(config, send_buffer=send_buffer) as address:
        wait_until_open(lambda: got(f"{address}/health").json()["status"])
        yield address


@contextlib.contextmanager
def running(config: uvicorn.Config, *, send_buffer: int = 0) -> Iterator[str]:
    """The address of a server that listens on a free port of this machine, in a thread.

    send_buffer  bytes that the system takes of a connection before its client does; 0: as it likes
    """
    config.port = 0
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    assert server.started
    listener = server.servers[0].sockets[0]
    try:
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def address_of(url: str) -> tuple[str, int]:
    found = httpx.URL(url)
    return found.host, found.port


def error_of(code: str, message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error in OpenAI's shape that names no field."""
    return {"message": message, "type": kind, "param": None, "code": code}


def got(url: str) -> httpx.Response:
    return httpx.get(url, timeout=PATIENCE_S)


def metric(address: str, name: str, label: str = "") -> float:
    """The sum of a metric over its labels, or those of them that have a text."""
    lines = got(f"{address}/metrics").text.splitlines()
    return sum(float(each.split()[-1]) for each in lines if each.startswith(name) and label in each)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
