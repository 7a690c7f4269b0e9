"""Mixed load on `qaflora serve` for minutes: are answers those given alone, does memory grow?

    python benchmarks/server_load.py BUNDLE... [--minutes 10] [--clients 5] [--probers 12]

Options that it does not have go to `qaflora serve`.

Clients ask for chats of many lengths under many mixes, streams and whole, JSON, probabilities,
and every other path of docs/server.md; some go away in the middle, some send what is refused.
--adapter comes and goes in a copy of the last bundle.
Probers ask probes: greedy chats of 8 tokens with log-probabilities, of each bundle under each of
STRATEGIES. Before, each probe was asked alone, and every model has had a prompt as long as any,
and a grammar.

After each minute all wait until nothing runs, and the memory is read, less what the server then
keeps of prompts: that is bounded, and changes with each prompt. Prints one JSON
object. Ends with status 1 where a probe's answer or log-probabilities differ from those given
alone, an answer is none that is expected, a path was never asked, or memory has grown by more than
--limit-mb from the first of these rests to the last.
"""

import argparse
import contextlib
import http.client
import json
import random
import shutil
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

from server_process import started, status_bytes

TIMEOUT_S = 600  # of a request, after which the server ends it
PATIENCE_S = TIMEOUT_S + 180  # a machine may be busy with other things, or stand still
CHAT = "/v1/chat/completions"
JSON_FORM = {"response_format": {"type": "json_object"}}
WORDS = ("the", "cat", "río", "42", "why")
MAX_WORDS = 40  # of a prompt
STRATEGIES = ("two-place", "relay", "static", "qa-flora", "spectr", "base")
CATS = "the cat"
ADAPTER = "more.gguf"
ASKED = [{"role": "user", "content": CATS}]
ADD = "/v1/load_lora_adapter"
REMOVE = "/v1/unload_lora_adapter"
# Every other path of docs/server.md.
READ = (
    *("/health", "/v1/health", "/v1/models", "/models", "/metrics", "/openapi.json", "/"),
    "/v1/models/{model}",
    *("/props", "/lora-adapters", "/api/tags", "/api/ps", "/api/version"),
)
ASK: dict[str, dict[str, Any]] = {
    "/v1/weights": {"prompt": CATS},
    "/v1/completions": {"prompt": CATS, "max_tokens": 4},
    "/completions": {"prompt": CATS, "max_tokens": 4},
    "/completion": {"prompt": CATS, "n_predict": 4},
    "/infill": {"input_prefix": "def f():", "input_suffix": "return 1", "n_predict": 4},
    "/chat/completions": {"messages": ASKED, "max_tokens": 4},
    "/v1/responses": {"input": CATS, "max_output_tokens": 16},
    "/v1/embeddings": {"input": CATS},
    "/embeddings": {"input": CATS},
    "/api/embed": {"input": CATS},
    "/api/chat": {"messages": ASKED, "options": {"num_predict": 4}},
    "/api/generate": {"prompt": CATS, "options": {"num_predict": 4}},
    "/api/show": {},
    "/tokenize": {"content": CATS},
    "/detokenize": {"tokens": [1, 2, 3]},
}
PATHS = {*READ, *ASK, CHAT, ADD, REMOVE}


class Client:
    """One of those who ask, by chance but for a seed."""

    def __init__(self, port: int, models: list[str], changing: str, seed: int) -> None:
        self.seen: Counter[str] = Counter()
        self.paths: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.longest_s = 0.0
        self._port, self._models, self._changing = port, models, changing
        self._random = random.Random(seed)
        self._seed = seed
        self._left: list[str] = []

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

    def probe(self, model: str, number: int) -> Any:
        """Ask a probe; give its answer with log-probabilities, and its mix; None: refused."""
        text = f"{number}. {' '.join(WORDS[number % 5 :] + WORDS * (number % 7))}?"
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8}
        more = {"temperature": 0, "logprobs": True, "top_logprobs": 5}
        answer = json.loads(self._expect(200, CHAT, {**body, **more}))
        return None if "error" in answer else (answer["choices"], answer["fusion"]["weights"])

    def run_probes(self, alone: dict[tuple[str, int], Any], until_s: float) -> None:
        """Ask probes in any order until then, and compare with the answers given alone."""
        while time.monotonic() < until_s and not self.wrong:
            probe = self._random.choice(list(alone))
            if found := self.probe(*probe):
                self.seen["probe"] += 1
                self.seen["differing"] += found != alone[probe]

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
        start = time.monotonic()
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            found = response.status, response.read()
        self.longest_s = max(self.longest_s, time.monotonic() - start)
        return found

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
        if not self._left:
            self._left = [*READ, *ASK, ADD]
            self._random.shuffle(self._left)
        path = self._left.pop()
        self.paths[path] += 1
        if path == ADD:
            self._change()
            return
        if path in ASK:
            self._expect(200, path, {"model": self._models[0], **ASK[path]})
            return
        model = self._models[0]
        status, data = self._ask("GET", f"{path.format(model=model)}?model={model}")
        if status != 200:
            self.wrong.append(f"{path} answers {status}: {data[:300]!r}")

    def _change(self) -> None:
        """Add an adapter, and remove it."""
        name = f"more{self._seed}-{self.paths[ADD]}"
        body = {"model": self._changing, "lora_name": name}
        data = self._expect(200, ADD, {**body, "lora_path": ADAPTER})
        if data.startswith(b"Success"):
            self.paths[REMOVE] += 1
            self._expect(200, REMOVE, body)


def memory_mb(field: str, pid: int) -> float:
    """What a process has in memory now: VmRSS; RssAnon leaves out files that are mapped."""
    if (n_byte := status_bytes(field, pid)) is None:
        raise SystemExit(f"/proc/{pid}/status has no {field}: this needs Linux.")
    return n_byte / 1e6


def got(port: int, path: str) -> Any:
    """What a path answers, from JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return json.load(connection.getresponse())


def is_followed(port: int, model: str) -> bool:
    """Whether a bundle knows what a strategy needs: relay asks for more than older ones have."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        body = {"model": model, "messages": ASKED, "max_tokens": 1}
        connection.request("POST", CHAT, json.dumps(body))
        return connection.getresponse().status == 200


def renamed(bundles: list[str], folder: Path) -> list[str]:
    """Copy bundles, and name them b0, b1, ...: two may have one name."""
    for i, bundle in enumerate(bundles):
        path = shutil.copytree(bundle, folder / f"b{i}") / "bundle.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {"name": f"b{i}"}))
    return [str(folder / f"b{i}") for i in range(len(bundles))]


def all_at_once(calls: Iterable[Callable[[], None]]) -> None:
    """Call each in a thread of its own. Raises what the first of them raised."""
    calls = list(calls)
    with ThreadPoolExecutor(len(calls)) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE")
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--probers", type=int, default=12)
    parser.add_argument("--probes", type=int, default=24)
    parser.add_argument("--limit-mb", type=float, default=60)
    parser.add_argument("--adapter", type=Path, required=True, help="a GGUF for the last bundle")
    options, of_serve = parser.parse_known_args()
    rests: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="qaflora-load-") as name, contextlib.ExitStack() as end:
        folder = Path(name)
        allowed = folder / "adapters"
        allowed.mkdir()
        shutil.copy(options.adapter, allowed / ADAPTER)
        n_bundle = len(options.bundles)
        bundles = renamed([*options.bundles, options.bundles[-1]], folder)
        command = [sys.executable, "-P", "-m", "qaflora_edge", "serve", *bundles]
        command += ["--timeout", str(TIMEOUT_S), "--allow-adapters", str(allowed), *of_serve]
        process, port = end.enter_context(started(command, folder / "log"))
        if missing := {*got(port, "/openapi.json")["paths"]} - PATHS:
            raise SystemExit(f"These paths are not asked: {', '.join(missing)}.")
        mixes = [f"b{i}:{strategy}" for strategy in STRATEGIES for i in range(n_bundle)]
        mixes = [mix for mix in mixes if is_followed(port, mix)]
        models = [each["id"] for each in got(port, "/v1/models")["data"]] + mixes
        n = options.clients
        clients = [Client(port, models, f"b{n_bundle}", i) for i in range(n + options.probers)]
        asked = [(mixes[i % len(mixes)], i) for i in range(options.probes)]
        alone = {probe: clients[0].probe(*probe) for probe in asked}
        all_at_once(partial(client.warm, models[i::n]) for i, client in enumerate(clients[:n]))
        for _ in range(options.minutes):
            until = time.monotonic() + 60
            calls = [partial(client.run, until) for client in clients[:n]]
            calls += [partial(client.run_probes, alone, until) for client in clients[n:]]
            all_at_once(calls)
            clients[0].rest()
            own_mb = memory_mb("RssAnon", process.pid)
            rss_mb = memory_mb("VmRSS", process.pid)
            found = {"own_mb": own_mb, "rss_mb": rss_mb}
            rests.append({name: round(value, 1) for name, value in found.items()})
            print(rests[-1], file=sys.stderr, flush=True)
    seen: Counter[str] = sum((client.seen for client in clients), Counter())
    paths: Counter[str] = sum((client.paths for client in clients), Counter())
    wrong = [each for client in clients for each in client.wrong]
    if unasked := sorted(PATHS - {*paths, CHAT}):
        wrong.append(f"never asked: {', '.join(unasked)}")
    grown_mb = round(rests[-1]["own_mb"] - rests[0]["own_mb"], 1)
    result = {
        "probes": seen.pop("probe", 0),
        "differing": seen.pop("differing", 0),
        "requests": seen,
        "paths": len({*paths, CHAT}),
        "errors": wrong,
        "longest_wait_s": round(max(client.longest_s for client in clients), 1),
        "after_a_minute": rests[0],
        "at_the_end": rests[-1],
        "grown_mb": grown_mb,
    }
    print(json.dumps(result, indent=1))
    sys.exit(bool(wrong or result["differing"]) or grown_mb > options.limit_mb)


if __name__ == "__main__":
    main()
