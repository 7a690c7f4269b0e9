"""What Ollama's API tells of models, and its embeddings: for programs that look for it on 11434."""

import hashlib
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qaflora_edge.arrays import F32
from qaflora_edge.dialects.ollama import written_time
from qaflora_edge.dialects.texts import several
from qaflora_edge.engine import Engine
from qaflora_edge.prompt.calls import call_format
from qaflora_edge.prompt.infill import infill_marks
from qaflora_edge.prompt.tokens import thought_tags
from qaflora_edge.server import bodies
from qaflora_edge.server.answers import embedded
from qaflora_edge.server.receive import Call, read, read_call
from qaflora_edge.server.respond import Computed
from qaflora_edge.server.served_models import ServedModel, models_of

VERSION = "0.12.6"  # of the Ollama whose API this follows: some clients refuse older ones


async def version(request: Request) -> Response:
    """Name the version of Ollama whose API this follows."""
    return JSONResponse({"version": VERSION})


async def tags(request: Request) -> Response:
    """List the models as Ollama does."""
    served = models_of(request)
    cards = []
    for name in served.listed:
        model, _ = served.find(name)
        cards.append(_card(model, name))
    return JSONResponse({"models": cards})


async def ps(request: Request) -> Response:
    """List the models that are loaded, as Ollama does."""
    served = models_of(request)
    loaded = []
    for name, model in served.by_name.items():
        if model.engine:
            loaded.append(_card(model, name))
    return JSONResponse({"models": loaded})


def _card(model: ServedModel, name: str) -> dict[str, Any]:
    if ":" not in name:
        name = f"{name}:latest"  # some clients add it where they miss it
    facts = json.dumps([name, model.sha256, model.n_byte], sort_keys=True)
    return {
        "name": name,
        "model": name,
        "modified_at": written_time(model.created_s),
        "size": model.n_byte,
        "digest": hashlib.sha256(facts.encode()).hexdigest(),
        "details": {
            "format": "gguf",
            "family": model.family,
            "families": [model.family],
            "parent_model": "",
            "parameter_size": "",
            "quantization_level": "",
        },
    }


async def show(request: Request) -> Computed:
    """Say what a model can do, as Ollama does."""
    body = await read(request, bodies.ShowBody)
    served, _ = models_of(request).find(body.model or body.name)

    def compute(engine: Engine, out: Computed) -> None:
        template = engine.chat_template
        family = served.family
        with engine.model() as model:
            can = {
                "completion": True,
                "tools": call_format(template),
                "thinking": thought_tags(template),
                "insert": infill_marks(model),
            }
            info = {
                "general.architecture": family,
                "general.parameter_count": model.n_param,
                f"{family}.context_length": engine.n_ctx,
                f"{family}.embedding_length": model.n_embd,
            }
        card = _card(served, served.name)
        shown = {
            "template": template or "",
            "model_info": info,
            "capabilities": [name for name, is_able in can.items() if is_able],
            "details": card["details"],
            "modified_at": card["modified_at"],
        }
        out.send(shown)

    return Computed(Call(request, body, served), compute, is_light=True)


async def embed(request: Request) -> Computed:
    """Embed texts, in the shape of Ollama."""
    call = await read_call(request, bodies.EmbedBody)

    def written(states: list[F32], n_token: int) -> Any:
        listed = [state.tolist() for state in states]
        return {"model": call.body.model, "embeddings": listed, "prompt_eval_count": n_token}

    return embedded(call, several("input", call.body.input, bodies.MAX_EMBEDDED), written)
