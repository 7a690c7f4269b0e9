"""Processes of `qaflora worker`, and a relay before one that counts what a client sends."""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from patience import PATIENCE_S, wait_until
from serving import free_port

# ggml-rpc.cpp enum rpc_cmd
GRAPH_COMPUTE, HELLO = 10, 14
HELLO_ANSWER = struct.Struct("<Q3Bx24s")  # size; version; build


@dataclass
class Worker:
    """One that listens, and what it has said so far."""

    process: subprocess.Popen[bytes]
    endpoint: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])


@contextlib.contextmanager
def worker(folder: Path, *words: str, port: int | None = None) -> Iterator[Worker]:
    """A worker on loopback; it is killed if it still runs at the end."""
    port = port or free_port()
    log = folder / f"worker-{port}.log"
    command = [sys.executable, "-m", "qaflora_edge", "worker", "--port", str(port), *words]
    environment = {**os.environ, "QAFLORA_WORKER_THREADS": "1"}
    with (
        log.open("wb") as said,
        subprocess.Popen(command, stdout=said, stderr=said, env=environment) as process,
    ):
        try:
            wait_until(lambda: process.poll() is not None or is_listening(port))
            assert process.poll() is None, log.read_text()
            yield Worker(process, f"127.0.0.1:{port}", log)
        finally:
            process.kill()


def is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


class Relay:
    """Passes on what a client and a worker say; `n_sent` are the bytes from the client."""

    def __init__(self, worker: Worker) -> None:
        self._target = ("127.0.0.1", worker.port)
        self.n_sent = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                target = socket.create_connection(self._target, PATIENCE_S)
                for start, end in ((client, target), (target, client)):
                    start.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    is_asked = start is client
                    threading.Thread(
                        target=self._pass_on, args=(start, end, is_asked), daemon=True
                    ).start()

    def _pass_on(self, start: socket.socket, end: socket.socket, is_asked: bool) -> None:
        with start, contextlib.suppress(OSError):
            while data := start.recv(1 << 16):
                self.n_sent += is_asked * len(data)
                end.sendall(data)
            for each in (start, end):
                each.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def relay(worker: Worker) -> Iterator[Relay]:
    """A relay before a worker."""
    made = Relay(worker)
    try:
        yield made
    finally:
        made.close()


def hello(port: int) -> tuple[socket.socket, bytes]:
    """Say HELLO to a worker; gives the connection, and the worker's build."""
    client = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    client.sendall(struct.pack("<BQ24x", HELLO, 24))
    with client.makefile("rb") as stream:
        answer = HELLO_ANSWER.unpack(stream.read(HELLO_ANSWER.size))
    return client, answer[-1].rstrip(b"\0")


@contextlib.contextmanager
def pretender(build: bytes) -> Iterator[str]:
    """Something that says it is a worker of this build; gives its endpoint."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):
                client, _ = server.accept()
                with client:
                    client.recv(9 + 24, socket.MSG_WAITALL)
                    client.sendall(HELLO_ANSWER.pack(28, 7, 0, 0, build))

        threading.Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
