"""The application: routes, and the checks before them."""

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
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

from qaflora_edge import __version__
from qaflora_edge.dialects import anthropic, openai_chat, openai_responses, texts
from qaflora_edge.dialects import ollama as ollama_dialect
from qaflora_edge.dialects.dialect import Dialect, registered
from qaflora_edge.errors import QafloraError
from qaflora_edge.server import answers, bodies, ollama, uploads
from qaflora_edge.server.bodies import Operation
from qaflora_edge.server.metrics import Metrics, Recorder
from qaflora_edge.server.page import page
from qaflora_edge.server.receive import MAX_HELD_BYTES, MAX_LARGE_BODIES, BodyRoom, Places
from qaflora_edge.server.refusals import Refusal, refusal
from qaflora_edge.server.respond import State, speaking
from qaflora_edge.server.security import Gate, Lock
from qaflora_edge.server.served_models import (
    N_LIGHT,
    ServedModels,
    ServerOptions,
    models_of,
)

log = logging.getLogger(__name__)
# Starlette sends what is raised as Exception to its outermost layer, which raises it again.
REFUSED = (Refusal, QafloraError, Exception)
NOT_HERE = ("/v1/images/{rest:path}", "/v1/audio/{rest:path}")


def make_app(places: Iterable[Path], options: ServerOptions) -> Starlette:
    """Return the server of some bundles, or bases alone. It opens the first one as it starts."""
    models = ServedModels(places, options)
    # All that have a slot, an Engine that opens, one that closes, one that changes, and bodies.
    n_slot = len(models.by_name) * options.n_slot + N_LIGHT
    n_sent = MAX_LARGE_BODIES + uploads.N_DOCUMENTS + uploads.N_FETCHES
    n_thread = n_slot + 3 + n_sent

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        threads = ThreadPoolExecutor(n_thread, thread_name_prefix="qaflora")
        asyncio.get_running_loop().set_default_executor(threads)
        app.state.opening = asyncio.create_task(_open_first(app))
        try:
            with contextlib.suppress(asyncio.CancelledError):  # by a second signal
                yield
        finally:
            for work in list(app.state.running):
                work.stop()
            await asyncio.gather(app.state.opening, return_exceptions=True)
            await models.close()
            for place in app.state.uploads.values():
                shutil.rmtree(place, ignore_errors=True)

    metrics = Metrics()
    handlers: dict[Any, Any] = dict.fromkeys(REFUSED, _refused)
    handlers[HTTPException] = _http_error
    app = Starlette(
        routes=_routes(),
        middleware=_middleware(options, metrics),
        exception_handlers=handlers,
        lifespan=lifespan,
    )
    app.state.options = options
    app.state.models = models
    app.state.metrics = metrics
    app.state.running = set()
    app.state.uploads = {}
    app.state.progress = {}
    app.state.upload_place = Places(1)
    app.state.document_places = Places(uploads.N_DOCUMENTS)
    app.state.fetch_places = Places(uploads.N_FETCHES)
    if options.adapters is not None:
        uploads.remove_old_uploads(options.adapters)
    app.state.changing = asyncio.Lock()
    app.state.body_room = BodyRoom(MAX_HELD_BYTES)
    app.state.large_bodies = asyncio.Semaphore(MAX_LARGE_BODIES)
    app.state.on_ready = lambda: None
    return app


def expire_all(app: Any) -> None:
    """Cut all answers as if their time was over."""
    for work in list(app.state.running):
        work.stop(State.EXPIRED)


def _middleware(options: ServerOptions, metrics: Metrics) -> list[Middleware]:
    cors = Middleware(
        CORSMiddleware,
        allow_origins=options.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["X-Fusion", "Retry-After"],
    )
    gate = Middleware(Gate, hosts=options.hosts, origins=options.cors_origins)
    layers = [Middleware(Recorder, metrics=metrics), gate, cors]
    if options.api_key is not None:
        layers.append(Middleware(Lock, key=options.api_key))
    return layers


async def _open_first(app: Starlette) -> None:
    models: ServedModels = app.state.models
    first = next(iter(models.by_name.values()))
    with contextlib.suppress(Refusal):  # the log and GET /v1/models say so
        async with models.engine(first):
            pass
    app.state.on_ready()


async def show_page(request: Request) -> Response:
    body, headers = page()
    return Response(body, media_type="text/html; charset=utf-8", headers=headers)


async def health(request: Request) -> Response:
    """Tell whether the server can answer anything."""
    state = request.app.state
    if not state.opening.done():
        return JSONResponse({"status": "loading"}, 503)
    models = state.models.by_name.values()
    if all(model.is_lost for model in models):
        return JSONResponse({"status": "error"}, 503)
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    """Show counters for Prometheus."""
    state = request.app.state
    gauges: Metrics = state.metrics
    n_waiting = state.models.queue.waiting.total()
    gauges.waiting.set(n_waiting)
    gauges.running.set(len(state.running) - n_waiting)
    loaded = [model for model in state.models.by_name.values() if model.engine]
    gauges.loaded.set(len(loaded))
    text = generate_latest(gauges.registry)
    return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)


async def openapi(request: Request) -> Response:
    """Describe the API in OpenAPI."""
    return JSONResponse(bodies.describe(_operations()))


async def models(request: Request) -> Response:
    """List the models."""
    served = models_of(request)
    cards = [served.card(name) for name in served.listed]
    return JSONResponse({"object": "list", "data": cards})


async def model(request: Request) -> Response:
    """Describe a model."""
    name = request.path_params["model"]
    card = models_of(request).card(name)
    return JSONResponse(card)


async def lora_adapters(request: Request) -> Response:
    """List adapters as llama-server does: the field `lora` names them by `id`."""
    served, _ = models_of(request).find(request.query_params.get("model"))
    listed = []
    for index, name in enumerate(served.weigher.adapters):
        listed.append({"id": index, "path": name, "scale": 0.0})
    return JSONResponse(listed)


async def props(request: Request) -> Response:
    """Tell the properties of a model as llama-server does."""
    state = request.app.state
    model, _ = state.models.find(request.query_params.get("model"))
    n_ctx = state.models.card(model.name)["meta"]["n_ctx"]
    sampling = {}
    for name, value in vars(model.sampling).items():
        if value is not None:
            sampling[name] = value
    template = None
    if model.engine:
        template = model.engine.chat_template
    properties = {
        "default_generation_settings": {"n_ctx": n_ctx, "params": sampling},
        "total_slots": int(state.options.engine.get("n_parallel", 1)),
        "model_alias": model.name,
        "chat_template": template or "",
        "modalities": {"vision": False, "audio": False},
        "build_info": f"qaflora-edge {__version__}",
    }
    return JSONResponse(properties)


async def not_here(request: Request) -> Response:
    """Refuse what OpenAI offers and a bundle cannot do."""
    message = f"{request.url.path:.100} is not offered here: a bundle reads and writes text."
    return Refusal(501, message, code="not_implemented").response(request.url.path)


async def _refused(request: Request, error: Exception) -> Response:
    refused = refusal(error)
    if refused.status == 500 and isinstance(error, QafloraError):
        log.error("a request failed", exc_info=error)
    return refused.response(request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = f"{request.method:.20} {request.url.path:.100}"
    message = f"{path}: {error.detail}; GET /openapi.json lists what there is."
    code = "not_found"
    if error.status_code == 405:
        code = "method_not_allowed"
    response = Refusal(error.status_code, message, code=code).response(request.url.path)
    response.headers.update(error.headers or {})
    return response


DIALECTS: tuple[Dialect, ...] = (
    openai_chat.CHAT,
    texts.COMPLETIONS,
    openai_responses.RESPONSES,
    anthropic.MESSAGES,
    texts.COMPLETION,
    texts.INFILL,
    ollama_dialect.CHAT,
    ollama_dialect.GENERATE,
)
OTHERS = (
    Operation("/v1/messages/count_tokens", answers.count_tokens, anthropic.TokensBody),
    Operation("/v1/weights", answers.weights, bodies.WeightsBody),
    Operation("/v1/teach", answers.teach, bodies.TeachBody),
    Operation("/v1/embeddings", answers.embeddings, bodies.EmbeddingsBody),
    Operation("/api/show", ollama.show, bodies.ShowBody),
    Operation("/api/embed", ollama.embed, bodies.EmbedBody),
    Operation("/api/tags", ollama.tags),
    Operation("/api/ps", ollama.ps),
    Operation("/api/version", ollama.version),
    Operation("/tokenize", answers.tokenize, bodies.TokenizeBody),
    Operation("/detokenize", answers.detokenize, bodies.DetokenizeBody),
    Operation("/v1/load_lora_adapter", uploads.load, bodies.AdapterBody, str),
    Operation("/v1/unload_lora_adapter", uploads.unload, bodies.AdapterBody, str),
    Operation("/v1/models", models),
    Operation("/v1/models/{model:path}", model, parameters=("model",)),
    Operation("/lora-adapters", lora_adapters, answer=list, parameters=("model",)),
    Operation("/props", props, parameters=("model",)),
    Operation("/health", health),
    Operation("/metrics", metrics, answer=str),
    Operation("/openapi.json", openapi),
)


def _operations() -> list[Operation]:
    """List what is offered; a program's own dialects replace others of their paths."""
    dialects = {dialect.path: dialect for dialect in DIALECTS} | registered
    operations = []
    for dialect in dialects.values():
        media = dialect.wire.media.partition(";")[0]
        route = speaking(dialect)
        operation = Operation(dialect.path, route, dialect.body, stream_media=media)
        operations.append(operation)
    return [*operations, *OTHERS]


# Other paths that clients try -> those that answer.
ALIASES = {
    "/models": "/v1/models",
    "/v1/health": "/health",
    "/chat/completions": "/v1/chat/completions",
    "/completions": "/v1/completions",
    "/embeddings": "/v1/embeddings",
}


def _routes() -> list[Route]:
    routes = [
        Route("/", show_page, methods=["GET"], include_in_schema=False),
        Route("/upload", uploads.upload, methods=["POST"], include_in_schema=False),
        Route("/progress", uploads.progress, methods=["GET"], include_in_schema=False),
        Route("/document", uploads.document, methods=["POST"], include_in_schema=False),
    ]
    operations = {operation.path: operation for operation in _operations()}
    for path, operation in operations.items():
        routes.append(Route(path, operation.route, methods=[operation.method]))
    for alias, path in ALIASES.items():
        operation = operations[path]
        methods = [operation.method]
        routes.append(Route(alias, operation.route, methods=methods, include_in_schema=False))
    for path in NOT_HERE:
        routes.append(Route(path, not_here, methods=["GET", "POST"]))
    return routes
