"""Attack `qaflora serve` from this machine: is everybody else still answered, does memory stay?

    python benchmarks/doors.py BUNDLE [--only silent slow long adds] [--cycles 50] [--adapter FILE]

Starts a server of the bundle for each attack, and prints a table:

    silent  1,000 connections that send nothing, or half a head; others ask once a second
    slow    8 bodies of 4 MB that come byte by byte; then one of 100 kB is sent whole
    long    /infill with 600 kB, then for --prompt tokens of it; short chats are asked beside both
    adds    --adapter is added and removed, with a chat after each; memory after each cycle

All connections go to 127.0.0.1. Other options go to `qaflora serve`.
"""

import argparse
import contextlib
import http.client
import json
import math
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from server_process import started, status_bytes

N_SILENT = 1000
SILENT_S = 70.0  # the server closes what is silent for a minute
N_SLOW = 8
SLOW_BYTES = 4_000_000
LONG_BYTES = 600_000
PATIENCE_S = 900.0
CHAT = "/v1/chat/completions"
SHORT = {"messages": [{"role": "user", "content": "Is 7 a prime? " * 8}], "max_tokens": 1}
CODE = "def area(width, height):\n    return width * height\n\n"
Row = tuple[str, object]


def asked(port: int, path: str, body: Any = None, timeout_s: float = PATIENCE_S) -> tuple[int, str]:
    """The status and text of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    with contextlib.closing(connection):
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data)
        response = connection.getresponse()
        return response.status, response.read().decode("utf-8", "replace")


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 10)


def is_closed(client: socket.socket) -> bool:
    """Whether the server has ended a connection, with or without words."""
    client.setblocking(False)
    try:
        while client.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def silent(port: int, pid: int, options: argparse.Namespace) -> Iterator[Row]:
    with contextlib.ExitStack() as stack:
        clients = []
        for number in range(N_SILENT):
            client = stack.enter_context(connected(port))
            if number % 2:
                client.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
            clients.append(client)
        yield "open connections", N_SILENT - sum(map(is_closed, clients))
        seen: Counter[int] = Counter()
        until = time.monotonic() + SILENT_S
        while time.monotonic() < until:
            seen[asked(port, "/health")[0]] += 1
            time.sleep(1)
        yield "answers to others, by status", dict(seen)
        yield f"open after {SILENT_S:g} s", N_SILENT - sum(map(is_closed, clients))


def slow(port: int, pid: int, options: argparse.Namespace) -> Iterator[Row]:
    head = f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: {SLOW_BYTES}\r\n\r\n"
    is_over = threading.Event()

    def drip(client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            client.sendall(head.encode())
            while not is_over.wait(0.5):
                client.sendall(b" ")

    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(port)) for _ in range(N_SLOW)]
        threads = [threading.Thread(target=drip, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        time.sleep(1)
        for n_byte in (1_000, 100_000):
            start = time.monotonic()
            status, _ = asked(port, "/tokenize", {"content": "a" * n_byte})
            yield f"seconds for {n_byte} bytes ({status})", round(time.monotonic() - start, 2)
        is_over.set()
        for thread in threads:
            thread.join()


def beside(port: int, most_s: float, work: Callable[[], tuple[int, str]]) -> Iterator[Row]:
    """Ask short chats until one long request is answered, or for so many seconds."""
    waits: list[float] = []
    answer: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: answer.append(work()), daemon=True)
    begin = time.monotonic()
    thread.start()
    time.sleep(1)
    while thread.is_alive() and time.monotonic() < begin + most_s:
        start = time.monotonic()
        status, text = asked(port, CHAT, SHORT)
        if status != 200:
            raise SystemExit(f"a short chat: {status} {text}")
        waits.append(time.monotonic() - start)
        time.sleep(0.5)
    for status, text in answer:
        if status != 200:
            raise SystemExit(f"the long request: {status} {text}")
        found = json.loads(text)
        yield "prompt, tokens", found.get("tokens_evaluated") or found["usage"]["prompt_tokens"]
    end = "answered after" if answer else "not answered after"
    yield f"{end}, s", round(time.monotonic() - begin, 1)
    yield "short chats beside it", len(waits)
    yield "longest of them, s", round(max(waits, default=math.nan), 2)


def long(port: int, pid: int, options: argparse.Namespace) -> Iterator[Row]:
    start, most_s = time.monotonic(), options.seconds
    asked(port, CHAT, SHORT)
    yield "a short chat alone, s", round(time.monotonic() - start, 2)
    yield "memory before, MB", mb_of(pid)
    code = CODE * (LONG_BYTES // len(CODE) // 2)
    infill = {"input_prefix": code, "input_suffix": code, "n_predict": 8}
    for name, value in beside(port, most_s, lambda: asked(port, "/infill", infill)):
        yield f"infill: {name}", value
    yield "memory after infill, MB", mb_of(pid)
    infill["n_prompt"] = options.prompt
    if options.prompt:
        for name, value in beside(port, most_s, lambda: asked(port, "/infill", infill)):
            yield f"long prompt: {name}", value
        yield "memory after it, MB", mb_of(pid)


def adds(port: int, pid: int, options: argparse.Namespace) -> Iterator[Row]:
    path = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    sizes = []
    for number in range(options.cycles):
        for each, body in zip(path, ({"lora_path": "more.gguf"}, {}), strict=True):
            status, text = asked(port, each, {"lora_name": "more", **body})
            if status == 200:
                status, text = asked(port, CHAT, {**SHORT, "max_tokens": 4})
            if status != 200:
                raise SystemExit(f"{each}: {status} {text}")
        sizes.append(mb_of(pid))
        if number in (0, 3, 9) or number % 10 == 9 or number == options.cycles - 1:
            yield f"memory after cycle {number + 1}, MB", sizes[-1]
    yield "largest, MB", max(sizes)


def mb_of(pid: int) -> float:
    """The memory of a process that no file backs."""
    return round(status_bytes("RssAnon", pid) / 1e6, 1)


ATTACKS = {each.__name__: each for each in (silent, slow, long, adds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*ATTACKS], default=[*ATTACKS])
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--adapter", type=Path, help="an adapter GGUF; without it, no adds")
    parser.add_argument("--prompt", type=int, default=32_000, help="tokens; 0: no long prompt")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of a long request at most")
    options, more = parser.parse_known_args()
    print("| attack | measured | |\n|---|---|--:|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "adapters"
        folder.mkdir()
        if options.adapter is not None:
            shutil.copy(options.adapter, folder / "more.gguf")
        command = [sys.executable, "-m", "qaflora_edge", "serve", str(options.bundle), *more]
        command += ["--allow-adapters", str(folder)]
        for name in options.only:
            if name == "adds" and options.adapter is None:
                continue
            with started(command, Path(place) / "log") as (process, port):
                for what, value in ATTACKS[name](port, process.pid, options):
                    print(f"| {name} | {what} | {value} |", flush=True)


if __name__ == "__main__":
    main()
