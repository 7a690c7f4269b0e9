"""Attack `qaflora serve` from this machine: is everybody else still answered, does memory stay?

    python benchmarks/doors.py BUNDLE [--only ATTACK ...] [--save FILE]

Starts a server of the bundle for each attack, and prints a table. `before` is what was measured of
demo/ before these doors were closed, as RECORD has it:

    silent  1,000 connections that send nothing, or half a head; others ask once a second
    slow    8 bodies of 4 MB that come byte by byte; then one of 100 kB is sent whole
    infill  /infill with 600 kB, for --seconds; short chats are asked beside it
    long    the same beside a prompt of --prompt tokens
    two     the same beside two such prompts, which have nothing in common
    adds    --adapter is added and removed --cycles times, with a chat after each, under qa-flora:
            its probe needs a sequence for each adapter
    slots   in this process: five slots grow for a long prompt, and are zeroed as it was cut

All connections go to 127.0.0.1. Other options go to `qaflora serve`.
"""

import argparse
import contextlib
import http.client
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from server_process import started, status_bytes

from qaflora_edge import Engine

N_SILENT = 1000
SILENT_S = 70.0  # the server closes what is silent for a minute
N_SLOW = 8
SLOW_BYTES = 4_000_000
LONG_BYTES = 600_000
SLOT_TOKENS = 32_768
PATIENCE_S = 900.0
LORA = [
    ("/v1/load_lora_adapter", {"lora_path": "more.gguf"}),
    ("/v1/unload_lora_adapter", dict[str, str]()),
]
CHAT = "/v1/chat/completions"
CODE = "def area(width, height):\n    return width * height\n\n"
OTHER_CODE = "class Circle:\n    def __init__(self, radius):\n        self.radius = radius\n\n"
RECORD = Path(__file__).parent / "results" / "doors.json"
Row = tuple[str, object]


def asked(port: int, path: str, body: Any = None, timeout_s: float = PATIENCE_S) -> tuple[int, str]:
    """The status and text of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    with contextlib.closing(connection):
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data)
        response = connection.getresponse()
        return response.status, response.read().decode("utf-8", "replace")


def short_chat(number: int) -> dict[str, Any]:
    text = f"Is {number} a prime? " * 8
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 1}


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


def prompt_of(port: int, code: str, n_token: int) -> dict[str, Any]:
    """A prompt of so many tokens, for /v1/completions."""
    content = code * (LONG_BYTES // len(code))
    status, text = asked(port, "/tokenize", {"content": content})
    if status != 200:
        raise SystemExit(f"/tokenize: {status} {text}")
    return {"prompt": json.loads(text)["tokens"][:n_token], "max_tokens": 8}


def beside(
    port: int, pid: int, most_s: float, path: str, bodies: list[dict[str, Any]]
) -> Iterator[Row]:
    """Ask short chats until all bodies are answered, or for so many seconds."""
    start = time.monotonic()
    asked(port, CHAT, short_chat(7))
    yield "a short chat alone, s", round(time.monotonic() - start, 2)
    yield "memory before, MB", mb_of(pid)
    waits: list[float] = []
    with ThreadPoolExecutor(len(bodies)) as pool:
        begin = time.monotonic()
        answers = [pool.submit(asked, port, path, body, most_s) for body in bodies]
        time.sleep(1)
        while not all(answer.done() for answer in answers):
            start = time.monotonic()
            status, text = asked(port, CHAT, short_chat(100 + len(waits)))
            if status != 200:
                raise SystemExit(f"a short chat: {status} {text}")
            waits.append(time.monotonic() - start)
            time.sleep(0.5)
        taken_s = time.monotonic() - begin
    for answer in answers:
        if isinstance(answer.exception(), TimeoutError):
            continue
        status, _ = answer.result()
        yield f"{path} is answered with", status
    yield "s beside it", round(taken_s, 1)
    yield "short chats in that time", len(waits)
    if waits:
        yield "median of them, s", round(statistics.median(waits), 2)
        yield "longest of them, s", round(max(waits), 2)
    yield "memory after it, MB", mb_of(pid)


def infill(port: int, pid: int, options: argparse.Namespace) -> Iterator[Row]:
    part = CODE * (LONG_BYTES // len(CODE) // 2)
    body = {"input_prefix": part, "input_suffix": part, "n_predict": 8}
    yield from beside(port, pid, options.seconds, "/infill", [body])


def long(port: int, pid: int, options: argparse.Namespace) -> Iterator[Row]:
    body = prompt_of(port, CODE, options.prompt)
    yield from beside(port, pid, options.seconds, "/v1/completions", [body])


def two(port: int, pid: int, options: argparse.Namespace) -> Iterator[Row]:
    bodies = [prompt_of(port, code, options.prompt) for code in (CODE, OTHER_CODE)]
    yield from beside(port, pid, options.seconds, "/v1/completions", bodies)


def adds(port: int, pid: int, options: argparse.Namespace) -> Iterator[Row]:
    sizes = []
    for number in range(options.cycles):
        for path, more in LORA:
            status, text = asked(port, path, {"lora_name": "more", **more})
            if status == 200:
                status, text = asked(port, CHAT, varied_chat(number))
            if status != 200:
                raise SystemExit(f"{path}: {status} {text}")
        sizes.append(mb_of(pid))
        n = number + 1
        if n in (1, 4) or n % 10 == 0 or n == options.cycles:
            yield f"memory after cycle {n}, MB", sizes[-1]
        if n >= 10 and (n % 10 == 0 or n == options.cycles):
            yield "lowest and highest, MB", [min(sizes), max(sizes)]
            yield f"trend from cycle 4 to {n}, MB a cycle", trend_of(sizes[3:])


def varied_chat(number: int) -> dict[str, Any]:
    """A chat of 50 to 250 tokens; of four one goes on with what another began with."""
    text = f"Is {number // 4} a prime? " * (4 + 8 * (number % 4))
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4}


def trend_of(sizes: list[float]) -> str:
    """The slope of a line through sizes, and its standard error."""
    cycles = range(len(sizes))
    slope, start = statistics.linear_regression(cycles, sizes)
    rest = [size - start - slope * cycle for cycle, size in zip(cycles, sizes, strict=True)]
    spread = statistics.pvariance(cycles) * len(sizes)
    error = (sum(each * each for each in rest) / (len(sizes) - 2) / spread) ** 0.5
    return f"{slope:.2f} +- {error:.2f}"


def slots(port: int, pid: int, options: argparse.Namespace) -> Iterator[Row]:
    with Engine(options.bundle, n_parallel=4, threads=1) as engine:
        engine.generate("Is 7 a prime? " * 60, max_tokens=2, weights="base").text()
        context = engine._core.context
        for what, work in (
            (f"s to grow from {context.n_ctx} to {SLOT_TOKENS} tokens", context.resize),
            ("s to zero one", lambda _: context.clean(1)),
        ):
            start = time.monotonic()
            work(SLOT_TOKENS)
            yield what, round(time.monotonic() - start, 3)
        yield "memory of this process, MB", mb_of(os.getpid())


def mb_of(pid: int) -> float:
    """The memory of a process that no file backs."""
    return round(status_bytes("RssAnon", pid) / 1e6, 1)


ATTACKS = {each.__name__: each for each in (silent, slow, infill, long, two, adds, slots)}


def adapter_of(bundle: Path) -> Path:
    """The bundle's last adapter: under another name it may be added once more."""
    document = json.loads((bundle / "bundle.json").read_bytes())
    return bundle / document["adapters"][-1]["file"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*ATTACKS], default=[*ATTACKS])
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--adapter", type=Path, help="a GGUF; by default the bundle's last one")
    parser.add_argument("--prompt", type=int, default=32_000, help="tokens of a long prompt")
    parser.add_argument("--seconds", type=float, default=100.0, help="of long requests, at most")
    parser.add_argument("--save", type=Path, help="write what was measured, as JSON")
    options, more = parser.parse_known_args()
    before = json.loads(RECORD.read_bytes())["before"]
    measured: dict[str, dict[str, object]] = {}
    print("| attack | measured | before | now |\n|---|---|--:|--:|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "adapters"
        folder.mkdir()
        shutil.copy(options.adapter or adapter_of(options.bundle), folder / "more.gguf")
        command = [sys.executable, "-P", "-m", "qaflora_edge", "serve", str(options.bundle), *more]
        command += ["--allow-adapters", str(folder)]
        for name in options.only:
            rows = measured[name] = {}
            strategy = ["--strategy", "qa-flora"] if name == "adds" else []
            with started([*command, *strategy], Path(place) / "log") as (process, port):
                for what, value in ATTACKS[name](port, process.pid, options):
                    rows[what] = value
                    was = before.get(name, {}).get(what, "")
                    print(f"| {name} | {what} | {was} | {value} |", flush=True)
                    if options.save:
                        options.save.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
