"""Whether a server with adapters per request keeps requests apart: one's weights, another's answer.

    python benchmarks/isolation.py --base-url http://127.0.0.1:8080

Asks `qaflora serve` or llama-server (the field `lora`), or vLLM (adapters are models), for chats
that begin alike under several mixes: one after another, through other chats, to zero and back, at
the same time, and after requests that were cancelled. Each answer is compared with the one given
to the same request alone before, without a cache where the server can be told so: the
probabilities of the likeliest tokens, up to the first token that differs. Prints a line for each
check. Ends with status 1 where one changes by more than --tolerance, and by more than twice what
a mix changes that follows itself: a cache may round otherwise.
"""

import argparse
import http.client
import itertools
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 600.0  # of one request
RULES = " ".join(f"Rule {i}: give answer number {i} in one short sentence." for i in range(1, 13))
FIRST = "Tom has 3 boxes of 12 eggs. He breaks 5 eggs. How many are left?"
LONGER = f"{FIRST} And how many boxes can he fill with those?"
OTHER = "What is the capital of France, and which river flows through it?"
CHATS = (FIRST, LONGER, OTHER)
Answer = list[dict[str, float]]  # for each token the probabilities of the likeliest, its own first


class Server:
    """A server, its mixes, and what it answers to each alone.

    mixes  name -> fields of a request
    """

    def __init__(self, url: str, model: str | None, key: str | None, n_token: int) -> None:
        self._address, self._n_token = urlsplit(url), n_token
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self.mixes = self._lora_mixes(model) or self._model_mixes(model)
        self.alone: dict[tuple[str, str], Answer] = {}

    def _lora_mixes(self, model: str | None) -> dict[str, dict[str, Any]]:
        """Of servers with the field `lora`; those that are not in the list weigh 0."""
        listed = self._get("/lora-adapters")
        if listed is None:
            return {}
        if len(listed) < 2:
            raise SystemExit("The server has fewer than two adapters; load two that differ.")
        a, b = (each["id"] for each in listed[:2])
        scales = {"a": {a: 1}, "b": {b: 1}, "half": {a: 0.5, b: 0.5}}
        scales |= {"zero": dict.fromkeys((each["id"] for each in listed), 0), "none": {}}
        return {
            name: {"lora": [{"id": id, "scale": scale} for id, scale in mix.items()]}
            | ({"model": model} if model else {})
            for name, mix in scales.items()
        }

    def _model_mixes(self, model: str | None) -> dict[str, dict[str, Any]]:
        """Of vLLM, whose adapters are models with a parent."""
        listed = (self._get("/v1/models") or {"data": []})["data"]
        adapters = [each["id"] for each in listed if each.get("parent")]
        bases = [each["id"] for each in listed if not each.get("parent")]
        if len(adapters) < 2:
            raise SystemExit("The server tells of fewer than two adapters; load two that differ.")
        names = {"a": adapters[0], "b": adapters[1], "zero": model or bases[0]}
        return {name: {"model": each} for name, each in names.items()}

    def learn(self) -> None:
        """Ask for every mix and chat alone, each past the server's cache."""
        for mix, chat in itertools.product(self.mixes, CHATS):
            fresh = {"cache_prompt": False, "cache_salt": uuid.uuid4().hex}
            self.alone[mix, chat] = self.ask(mix, chat, **fresh)

    def noise(self) -> float:
        """How much the server's cache changes a mix that follows itself: of the steadiest one."""
        found = []
        for mix in self.mixes:
            self.ask(mix, FIRST)
            found.append(max(self.change(mix, chat) for chat in (FIRST, LONGER, OTHER, FIRST)))
        return min(found)

    def change(self, mix: str, chat: str) -> float:
        """Ask again: the largest change from what was answered alone."""
        return difference(self.alone[mix, chat], self.ask(mix, chat))

    def ask(self, mix: str, chat: str, **more: Any) -> Answer:
        """Answer a chat under a mix."""
        with closing(self._begin(mix, chat, **more)) as connection:
            response = connection.getresponse()
            body = json.load(response)
        if response.status != 200:
            raise SystemExit(f"The server answers {response.status} to mix {mix}: {body}")
        return [
            {top["token"]: math.exp(top["logprob"]) for top in (token, *token["top_logprobs"])}
            for token in body["choices"][0]["logprobs"]["content"]
        ]

    def leave(self, mix: str, chat: str, *, is_early: bool) -> None:
        """Ask, and go away while the prompt is prefilled, or after the answer's first line."""
        with closing(self._begin(mix, chat, stream=True, max_tokens=200)) as connection:
            if is_early:
                time.sleep(0.05)
            else:
                connection.getresponse().readline()

    def _begin(self, mix: str, chat: str, **more: Any) -> http.client.HTTPConnection:
        messages = [{"role": "system", "content": RULES}, {"role": "user", "content": chat}]
        body = {"messages": messages, "max_tokens": self._n_token, "temperature": 0}
        body |= {"logprobs": True, "top_logprobs": 20, **self.mixes[mix], **more}
        connection = self._connection()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), self._headers)
        return connection

    def _connection(self) -> http.client.HTTPConnection:
        is_safe = self._address.scheme == "https"
        kind = http.client.HTTPSConnection if is_safe else http.client.HTTPConnection
        return kind(self._address.netloc, timeout=TIMEOUT_S)

    def _get(self, path: str) -> Any:
        with closing(self._connection()) as connection:
            connection.request("GET", path, headers=self._headers)
            response = connection.getresponse()
            data = response.read()
        return json.loads(data) if response.status == 200 else None


def difference(alone: Answer, found: Answer) -> float:
    """The largest change of a probability, up to the first token that differs; 1 if shorter."""
    largest = 0.0 if alone and found else 1.0
    for one, other in zip(alone, found, strict=False):
        largest = max(largest, *(abs(p - other.get(token, 0.0)) for token, p in one.items()))
        if next(iter(one)) != next(iter(other)):
            break
    return largest


def checks(server: Server) -> Iterable[tuple[str, dict[str, float]]]:
    """Each check, and the changes that it found by what was asked."""
    names = list(server.mixes)
    pairs = [(names[i - step], names[i]) for step in (1, -1) for i in range(-1, len(names) - 1)]
    if "none" in server.mixes:
        zero, none = (server.alone[mix, FIRST] for mix in ("zero", "none"))
        yield 'alone: "lora": [] is zero', {"none": difference(zero, none)}

    def after(act: Callable[[str, str], Any], chat: str) -> dict[str, float]:
        found = {}
        for before, mix in pairs:
            act(before, mix)
            found[f"{before} > {mix}"] = server.change(mix, chat)
        return found

    def other_chat(before: str, mix: str) -> None:
        server.ask(before, FIRST)
        server.ask(mix, OTHER)

    yield "a chat after another mix", after(lambda x, _: server.ask(x, FIRST), FIRST)
    yield "a longer chat after another mix", after(lambda x, _: server.ask(x, FIRST), LONGER)
    yield "a chat that another mix had, after another chat", after(other_chat, FIRST)
    there = [mix for mix in ("a", "zero", "a", "none", "b", "zero", "b") if mix in server.mixes]
    yield "to zero and back", {f"{i} {x}": server.change(x, FIRST) for i, x in enumerate(there)}
    with ThreadPoolExecutor(len(names)) as threads:
        together = threads.map(server.change, names, [FIRST] * len(names))
        yield "all mixes together", dict(zip(names, together, strict=True))
    for is_early, when in ((True, "while it is prefilled"), (False, "while it is answered")):

        def leave(before: str, mix: str, is_early: bool = is_early) -> None:
            server.leave(before, FIRST, is_early=is_early)

        yield f"after a chat cancelled {when}", after(leave, LONGER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base-url", required=True, help="of the server, without /v1")
    parser.add_argument("--model", help="the model, or vLLM's base; by default the server's first")
    parser.add_argument("--api-key", default=os.environ.get("QAFLORA_API_KEY"))
    parser.add_argument("--tokens", type=int, default=12, help="of each answer")
    parser.add_argument("--tolerance", type=float, default=0.02, help="of a probability")
    options = parser.parse_args()
    server = Server(options.base_url, options.model, options.api_key, options.tokens)
    server.learn()
    effect = min(
        difference(server.alone[one, FIRST], server.alone[other, FIRST])
        for one, other in itertools.combinations(("a", "b", "zero"), 2)
    )
    if effect < 3 * options.tolerance:
        raise SystemExit(f"The adapters change too little to be told apart: {effect:.3f}.")
    noise = server.noise()
    tolerance = max(options.tolerance, 2 * noise)
    print(f"mixes {', '.join(server.mixes)} differ by {effect:.4f} or more, alike by {noise:.4f}\n")
    print(f"{'check':<48} {'answers':>7} {'wrong':>5} {'largest':>8}")
    n_failed = 0
    for name, found in checks(server):
        wrong = [what for what, change in found.items() if change > tolerance]
        verdict = f"FAIL {', '.join(wrong)}" if wrong else "PASS"
        n_failed += bool(wrong)
        largest = max(found.values())
        print(f"{name:<48} {len(found):>7} {len(wrong):>5} {largest:>8.4f}  {verdict}", flush=True)
    raise SystemExit(n_failed > 0)


if __name__ == "__main__":
    main()
