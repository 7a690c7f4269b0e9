"""Mixed load on `qaflora serve` for minutes: its memory early, and at the end.

    python benchmarks/server_load.py BUNDLE [--minutes 10] [--clients 6]

Clients ask for chats of many lengths under many mixes, streams and whole, JSON, probabilities,
weights and tokens; some go away in the middle, some send what is refused. Before, every model has
had prompts as long as any, so that its contexts have their size and --prefix-cache is full. Ends
with status 1 where an answer is none that is expected, or memory has grown by more than --limit-mb.
"""

import argparse
import contextlib
import http.client
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATIENCE_S = 600
CHAT = "/v1/chat/completions"
WORDS = ("the", "cat", "río", "42", "why")
MAX_WORDS = 120  # of a prompt
N_WARM = 4  # prompts of each model


class Client:
    """One of those who ask, by chance but for a seed."""

    def __init__(self, port: int, models: list[str], seed: int, until_s: float) -> None:
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._port, self._models, self._until_s = port, models, until_s
        self._random = random.Random(seed)

    def warm(self) -> None:
        """Ask each model what takes the most memory."""
        for model in self._models:
            for _ in range(N_WARM):
                messages = [{"role": "user", "content": self._text(MAX_WORDS)}]
                body = {"model": model, "messages": messages, "max_tokens": 48, "logprobs": True}
                self._expect(200, CHAT, body)

    def run(self) -> None:
        while time.monotonic() < self._until_s and not self.wrong:
            act = self._random.choice(
                (self._whole, self._stream, self._vanish, self._refused, self._small)
            )
            try:
                act()
            except (OSError, http.client.HTTPException) as error:
                self.wrong.append(f"{act.__name__}: {error!r}")
            self.seen[act.__name__.strip("_")] += 1

    def _body(self, **more: Any) -> dict[str, Any]:
        draw = self._random
        text = self._text(draw.randint(1, MAX_WORDS))
        form: dict[str, Any] = draw.choice(
            (
                {},
                {"logprobs": True, "top_logprobs": 5},
                {"response_format": {"type": "json_object"}},
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

    def _post(self, path: str, body: Any) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body))
            response = connection.getresponse()
            return response.status, response.read()

    def _expect(self, status: int, path: str, body: Any) -> bytes:
        found, data = self._post(path, body)
        if found not in (status, 503):  # the queue may be full
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
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1000
    raise SystemExit(f"/proc/{pid}/status has no RssAnon: this needs Linux.")


@contextlib.contextmanager
def served(arguments: list[str], log: Path) -> Iterator[tuple[int, int]]:
    """The process and the port of a server that is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "qaflora_edge", "serve", *arguments, "--port", str(port)]
    with log.open("wb") as file, subprocess.Popen(command, stderr=file) as process:
        try:
            while not is_ready(port):
                if process.poll() is not None:
                    raise SystemExit(log.read_text(encoding="utf-8"))
                time.sleep(0.1)
            yield process.pid, port
        finally:
            process.terminate()


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False


def models_of(port: int) -> list[str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("GET", "/v1/models")
        return [each["id"] for each in json.load(connection.getresponse())["data"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--limit-mb", type=float, default=5)
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--prefix-cache", type=int, default=32, help="MiB")
    options = parser.parse_args()
    seconds = 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="qaflora-load-") as folder:
        arguments = [options.bundle, "--parallel", "4", "--ctx", str(options.ctx)]
        arguments += ["--prefix-cache", str(options.prefix_cache)]
        with served(arguments, Path(folder) / "log") as (pid, port):
            models = models_of(port)
            Client(port, models, options.clients, 0).warm()
            begin = time.monotonic()
            clients = [Client(port, models, i, begin + seconds) for i in range(options.clients)]
            threads = [threading.Thread(target=client.run) for client in clients]
            for thread in threads:
                thread.start()
            time.sleep(seconds / 10)
            early_mb = memory_mb(pid)
            for thread in threads:
                thread.join()
            late_mb = memory_mb(pid)
    seen: Counter[str] = sum((client.seen for client in clients), Counter())
    wrong = [each for client in clients for each in client.wrong]
    grown_mb = late_mb - early_mb
    figures = {"early_mb": early_mb, "late_mb": late_mb, "grown_mb": round(grown_mb, 2)}
    print(json.dumps({"minutes": options.minutes, "requests": seen, **figures, "wrong": wrong}))
    sys.exit(bool(wrong) or grown_mb > options.limit_mb)


if __name__ == "__main__":
    main()
