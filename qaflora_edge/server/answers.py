"""Routes that take a body: chats, texts, weights and tokens."""

import base64
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from qaflora_edge.arrays import F32
from qaflora_edge.ask import Ask, Weighing
from qaflora_edge.dialects import (
    decisions,
    llama_server,
    openai_chat,
    openai_responses,
    openai_text,
)
from qaflora_edge.dialects.extras import Extras, weighing_of, wrong_field
from qaflora_edge.dialects.openai_shapes import Shape, answer_chunks, answer_dict, answer_head
from qaflora_edge.dialects.openai_text import several
from qaflora_edge.dialects.options import wants_thoughts
from qaflora_edge.engine import Engine
from qaflora_edge.errors import CancelledError
from qaflora_edge.inference.generation import Generation
from qaflora_edge.prompt.tokens import checked_tokens
from qaflora_edge.server import bodies
from qaflora_edge.server.receive import read
from qaflora_edge.server.respond import CHUNKS, Computed
from qaflora_edge.server.served_models import ServedModel
from qaflora_edge.weighing.numbers import FusionWeights

_PROSE = {"type": "text"}  # a response_format that asks for nothing
B = TypeVar("B", bound=bodies.Body)
Tell = Callable[[Computed, Iterator[Generation], Extras], None]


# reading what is asked


async def asked(request: Request, kind: type[B]) -> tuple[B, ServedModel]:
    """Read a body; return it with its bundle."""
    body = await read(request, kind)
    served, _ = request.app.state.models.find(body.model)
    return body, served


def weighing(request: Request, body: bodies.Weighed) -> Weighing:
    """Read who is weighed, and how: of the fields `fusion` and `lora`, and the model id."""
    served, strategy = request.app.state.models.find(body.model)
    return weighing_of(bodies.as_mapping(body), strategy, served.weigher.adapters)


def defaults(request: Request, body: bodies.Weighed) -> Ask:
    """Say what holds where a body says nothing."""
    served, _ = request.app.state.models.find(body.model)
    return Ask((), weighing(request, body), served.sampling)


# telling the answer


def note_mix(fusion: FusionWeights, out: Computed, extras: Extras) -> None:
    """Note a mix for the log and the header X-Fusion."""
    out.facts["strategy"] = fusion.strategy
    out.facts["probe_ms"] = fusion.probe_ms
    if fusion.means and extras.returned != "none":
        shown = (f"{name}={mean:.2f}" for name, mean in fusion.means.items())
        out.headers["X-Fusion"] = ",".join(shown)


def extras_of(body: Any, engine: Engine) -> Extras:
    """Say what the answers to a body tell besides."""
    returned = body.fusion.returned if body.fusion else None
    spell = partial(_spelt, engine) if getattr(body, "verbose", False) else None
    effort = getattr(body, "reasoning_effort", None) or getattr(body, "think", None)
    return Extras(returned or "summary", spell, wants_thoughts(effort))


def answered(
    request: Request,
    served: ServedModel,
    body: bodies.Weighed,
    asks: Sequence[Ask],
    tell: Tell,
    head: Mapping[str, Any] | None = None,
    **how: Any,
) -> Computed:
    """Answer what is asked.

    tell  sends the answers
    head  of what says how far the prompt is; None: nothing does
    how   as Computed takes it
    """

    def compute(engine: Engine, out: Computed) -> None:
        extras = extras_of(body, engine)
        watched = [replace(ask, cancel=out.cancel) for ask in asks]
        if head is not None and len(asks) == 1:
            watched = [replace(watched[0], on_progress=_progress(head, out))]
        tell(out, _noted(engine, watched, out, extras), extras)
        out.end()

    return Computed(request, served, body, compute, **how)


def _noted(
    engine: Engine, asks: Sequence[Ask], out: Computed, extras: Extras
) -> Iterator[Generation]:
    """Yield all answers; note the mix of the first, and the tokens of each when it is over.

    Raises CancelledError where the request is ended before the last one begins.
    """
    facts = out.facts
    is_first = True
    for ask in asks:
        n_begun = 0
        for answer in engine.submit_all(ask):
            n_begun += 1
            if is_first:
                note_mix(answer.fusion, out, extras)
                is_first = False
            try:
                yield answer
            finally:
                n_read = answer.n_prompt if n_begun == 1 else 0
                facts["prompt_tokens"] = facts.get("prompt_tokens", 0) + n_read
                for token_s in answer.timings.token_s[:1]:
                    facts.setdefault("first_ms", 1e3 * (token_s - facts["start_s"]))
                facts["completion_tokens"] = facts.get("completion_tokens", 0) + answer.n_completion
        if n_begun < ask.n:
            raise CancelledError("The request was ended before all of its answers began.")


def _progress(head: Mapping[str, Any], out: Computed) -> Callable[[str, int, int], None]:
    """Tell a stream how far its prompt is, as llama-server does."""
    start = time.perf_counter()
    done = set[tuple[str, int]]()

    def tell(stage: str, n_done: int, n_token: int) -> None:
        if (stage, n_done) not in done:
            done.add((stage, n_done))
            ms = round(1e3 * (time.perf_counter() - start), 3)
            progress = {"stage": stage, "total": n_token, "processed": n_done, "time_ms": ms}
            out.send({**head, "choices": [], "prompt_progress": progress})

    return tell


def _spelt(engine: Engine, tokens: Iterable[int]) -> str:
    """Give the text of tokens, with control tokens."""
    with engine.model() as model:
        return model.detokenize(tokens, special=True).decode("utf-8", "replace")


def _in_choices(
    request: Request,
    served: ServedModel,
    body: bodies.Answered,
    asks: Sequence[Ask],
    shape: Shape,
    kind: str,
) -> Computed:
    """Answer in OpenAI's choices: whole, or as chunks where the body has `stream`."""
    head = answer_head(kind, body.model or served.name)
    n = asks[0].n
    has_usage = bool(body.stream_options and body.stream_options.include_usage)

    def tell(out: Computed, answers: Iterator[Generation], extras: Extras) -> None:
        if not out.is_stream:
            out.send(answer_dict(head, answers, shape, n, extras))
            return
        chunks = answer_chunks(head, answers, shape, n, include_usage=has_usage, extras=extras)
        for chunk in chunks:
            out.send(chunk)

    is_told = body.return_progress and body.stream
    progress = head if is_told else None
    return answered(request, served, body, asks, tell, progress, wire=CHUNKS)


# routes


async def chat_completions(request: Request) -> Computed:
    """Answer a conversation."""
    body, served = await asked(request, bodies.ChatBody)
    if body.json_schema is not None:  # llama-server's own
        if body.response_format not in (None, _PROSE):
            raise wrong_field("json_schema", body.json_schema, "nothing next to response_format")
        body.response_format = {"type": "json_object", "schema": body.json_schema}
    ask = openai_chat.ask(bodies.as_mapping(body), defaults(request, body))
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    return _in_choices(request, served, body, [ask], openai_chat.SHAPE, kind)


async def completions(request: Request) -> Computed:
    """Go on with a text."""
    body, served = await asked(request, bodies.TextBody)
    asks = openai_text.asks(bodies.as_mapping(body), defaults(request, body))
    return _in_choices(request, served, body, asks, openai_text.SHAPE, "text_completion")


async def completion(request: Request) -> Computed:
    """Go on with a text, in the shape of llama-server."""
    return await _completed(request, bodies.CompletionBody, llama_server.ask)


async def infill(request: Request) -> Computed:
    """Fill a gap in code, in the shape of llama-server."""
    return await _completed(request, bodies.InfillBody, llama_server.ask_infill)


async def _completed(
    request: Request,
    kind: type[bodies.CompletionBody],
    ask: Callable[[Mapping[str, Any], Ask], Ask],
) -> Computed:
    body, served = await asked(request, kind)
    fields = bodies.as_mapping(body)
    model = body.model or served.name

    def tell(out: Computed, answers: Iterator[Generation], extras: Extras) -> None:
        for answer in answers:
            for event in llama_server.events(fields, model, answer, extras):
                out.send(event)

    return answered(request, served, body, [ask(fields, defaults(request, body))], tell)


async def embeddings(request: Request) -> Computed:
    """Embed texts by the base alone."""
    body, served = await asked(request, bodies.EmbeddingsBody)
    model = body.model or served.name

    def compute(engine: Engine, out: Computed) -> None:
        states = embedded(engine, several(body.input), out)
        data: list[Any] = [state.tolist() for state in states]
        if body.encoding_format == "base64":
            data = [base64.b64encode(state.astype("<f4").tobytes()).decode() for state in states]
        listed = [
            {"object": "embedding", "index": index, "embedding": each}
            for index, each in enumerate(data)
        ]
        n_token = out.facts["prompt_tokens"]
        usage = {"prompt_tokens": n_token, "total_tokens": n_token}
        out.send({"object": "list", "data": listed, "model": model, "usage": usage})

    return Computed(request, served, body, compute)


async def embedding(request: Request) -> Computed:
    """Embed texts, in the shape of llama-server."""
    body, served = await asked(request, bodies.EmbeddingBody)

    def compute(engine: Engine, out: Computed) -> None:
        states = embedded(engine, several(body.content), out)
        listed = [{"index": i, "embedding": [each.tolist()]} for i, each in enumerate(states)]
        out.send(listed)

    return Computed(request, served, body, compute)


def embedded(engine: Engine, texts: Iterable[str | list[int]], out: Computed) -> list[F32]:
    """Embed texts, float32 [n_embd] each, and note how many tokens they have."""
    prompts = [engine.tokenize(text) for text in texts]
    out.facts["prompt_tokens"] = sum(map(len, prompts))
    return [engine.embed(tokens, out.cancel) for tokens in prompts]


async def responses(request: Request) -> Computed:
    """Answer as a response."""
    body, served = await asked(request, bodies.ResponsesBody)
    ask = openai_responses.ask(bodies.as_mapping(body), defaults(request, body))
    head = openai_responses.head_of(body.model or served.name, ask.sampling)

    def tell(out: Computed, answers: Iterator[Generation], extras: Extras) -> None:
        for answer in answers:
            for event in openai_responses.events(head, answer, extras):
                if out.is_stream:
                    out.send(event, event["type"])
            if not out.is_stream:
                out.send(event["response"])

    return answered(request, served, body, [ask], tell)


async def apply_template(request: Request) -> Computed:
    """Show the prompt that a conversation becomes."""
    body, served = await asked(request, bodies.TemplateBody)
    chat = openai_chat.conversation(bodies.as_mapping(body))

    def compute(engine: Engine, out: Computed) -> None:
        out.send({"prompt": _spelt(engine, engine.read(chat).tokens)})

    return Computed(request, served, body, compute, is_light=True)


async def weights(request: Request) -> Computed:
    """Weigh the adapters for a prompt."""
    body, served = await asked(request, bodies.WeightsBody)
    how = weighing(request, body)
    strategy = strategy_of(body, how, served)
    prompt, messages = body.prompt, body.messages
    if (messages is None) == (prompt is None):
        raise wrong_field("prompt", prompt, "either prompt or messages")

    def compute(engine: Engine, out: Computed) -> None:
        fusion = engine.weights(
            messages or prompt,
            strategy=strategy,
            adapters=how.adapters,
            raw=bool(body.raw),
            cancel=out.cancel,
        )
        note_mix(fusion, out, extras_of(body, engine))
        out.facts["prompt_tokens"] = fusion.prompt_tokens
        out.send(fusion.to_dict())

    return Computed(request, served, body, compute)


def strategy_of(body: bodies.Weighed, how: Weighing, served: ServedModel) -> str | None:
    """Return the strategy of a request that takes no weights. Raises OptionError."""
    strategy = how.by_for(served.weigher.known.strategy)
    if strategy is None or isinstance(strategy, str):
        return strategy
    name = "fusion.weights" if body.lora is None else "lora"
    raise wrong_field(name, strategy, "a strategy")


async def systemone(request: Request) -> Computed:
    """Decide typed questions about a state."""
    body, served = await asked(request, bodies.SystemOneBody)
    how = weighing(request, body)
    strategy = strategy_of(body, how, served)
    questions = {
        name: decisions.read_question(name, body.state, question)
        for name, question in body.questions.items()
    }
    model = body.model or served.name

    def compute(engine: Engine, out: Computed) -> None:
        answers: dict[str, Any] = {}
        n_token = 0
        extras = extras_of(body, engine)
        for name, (text, choices) in questions.items():
            decision = engine.decide(
                text, choices, strategy=strategy, adapters=how.adapters, cancel=out.cancel
            )
            n_token += decision.n_prompt
            note_mix(decision.fusion, out, extras)
            answers[name] = decisions.answer(body.questions[name], decision)
            answers[name] |= extras.mix(decision.fusion)
        out.facts["prompt_tokens"] = n_token
        usage = {"input_tokens": n_token, "output_tokens": 0}
        head = {"id": f"req_{uuid.uuid4().hex}", "model": model}
        out.send({**head, "answers": answers, "usage": usage})

    return Computed(request, served, body, compute)


async def tokenize(request: Request) -> Computed:
    """Turn a text into token ids."""
    body, served = await asked(request, bodies.TokenizeBody)
    is_special = bool(body.add_special)
    is_parsed = body.parse_special is not False

    def compute(engine: Engine, out: Computed) -> None:
        with engine.model() as model:
            tokens = model.tokenize(body.content, add_special=is_special, parse_special=is_parsed)
        out.send({"tokens": tokens})

    return Computed(request, served, body, compute, is_light=True)


async def detokenize(request: Request) -> Computed:
    """Turn token ids into text; control tokens are spelt out."""
    body, served = await asked(request, bodies.DetokenizeBody)

    def compute(engine: Engine, out: Computed) -> None:
        text = ""
        if body.tokens:
            with engine.model() as model:
                tokens = checked_tokens(model, body.tokens, bodies.MAX_TOKENS)
                text = _spelt(engine, tokens)
        out.send({"content": text})

    return Computed(request, served, body, compute, is_light=True)
