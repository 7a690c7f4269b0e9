"""Metrics, and a line of the log for each request."""

import logging
import time
from collections.abc import Mapping
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("qaflora_edge.server")
M = TypeVar("M", Counter, Gauge, Histogram)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)
# Facts that a line of the log shows, in order.
_SHOWN = ("model", "strategy", "prompt_tokens", "completion_tokens", "wait_ms", "first_ms")


class Metrics:
    """Count for one server, under the prefix qaflora_."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._new(Counter, "requests", "Requests answered.", "path", "status")
        self.running = self._new(Gauge, "requests_running", "Requests that are computed now.")
        self.waiting = self._new(Gauge, "requests_waiting", "Requests that wait for a slot.")
        self.loaded = self._new(Gauge, "bundles_loaded", "Bundles that are open.")
        of_prompts = self._new(Counter, "prompt_tokens", "Tokens of prompts.", "model")
        of_answers = self._new(Counter, "completion_tokens", "Tokens of answers.", "model")
        self._tokens = {"prompt_tokens": of_prompts, "completion_tokens": of_answers}
        self._times = {
            "whole_ms": self._seconds("request", "From a request to its end."),
            "first_ms": self._seconds("first_token", "From a request to its first token."),
            "wait_ms": self._seconds("wait", "For a slot, and for a bundle to open."),
            "probe_ms": self._seconds("probe", "For weighing."),
        }

    def _new(self, kind: type[M], name: str, text: str, *labels: str, **options: Any) -> M:
        return kind(name, text, labels, namespace="qaflora", registry=self.registry, **options)

    def _seconds(self, name: str, text: str) -> Histogram:
        return self._new(Histogram, f"{name}_seconds", text, buckets=_SECONDS)

    def add(self, path: str, status: int, facts: Mapping[str, Any]) -> None:
        self.requests.labels(path, str(status)).inc()
        for key, histogram in self._times.items():
            if key in facts:
                seconds = facts[key] / 1e3
                histogram.observe(seconds)
        for key, counter in self._tokens.items():
            if key in facts:
                of_model = counter.labels(facts["model"])
                of_model.inc(facts[key])


class Recorder:
    """Note how each request ended; the outermost layer.

    A metric has the path of the route: paths as they were asked would fill the memory.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s = time.perf_counter()
        facts: dict[str, Any] = {"start_s": start_s}
        scope["qaflora"] = facts
        status = 499  # as nginx has it: gone before there was an answer

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except BaseException:
            status = 500
            raise
        finally:
            seconds = time.perf_counter() - start_s
            facts["whole_ms"] = 1e3 * seconds
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._metrics.add(path, status, facts)
            log.info("%s", _line(scope, status, facts))


def _line(scope: Scope, status: int, facts: Mapping[str, Any]) -> str:
    """Return one line, whatever a client or a proxy wrote into its request."""
    client = "-"
    if scope.get("client"):
        host, _ = scope["client"]
        client = _field(host)
    whole = f"{facts['whole_ms']:.1f}ms"
    parts = [client, _field(scope["method"]), _field(scope["path"]), str(status), whole]
    for name in _SHOWN:
        value = facts.get(name)
        if isinstance(value, float):
            parts.append(f"{name}={value:.1f}")
        elif value is not None:
            parts.append(f"{name}={value}")
    return " ".join(parts)


def _field(text: str) -> str:
    """Write what others chose as one field of a line, cut to a hundred characters."""
    return ascii(text[:100])[1:-1].replace(" ", "\\x20")
