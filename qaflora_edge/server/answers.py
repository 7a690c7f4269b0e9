"""Routes that take a body: chats, texts, weights and tokens."""

import base64
import itertools
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from qaflora_edge.arrays import F32
from qaflora_edge.config import in_group
from qaflora_edge.engine import Engine
from qaflora_edge.errors import CancelledError
from qaflora_edge.inference.generation import Generation
from qaflora_edge.inference.request import checked_tokens
from qaflora_edge.openai import decisions
from qaflora_edge.openai.chat import begin_chat, chat_shape
from qaflora_edge.openai.completions import TEXT, Shape, answer_chunks, answer_dict, answer_head
from qaflora_edge.openai.infill import N_PROMPT, infill_tokens
from qaflora_edge.openai.options import FIXED, openai_options
from qaflora_edge.openai.responses import chat_request, response_events, response_head
from qaflora_edge.openai.tools import chosen_tools
from qaflora_edge.server import requests as bodies
from qaflora_edge.server.requests import wrong_field
from qaflora_edge.server.served_models import ServedModel
from qaflora_edge.server.stream import DONE, Computed, encoded, event
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.strategy import parse_strategy

SHOWN = ("temperature", "top_p", "frequency_penalty", "presence_penalty")  # in a response
OF_TEMPLATE = ("continue_final_message", "add_generation_prompt", "chat_template_kwargs")
OF_CHAT = (
    *("n", "logprobs", "top_logprobs", "response_format", "reasoning_effort"),
    *("tools", "tool_choice", "parallel_tool_calls", *OF_TEMPLATE),
)
_PROSE = {"type": "text"}  # a response_format that asks for nothing
B = TypeVar("B", bound=bodies.Body)
C = TypeVar("C", bound=bodies.CompletionBody)


# reading what is asked


async def asked(request: Request, kind: type[B]) -> tuple[B, ServedModel, dict[str, Any]]:
    """Read a body; return it with its bundle, and the options that say how it is weighed."""
    body = await bodies.read(request, kind)
    served, strategy = request.app.state.models.find(body.model)
    weighing = {}
    if isinstance(body, bodies.Weighed):
        weighing = weighing_of(body, strategy, served.weigher.adapters)
        if body.fusion is not None and body.fusion.relay is False:
            asked = weighing["weights"] or served.weigher.known.strategy
            is_relay = isinstance(asked, str) and asked.partition(":")[0] == "relay"
            weighing["weights"] = "two-place" if is_relay else weighing["weights"]
    return body, served, weighing


def weighing_of(
    body: bodies.Weighed, of_model: str | None, adapters: Sequence[str]
) -> dict[str, Any]:
    """Combine the fields `fusion` and `lora` with the strategy that the model id names.

    Returns the options `weights`, `adapters` and `prefill` of Engine.generate. Raises Refusal where
    the fields contradict each other, or a weight is too large.
    """
    fusion = body.fusion or bodies.Fusion.model_validate({})
    weights, by = fusion.weights, "fusion.weights"
    if body.lora is not None:
        lora = [scale.model_dump() for scale in body.lora]
        if weights is not None or any(scale.id >= len(adapters) for scale in body.lora):
            expected = f"ids below {len(adapters)}, and no fusion.weights"
            raise wrong_field("lora", lora, expected)
        weights, by = {adapters[scale.id]: scale.scale for scale in body.lora}, "lora"
    strategy = fusion.strategy or of_model
    if of_model not in (None, strategy):
        expected = f"{of_model}, as the model says, or nothing"
        raise wrong_field("fusion.strategy", strategy, expected)
    if weights is not None and strategy is not None:
        raise wrong_field(by, weights, f"none next to the strategy {strategy}: leave one out")
    if strategy is not None and strategy.startswith("manual:"):
        _check_range("fusion.strategy", strategy, parse_strategy(strategy, adapters).argument)
    elif weights is not None:
        _check_range(by, weights, weights)
    chosen = strategy if weights is None else weights
    return {"weights": chosen, "adapters": fusion.adapters, "prefill": fusion.prefill}


def _check_range(field: str, found: Any, weights: Any) -> None:
    """Refuse a field with weights, by name or by layer, that are too large or no numbers."""
    rows = [weights.values()] if isinstance(weights, dict) else weights
    for weight in itertools.chain.from_iterable(rows):
        if type(weight) not in (int, float) or abs(weight) > bodies.MAX_WEIGHT:
            raise wrong_field(field, found, f"weights {bodies.RANGE}")


def options_of(
    served: ServedModel, body: bodies.Answered | bodies.OllamaBody, **given: Any
) -> dict[str, Any]:
    """Return the options of an answer; the model's hold where a request says nothing.

    given  fields that one path has in place of sampling options

    Raises OptionError for a known field that cannot be followed.
    """
    fixed = {name: value for name, value in (body.model_extra or {}).items() if name in FIXED}
    asked = {**fixed, **body.sampling, **given}
    known = {**served.sampling, **openai_options({k: v for k, v in asked.items() if v is not None})}
    return {name: value for name, value in known.items() if value is not None}


# telling the answer


def mix_of(fusion: FusionWeights, out: Computed) -> dict[str, Any]:
    """Note a mix for the log and the header X-Fusion; return the field `fusion` of an answer."""
    out.facts |= {"strategy": fusion.strategy, "probe_ms": fusion.probe_ms}
    returned = out.body.fusion.returned if out.body.fusion else None
    if returned == "none":
        return {}
    means = fusion.means
    if means:
        shown = (f"{name}={mean:.2f}" for name, mean in means.items())
        out.headers["X-Fusion"] = ",".join(shown)
    found: dict[str, Any] = {
        "strategy": fusion.strategy,
        "probe_ms": round(fusion.probe_ms, 3),
        "weights": {name: round(mean, 6) for name, mean in means.items()},
    }
    found |= fusion.relay_dict()
    if returned in ("why", "layers"):
        found |= fusion.why_dict()
    if returned == "layers":
        found["layers"] = dict(zip(fusion.adapters, fusion.weights.tolist(), strict=True))
    return {"fusion": found}


class Sender:
    """Send answers with two fields more than OpenAI's: the mix, and the times.

    answers  of the Engine: the n answers to each prompt; the first has begun
    """

    def __init__(
        self,
        engine: Engine,
        answers: Iterable[Generation],
        out: Computed,
        n: int = 1,
        n_prompt: int = 1,
    ) -> None:
        noted = _noted(answers, n, n_prompt, out.facts)
        self._engine, self._first, self._out, self._n = engine, next(noted), out, n
        self._first.wait_for_draft()
        self._mix = mix_of(self._first.fusion, out)
        self.answers = itertools.chain([self._first], noted)

    @property
    def end(self) -> dict[str, Any]:
        """Give what is told at an answer's end."""
        end = {**self._mix, "timings": _timings(self._first)}
        if self._out.body.verbose:
            end["__verbose"] = {"prompt": _spelt(self._engine, self._first.prompt)}
        return end

    def send(self, head: dict[str, Any], shape: Shape) -> None:
        """Send all answers: as one text, or as chunks where the body has `stream`."""
        body = self._out.body
        if not body.stream:
            self.send_whole(_ended(answer_dict(head, self.answers, shape, self._n)))
            return
        usage = bool(body.stream_options and body.stream_options.include_usage)
        more = self._mix  # on the first chunk, and with the times on the usage's
        for chunk in answer_chunks(head, self.answers, shape, self._n, include_usage=usage):
            more = more if chunk["choices"] else self.end
            self._out.send(event({**_ended(chunk), **more}))
            more = {}
        self._out.send(DONE)

    def send_whole(self, answer: Mapping[str, Any]) -> None:
        """Send an answer as one text, or as the event that ends a stream."""
        self._out.send(self._out.framed({**answer, **self.end}))

    def send_events(self, events: Iterator[dict[str, Any]]) -> None:
        """Send events of a response; the mix is in the response of each that has one."""
        for each in events:
            if "response" in each:
                is_end = each["response"]["usage"] is not None
                each["response"] |= self.end if is_end else self._mix
            self._out.send(event(each, each["type"]))


def _ended(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Say in OpenAI's words that the time limit has cut an answer: by length."""
    for choice in answer["choices"]:
        if choice["finish_reason"] == "cancelled":
            choice["finish_reason"] = "length"
    return answer


def _timings(answer: Generation) -> dict[str, float]:
    """Return the times of an answer in our names and in those of llama-server."""
    ours, n_read = answer.timings.to_dict(), answer.n_prompt - answer.n_cached
    prompt_ms, predicted_ms = ours["prefill_ms"], ours["decode_ms"]
    return {
        **ours,
        **{"cache_n": answer.n_cached, "prompt_n": n_read, "prompt_ms": prompt_ms},
        "prompt_per_second": round(1e3 * n_read / prompt_ms, 3) if prompt_ms else 0.0,
        **{"predicted_n": answer.n_completion, "predicted_ms": predicted_ms},
        "predicted_per_second": ours["tokens_per_second"],
    }


def _spelt(engine: Engine, tokens: Iterable[int]) -> str:
    """Give the text of tokens, with control tokens."""
    with engine._core.call():
        return engine._model.detokenize(tokens, special=True).decode("utf-8", "replace")


def progress(head: Mapping[str, Any], out: Computed) -> dict[str, Any]:
    """Return the option that tells a stream how far its prompt is, as llama-server does."""
    start, done = time.perf_counter(), set[tuple[str, int]]()

    def tell(stage: str, n_done: int, n_token: int) -> None:
        if (stage, n_done) not in done:
            done.add((stage, n_done))
            ms = round(1e3 * (time.perf_counter() - start), 3)
            told = {"stage": stage, "total": n_token, "processed": n_done, "time_ms": ms}
            out.send(event({**head, "choices": [], "prompt_progress": told}))

    return {"on_progress": tell} if out.body.return_progress and out.body.stream else {}


def _noted(
    answers: Iterable[Generation], n: int, n_prompt: int, facts: dict[str, Any]
) -> Iterator[Generation]:
    """Yield the n answers to each prompt; note the tokens of each when it is over.

    Raises CancelledError where the request is ended before the last one begins.
    """
    n_begun = 0
    for n_begun, answer in enumerate(answers, start=1):
        try:
            yield answer
        finally:
            n_read = answer.n_prompt if n_begun % n == 1 % n else 0
            facts["prompt_tokens"] = facts.get("prompt_tokens", 0) + n_read
            for token_s in answer.timings.token_s[:1]:
                facts.setdefault("first_ms", 1e3 * (token_s - facts["start_s"]))
            facts["completion_tokens"] = facts.get("completion_tokens", 0) + answer.n_completion
    if n_begun < n * n_prompt:
        raise CancelledError("The request was ended before all of its answers began.")


# routes


async def chat_completions(request: Request) -> Computed:
    """Answer a conversation."""
    body, served, weighing = await asked(request, bodies.ChatBody)
    given = {name: getattr(body, name) for name in OF_CHAT}
    if body.json_schema is not None:  # llama-server's own
        if body.response_format not in (None, _PROSE):
            raise wrong_field("json_schema", body.json_schema, "nothing next to response_format")
        given["response_format"] = {"type": "json_object", "schema": body.json_schema}
    options = {**weighing, **options_of(served, body, **given)}
    model = body.model or served.name

    def compute(engine: Engine, out: Computed) -> None:
        head = answer_head("chat.completion" + ".chunk" * bool(body.stream), model)
        more = {**options, "cancel": out.cancel, **progress(head, out)}
        answers, tools = begin_chat(engine, body.messages, **more)
        Sender(engine, answers, out, options.get("n", 1)).send(head, chat_shape(tools))

    return Computed(request, served, body, compute)


async def completions(request: Request) -> Computed:
    """Go on with a text."""
    body, served, weighing = await asked(request, bodies.TextBody)
    prompts, n = _each(body.prompt), body.n or 1
    options = {"max_tokens": 16, **weighing, **options_of(served, body, logprobs=None)}
    options |= {"json_schema": body.json_schema, "logprobs": body.logprobs, "parse_special": True}
    model = body.model or served.name

    def compute(engine: Engine, out: Computed) -> None:
        head = answer_head("text_completion", model)
        more = {**options, "cancel": out.cancel}
        if len(prompts) == 1:
            more |= progress(head, out)
        each = (engine.answers(prompt, n, **more) for prompt in prompts)
        answers = itertools.chain.from_iterable(each)
        Sender(engine, answers, out, n, len(prompts)).send(head, TEXT)

    return Computed(request, served, body, compute)


def _each(given: Any) -> list[Any]:
    """List the texts, or token ids, of a field that holds one of them or several."""
    is_one = isinstance(given, str) or isinstance(given[0], int)
    return [given] if is_one else given


async def completion(request: Request) -> Computed:
    """Go on with a text, in the shape of llama-server."""
    return await _completed(request, bodies.CompletionBody, lambda engine, body: body.prompt)


async def infill(request: Request) -> Computed:
    """Fill a gap in code, in the shape of llama-server."""

    def prompt(engine: Engine, body: bodies.InfillBody) -> list[int]:
        before = body.input_prefix + body.prompt
        files = [(each.filename, each.text) for each in body.input_extra or ()]
        limits = {"n_answer": body.n_predict or 0, "n_prompt": body.n_prompt or N_PROMPT}
        return infill_tokens(engine, before, body.input_suffix, files, **limits)

    return await _completed(request, bodies.InfillBody, prompt)


async def _completed(
    request: Request, kind: type[C], prompt: Callable[[Engine, C], str | list[int]]
) -> Computed:
    body, served, weighing = await asked(request, kind)
    options = {**weighing, **options_of(served, body), "parse_special": True}
    if body.n_predict is not None:
        options["max_tokens"] = None if body.n_predict < 0 else body.n_predict
    options["json_schema"] = body.json_schema
    model = body.model or served.name

    def compute(engine: Engine, out: Computed) -> None:
        answers = engine.answers(prompt(engine, body), 1, cancel=out.cancel, **options)
        sender = Sender(engine, answers, out)
        limit_ms = getattr(body, "t_max_predict_ms", None) or math.inf
        for answer in sender.answers:
            text, start = "", time.perf_counter()
            for piece in answer:
                text += piece
                if body.stream:
                    out.send(event({"index": 0, "content": piece, "stop": False}))
                if "\n" in text and 1e3 * (time.perf_counter() - start) > limit_ms:
                    answer.cancel()
            whole = {
                "index": 0,
                "content": "" if body.stream else text,
                "stop": True,
                "model": model,
                "stop_type": "eos" if answer.finish_reason == "stop" else "limit",
                "truncated": False,
                "has_new_line": "\n" in text,
                "tokens_predicted": answer.n_completion,
                "tokens_evaluated": answer.n_prompt,
                "tokens_cached": answer.n_cached,
            }
            sender.send_whole(whole)

    return Computed(request, served, body, compute)


async def embeddings(request: Request) -> Computed:
    """Embed texts by the base alone."""
    body, served, _ = await asked(request, bodies.EmbeddingsBody)
    model = body.model or served.name

    def compute(engine: Engine, out: Computed) -> None:
        states = embedded(engine, _each(body.input), out)
        data: list[Any] = [state.tolist() for state in states]
        if body.encoding_format == "base64":
            data = [base64.b64encode(state.astype("<f4").tobytes()).decode() for state in states]
        listed = [
            {"object": "embedding", "index": index, "embedding": each}
            for index, each in enumerate(data)
        ]
        n_token = out.facts["prompt_tokens"]
        usage = {"prompt_tokens": n_token, "total_tokens": n_token}
        out.send(encoded({"object": "list", "data": listed, "model": model, "usage": usage}))

    return Computed(request, served, body, compute)


async def embedding(request: Request) -> Computed:
    """Embed texts, in the shape of llama-server."""
    body, served, _ = await asked(request, bodies.EmbeddingBody)

    def compute(engine: Engine, out: Computed) -> None:
        states = embedded(engine, _each(body.content), out)
        listed = [{"index": i, "embedding": [each.tolist()]} for i, each in enumerate(states)]
        out.send(encoded(listed))

    return Computed(request, served, body, compute)


def embedded(engine: Engine, texts: Iterable[str | list[int]], out: Computed) -> list[F32]:
    """Embed texts, float32 [n_embd] each, and note how many tokens they have."""
    prompts = [engine.tokenize(text) for text in texts]
    out.facts["prompt_tokens"] = sum(map(len, prompts))
    return [engine.embed(tokens, out.cancel) for tokens in prompts]


async def responses(request: Request) -> Computed:
    """Answer as a response."""
    body, served, weighing = await asked(request, bodies.ResponsesBody)
    messages, given = chat_request(body.model_dump(by_alias=True, exclude_unset=True))
    options = {**weighing, **options_of(served, body, **given)}
    shown = {name: options.get(name, in_group("sampling")[name].default) for name in SHOWN}
    model = body.model or served.name

    def compute(engine: Engine, out: Computed) -> None:
        answers, tools = begin_chat(engine, messages, cancel=out.cancel, **options)
        sender = Sender(engine, answers, out)
        for answer in sender.answers:
            events = response_events(response_head(model, shown), answer, tools)
            if body.stream:
                sender.send_events(events)
            else:
                *_, last = events
                sender.send_whole(last["response"])

    return Computed(request, served, body, compute)


async def apply_template(request: Request) -> Computed:
    """Show the prompt that a conversation becomes."""
    body, served, _ = await asked(request, bodies.TemplateBody)
    how = {name: getattr(body, name) for name in OF_TEMPLATE}

    def compute(engine: Engine, out: Computed) -> None:
        tools, _ = chosen_tools(body.tools, None)
        prompt = _spelt(engine, engine.chat_tokens(body.messages, tools=tools, **how))
        out.send(encoded({"prompt": prompt}))

    return Computed(request, served, body, compute, is_light=True)


async def weights(request: Request) -> Computed:
    """Weigh the adapters for a prompt."""
    body, served, weighing = await asked(request, bodies.WeightsBody)
    strategy, adapters = strategy_of(body, weighing), weighing["adapters"]
    prompt, messages = body.prompt, body.messages
    if (messages is None) == (prompt is None):
        raise wrong_field("prompt", prompt, "either prompt or messages")

    def compute(engine: Engine, out: Computed) -> None:
        options = {"strategy": strategy, "adapters": adapters, "cancel": out.cancel}
        found = engine.weights(messages or prompt, raw=bool(body.raw), **options)
        mix_of(found, out)
        out.facts["prompt_tokens"] = found.prompt_tokens
        out.send(encoded(found.to_dict()))

    return Computed(request, served, body, compute)


def strategy_of(body: bodies.Weighed, weighing: Mapping[str, Any]) -> str | None:
    """Return the strategy of a request that takes no weights. Raises Refusal."""
    strategy = weighing["weights"]
    if strategy is None or isinstance(strategy, str):
        return strategy
    name = "fusion.weights" if body.lora is None else "lora"
    raise wrong_field(name, strategy, "a strategy")


async def systemone(request: Request) -> Computed:
    """Decide typed questions about a state."""
    body, served, weighing = await asked(request, bodies.SystemOneBody)
    strategy, adapters = strategy_of(body, weighing), weighing["adapters"]
    questions = {
        name: decisions.read_question(name, body.state, question)
        for name, question in body.questions.items()
    }
    model = body.model or served.name

    def compute(engine: Engine, out: Computed) -> None:
        answers: dict[str, Any] = {}
        n_token = 0
        for name, (text, choices) in questions.items():
            decision = engine.decide(
                text, choices, strategy=strategy, adapters=adapters, cancel=out.cancel
            )
            n_token += decision.n_prompt
            answers[name] = decisions.answer(body.questions[name], decision)
            answers[name] |= mix_of(decision.fusion, out)
        out.facts["prompt_tokens"] = n_token
        usage = {"input_tokens": n_token, "output_tokens": 0}
        head = {"id": f"req_{uuid.uuid4().hex}", "model": model}
        out.send(encoded({**head, "answers": answers, "usage": usage}))

    return Computed(request, served, body, compute)


async def tokenize(request: Request) -> Computed:
    """Turn a text into token ids."""
    body, served, _ = await asked(request, bodies.TokenizeBody)
    is_special, is_parsed = bool(body.add_special), body.parse_special is not False

    def compute(engine: Engine, out: Computed) -> None:
        with engine._core.call():
            tokens = engine._model.tokenize(
                body.content, add_special=is_special, parse_special=is_parsed
            )
        out.send(encoded({"tokens": tokens}))

    return Computed(request, served, body, compute, is_light=True)


async def detokenize(request: Request) -> Computed:
    """Turn token ids into text; control tokens are spelt out."""
    body, served, _ = await asked(request, bodies.DetokenizeBody)

    def compute(engine: Engine, out: Computed) -> None:
        text = ""
        if body.tokens:
            with engine._core.call():
                tokens = checked_tokens(engine._model, body.tokens, bodies.MAX_TOKENS)
                text = _spelt(engine, tokens)
        out.send(encoded({"content": text}))

    return Computed(request, served, body, compute, is_light=True)
