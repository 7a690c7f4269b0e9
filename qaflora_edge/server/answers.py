"""Routes that take a body and are no dialect's: weights, teaching, embeddings and tokens."""

import base64
from collections.abc import Callable, Iterable
from typing import Any

from starlette.requests import Request

from qaflora_edge.arrays import F32
from qaflora_edge.dialects import anthropic
from qaflora_edge.dialects.texts import several
from qaflora_edge.engine import Engine
from qaflora_edge.errors import CancelledError, wrong_field
from qaflora_edge.prompt.tokens import check_size, checked_tokens
from qaflora_edge.server import bodies
from qaflora_edge.server.receive import Call, read_call
from qaflora_edge.server.refusals import Refusal
from qaflora_edge.server.respond import Computed, extras_of, note_mix

N_AT_ONCE = 4096  # tokens that are written before a client may have gone


async def count_tokens(request: Request) -> Computed:
    """Count the tokens of a message's prompt, in the shape of Anthropic."""
    call = await read_call(request, anthropic.TokensBody)
    chat = anthropic.conversation(call.body)

    def compute(engine: Engine, out: Computed) -> None:
        prompt = engine.read(chat)
        out.send({"input_tokens": len(prompt.tokens)})

    return Computed(call, compute, is_light=True)


async def embeddings(request: Request) -> Computed:
    """Embed texts by the base alone."""
    call = await read_call(request, bodies.EmbeddingsBody)

    def written(states: list[F32], n_token: int) -> Any:
        listed = []
        for index, state in enumerate(states):
            embedding: Any = state.tolist()
            if call.body.encoding_format == "base64":
                data = state.astype("<f4").tobytes()
                embedding = base64.b64encode(data).decode()
            listed.append({"object": "embedding", "index": index, "embedding": embedding})
        usage = {"prompt_tokens": n_token, "total_tokens": n_token}
        return {"object": "list", "data": listed, "model": call.model, "usage": usage}

    return embedded(call, several("input", call.body.input, bodies.MAX_EMBEDDED), written)


def embedded(
    call: Call[Any], texts: Iterable[str | list[int]], written: Callable[[list[F32], int], Any]
) -> Computed:
    """Answer with embeddings of texts.

    written  makes the answer of float32 [n_embd] of each text, and the tokens of all
    """

    def compute(engine: Engine, out: Computed) -> None:
        prompts = [engine.tokenize(text) for text in texts]
        n_token = sum(map(len, prompts))
        out.facts["prompt_tokens"] = n_token
        states = [engine.embed(tokens, out.cancel) for tokens in prompts]
        out.send(written(states, n_token))

    return Computed(call, compute)


async def weights(request: Request) -> Computed:
    """Weigh the adapters for a prompt."""
    call = await read_call(request, bodies.WeightsBody)
    body = call.body
    adapters = call.defaults.weighing.adapters
    strategy = _strategy_of(call)
    if (body.messages is None) == (body.prompt is None):
        raise wrong_field("prompt", body.prompt, "either prompt or messages")

    def compute(engine: Engine, out: Computed) -> None:
        prompt = body.messages or body.prompt
        fusion = engine.weights(
            prompt, strategy=strategy, adapters=adapters, raw=bool(body.raw), cancel=out.cancel
        )
        note_mix(fusion, out, extras_of(call))
        out.facts["prompt_tokens"] = fusion.prompt_tokens
        out.send(fusion.to_dict())

    return Computed(call, compute)


async def teach(request: Request) -> Computed:
    """Teach whose question one is, from the next question on; or undo that."""
    if not request.app.state.options.takes_teaching:
        message = (
            "This server takes no teaching, for others reach it; `qaflora serve --teach` with an "
            "API key allows it."
        )
        raise Refusal(403, message, code="teaching_not_allowed")
    call = await read_call(request, bodies.TeachBody)
    body = call.body
    if bool(body.undo) == (body.messages is not None):
        raise wrong_field("messages", body.messages, "either messages and adapter, or undo")
    if (body.messages is None) != (body.adapter is None):
        raise wrong_field("adapter", body.adapter, "a name beside messages, and none beside undo")

    def compute(engine: Engine, out: Computed) -> None:
        if body.messages is not None and body.adapter is not None:
            n_taught = engine.teach(body.messages, body.adapter)
            out.send({"adapter": body.adapter, "taught": n_taught})
            return
        undone = engine.unteach()
        if undone is None:
            raise Refusal(400, "There is nothing to undo.", param="undo", code="nothing_taught")
        out.send({"adapter": undone, "undone": True})

    return Computed(call, compute)


def _strategy_of(call: Call[Any]) -> str | None:
    strategy = call.served.weigher.by_of(call.defaults.weighing)
    if strategy is None or isinstance(strategy, str):
        return strategy
    name = "lora"
    if call.body.lora is None:
        name = "fusion.weights"
    raise wrong_field(name, strategy, "a strategy")


async def tokenize(request: Request) -> Computed:
    """Turn a text into token ids."""
    call = await read_call(request, bodies.TokenizeBody)
    body = call.body
    is_parsed = body.parse_special is not False

    def compute(engine: Engine, out: Computed) -> None:
        with engine.model() as model:
            check_size(model, [body.content], engine.n_ctx)
            tokens = model.tokenize(
                body.content,
                add_special=bool(body.add_special),
                parse_special=is_parsed,
                n_most=engine.n_ctx,
                cancel=out.cancel,
            )
            if tokens:
                checked_tokens(model, tokens, engine.n_ctx)
        out.send({"tokens": tokens})

    return Computed(call, compute, is_light=True)


async def detokenize(request: Request) -> Computed:
    """Turn token ids into text; control tokens are spelt out."""
    call = await read_call(request, bodies.DetokenizeBody)
    tokens = call.body.tokens

    def compute(engine: Engine, out: Computed) -> None:
        text = ""
        if tokens:
            with engine.model() as model:
                checked_tokens(model, tokens, bodies.MAX_TOKENS)
                data = bytearray()
                for start in range(0, len(tokens), N_AT_ONCE):
                    if out.cancel.is_set():
                        raise CancelledError("The tokens were not written to their end.")
                    part = tokens[start : start + N_AT_ONCE]
                    data += model.detokenize(part, special=True)
            text = data.decode("utf-8", "replace")
        out.send({"content": text})

    return Computed(call, compute, is_light=True)
