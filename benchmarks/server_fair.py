"""Sixteen users of `qaflora serve` for minutes: who waits, and for how long?

    python benchmarks/server_fair.py BUNDLE [--minutes 10]

Options that it does not have go to `qaflora serve`. Two copies of the bundle are served, over one
base. Each has the same users but one, who ask one thing after the other until one fails: chats,
relays, a JSON schema, two answers at once, embeddings, a gap in code, prompts of some 1,700 tokens.
The first copy has a prompt of about 30,000 tokens in place of the gap.

Prints a line for each minute: answers of each kind, and resident memory. Then one JSON object, with
seconds of each kind. Ends with status 1 where an answer fails or the long prompt does not end,
relay's median is above 2.5 of a chat's, a chat's 95th percentile above 4 of its median, one copy's
like users have more than 1.5 times the answers of the other's, or memory after the second minute
grows by more than 150 MB. A minute's memory is the median of a sample a second: copies of a KV
state come and go within one. Keys and values of the long prompt are not counted there: its client
knows how many tokens are prefilled, and a token's are in memory from then on.
"""

import argparse
import contextlib
import http.client
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server_load import memory_mb, renamed
from server_process import started

from qaflora_edge.bundles.open import load_bundle

CHAT = "/v1/chat/completions"
VALUE_BYTES = 2  # f16, as `qaflora serve` stores keys and values
NO_ANSWER = 0  # in place of a status, where the server ended the connection
LONG_WAIT_S = 1800.0  # of a client; the server's --timeout counts before
WORDS = ("the", "river", "cat", "why", "seven", "window", "paints", "a", "quiet", "letter")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
KINDS = ("chat", "chat", "relay", "schema", "two", "embeddings", "1700")
Body = dict[str, Any]


def chat_body(text: str, **more: Any) -> Body:
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "max_tokens": 32, "temperature": 0, **more}


def request_of(kind: str, draw: random.Random, n_long: int) -> tuple[str, Body]:
    """Return a path and a body, other words each time."""

    def words(n_word: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(n_word))

    if kind == "schema":
        return CHAT, chat_body(words(20), response_format=FORM)
    if kind == "two":
        return CHAT, chat_body(words(20), n=2, temperature=0.7)
    if kind == "embeddings":
        return "/v1/embeddings", {"input": [words(30), words(30)]}
    if kind == "infill":
        return "/infill", {"input_prefix": f"# {words(30)}\ndef f():", "n_predict": 32}
    if kind == "long":
        return CHAT, chat_body(words(n_long), stream=True, return_progress=True)
    return CHAT, chat_body(words(1690 if kind == "1700" else 20))


@dataclass(frozen=True)
class Answer:
    """Note an answer: whose it was, its status, when it came, and after how many seconds."""

    kind: str
    model: str
    status: int
    at_s: float
    seconds: float


class User:
    """Ask for one kind of thing, one after the other."""

    def __init__(
        self, port: int, model: str, kind: str, n_long: int, note: Callable[[Answer], None]
    ) -> None:
        self._port = port
        self._n_long = n_long
        self._model = model
        self._kind = kind
        self._note = note
        self.n_read = 0  # tokens of the long prompt that are prefilled
        self._draw = random.Random(f"{model} {kind}")

    def run(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            path, body = request_of(self._kind, self._draw, self._n_long)
            model = f"{self._model}:relay" if self._kind == "relay" else self._model
            start_s = time.monotonic()
            status = self._ask(path, body | {"model": model})
            end_s = time.monotonic()
            self._note(Answer(self._kind, self._model, status, end_s, end_s - start_s))
            if self._kind == "long" or status != 200:
                return

    def _ask(self, path: str, body: Body) -> int:
        client = http.client.HTTPConnection("127.0.0.1", self._port, timeout=LONG_WAIT_S)
        try:
            with contextlib.closing(client):
                client.request("POST", path, json.dumps(body))
                response = client.getresponse()
                for line in response:
                    self._note_progress(line)
        except (OSError, http.client.HTTPException):
            return NO_ANSWER
        return response.status

    def _note_progress(self, line: bytes) -> None:
        if b'"prompt_progress"' in line:
            chunk = json.loads(line.removeprefix(b"data:"))
            self.n_read = chunk["prompt_progress"]["processed"]


def token_mb(bundle: Path) -> float:
    """Give the megabytes of one token's keys and values."""
    base = load_bundle(bundle).header
    n_value = [base.tensors[f"blk.0.attn_{side}.weight"].shape[0] for side in "kv"]
    return sum(n_value) * base.n_layer * VALUE_BYTES / 1e6


def percentile(seconds: list[float], part: float) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(part * len(seconds)))]


def summary_of(answers: list[Answer], memory: list[float]) -> dict[str, Any]:
    """Give the seconds of each kind, and what has to hold of them.

    memory  megabytes after each minute, but for the long prompt's keys and values
    """
    times: dict[str, list[float]] = {}
    per_model: Counter[str] = Counter()
    for answer in answers:
        times.setdefault(answer.kind, []).append(answer.seconds)
        if answer.kind in KINDS:
            per_model[answer.model] += 1
    kinds = {}
    for kind, seconds in times.items():
        kinds[kind] = {
            "n": len(seconds),
            "median_s": round(statistics.median(seconds), 1),
            "p95_s": round(percentile(seconds, 0.95), 1),
        }
    chat_s = statistics.median(times["chat"])
    return {
        "kinds": kinds,
        "failed": [vars(answer) for answer in answers if answer.status != 200],
        "relay_to_chat": round(statistics.median(times["relay"]) / chat_s, 2),
        "chat_p95_to_median": round(percentile(times["chat"], 0.95) / chat_s, 2),
        "answers": per_model,
        "copies_factor": round(max(per_model.values()) / min(per_model.values()), 2),
        "long_prompt_ended": any(each.kind == "long" and each.status == 200 for each in answers),
        "grown_mb": round(memory[-1] - memory[min(1, len(memory) - 1)], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--long", type=int, default=29_500, help="words of the long prompt")
    options, of_serve = parser.parse_known_args()
    answers: list[Answer] = []
    memory: list[float] = []
    with tempfile.TemporaryDirectory(prefix="qaflora-fair-") as name, contextlib.ExitStack() as end:
        folder = Path(name)
        bundles = renamed([options.bundle, options.bundle], folder)
        command = [sys.executable, "-P", "-m", "qaflora_edge", "serve", *bundles, *of_serve]
        process, port = end.enter_context(started(command, folder / "log"))
        wanted = [(model, kind) for model in ("b0", "b1") for kind in KINDS]
        wanted += [("b0", "long"), ("b1", "infill")]
        users = [User(port, model, kind, options.long, answers.append) for model, kind in wanted]
        start_s = time.monotonic()
        until_s = start_s + 60 * options.minutes
        threads = [threading.Thread(target=user.run, args=(until_s,)) for user in users]
        for thread in threads:
            thread.start()
        long_mb = token_mb(Path(options.bundle))
        for minute in range(1, options.minutes + 1):
            samples = []
            while time.monotonic() < start_s + 60 * minute:
                time.sleep(1)
                rss_mb = memory_mb("VmRSS", process.pid)
                samples.append(rss_mb - long_mb * max(user.n_read for user in users))
            memory.append(statistics.median(samples))
            since_s = start_s + 60 * (minute - 1)
            counts = Counter(answer.kind for answer in answers if answer.at_s > since_s)
            line = {"minute": minute, "rss_mb": round(rss_mb)}
            line |= {"without_long_mb": round(memory[-1]), "answers": counts}
            print(json.dumps(line), file=sys.stderr, flush=True)
        for thread in threads:
            thread.join()
    result = summary_of(answers, memory)
    print(json.dumps(result, indent=1))
    is_fair = (
        result["long_prompt_ended"]
        and result["relay_to_chat"] <= 2.5
        and result["chat_p95_to_median"] <= 4
        and result["copies_factor"] <= 1.5
        and result["grown_mb"] <= 150
    )
    sys.exit(bool(result["failed"]) or not is_fair)


if __name__ == "__main__":
    main()
