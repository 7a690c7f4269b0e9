"""Mixed load on `qaflora serve` for minutes: its memory after the first, and at the end.

    python benchmarks/server_load.py BUNDLE [--minutes 10] [--clients 6]

Clients ask for chats of many lengths under many mixes, streams and whole, JSON, probabilities,
weights and tokens; some go away in the middle, some send what is refused. Before, every model has
had a prompt as long as any, and a grammar. After each minute all wait until nothing runs, and the
memory is read, less what the server then keeps of prompts (--prefix-cache): that is bounded, and
changes with each prompt. Ends with status 1 where an answer is none that is expected, or memory has
grown by more than --limit-mb from the first of these rests to the last.
"""

import argparse
import contextlib
import http.client
import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from server_process import started

from qaflora_edge.bench.parts import status_bytes

TIMEOUT_S = 120  # of a request, after which the server ends it
PATIENCE_S = TIMEOUT_S + 180  # a machine may be busy with other things, or stand still
CHAT = "/v1/chat/completions"
JSON_FORM = {"response_format": {"type": "json_object"}}
WORDS = ("the", "cat", "río", "42", "why")
MAX_WORDS = 40  # of a prompt


class Client:
    """One of those who ask, by chance but for a seed."""

    def __init__(self, port: int, models: list[str], seed: int) -> None:
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._port, self._models = port, models
        self._random = random.Random(seed)

    def warm(self, models: list[str]) -> None:
        """Ask models what takes the most memory, while others do."""
        longest = " ".join([max(WORDS, key=lambda word: len(word.encode()))] * MAX_WORDS)
        for model in models:
            messages = [{"role": "user", "content": f"{self._random.random()} {longest}"}]
            body = {"model": model, "messages": messages, "max_tokens": 48}
            form = JSON_FORM if model == models[0] else {"logprobs": True, "top_logprobs": 5}
            self._expect(200, CHAT, {**body, **form})

    def run(self, until_s: float) -> None:
        """Ask until then; what is asked by then is answered."""
        while time.monotonic() < until_s and not self.wrong:
            act = self._random.choice(
                (self._whole, self._stream, self._vanish, self._refused, self._small)
            )
            try:
                act()
            except (OSError, http.client.HTTPException) as error:
                self.wrong.append(f"{act.__name__}: {error!r}")
            self.seen[act.__name__.strip("_")] += 1

    def rest(self) -> None:
        """Wait until the server has done what nobody waits for any more."""
        until = time.monotonic() + PATIENCE_S
        while self._is_busy() and time.monotonic() < until:
            time.sleep(0.1)

    def _is_busy(self) -> bool:
        return bool(self.metric("requests_running") + self.metric("requests_waiting"))

    def metric(self, name: str) -> float:
        """One of those that the server tells."""
        lines = self._ask("GET", "/metrics")[1].decode().splitlines()
        return next(float(each.split()[1]) for each in lines if each.startswith(f"qaflora_{name} "))

    def _body(self, **more: Any) -> dict[str, Any]:
        draw = self._random
        text = self._text(draw.randint(1, MAX_WORDS))
        form: dict[str, Any] = draw.choice(
            (
                {},
                {"logprobs": True, "top_logprobs": 5},
                JSON_FORM,
                {"n": 2, "stop": ["."]},
                {"lora": [{"id": 0, "scale": round(draw.random(), 3)}]},
            )
        )
        model = self._models[0] if "lora" in form else draw.choice(self._models)
        messages = [{"role": "user", "content": text}]
        size = {"max_tokens": draw.randint(1, 48), "seed": draw.randint(0, 9)}
        return {"model": model, "messages": messages, **size, **form, **more}

    def _text(self, n_word: int) -> str:
        return " ".join(self._random.choice(WORDS) for _ in range(n_word))

    def _ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, response.read()

    def _expect(self, status: int, path: str, body: Any) -> bytes:
        found, data = self._ask("POST", path, body)
        if found == 503:  # the queue is full, or the time over
            self.seen["unavailable"] += 1
        elif found != status:
            self.wrong.append(f"{path} answers {found}, expected {status}: {data[:300]!r}")
        return data

    def _whole(self) -> None:
        self._expect(200, CHAT, self._body())

    def _stream(self) -> None:
        data = self._expect(200, CHAT, self._body(stream=True))
        if data.startswith(b"data:") and not data.endswith(b"data: [DONE]\n\n"):
            self.wrong.append(f"a stream ends with {data[-300:]!r}")

    def _vanish(self) -> None:
        data = json.dumps(self._body(stream=True, max_tokens=200)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self._port), PATIENCE_S) as connection:
            cut = self._random.choice((len(data) // 2, len(data)))
            connection.sendall(head.encode() + data[:cut])
            if cut == len(data):
                connection.recv(1000)

    def _refused(self) -> None:
        wrong: Any = self._random.choice(
            ({"temperature": -1}, {"messages": []}, {"fusion": {"no": 1}}, {"n": 99})
        )
        self._expect(400, CHAT, {**self._body(), **wrong})

    def _small(self) -> None:
        path = self._random.choice(("/v1/weights", "/tokenize"))
        body = {"model": self._models[0], "content": "the cat", "prompt": "the cat"}
        self._expect(200, path, body)


def memory_mb(pid: int) -> float:
    """What a process has in memory now, files that are mapped apart."""
    if (n_byte := status_bytes("RssAnon", pid)) is None:
        raise SystemExit(f"/proc/{pid}/status has no RssAnon: this needs Linux.")
    return n_byte / 1e6


def models_of(port: int) -> list[str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("GET", "/v1/models")
        return [each["id"] for each in json.load(connection.getresponse())["data"]]


def all_at_once(calls: Iterable[Callable[[], None]]) -> None:
    """Call each in a thread of its own. Raises what the first of them raised."""
    calls = list(calls)
    with ThreadPoolExecutor(len(calls)) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--limit-mb", type=float, default=5)
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--prefix-cache", type=int, default=32, help="MiB")
    options = parser.parse_args()
    command = [sys.executable, "-P", "-m", "qaflora_edge", "serve", options.bundle]
    command += ["--parallel", "4", "--ctx", str(options.ctx), "--timeout", str(TIMEOUT_S)]
    command += ["--prefix-cache", str(options.prefix_cache)]
    rests: list[dict[str, float]] = []
    with (
        tempfile.TemporaryDirectory(prefix="qaflora-load-") as folder,
        started(command, Path(folder) / "log") as (process, port),
    ):
        models = models_of(port)
        n = options.clients
        clients = [Client(port, models, i) for i in range(n)]
        all_at_once(partial(client.warm, models[i::n]) for i, client in enumerate(clients))
        for _ in range(options.minutes):
            until = time.monotonic() + 60
            all_at_once(partial(client.run, until) for client in clients)
            clients[0].rest()
            kept_mb = clients[0].metric("prefix_cache_bytes") / 1e6
            rests.append({"own_mb": round(memory_mb(process.pid) - kept_mb, 1), "kept_mb": kept_mb})
            print(rests[-1], file=sys.stderr, flush=True)
    seen: Counter[str] = sum((client.seen for client in clients), Counter())
    wrong = [each for client in clients for each in client.wrong]
    grown_mb = round(rests[-1]["own_mb"] - rests[0]["own_mb"], 1)
    print(json.dumps({"rests": rests, "grown_mb": grown_mb, "requests": seen, "wrong": wrong}))
    sys.exit(bool(wrong) or grown_mb > options.limit_mb)


if __name__ == "__main__":
    main()
