"""Tokens/s, first token and bytes over the wire with layers on workers: docs/backends.md.

    python benchmarks/workers.py BUNDLE --workers 0 1 2 3 --delay-ms 0 1 20 --mbit 100

Workers are processes of this machine, one thread each; a relay before each of them counts what is
sent, holds it back by the delay and lets it through at the rate, both ways. It is no network: TCP
on both sides of it is that of the loopback.
"""

import argparse
import contextlib
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from qaflora_edge import Engine

PROMPT = "A shirt costs 12 dollars. What do seven shirts cost? Explain each step of the sum."


class Line:
    """One direction of a connection: bytes come out later, and not faster than a rate.

    count  of bytes, shared by all lines of a direction
    """

    def __init__(self, delay_s: float, byte_s: float, count: list[int]) -> None:
        self._delay_s, self._byte_s, self._count = delay_s, byte_s, count

    def carry(self, source: socket.socket, target: socket.socket) -> None:
        waiting: queue.Queue[tuple[float, bytes]] = queue.Queue()
        threading.Thread(target=self._deliver, args=(waiting, target), daemon=True).start()
        free_at = 0.0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._count[0] += len(data)
                free_at = max(free_at, time.perf_counter()) + len(data) * self._byte_s
                waiting.put((free_at + self._delay_s, data))
        waiting.put((0.0, b""))

    @staticmethod
    def _deliver(waiting: "queue.Queue[tuple[float, bytes]]", target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                at, data = waiting.get()
                if not data:
                    target.shutdown(socket.SHUT_RDWR)
                    return
                if (left := at - time.perf_counter()) > 0:
                    time.sleep(left)
                target.sendall(data)


@contextlib.contextmanager
def worker(port: int) -> Iterator[None]:
    module = [sys.executable, "-m", "qaflora_edge"]
    command = [*module, "worker", "--threads", "1", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        while b"Waiting" not in process.stdout.readline():
            assert process.poll() is None
        threading.Thread(target=process.stdout.read, daemon=True).start()
        try:
            yield
        finally:
            process.kill()


def relay(port: int, delay_s: float, byte_s: float, counts: tuple[list[int], list[int]]) -> int:
    """Before a worker; gives its own port."""
    server = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            client, _ = server.accept()
            there = socket.create_connection(("127.0.0.1", port))
            for each in (client, there):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for count, ends in zip(counts, ((client, there), (there, client)), strict=True):
                line = Line(delay_s, byte_s, count)
                threading.Thread(target=line.carry, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    own: int = server.getsockname()[1]
    return own


def measure(
    bundle: Path,
    rpc: str | None,
    flash_attn: bool | None,
    counts: tuple[list[int], list[int]],
    n: int,
) -> str:
    """A row: seconds and bytes to open, bytes of three tokens and first one, then of each token."""
    start = time.perf_counter()
    options = {"rpc": rpc, "threads": 1, "n_ctx": 512}
    with Engine(bundle, flash_attn=flash_attn, **options) as engine:
        opened_s, opened = time.perf_counter() - start, counts[0][0]
        firsts, rates, sizes, asked = [], [], [], []
        for i in range(3):
            prompt = f"{i}. {PROMPT}"  # nothing of it was read before
            begun, start = counts[0][0], time.perf_counter()
            answer = engine.generate(prompt, grammar=f"root ::= [a-z ]{{{n * 8}}}", max_tokens=n)
            next(answer)
            firsts.append(time.perf_counter() - start)
            next(answer), next(answer)  # the graph of single tokens is sent
            asked.append(counts[0][0] - begun)
            before = [count[0] for count in counts]
            n_before, start = answer.n_completion, time.perf_counter()
            answer.text()
            n_token = answer.n_completion - n_before
            rates.append(n_token / (time.perf_counter() - start))
            sizes.append([(c[0] - b) / n_token for c, b in zip(counts, before, strict=True)])
    sent, received = (median(each) for each in zip(*sizes, strict=True))
    columns = (
        f"{opened_s:.1f} s",
        f"{opened / 1e6:.1f} MB",
        f"{median(asked) / 1e6:.2f} MB",
        f"{median(firsts):.2f} s",
        f"{median(rates):.2f}",
        f"{sent:.0f}",
        f"{received:.0f}",
    )
    return " | ".join(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--delay-ms", type=float, nargs="+", default=[0.0])
    parser.add_argument("--mbit", type=float, default=0.0, help="0: no limit")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--flash-attn", action=argparse.BooleanOptionalAction)
    given = parser.parse_args()
    os.environ.pop("QAFLORA_RPC", None)
    print(
        "workers | delay | opened | sent for it | sent for three tokens | first token | tokens/s | "
    )
    print("bytes/token there | back")
    with contextlib.ExitStack() as stack:
        first = 51000 + os.getpid() % 1000
        ports = [first + i for i in range(max(given.workers))]
        for port in ports:
            stack.enter_context(worker(port))
        for delay_ms in given.delay_ms:
            for n_worker in given.workers:
                counts: tuple[list[int], list[int]] = ([0], [0])
                byte_s = 8e-6 / given.mbit if given.mbit else 0.0
                relays = [relay(port, delay_ms / 1e3, byte_s, counts) for port in ports[:n_worker]]
                rpc = ",".join(f"127.0.0.1:{port}" for port in relays) or None
                row = measure(given.bundle, rpc, given.flash_attn, counts, given.tokens)
                print(f"{n_worker} | {delay_ms:g} ms | {row}", flush=True)


if __name__ == "__main__":
    main()
