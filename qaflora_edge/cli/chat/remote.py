"""An Engine that is elsewhere: what a chat needs of one, over `qaflora serve`."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from qaflora_edge.chat.messages import Message
from qaflora_edge.chat.session_file import BundleIdentity
from qaflora_edge.errors import OptionError, PromptError, QafloraError, ServerError, StrategyError
from qaflora_edge.inference.sequence import Timings
from qaflora_edge.progress import Tell
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.strategy import parse_strategy

KEY_VARIABLE = "QAFLORA_API_KEY"
_CONNECT_S = 10.0
_MAX_LINE = 64 << 20


class Server:
    """Asks a server. One request at a time is on its way; any thread may cut it.

    Raises ServerError when it cannot be reached, or refuses.
    """

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            is_address = parts.scheme in ("http", "https") and parts.hostname
            http.client.HTTPConnection(parts.netloc)  # checks it, and connects to nothing
        except (ValueError, http.client.InvalidURL):
            is_address = None
        if not is_address:
            raise OptionError(
                f"Option server is {url!r}, expected an address such as http://127.0.0.1:8080."
            )
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._parts, self._root = parts, parts.path.rstrip("/").removesuffix("/v1")
        self._socket: socket.socket | None = None

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that is answered to a POST with a body, or to a GET."""
        with self.opened(path, body) as response, self.reached():
            text = response.read()
        with self.understood():
            return json.loads(text)

    @contextlib.contextmanager
    def opened(
        self, path: str, body: Mapping[str, Any] | None
    ) -> Iterator[http.client.HTTPResponse]:
        """A response that is read as it comes."""
        kind: type[http.client.HTTPConnection] = http.client.HTTPConnection
        if self._parts.scheme == "https":
            kind = http.client.HTTPSConnection
        connection = kind(self._parts.netloc, timeout=_CONNECT_S)
        try:
            with self.reached():
                connection.connect()
                self._socket = connection.sock
                connection.sock.settimeout(None)  # it may weigh, or let others pass, for long
                data = None if body is None else json.dumps(body).encode()
                connection.request(
                    "GET" if body is None else "POST", self._root + path, data, _headers()
                )
                response = connection.getresponse()
                if response.status != 200:
                    raise self._refused(response)
            yield response
        finally:
            self._socket = None
            connection.close()

    def cut(self) -> None:
        """End the request that is on its way, if any; its reader raises ServerError."""
        with contextlib.suppress(OSError, AttributeError):
            self._socket.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

    @contextlib.contextmanager
    def reached(self) -> Iterator[None]:
        """Raise ServerError where the connection fails."""
        try:
            yield
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            raise ServerError(
                f"The server {self.url} cannot be reached: {error or type(error).__name__}. Start "
                "it with `qaflora serve`, or correct the address (--server)."
            ) from error

    @contextlib.contextmanager
    def understood(self) -> Iterator[None]:
        """Raise ServerError where an answer is read that has not what is looked for."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ServerError(
                f"The server {self.url} answers with what cannot be read, expected the JSON of "
                "`qaflora serve`. Correct the address (--server)."
            ) from error

    def _refused(self, response: http.client.HTTPResponse) -> QafloraError:
        text = response.read(1 << 20)
        try:
            error = json.loads(text)["error"]
            said, param = error["message"], error["param"]
        except (ValueError, KeyError, TypeError):
            said, param = "no reason that can be read", None
        if param in ("messages", "prompt"):  # as an Engine says it, which leaves out old turns then
            return PromptError(said)
        if response.status == 401:
            said = f"{said} Set {KEY_VARIABLE}."
        return ServerError(f"The server {self.url} answered {response.status}: {said}")


def _headers() -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    return headers


class RemoteEngine:
    """A model of a server, with what a chat uses of an Engine.

    model  an id of its GET /v1/models; None: the only bundle that it has
    """

    system = ""  # what a bundle has of its own is the server's matter

    def __init__(self, server: Server, model: str | None) -> None:
        self._server = server
        self._answer: RemoteGeneration | None = None
        with server.understood():
            self._read_facts(server, model)

    def _read_facts(self, server: Server, model: str | None) -> None:
        listed = [each["id"] for each in server.ask("/v1/models")["data"]]
        bundles = [each for each in listed if ":" not in each]
        if model is None and len(bundles) == 1:
            model = bundles[0]
        if model is None or model not in listed:
            found = "not given" if model is None else f"{model!r}"
            raise ServerError(
                f"The model is {found}, and {server.url} has {', '.join(listed)}; name one of them."
            )
        self.model, _, named = model.partition(":")
        self._strategies = {each.partition(":")[2] for each in listed} - {""}
        server.ask("/tokenize", {"model": self.model, "content": ""})  # it is loaded now
        meta = server.ask(f"/v1/models/{quote(self.model)}")["meta"]
        self.name, self.n_ctx, self.n_ctx_train = meta["base"], meta["n_ctx"], meta["n_ctx_train"]
        self.loaded_adapters = self.adapters = tuple(meta["adapters"])
        self.n_layer = meta["n_layer"]
        self.strategy = named or meta["strategy"]
        hashes = meta["sha256"]
        self.identity = BundleIdentity(
            self.model, hashes.get("base", ""), dict(hashes.get("adapters", {}))
        )

    def close(self) -> None:
        if self._answer is not None:
            self._answer.close()

    def cancel(self) -> None:
        """End what is asked now; any thread may call it."""
        self._server.cut()

    def use_adapters(self, names: Sequence[str]) -> None:
        """Weigh only these from now on. Raises StrategyError as an Engine does."""
        chosen = tuple(name for name in self.loaded_adapters if name in names)
        parse_strategy(self.strategy, chosen)
        self.adapters = chosen

    def use_strategy(self, strategy: str) -> None:
        """Weigh by this from now on. Raises StrategyError for what the server cannot follow."""
        parse_strategy(strategy, self.adapters)
        if ":" not in strategy and strategy not in self._strategies:
            raise StrategyError(
                f"Strategy {strategy!r} cannot be followed by {self.model} at {self._server.url}, "
                f"expected one of {', '.join(sorted(self._strategies))}."
            )
        self.strategy = strategy

    # tokens

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, as Engine.tokenize gives them."""
        return self._tokens(content=text, add_special=True, parse_special=False)

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation under the base's chat template."""
        return self._tokens(messages=list(messages))

    def _tokens(self, **body: Any) -> list[int]:
        found = self._server.ask("/tokenize", {"model": self.model, **body})
        tokens: list[int] = found["tokens"]
        if len(tokens) > self.n_ctx:
            raise PromptError(
                f"The prompt has {len(tokens)} tokens, the context {self.n_ctx}; shorten it, or "
                "start the server with a larger --ctx."
            )
        return tokens

    # answers

    def generate(
        self,
        prompt: Sequence[int],
        *,
        weights: FusionWeights | None = None,
        keep_history: Any = False,
        on_progress: Tell | None = None,
        **sampling: Any,
    ) -> RemoteGeneration:
        """Answer token ids; the prompt was weighed and read when this returns.

        keep_history  with weights alone, which are those that the prompt was read under
        on_progress   called meanwhile as Engine.generate calls it
        """
        if keep_history and weights is None:
            raise OptionError(
                "A server reads each turn under its own weights; keep no history (/keep-history "
                "off), or chat with the bundle itself."
            )
        self.close()
        fusion: dict[str, Any] = {"adapters": list(self.adapters), "return": "layers"}
        if weights is None or not weights.adapters:  # rows of nothing are no matrix in JSON
            fusion["strategy"] = self.strategy
        else:
            fusion["weights"] = [[float(weight) for weight in row] for row in weights.weights]
        asked = {name: value for name, value in sampling.items() if value is not None}
        body = {
            "max_tokens": self.n_ctx,
            **asked,
            "model": self.model,
            "prompt": list(prompt),
            "fusion": fusion,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if on_progress is not None:
            body["return_progress"] = True
        self._answer = RemoteGeneration(self._server, body, weights, self.n_layer, on_progress)
        return self._answer


class RemoteGeneration(Iterator[str]):
    """An answer as it comes from a server, with what a chat uses of a Generation."""

    def __init__(
        self,
        server: Server,
        body: Mapping[str, Any],
        weights: FusionWeights | None,
        n_layer: int,
        on_progress: Tell | None = None,
    ) -> None:
        self._server, self._stack = server, contextlib.ExitStack()
        self._response = self._stack.enter_context(server.opened("/v1/completions", body))
        self.n_prompt, self.n_completion = len(body["prompt"]), 0
        self.finish_reason: str | None = None
        self.timings = Timings()
        self._events = self._read()
        try:
            with server.understood():
                self._first: Mapping[str, Any] | None = self._read_first(on_progress)
                self.fusion = weights or _fusion(self._first["fusion"], self.n_prompt, n_layer)
        except BaseException:
            self.close()
            raise

    def __next__(self) -> str:
        with self._server.understood():
            return self._next_piece()

    def _next_piece(self) -> str:
        while (event := self._next_event()) is not None:
            for choice in event["choices"]:
                self.finish_reason = choice["finish_reason"] or self.finish_reason
                if choice["text"]:
                    self.n_completion += 1
                    return str(choice["text"])
            if usage := event.get("usage"):
                self._take_times(usage, event["timings"])
        self.close()
        raise StopIteration

    def close(self) -> None:
        """End it, where it has not ended."""
        self._stack.close()

    def _read_first(self, on_progress: Tell | None) -> dict[str, Any]:
        """The event behind those that tell how far the prompt is weighed and read."""
        for event in self._events:
            told = event.get("prompt_progress")
            if told is None:
                return event
            if on_progress is not None:
                on_progress(told["stage"], told["processed"], told["total"])
        raise LookupError("no answer")

    def _next_event(self) -> Mapping[str, Any] | None:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return next(self._events, None)

    def _take_times(self, usage: Mapping[str, int], times: Mapping[str, float]) -> None:
        self.n_completion = usage["completion_tokens"]
        self.timings = Timings(
            probe_ms=times["probe_ms"],
            prefill_ms=times["prefill_ms"],
            decode_ms=times["decode_ms"],
            n_decoded=max(0, self.n_completion - 1),
        )

    def _read(self) -> Iterator[dict[str, Any]]:
        """Events until the end. Raises ServerError where that does not come."""
        while True:
            with self._server.reached():
                line = self._response.readline(_MAX_LINE)
                if not line.endswith(b"\n"):
                    raise ConnectionError("it went away before the answer ended")
            if line == b"data: [DONE]\n":
                return
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                said = event["error"]["message"]
                raise ServerError(f"The server {self._server.url} failed: {said}")
            yield event


def _fusion(told: Mapping[str, Any], n_prompt: int, n_layer: int) -> FusionWeights:
    """The weights that a server tells."""
    layers = told["layers"]
    rows = np.array(list(layers.values()), np.float32).reshape(len(layers), n_layer)
    return FusionWeights(
        adapters=tuple(layers),
        weights=rows,
        strategy=told["strategy"],
        prompt_tokens=n_prompt,
        probe_ms=told["probe_ms"],
    )
