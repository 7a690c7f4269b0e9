"""Ollama's API, as far as it asks models: for programs that look for it on port 11434."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qaflora_edge.engine import Engine
from qaflora_edge.errors import ModalityError
from qaflora_edge.inference.generation import Generation
from qaflora_edge.openai.chat import begin_chat, chat_shape, response_schema
from qaflora_edge.openai.infill import infill_marks, infill_tokens
from qaflora_edge.openai.options import thinking
from qaflora_edge.openai.tools import Tools
from qaflora_edge.prompt.calls import call_format
from qaflora_edge.prompt.tokens import thought_tags
from qaflora_edge.server import requests as bodies
from qaflora_edge.server.answers import Sender, asked, embedded, options_of
from qaflora_edge.server.requests import Refusal
from qaflora_edge.server.served_models import ServedModel, ServedModels
from qaflora_edge.server.stream import Computed, encoded

VERSION = "0.12.6"  # of the Ollama whose API this follows: some clients refuse older ones
_NO_IMAGES = "{} has images, expected text alone: a bundle reads no images. Leave them out."
Begun = tuple[Iterator[Generation], Tools | None]


class Lines(Computed):
    """Answer a request in Ollama's shape: a stream is lines of JSON, without comments."""

    media, ping = "application/x-ndjson", b""

    def framed(self, value: Any) -> bytes:
        """Encode a part of the answer as a line."""
        return encoded(value) + b"\n"

    def _refusal(self, error: BaseException) -> Refusal:
        refused = super()._refusal(error)
        refused.body = {"error": str(refused)}
        return refused


async def version(request: Request) -> Response:
    """Name the version of Ollama whose API this follows."""
    return JSONResponse({"version": VERSION})


async def tags(request: Request) -> Response:
    """List the models as Ollama does."""
    served: ServedModels = request.app.state.models
    cards = [_card(served.find(name)[0], name) for name in served.listed]
    return JSONResponse({"models": cards})


async def ps(request: Request) -> Response:
    """List the models that are loaded, as Ollama does."""
    served: ServedModels = request.app.state.models
    loaded = [_card(each, name) for name, each in served.by_name.items() if each.engine]
    return JSONResponse({"models": loaded})


def _card(model: ServedModel, name: str) -> dict[str, Any]:
    name = name if ":" in name else f"{name}:latest"  # some clients add it where they miss it
    facts = json.dumps([name, model.sha256, model.n_byte], sort_keys=True)
    nothing = dict.fromkeys(("parent_model", "parameter_size", "quantization_level"), "")
    kind = {"format": "gguf", "family": model.family, "families": [model.family]}
    return {
        "name": name,
        "model": name,
        "modified_at": _told(model.created_s),
        "size": model.n_byte,
        "digest": hashlib.sha256(facts.encode()).hexdigest(),
        "details": nothing | kind,
    }


def _told(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat().replace("+00:00", "Z")


async def show(request: Request) -> Computed:
    """Say what a model can do, as Ollama does."""
    body = await bodies.read(request, bodies.ShowBody)
    served, _ = request.app.state.models.find(body.model or body.name)

    def compute(engine: Engine, out: Computed) -> None:
        model, family = engine._model, served.family
        can = {
            "completion": True,
            "tools": call_format(model.chat_template),
            "thinking": thought_tags(model.chat_template),
            "insert": infill_marks(engine),
        }
        info = {
            "general.architecture": family,
            "general.parameter_count": model._lib.llama_model_n_params(model._pointer),
            f"{family}.context_length": engine.n_ctx,
            f"{family}.embedding_length": model.n_embd,
        }
        card = _card(served, served.name)
        found: dict[str, Any] = {"template": model.chat_template or "", "model_info": info}
        found |= {"capabilities": [name for name, has in can.items() if has]}
        out.send(encoded({**found, **{key: card[key] for key in ("details", "modified_at")}}))

    return Lines(request, served, body, compute, is_light=True)


async def chat(request: Request) -> Computed | Response:
    """Answer a conversation, in the shape of Ollama."""
    body, served, weighing = await asked(request, bodies.OllamaChatBody)
    options = {**weighing, **_options(served, body), "tools": body.tools}
    messages = _messages(body.messages)

    def begin(engine: Engine, more: dict[str, Any]) -> Begun:
        return begin_chat(engine, messages, **options, **more)

    def fields(part: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"role": "assistant", "content": part.get("content") or ""}
        found |= _thought(part)
        if calls := part.get("tool_calls"):
            found["tool_calls"] = [_call(i, call) for i, call in enumerate(calls)]
        return {"message": found}

    return _answered(request, served, body, begin if messages else None, fields)


async def generate(request: Request) -> Computed | Response:
    """Answer a text, or go on with it, in the shape of Ollama."""
    body, served, weighing = await asked(request, bodies.OllamaTextBody)
    if body.images:
        raise ModalityError(_NO_IMAGES.format("The request"))
    options = {**weighing, **_options(served, body)}
    system = [{"role": "system", "content": body.system}] if body.system else []
    messages = [*system, {"role": "user", "content": body.prompt}]

    def begin(engine: Engine, more: dict[str, Any]) -> Begun:
        if not (body.raw or body.suffix) and engine.has_chat_template:
            return begin_chat(engine, messages, **options, **more)
        options["json_schema"] = response_schema(options.pop("response_format"))
        del options["chat_template_kwargs"]
        prompt: Any = body.prompt
        if body.suffix:
            n_answer = options.get("max_tokens", 0)
            prompt = infill_tokens(engine, prompt, body.suffix, n_answer=n_answer)
        return engine.answers(prompt, 1, parse_special=True, **options, **more), None

    def fields(part: Mapping[str, Any]) -> dict[str, Any]:
        return {"response": part.get("content") or "", **_thought(part)}

    has_prompt = body.prompt or body.suffix
    return _answered(request, served, body, begin if has_prompt else None, fields)


def _options(served: ServedModel, body: bodies.OllamaBody) -> dict[str, Any]:
    form: dict[str, Any] | None = None
    if body.format:
        schema = {} if body.format == "json" else {"schema": body.format}
        form = {"type": "json_object", **schema}
    kwargs = None if body.think is None else thinking(body.think)
    options = options_of(served, body)
    return {**options, "response_format": form, "chat_template_kwargs": kwargs}


def _messages(given: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as OpenAI has them; calls get ids, which some templates ask for."""
    messages: list[dict[str, Any]] = []
    ids: list[str] = []  # of calls that no message has answered
    for n, each in enumerate(given):
        message = {"content": "", **each}
        if message.pop("images", None):
            raise ModalityError(_NO_IMAGES.format(f"Message {n}"))
        for theirs, ours in (("thinking", "reasoning_content"), ("tool_name", "name")):
            if theirs in message:
                message[ours] = message.pop(theirs)
        calls = message.get("tool_calls")
        if isinstance(calls, list) and all(isinstance(call, dict) for call in calls):
            calls = [{"id": f"{n:06d}{i:03d}", **call} for i, call in enumerate(calls)]
            message["tool_calls"], ids = calls, [call["id"] for call in calls]
        if message.get("role") == "tool" and ids:
            message.setdefault("tool_call_id", ids.pop(0))
        messages.append(message)
    return messages


def _thought(part: Mapping[str, Any]) -> dict[str, Any]:
    thought = part.get("reasoning_content")
    return {"thinking": thought} if thought else {}


def _call(index: int, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call as Ollama has it, with its arguments as an object."""
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        arguments = None
    named = {"index": index, "name": function["name"]}
    arguments = arguments if isinstance(arguments, dict) else {}
    return {"id": call["id"], "function": {**named, "arguments": arguments}}


async def embed(request: Request) -> Computed:
    """Embed texts, in the shape of Ollama."""
    body, served, _ = await asked(request, bodies.EmbedBody)
    texts = [body.input] if isinstance(body.input, str) else body.input

    def compute(engine: Engine, out: Computed) -> None:
        states = [state.tolist() for state in embedded(engine, texts, out)]
        n_token = out.facts["prompt_tokens"]
        out.send(
            out.framed({"model": body.model, "embeddings": states, "prompt_eval_count": n_token})
        )

    return Lines(request, served, body, compute)


async def embeddings(request: Request) -> Computed:
    """Embed a text, in the older shape of Ollama."""
    body, served, _ = await asked(request, bodies.OldEmbedBody)

    def compute(engine: Engine, out: Computed) -> None:
        states = embedded(engine, [body.prompt], out) if body.prompt else []
        out.send(out.framed({"embedding": states[0].tolist() if states else []}))

    return Lines(request, served, body, compute)


def _answered(
    request: Request,
    served: ServedModel,
    body: bodies.OllamaBody,
    begin: Callable[[Engine, dict[str, Any]], Begun] | None,
    fields: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> Computed | Response:
    """Answer once; without a prompt the model is only loaded.

    fields  return a part of a message in Ollama's shape
    """
    head = {"model": body.model, "created_at": _told(time.time())}
    if begin is None and body.keep_alive in (0, "0", "0s"):
        request.app.state.models.close_idle(served)
        return JSONResponse({**head, **fields({}), "done": True, "done_reason": "unload"})

    def compute(engine: Engine, out: Computed) -> None:
        if begin is None:
            out.send(out.framed({**head, **fields({}), "done": True, "done_reason": "load"}))
            return
        answers, tools = begin(engine, {"cancel": out.cancel})
        sender, shape = Sender(engine, answers, out), chat_shape(tools)
        for answer in sender.answers:
            message: Mapping[str, Any] = {}
            if body.stream:
                for choice in shape.choices(answer):
                    if part := {k: v for k, v in choice["delta"].items() if k != "role"}:
                        out.send(out.framed({**head, **fields(part), "done": False}))
            else:
                message = shape.choice(answer)["message"]
            reason = "stop" if answer.finish_reason == "stop" else "length"
            end = {"done": True, "done_reason": reason, **_counts(answer, out.facts)}
            sender.send_whole({**head, **fields(message), **end})

    return Lines(request, served, body, compute, is_light=begin is None)


def _counts(answer: Generation, facts: Mapping[str, Any]) -> dict[str, int]:
    """Count tokens and nanoseconds as Ollama does."""
    times = answer.timings.to_dict()
    return {
        "total_duration": int(1e9 * (time.perf_counter() - facts["start_s"])),
        "load_duration": int(1e6 * facts["wait_ms"]),
        "prompt_eval_count": answer.n_prompt,
        "prompt_eval_duration": int(1e6 * (times["probe_ms"] + times["prefill_ms"])),
        "eval_count": answer.n_completion,
        "eval_duration": int(1e6 * times["decode_ms"]),
    }
