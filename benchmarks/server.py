"""`qaflora serve` beside stock llama-server: users who ask at once, each with a mix of adapters.

    python benchmarks/server.py --llama-server PATH [--users 1 4 8 16] [--probe 8] [--json]

The base is one of the registry, with three adapters of random values; both servers read the same
files, and are asked the same: token ids, `lora` scales, and no token that ends an answer. Times are
those at which a client has received an event of the stream. Stock llama-server decodes users
together whose scales are equal, and the others one after another. With --probe, `qaflora serve` is
asked for qa-flora's weights besides, which llama-server has nothing like. Each turn of the users is
told on stderr as it ends.
"""

import argparse
import contextlib
import json
import os
import re
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import httptools
import numpy as np
from server_process import started, status_bytes

from qaflora_edge.bundles.create import create_bundle
from qaflora_edge.hub import fetch_model

N_ADAPTER, RANK, ALPHA = 3, 16, 16.0
MODULES = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
PATIENCE_S = 600

# The same without HTTP and JSON, in a process of its own: a line of requests in, of tokens/s out.
DIRECT = """
import json, sys, time
from qaflora_edge import Engine
bundle, options = json.loads(sys.argv[1])
with Engine(bundle, **options) as engine:
    for line in sys.stdin:
        requests = json.loads(line)
        begin = time.perf_counter()
        n = sum(g.usage["completion_tokens"] for _, g in engine.generate_many(requests))
        print(n / (time.perf_counter() - begin), flush=True)
"""


@dataclass(frozen=True)
class Row:
    """What users of one server saw. Milliseconds, megabytes, tokens of answers a second.

    mixes  "own": each user has one; "one": all have the same; "probe": each question is weighed
    """

    server: str
    users: int
    mixes: str
    tokens_per_second: float
    first_ms_p50: float
    first_ms_p95: float
    pause_ms_p95: float
    peak_mb: float


# files


def write_random_adapter(path: Path, base: gguf.GGUFReader, seed: int, rank: int = RANK) -> None:
    """Write an adapter on every projection of a base."""
    architecture = base.get_field("general.architecture")
    assert architecture is not None
    writer = gguf.GGUFWriter(path, architecture.contents())
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    rng = np.random.default_rng(seed)
    for tensor in base.tensors:
        found = re.fullmatch(r"blk\.\d+\.(\w+)\.weight", tensor.name)
        if found and found[1] in MODULES:
            n_in, n_out = (int(n) for n in tensor.shape)
            a = rng.standard_normal((rank, n_in), np.float32) / np.sqrt(n_in)
            b = rng.standard_normal((n_out, rank), np.float32) * 0.01
            writer.add_tensor(f"{tensor.name}.lora_a", a.astype(np.float16))
            writer.add_tensor(f"{tensor.name}.lora_b", b.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def end_tokens(base: gguf.GGUFReader) -> list[int]:
    """Control tokens of a base, those that end an answer among them."""
    kinds = base.get_field("tokenizer.ggml.token_type")
    assert kinds is not None
    return [i for i, kind in enumerate(kinds.contents()) if kind == gguf.TokenType.CONTROL]


# asking


def request_of(user: int, options: argparse.Namespace, mixes: str, forbidden: list[int]) -> Any:
    """The body that a user sends: its own question, and its own mix, that of all, or none."""
    rng = np.random.default_rng([user, options.seed])
    question = [int(token) for token in rng.integers(1000, 20000, options.question)]
    scales = np.random.default_rng(user if mixes == "own" else 0).dirichlet(np.ones(N_ADAPTER))
    lora = [{"id": i, "scale": round(float(s), 4)} for i, s in enumerate(scales)]
    return {
        "model": "bench",
        "prompt": question,
        "max_tokens": options.answer,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"fusion": {"strategy": "qa-flora"}} if mixes == "probe" else {"lora": lora}),
        "logit_bias": {str(token): -100 for token in forbidden},
        "cache_prompt": False,  # of llama-server: what it has read before would be free
    }


class Answer:
    """A stream as it came: bytes are noted while it comes, and read only after all have ended.

    times_s, usage  when each event with text was there, by time.perf_counter(); tokens
    """

    def __init__(self, port: int, body: Any) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        content = json.dumps(body).encode()
        lines = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Connection: close")
        more = ("Content-Type: application/json", f"Content-Length: {len(content)}")
        self.request = "\r\n".join((*lines, *more, "", "")).encode() + content
        self.received: list[tuple[float, bytes]] = []
        self._parser, self._line, self._now_s = httptools.HttpResponseParser(self), b"", 0.0
        self.times_s, self.usage = list[float](), dict[str, int]()

    def read(self) -> None:
        """Raises ValueError for what is not answered with 200."""
        for now_s, data in self.received:
            self._now_s = now_s
            self._parser.feed_data(data)
        if self._parser.get_status_code() != 200:
            raise ValueError(f"The server answered {self.received[0][1][:2000]!r}")

    def on_body(self, data: bytes) -> None:
        """For the parser."""
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                self.usage = event.get("usage") or self.usage
                if event["choices"] and event["choices"][0]["text"]:
                    self.times_s.append(self._now_s)


def ask(port: int, bodies: list[Any]) -> tuple[float, list[Answer]]:
    """Ask all at once and wait for all, in one thread, which costs the servers' cores little.

    returns  when they were asked, and the answers
    """
    answers = [Answer(port, body) for body in bodies]
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        start_s = time.perf_counter()
        for answer in answers:
            stack.enter_context(answer.socket).sendall(answer.request)
            selector.register(answer.socket, selectors.EVENT_READ, answer)
        while selector.get_map():
            ready = selector.select(PATIENCE_S)
            if not ready:
                raise SystemExit(f"Nothing came for {PATIENCE_S} s.")
            for key, _ in ready:
                data = key.data.socket.recv(1 << 16)
                if data:
                    key.data.received.append((time.perf_counter(), data))
                else:
                    selector.unregister(key.data.socket)
    for answer in answers:
        answer.read()
    return start_s, answers


def measure(
    name: str, process: "subprocess.Popen[bytes] | None", port: int, bodies: list[Any], mixes: str
) -> Row:
    """Let all users ask at once, and wait for all."""
    start_s, answers = ask(port, bodies)
    seconds = max(answer.received[-1][0] for answer in answers) - start_s
    n_token = sum(answer.usage["completion_tokens"] for answer in answers)
    expected = len(bodies) * bodies[0]["max_tokens"]
    if n_token != expected:
        raise SystemExit(f"{name}: answers have {n_token} tokens together, expected {expected}.")
    first = [1000 * (answer.times_s[0] - start_s) for answer in answers]
    pauses = [1000 * pause for answer in answers for pause in np.diff(answer.times_s)]
    return Row(
        name,
        len(bodies),
        mixes,
        n_token / seconds,
        statistics.median(first),
        float(np.percentile(first, 95)),
        float(np.percentile(pauses, 95)) if pauses else 0.0,
        ((status_bytes("VmHWM", process.pid) or 0) / 1e6) if process is not None else 0.0,
    )


# servers


def most_users(options: argparse.Namespace) -> int:
    """The places that any part of the plan needs."""
    return max(*options.users, *options.one_mix, *options.probe)


def servers(
    options: argparse.Namespace, bundle: Path, base: Path, adapters: list[Path], n_ctx: int
) -> dict[str, list[str]]:
    """Name -> command, but for the port."""
    n, threads = most_users(options), str(options.threads)
    ours = [sys.executable, "-P", "-m", "qaflora_edge", "serve", str(bundle), "--parallel", str(n)]
    found = {"qaflora": [*ours, "--ctx", str(n_ctx), "--threads", threads]}
    if options.llama_server is not None:
        stock = [options.llama_server, "--model", str(base), "--parallel", str(n)]
        stock += ["--ctx-size", str(n * n_ctx), "--threads", threads, "--offline"]
        loras = [part for path in adapters for part in ("--lora", str(path))]
        found["llama-server"] = [*stock, *loras, "--lora-init-without-apply"]
    return found


def measure_server(
    name: str,
    command: list[str],
    options: argparse.Namespace,
    forbidden: list[int],
    place: Path,
    direct: "Direct | None",
) -> list[Row]:
    """All numbers of users, each with a mix of its own, and some with one mix for all.

    direct  asked the same as each of --direct users with a mix each, right after them
    """
    plan = [(n, "own") for n in options.users] + [(n, "one") for n in options.one_mix]
    plan += [(n, "probe") for n in options.probe if name == "qaflora"]
    rows = []
    with started(command, place / f"{name}.log") as (process, port):
        warm = {**request_of(10_000, options, "own", forbidden), "max_tokens": 4}
        measure(name, process, port, [warm], "own")
        for n, mixes in plan:
            for turn in range(options.repeat):
                start = 100 * (turn + 1)
                bodies = [request_of(start + i, options, mixes, forbidden) for i in range(n)]
                rows.append(measure(name, process, port, bodies, mixes))
                print(rows[-1], file=sys.stderr, flush=True)
                if direct is not None and mixes == "own" and n in options.direct:
                    direct.compare(bodies, rows[-1].tokens_per_second)
    return rows


class Direct:
    """The same requests by Engine.generate_many, without HTTP and JSON: one is what `run` does.

    pairs  users -> tokens/s served and by generate_many, of the same requests one after the other
    """

    def __init__(self, options: argparse.Namespace, bundle: Path, n_ctx: int) -> None:
        engine = {"n_ctx": n_ctx, "n_parallel": most_users(options), "threads": options.threads}
        command = [sys.executable, "-c", DIRECT, json.dumps([str(bundle), engine])]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, **pipes)
        self.pairs: dict[int, list[tuple[float, float]]] = {n: [] for n in options.direct}
        self._asked(request_of(10_000, options, "own", []) | {"max_tokens": 4})

    def _asked(self, *bodies: Any) -> float:
        requests = [
            {
                "prompt": body["prompt"],
                "weights": {f"a{each['id']}": each["scale"] for each in body["lora"]},
                "logit_bias": {int(k): v for k, v in body["logit_bias"].items()},
                "max_tokens": body["max_tokens"],
            }
            for body in bodies
        ]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(requests) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("The process that calls generate_many has ended; see above.")
        return float(line)

    def compare(self, bodies: list[Any], served: float) -> None:
        """Ask the same as users of a server have; note both."""
        self.pairs[len(bodies)].append((served, self._asked(*bodies)))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


# telling


def middle(rows: list[Row]) -> list[Row]:
    """One row for each server, number of users and mixes: the medians of its turns."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.server, row.users, row.mixes), []).append(row)
    numbers = [name for name, kind in Row.__annotations__.items() if kind is float]
    return [
        Row(*key, *(statistics.median(getattr(row, name) for row in group) for name in numbers))
        for key, group in groups.items()
    ]


def table(rows: list[Row], direct: Direct | None) -> str:
    """Rows, and what is compared by them."""
    lines = ["server        users  mixes  tokens/s  first p50  first p95  pause p95   peak MB"]
    for row in rows:
        lines.append(
            f"{row.server:<12} {row.users:>6}  {row.mixes:<5} {row.tokens_per_second:>9.1f} "
            f"{row.first_ms_p50:>7.0f} ms {row.first_ms_p95:>7.0f} ms {row.pause_ms_p95:>7.0f} ms "
            f"{row.peak_mb:>9.0f}"
        )
    of = {(row.server, row.users, row.mixes): row for row in rows}
    for (server, users, mixes), stock in of.items():
        if server == "llama-server":
            ours = of["qaflora", users, mixes]
            faster = ours.tokens_per_second / stock.tokens_per_second
            first = ours.first_ms_p95 / stock.first_ms_p95
            lines.append(
                f"{users} users, {mixes} mix: {faster:.2f} times the tokens/s of llama-server, "
                f"first token p95 {first:.2f} times as long"
            )
    for users, pairs in direct.pairs.items() if direct is not None else ():
        served, alone = (statistics.median(column) for column in zip(*pairs, strict=True))
        cost = statistics.median(1 - one / other for one, other in pairs)
        by = "as in `qaflora run`" if users == 1 else "by generate_many"
        lines.append(
            f"{users} users: {served:.1f} tokens/s served, {alone:.1f} {by}: "
            f"HTTP, JSON and the clients cost {100 * cost:.1f} % (medians of turns)"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-server", metavar="PATH")
    parser.add_argument("--base", default="qwen2.5-coder-0.5b-instruct", help="of the registry")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--one-mix", type=int, nargs="*", default=[8], help="users with one mix")
    parser.add_argument(
        "--probe", type=int, nargs="*", default=[8], help="users whose questions are weighed"
    )
    parser.add_argument(
        "--direct", type=int, nargs="*", default=[1, 8], help="users of generate_many"
    )
    parser.add_argument("--question", type=int, default=64, help="tokens")
    parser.add_argument("--answer", type=int, default=128, help="tokens")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not {*options.direct} <= {*options.users}:
        parser.error("--direct has to be of --users: the two are compared")
    n_ctx = options.question + options.answer + 64
    with tempfile.TemporaryDirectory(prefix="qaflora-bench-") as folder:
        place = Path(folder)
        base = fetch_model(options.base)
        reader = gguf.GGUFReader(base)
        adapters = [place / f"a{i}.gguf" for i in range(N_ADAPTER)]
        for seed, path in enumerate(adapters):
            write_random_adapter(path, reader, seed)
        forbidden = end_tokens(reader)
        named = {path.stem: path for path in adapters}
        bundle = place / "bundle"
        create_bundle(bundle, base, named, name="bench")
        rows = []
        direct = Direct(options, bundle, n_ctx) if options.direct else None
        try:
            for name, command in servers(options, bundle, base, adapters, n_ctx).items():
                compared = direct if name == "qaflora" else None
                rows += measure_server(name, command, options, forbidden, place, compared)
        finally:
            if direct is not None:
                direct.close()
    rows = middle(rows)
    if options.json:
        print(
            json.dumps({"rows": [asdict(row) for row in rows], "direct": direct and direct.pairs})
        )
    else:
        print(table(rows, direct))


if __name__ == "__main__":
    main()
