"""The application: routes, and what stands before them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from qaflora_edge.errors import QafloraError
from qaflora_edge.server.answers import chat_completions, completions, responses
from qaflora_edge.server.openapi import describe
from qaflora_edge.server.options import ServerOptions
from qaflora_edge.server.page.content import page
from qaflora_edge.server.post import Post
from qaflora_edge.server.record import Metrics, Recorder
from qaflora_edge.server.refusals import Refusal, refusal
from qaflora_edge.server.security import Gate, Lock
from qaflora_edge.server.shelf import Shelf
from qaflora_edge.server.tokens import detokenize, tokenize, weights
from qaflora_edge.server.work import refused_response

NOT_HERE = ("/v1/embeddings", "/v1/images/{rest:path}", "/v1/audio/{rest:path}")


def make_app(places: Iterable[Path], options: ServerOptions) -> Starlette:
    """The server for some bundles, or bases alone; the first is opened as it starts.

    Raises BundleError for a bundle that cannot be read.
    """
    places = list(places)
    n_thread = len(places) * options.n_turn + 2  # all who have a turn, and opening and closing
    threads = ThreadPoolExecutor(n_thread, thread_name_prefix="qaflora")

    async def in_thread(function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        call = partial(function, *args, **keywords)
        return await asyncio.get_running_loop().run_in_executor(threads, call)

    record = Metrics()
    shelf = Shelf(places, options, in_thread)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.post = Post(asyncio.get_running_loop())
        opening = asyncio.create_task(_open_first(app))
        try:
            with contextlib.suppress(asyncio.CancelledError):  # by a second signal
                yield
        finally:
            for work in list(app.state.running):
                work.stop()
            await asyncio.gather(opening, return_exceptions=True)
            await shelf.close()
            threads.shutdown()

    app = Starlette(
        routes=_routes(),
        middleware=[
            Middleware(Recorder, metrics=record),
            Middleware(Gate, options=options),
            *_cors(options),
            *([Middleware(Lock, key=options.api_key)] if options.api_key is not None else []),
        ],
        exception_handlers={
            Refusal: _refused,
            QafloraError: _refused,
            HTTPException: _http_error,
            Exception: _refused,
        },
        lifespan=lifespan,
    )
    app.state.options, app.state.shelf, app.state.in_thread = options, shelf, in_thread
    app.state.metrics, app.state.running, app.state.is_opening = record, set(), False
    return app


def expire_all(app: Any) -> None:
    """Cut all answers, as if their time were over."""
    for work in list(app.state.running):
        work.expire()


def _routes() -> list[Route]:
    return [
        Route("/", show_page, methods=["GET"], include_in_schema=False),
        Route("/health", health, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{model:path}", model, methods=["GET"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/weights", weights, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        *(Route(path, not_here, methods=["GET", "POST"]) for path in NOT_HERE),
    ]


def _cors(options: ServerOptions) -> list[Middleware]:
    if not options.cors_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Fusion", "Retry-After"],
        )
    ]


async def _open_first(app: Starlette) -> None:
    shelf: Shelf = app.state.shelf
    app.state.is_opening = True
    try:
        with contextlib.suppress(Refusal):  # the log and GET /v1/models say so
            async with shelf.engine(next(iter(shelf.bundles.values()))):
                pass
    finally:
        app.state.is_opening = False


async def show_page(request: Request) -> Response:
    """GET /: the page, which is no part of the API."""
    found = page()
    return Response(found.body, media_type="text/html; charset=utf-8", headers=found.headers)


async def health(request: Request) -> Response:
    """GET /health: whether the server can answer anything."""
    state = request.app.state
    is_lost = all(bundle.has_failed for bundle in state.shelf.bundles.values())
    status = "loading" if state.is_opening else "error" if is_lost else "ok"
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


async def metrics(request: Request) -> Response:
    """GET /metrics"""
    state = request.app.state
    record: Metrics = state.metrics
    waiting = state.shelf.room.n_waiting
    record.waiting.set(waiting)
    record.running.set(len(state.running) - waiting)
    engines = [each.engine for each in state.shelf.bundles.values() if each.engine is not None]
    record.loaded.set(len(engines))
    record.prefix_cache.set(sum(engine.prefix_cache_bytes for engine in engines))
    return Response(generate_latest(record.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


async def openapi(request: Request) -> Response:
    """GET /openapi.json"""
    shelf: Shelf = request.app.state.shelf
    return JSONResponse(describe(each["id"] for each in shelf.listed()))


async def models(request: Request) -> Response:
    """GET /v1/models"""
    return JSONResponse({"object": "list", "data": request.app.state.shelf.listed()})


async def model(request: Request) -> Response:
    """GET /v1/models/{model}"""
    shelf: Shelf = request.app.state.shelf
    name = request.path_params["model"]
    return JSONResponse(shelf.whole_card(shelf.find(name)[0], name))


async def not_here(request: Request) -> Response:
    """What OpenAI has and a bundle has not."""
    message = f"{request.url.path:.100} is not offered here: a bundle reads and writes text."
    return refused_response(Refusal(501, message, code="not_implemented"))


async def _refused(request: Request, error: Exception) -> Response:
    return refused_response(refusal(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = f"{request.method:.20} {request.url.path:.100}"
    message = f"{path}: {error.detail}; GET /openapi.json lists what there is."
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    found = refused_response(Refusal(error.status_code, message, code=code))
    found.headers.update(error.headers or {})
    return found
