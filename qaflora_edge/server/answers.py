"""Routes that take a body: chats, texts, weights and tokens."""

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from qaflora_edge.config import in_group
from qaflora_edge.engine import Engine
from qaflora_edge.errors import CancelledError
from qaflora_edge.inference.generation import Generation
from qaflora_edge.inference.request import checked_tokens
from qaflora_edge.openai.chat import begin_chat, completion_chunks, completion_dict
from qaflora_edge.openai.completions import answer_head, text_chunks, text_dict
from qaflora_edge.openai.options import FIXED, openai_options
from qaflora_edge.openai.responses import (
    chat_request,
    response_dict,
    response_events,
    response_head,
)
from qaflora_edge.server.requests import (
    MAX_TOKENS,
    MAX_WEIGHT,
    Answered,
    Body,
    ChatBody,
    DetokenizeBody,
    Fusion,
    ResponsesBody,
    TextBody,
    TokenizeBody,
    Weighed,
    WeightsBody,
    read,
    wrong_field,
)
from qaflora_edge.server.served_models import ServedModel
from qaflora_edge.server.stream import DONE, Computed, Outlet, encoded, event
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.strategy import parse_strategy

SHOWN = ("temperature", "top_p", "frequency_penalty", "presence_penalty")  # in a response
OF_CHAT = (
    *("n", "logprobs", "top_logprobs", "response_format"),
    *("tools", "tool_choice", "parallel_tool_calls"),
)
_PROSE = {"type": "text"}  # a response_format that asks for nothing
B = TypeVar("B", bound=Body)


# reading what is asked


@dataclass(frozen=True)
class Weighing:
    """How a request wants to be weighed, and how much the answer says of it.

    weights   a strategy, or weights as Engine.generate takes them; None: the default
    adapters  those in use, None: all
    returned  "summary", "layers" or "none"
    """

    weights: Any = None
    adapters: list[str] | None = None
    returned: str = "summary"

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of Engine.generate."""
        return {"weights": self.weights, "adapters": self.adapters}

    def told(self, fusion: FusionWeights) -> dict[str, Any]:
        """Return the field `fusion` of an answer, or nothing."""
        if self.returned == "none":
            return {}
        means = {name: round(mean, 6) for name, mean in fusion.means().items()}
        told: dict[str, Any] = {
            "strategy": fusion.strategy,
            "probe_ms": round(fusion.probe_ms, 3),
            "weights": means,
        }
        if self.returned == "layers":
            rows = fusion.weights.astype(float).tolist()
            told["layers"] = dict(zip(fusion.adapters, rows, strict=True))
        return {"fusion": told}

    def headers(self, fusion: FusionWeights) -> dict[str, str]:
        """Return the mix as a header, such as math=0.61,es=0.39."""
        if self.returned == "none" or not fusion.adapters:
            return {}
        means = fusion.means().items()
        return {"X-Fusion": ",".join(f"{name}={mean:.2f}" for name, mean in means)}


def weighing_of(body: Weighed, of_model: str | None, adapters: Sequence[str]) -> Weighing:
    """Combine the fields `fusion` and `lora` with the strategy that the model id names.

    Raises Refusal where they contradict each other.
    """
    fusion = body.fusion or Fusion.model_validate({})
    weights, by = fusion.weights, "fusion.weights"
    if body.lora is not None:
        given = [scale.model_dump() for scale in body.lora]
        if weights is not None:
            raise wrong_field("lora", given, "no such field beside fusion.weights")
        if any(scale.id >= len(adapters) for scale in body.lora):
            raise wrong_field("lora", given, f"ids below {len(adapters)}")
        weights, by = {adapters[scale.id]: scale.scale for scale in body.lora}, "lora"
    strategy = fusion.strategy or of_model
    if of_model not in (None, strategy):
        expected = f"{of_model}, as the model says, or nothing"
        raise wrong_field("fusion.strategy", strategy, expected)
    if weights is not None and strategy is not None:
        raise wrong_field(by, weights, f"none beside the strategy {strategy}: leave one out")
    if fusion.strategy and fusion.strategy.startswith("manual:"):
        by_name = parse_strategy(fusion.strategy, adapters).argument
        if any(abs(weight) > MAX_WEIGHT for weight in by_name.values()):
            expected = f"weights from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
            raise wrong_field("fusion.strategy", strategy, expected)
    chosen = strategy if weights is None else weights
    return Weighing(chosen, fusion.adapters, fusion.returned or "summary")


async def asked(request: Request, kind: type[B]) -> tuple[B, ServedModel, Weighing]:
    """Read a body; return it with its bundle, and how it wants to be weighed."""
    body = await read(request, kind)
    served, strategy = request.app.state.models.find(body.model)
    weighing = Weighing()
    if isinstance(body, Weighed):
        weighing = weighing_of(body, strategy, served.adapters)
    return body, served, weighing


def options_of(request: Request, body: Answered, **given: Any) -> dict[str, Any]:
    """Return the options of an answer; those of the command hold where a request says nothing.

    given  fields that one path has in place of sampling options

    Raises OptionError for a known field that cannot be followed.
    """
    fixed = {name: value for name, value in (body.model_extra or {}).items() if name in FIXED}
    asked = {**fixed, **body.sampling, **given}
    defaults = request.app.state.options.sampling
    known = {**defaults, **openai_options({k: v for k, v in asked.items() if v is not None})}
    return {name: value for name, value in known.items() if value is not None}


# telling the answer


class Told:
    """Sends answers with what stands beside OpenAI's fields: the mix, and the times."""

    def __init__(self, first: Generation, weighing: Weighing, out: Outlet) -> None:
        self._first, self._out = first, out
        self._mix = weighing.told(first.fusion)
        out.facts |= {"strategy": first.fusion.strategy, "probe_ms": first.fusion.probe_ms}
        out.send(weighing.headers(first.fusion))

    @property
    def _end(self) -> dict[str, Any]:
        return {**self._mix, "timings": self._first.timings.to_dict()}

    def send_whole(self, answer: Mapping[str, Any]) -> None:
        self._out.send(encoded({**_ended(answer), **self._end}))

    def send_chunks(self, chunks: Iterator[dict[str, Any]]) -> None:
        """Send chunks as events: the mix is on the first, and with the times on the usage's."""
        more = self._mix
        for chunk in chunks:
            more = more if chunk["choices"] else self._end
            self._out.send(event({**_ended(chunk), **more}))
            more = {}
        self._out.send(DONE)

    def send_events(self, events: Iterator[dict[str, Any]]) -> None:
        """Send events of a response; the mix is in the response of each that has one."""
        for each in events:
            if "response" in each:
                is_end = each["response"]["usage"] is not None
                each["response"] |= self._end if is_end else self._mix
            self._out.send(event(each, each["type"]))


def _ended(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Say in OpenAI's words that the time limit has cut an answer: by length."""
    for choice in answer.get("choices", ()):
        if choice["finish_reason"] == "cancelled":
            choice["finish_reason"] = "length"
    return answer


def progress(head: Mapping[str, Any], out: Outlet) -> Any:
    """Return a function that tells a stream how far its prompt is, as llama-server does."""
    start = time.perf_counter()
    last: tuple[str, int] | None = None

    def tell(stage: str, n_done: int, n_token: int) -> None:
        nonlocal last
        if (stage, n_done) == last:
            return
        last = stage, n_done
        ms = round(1e3 * (time.perf_counter() - start), 3)
        told = {"stage": stage, "total": n_token, "processed": n_done, "time_ms": ms}
        out.send(event({**head, "choices": [], "prompt_progress": told}))

    return tell


def noted(answers: Iterable[Generation], n: int, facts: dict[str, Any]) -> Iterator[Generation]:
    """Yield the n answers to one prompt; note the tokens of each when it is over.

    Raises CancelledError where it is ended before the last one begins.
    """
    n_begun = 0
    for answer in answers:
        try:
            yield answer
        finally:
            n_prompt = 0 if n_begun else answer.n_prompt
            facts["prompt_tokens"] = facts.get("prompt_tokens", 0) + n_prompt
            for token_s in answer.timings.token_s[:1]:
                facts.setdefault("first_ms", 1e3 * (token_s - facts["start_s"]))
            facts["completion_tokens"] = facts.get("completion_tokens", 0) + answer.n_completion
        n_begun += 1
    if n_begun < n:
        raise CancelledError("The request was ended before all of its answers began.")


# routes


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions"""
    body, served, weighing = await asked(request, ChatBody)
    given = {name: getattr(body, name) for name in OF_CHAT}
    if body.json_schema is not None:  # llama-server's own
        if body.response_format not in (None, _PROSE):
            raise wrong_field("json_schema", body.json_schema, "nothing beside response_format")
        given["response_format"] = {"type": "json_object", "schema": body.json_schema}
    options = options_of(request, body, **given)
    model = body.model or served.name

    def compute(engine: Engine, out: Outlet) -> None:
        head = answer_head("chat.completion.chunk", model)
        more = {"cancel": out.cancel, **weighing.options, **options}
        if body.return_progress and body.stream:
            more["on_progress"] = progress(head, out)
        begun = begin_chat(engine, body.messages, **more)
        told = Told(begun.first, weighing, out)
        answers = noted(begun.answers, options.get("n", 1), out.facts)
        if body.stream:
            usage = body.includes_usage
            told.send_chunks(
                completion_chunks(head, answers, has_tools=begun.has_tools, include_usage=usage)
            )
        else:
            told.send_whole(completion_dict(model, answers, has_tools=begun.has_tools))

    return Computed(request, served, body, compute)


async def completions(request: Request) -> Response:
    """POST /v1/completions"""
    body, served, weighing = await asked(request, TextBody)
    prompt, n = body.prompt, body.n or 1
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts: Any = [prompt] if is_one else prompt
    options = {"max_tokens": 16, **options_of(request, body, logprobs=None)}
    options |= {"json_schema": body.json_schema, "logprobs": body.logprobs}
    model = body.model or served.name

    def compute(engine: Engine, out: Outlet) -> None:
        head = answer_head("text_completion", model)
        more = {"cancel": out.cancel, "parse_special": True, **weighing.options, **options}
        if body.return_progress and body.stream and len(prompts) == 1:
            more["on_progress"] = progress(head, out)

        def answers() -> Iterator[Generation]:
            for each in prompts:
                if out.cancel.is_set():
                    raise CancelledError("The request was ended before all of its answers began.")
                yield from noted(engine.answers(each, n, **more), n, out.facts)

        found = answers()
        first = next(found)
        told = Told(first, weighing, out)
        rest = itertools.chain([first], found)
        if body.stream:
            told.send_chunks(text_chunks(head, rest, n, include_usage=body.includes_usage))
        else:
            told.send_whole(text_dict(model, rest, n))

    return Computed(request, served, body, compute)


async def responses(request: Request) -> Response:
    """POST /v1/responses"""
    body, served, weighing = await asked(request, ResponsesBody)
    raw = body.model_dump(by_alias=True, exclude_unset=True)
    messages, given = chat_request(raw)
    options = options_of(request, body, **given)
    shown = {name: options.get(name, in_group("sampling")[name].default) for name in SHOWN}
    model = body.model or served.name

    def compute(engine: Engine, out: Outlet) -> None:
        begun = begin_chat(engine, messages, cancel=out.cancel, **weighing.options, **options)
        told = Told(begun.first, weighing, out)
        for answer in noted(begun.answers, 1, out.facts):
            head = response_head(model, shown)
            if body.stream:
                told.send_events(response_events(head, answer, has_tools=begun.has_tools))
            else:
                told.send_whole(response_dict(head, answer, has_tools=begun.has_tools))

    return Computed(request, served, body, compute)


async def weights(request: Request) -> Response:
    """POST /v1/weights"""
    body, served, weighing = await asked(request, WeightsBody)
    if not isinstance(weighing.weights, str | None):
        name = "fusion.weights" if body.lora is None else "lora"
        raise wrong_field(name, weighing.weights, "a strategy: these are known already")
    prompt, messages = body.prompt, body.messages
    if (messages is None) == (prompt is None):
        raise wrong_field("prompt", prompt, "either prompt or messages")

    def compute(engine: Engine, out: Outlet) -> None:
        if messages is not None:
            tokens = engine.chat_tokens(messages)
        else:
            tokens = engine.tokenize(prompt or "")
        chosen, adapters = weighing.weights, weighing.adapters
        found = engine.weights(tokens, strategy=chosen, adapters=adapters, cancel=out.cancel)
        out.facts |= {"strategy": found.strategy, "probe_ms": found.probe_ms}
        out.facts["prompt_tokens"] = found.prompt_tokens
        out.send(weighing.headers(found))
        out.send(encoded(found.to_dict()))

    return Computed(request, served, body, compute)


async def tokenize(request: Request) -> Response:
    """POST /tokenize"""
    body, served, _ = await asked(request, TokenizeBody)
    text, messages = body.content, body.messages
    if (messages is None) == (text is None):
        raise wrong_field("content", text, "a text, or else messages")
    special = {
        "add_special": bool(body.add_special),
        "parse_special": body.parse_special is not False,
    }

    def compute(engine: Engine, out: Outlet) -> None:
        if messages is not None:
            tokens = engine.chat_tokens(messages)
        else:
            with engine._core.call():
                tokens = engine._model.tokenize(text or "", **special)
        out.send(encoded({"tokens": tokens}))

    return Computed(request, served, body, compute, is_light=True)


async def detokenize(request: Request) -> Response:
    """POST /detokenize: control tokens are spelt out."""
    body, served, _ = await asked(request, DetokenizeBody)

    def compute(engine: Engine, out: Outlet) -> None:
        text = b""
        if body.tokens:
            with engine._core.call():
                tokens = checked_tokens(engine._model, body.tokens, MAX_TOKENS)
                text = engine._model.detokenize(tokens, special=True)
        out.send(encoded({"content": text.decode("utf-8", "replace")}))

    return Computed(request, served, body, compute, is_light=True)
