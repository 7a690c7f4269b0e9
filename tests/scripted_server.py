"""A server of which every answer is given beforehand, with the page that is tested in a browser.

It speaks as `qaflora serve` does where the page listens, and keeps what the page asked.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from serving import running
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from qaflora_edge.server.app import show_page
from qaflora_edge.server.refusals import Refusal

ADAPTERS = {"demo": ("math", "es", "med"), "code": ("sql",)}
STRATEGIES = ("qa-flora", "spectr", "static", "base")
N_LAYER = 24
SHA256: dict[str, Any] = {
    "base": "ab" * 32,
    "adapters": {name: name * 8 for name in ADAPTERS["demo"]},
}


@dataclass
class Script:
    """What the server says, and what it was asked.

    answers  question -> text; {strategy} in it is filled in
    documents  name -> text of a file that it can read
    thought  what comes before each
    why      what decided: `because` and `why` of a mix
    relay    of a mix: knower, writer and draft, which is told by pieces before the answer
    reason   why an answer ends
    probe_ms  how long it says that it weighed
    pieces   how many letters come at once, and how long it waits before the next
    progress  the `prompt_progress` that it tells before probe_s
    key      what it asks for, if anything
    refusal  a status, a message and headers (and `code`) that every question is refused with
    is_broken  whether a stream ends before its end
    taught   what it is taught; None where teaching is off
    """

    answers: dict[str, str] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)
    thought: str = ""
    weights: dict[str, float] | None = None
    why: dict[str, Any] = field(default_factory=dict)
    relay: dict[str, Any] | None = None
    reason: str = "stop"
    piece_chars: int = 7
    pause_s: float = 0.0
    probe_s: float = 0.0
    probe_ms: float = 379.4
    progress: dict[str, Any] | None = None
    key: str = ""
    refusal: tuple[int, str, dict[str, str]] | None = None
    is_broken: bool = False
    taught: list[dict[str, Any]] | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    n_left: int = 0  # callers that went away before the end


def layers(names: list[str], strategy: str) -> list[list[float]]:
    """Weights [n_adapter][n_layer] that sum to 1 at each layer."""
    shift = len(strategy) % 5
    raw = [
        [
            1 + ((7 * row + 3 * layer * (row + 1) + shift) % 11) / (1 + row)
            for layer in range(N_LAYER)
        ]
        for row in range(len(names))
    ]
    sums = [sum(column) for column in zip(*raw, strict=True)]
    return [[w / total for w, total in zip(row, sums, strict=True)] for row in raw]


def fusion_of(script: Script, body: dict[str, Any]) -> dict[str, Any]:
    wanted = body.get("fusion", {})
    strategy = wanted.get("strategy", "qa-flora")
    names = wanted.get("adapters", list(ADAPTERS[body["model"]]))
    given = wanted.get("weights") or script.weights
    if isinstance(given, list):
        strategy, rows = "manual", given
    elif given is not None:
        strategy, rows = "manual", [[w] * N_LAYER for w in given.values()]
        names = list(given)
    elif strategy == "base":
        rows = [[0.0] * N_LAYER for _ in names]
    elif strategy == "static":
        rows = [[1 / len(names)] * N_LAYER for _ in names]
    else:
        rows = layers(names, strategy)
    means = {name: sum(row) / N_LAYER for name, row in zip(names, rows, strict=True)}
    found = {"strategy": strategy, "probe_ms": script.probe_ms, "weights": means, **script.why}
    if wanted.get("return") == "layers":
        found["layers"] = dict(zip(names, rows, strict=True))
    return found


def app(script: Script) -> Starlette:
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return error.response(request.url.path)

    async def models(request: Request) -> Response:
        found = []
        for name, names in ADAPTERS.items():
            meta = {"adapters": list(names), "strategy": "qa-flora", "sha256": SHA256}
            meta |= {
                "n_ctx": 4096,
                "descriptions": {"es": "Spanish"},
                "questions": ["What is 2 + 3?"],
                "takes_teaching": script.taught is not None,
            }
            meta["strategies"] = [*STRATEGIES, *(f"single:{each}" for each in names)]
            found += [{"id": each, "meta": meta} for each in (name, f"{name}:base")]
        return JSONResponse({"object": "list", "data": found})

    async def answer(request: Request) -> Response:
        body = await request.json()
        script.asked.append(body)
        if script.refusal is not None:
            status, message, headers = script.refusal
            error = {"message": message, "code": headers.pop("code", None)}
            return JSONResponse({"error": error}, status_code=status, headers=headers)
        return StreamingResponse(stream(body), media_type="text/event-stream")

    async def teach(request: Request) -> Response:
        body = await request.json()
        if script.taught is None:
            error = {"message": "This server takes no teaching."}
            return JSONResponse({"error": error}, status_code=403)
        if "undo" in body:
            return JSONResponse({"adapter": script.taught.pop()["adapter"], "undone": True})
        script.taught.append(body)
        n_taught = sum(other["adapter"] == body["adapter"] for other in script.taught)
        return JSONResponse({"adapter": body["adapter"], "taught": n_taught})

    async def document(request: Request) -> Response:
        name = request.query_params["name"]
        if name in script.documents:
            text = script.documents[name]
            return JSONResponse({"text": text, "n_token": 250 * len(text)})
        message = f"Cannot read {name}: it is no text."
        return JSONResponse({"error": {"message": message}}, status_code=400)

    async def stream(body: dict[str, Any]) -> AsyncIterator[str]:
        def event(choices: list[Any], **more: Any) -> str:
            return f"data: {json.dumps({'id': 'x', 'choices': choices, **more})}\n\n"

        def delta(content: dict[str, str], reason: str | None = None) -> list[Any]:
            return [{"index": 0, "delta": content, "finish_reason": reason}]

        is_whole = False
        try:
            yield ": ping\n\n"
            if script.progress is not None and body.get("return_progress"):
                yield event([], prompt_progress=script.progress)
            await asyncio.sleep(script.probe_s)
            fusion = fusion_of(script, body)
            strategy = fusion["strategy"]
            if body["fusion"].get("return") == "none":
                fusion = {}
            if script.relay is None:
                yield event(delta({"role": "assistant"}), fusion=fusion)
            else:
                begun = fusion | {"relay": script.relay | {"draft": ""}}
                for word in re.findall(r"\S+\s*", script.relay["draft"]):
                    yield event(delta({}), fusion=begun | {"draft": word})
                    begun = {}
                    await asyncio.sleep(script.pause_s)
                fusion["relay"] = script.relay
            text = script.answers.get(body["messages"][-1]["content"], "An answer.")
            text = text.replace("{strategy}", strategy)
            for letter in script.thought:
                yield event(delta({"reasoning_content": letter}))
            for start in range(0, len(text), script.piece_chars):
                yield event(delta({"content": text[start : start + script.piece_chars]}))
                await asyncio.sleep(script.pause_s)
            if not script.is_broken:
                yield event(delta({}, script.reason))
                usage = {"prompt_tokens": 42, "completion_tokens": len(text) // 4}
                yield event([], usage=usage, fusion=fusion, timings={"tokens_per_second": 22.14})
                yield "data: [DONE]\n\n"
            is_whole = True
        finally:
            script.n_left += not is_whole

    made = Starlette(
        routes=[
            Route("/", show_page),
            Route("/v1/models", models),
            Route("/v1/teach", teach, methods=["POST"]),
            Route("/document", document, methods=["POST"]),
            Route("/v1/chat/completions", answer, methods=["POST"]),
        ],
        exception_handlers={Refusal: refused},
    )

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            script.paths.append(scope["path"])
            given = dict(scope["headers"]).get(b"authorization", b"").decode()
            if script.key and scope["path"] != "/" and given != f"Bearer {script.key}":
                await Refusal(401, "A key is needed.").response("")(scope, receive, send)
                return
        await made(scope, receive, send)

    return guarded  # type: ignore[return-value]


@contextlib.contextmanager
def served(application: Any) -> Iterator[str]:
    """An application at an address of this machine, for as long as the block runs."""
    config = uvicorn.Config(application, log_level="error", lifespan="off", ws="none")
    with running(config) as address:
        yield f"{address}/"
