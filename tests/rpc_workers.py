"""Processes of `qaflora worker`, and a relay before one that reads llama.cpp's RPC protocol."""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from patience import PATIENCE_S
from serving import free_port

# ggml-rpc.cpp enum rpc_cmd
SET_TENSOR, GET_TENSOR, GRAPH_COMPUTE, HELLO, GRAPH_RECOMPUTE = 6, 8, 10, 14, 16
HELLO_ANSWER = struct.Struct("<Q3Bx24s")  # size; major, minor, patch; build
VERSION = (7, 0, 0)


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
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, env=environment) as process,
    ):
        try:
            assert process.stdout is not None
            while b"Waiting" not in (line := process.stdout.readline()):
                assert line, log.read_text()
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield Worker(process, f"127.0.0.1:{port}", log)
        finally:
            process.kill()


class Relay:
    """Passes on what a client and a worker say, counts it, and can end the connection.

    sent      command -> how often the client sent it
    n_sent    bytes from the client, and n_received bytes to it
    before    called with each command before it is passed on; False ends the connection
    """

    def __init__(self, worker: Worker) -> None:
        self._target = ("127.0.0.1", worker.port)
        self.sent: Counter[int] = Counter()
        self.n_sent = self.n_received = 0
        self.before: Callable[[int], bool] = lambda command: True
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def forget(self) -> None:
        """Count anew."""
        self.sent.clear()
        self.n_sent = self.n_received = 0

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                target = socket.create_connection(self._target, PATIENCE_S)
                target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for way, each in ((self._forth, client), (self._back, target)):
                    other = target if each is client else client
                    threading.Thread(target=way, args=(each, other), daemon=True).start()

    def _forth(self, client: socket.socket, target: socket.socket) -> None:
        with client.makefile("rb") as stream, contextlib.suppress(OSError):
            while head := stream.read(9):
                command, size = struct.unpack("<BQ", head)
                data = stream.read(size)
                if not self.before(command):
                    break
                self.sent[command] += 1
                self.n_sent += len(head) + size
                target.sendall(head + data)
        _end(client, target)
        client.close()

    def _back(self, target: socket.socket, client: socket.socket) -> None:
        with target, contextlib.suppress(OSError):
            while data := target.recv(1 << 16):
                self.n_received += len(data)
                client.sendall(data)
            _end(client, target)


def _end(*ends: socket.socket) -> None:
    """Let those who read from them know; a thread that does so keeps a closed one open."""
    for each in ends:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def relay(worker: Worker) -> Iterator[Relay]:
    """A relay before a worker."""
    made = Relay(worker)
    try:
        yield made
    finally:
        made.close()


def hello(port: int, build: bytes) -> tuple[socket.socket, tuple[int, int, int], bytes]:
    """Say HELLO to a worker as a client of a build; gives the connection, its version and build."""
    client = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    client.sendall(struct.pack("<BQ24s", HELLO, 24, build))
    with client.makefile("rb") as stream:
        _, *version, found = HELLO_ANSWER.unpack(stream.read(HELLO_ANSWER.size))
    return client, (version[0], version[1], version[2]), found.rstrip(b"\0")


@contextlib.contextmanager
def pretender(version: tuple[int, int, int], build: bytes) -> Iterator[str]:
    """Something that says it is a worker of this version and build; gives its endpoint."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = server.accept()
                    with client:
                        client.recv(9 + 24, socket.MSG_WAITALL)
                        client.sendall(HELLO_ANSWER.pack(28, *version, build))

        threading.Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
