"""Routes that answer: chats and texts."""

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from qaflora_edge.config import in_group
from qaflora_edge.engine import Engine
from qaflora_edge.errors import CancelledError, ChatTemplateError, GrammarError, PromptError
from qaflora_edge.inference.generation import Generation
from qaflora_edge.openai.chat import begin_chat, completion_chunks, completion_dict
from qaflora_edge.openai.completions import answer_head, text_chunks, text_dict
from qaflora_edge.openai.responses import ResponseShape, chat_request
from qaflora_edge.server import fields
from qaflora_edge.server.body import json_body
from qaflora_edge.server.fields import Fusion
from qaflora_edge.server.options import MAX_PROMPTS
from qaflora_edge.server.refusals import Params, Refusal, wrong_field
from qaflora_edge.server.stream import DONE, encoded, event
from qaflora_edge.server.tokens import chat_of, check_messages_size, check_texts_size, spelt
from qaflora_edge.server.work import Outlet, Work

# Options that a response tells.
SHOWN = ("temperature", "top_p", "frequency_penalty", "presence_penalty")
_OTHERS = {"logprobs", "max_tokens", "max_completion_tokens"}  # of chats, that responses name else


class Told:
    """What an answer tells beside OpenAI's fields: the mix, and the times."""

    def __init__(self, first: Generation, fusion: Fusion, out: Outlet) -> None:
        self._first, self._fusion, self._out = first, fusion, out
        out.facts |= {"strategy": first.fusion.strategy, "probe_ms": first.fusion.probe_ms}

    def head(self) -> dict[str, str]:
        return self._fusion.headers(self._first.fusion)

    def begin(self) -> dict[str, Any]:
        return self._fusion.answer_fields(self._first.fusion)

    def end(self) -> dict[str, Any]:
        return {**self.begin(), "timings": self._first.timings.to_dict()}

    def send_whole(self, answer: Mapping[str, Any]) -> None:
        self._out.send(self.head())
        self._out.send(encoded({**_ended(answer), **self.end()}))

    def send_chunks(self, chunks: Iterator[dict[str, Any]]) -> None:
        """Chunks as events: the mix is on the first, and with the times on that of the usage."""
        self._out.send(self.head())
        more = self.begin()
        for chunk in chunks:
            more = more if chunk["choices"] else self.end()
            self._out.send(event({**_ended(chunk), **more}))
            more = {}
        self._out.send(DONE)

    def send_events(self, events: Iterator[dict[str, Any]]) -> None:
        """Events of a response; the mix is in the response of each that has one."""
        self._out.send(self.head())
        for each in events:
            if "response" in each:
                is_end = each["response"]["usage"] is not None
                each["response"] |= self.end() if is_end else self.begin()
            self._out.send(event(each, each["type"]))


class Progress:
    """Tells a stream how much of its prompt is weighed and read, as llama-server does if asked."""

    def __init__(self, head: Mapping[str, Any], out: Outlet) -> None:
        self._head, self._out, self._start = head, out, time.perf_counter()
        self._last: tuple[str, int] | None = None

    def __call__(self, stage: str, n_done: int, n_token: int) -> None:
        if (stage, n_done) == self._last:
            return
        self._last = stage, n_done
        ms = round(1e3 * (time.perf_counter() - self._start), 3)
        told = {"stage": stage, "total": n_token, "processed": n_done, "time_ms": ms}
        self._out.send(event({**self._head, "choices": [], "prompt_progress": told}))


def noted(answers: Iterable[Generation], n: int, facts: dict[str, Any]) -> Iterator[Generation]:
    """The same n answers to one prompt; what they took is noted once they are over.

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
        raise _ended_early()


def _ended_early() -> CancelledError:
    return CancelledError("The request was ended before all of its answers began.")


def _ended(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the time limit has cut was cut by length, in OpenAI's words."""
    for choice in answer.get("choices", ()):
        if choice["finish_reason"] == "cancelled":
            choice["finish_reason"] = "length"
    return answer


def form_params(body: Mapping[str, Any]) -> Params:
    """Of several forms that an answer can have, the one that a request asks for."""
    forms = ("grammar", "json_schema", "response_format", "tools")
    given = (name for name in forms if body.get(name) is not None)
    return {GrammarError: next(given, "response_format")}


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions"""
    body = await json_body(request)
    state = request.app.state
    bundle, strategy = state.shelf.find(body.get("model"))
    messages = fields.messages(body)
    fusion = fields.read_fusion(body, strategy, bundle.adapters)
    options = fields.chat_options(body, state.options.sampling)
    is_stream, usage = fields.flag(body, "stream"), fields.includes_usage(body)
    tells_progress = fields.flag(body, "return_progress") and is_stream
    model = body.get("model") or bundle.name

    def compute(engine: Engine, out: Outlet) -> None:
        check_messages_size(engine, messages)
        asked = chat_of(engine, state.options)
        head = answer_head("chat.completion.chunk", model)
        more = {"cancel": out.cancel, **fusion.options, **options}
        if tells_progress:
            more["on_progress"] = Progress(head, out)
        begun = begin_chat(asked, messages, **more)
        told = Told(begun.first, fusion, out)
        answers = noted(begun.answers, options.get("n", 1), out.facts)
        has_tools = begun.has_tools
        if is_stream:
            chunks = completion_chunks(head, answers, has_tools=has_tools, include_usage=usage)
            told.send_chunks(chunks)
        else:
            told.send_whole(completion_dict(model, answers, has_tools=has_tools))

    params = form_params(body)
    return Work(request, body, bundle, compute, is_stream=is_stream, params=params)


async def completions(request: Request) -> Response:
    """POST /v1/completions"""
    body = await json_body(request)
    state = request.app.state
    bundle, strategy = state.shelf.find(body.get("model"))
    prompts = _prompts(body.get("prompt"))
    fusion = fields.read_fusion(body, strategy, bundle.adapters)
    options = fields.text_options(body, state.options.sampling)
    n = options.pop("n")
    is_stream, usage = fields.flag(body, "stream"), fields.includes_usage(body)
    tells_progress = fields.flag(body, "return_progress") and is_stream
    is_echo = fields.flag(body, "echo")
    if is_echo and options.get("logprobs") is not None:
        raise wrong_field("echo", True, "false beside logprobs")
    model = body.get("model") or bundle.name

    def compute(engine: Engine, out: Outlet) -> None:
        head = answer_head("text_completion", model)
        more = {"cancel": out.cancel, "parse_special": True, **fusion.options, **options}
        if tells_progress and len(prompts) == 1:
            more["on_progress"] = Progress(head, out)

        def answers() -> Iterator[tuple[str, Generation]]:
            for prompt in prompts:
                if out.cancel.is_set():
                    raise _ended_early()
                check_texts_size(engine, [prompt] if isinstance(prompt, str) else [])
                start = spelt(engine, prompt) if is_echo else ""
                for answer in noted(engine.answers(prompt, n, **more), n, out.facts):
                    yield start, answer

        all_answers = answers()
        first = next(all_answers)
        told = Told(first[1], fusion, out)
        rest = itertools.chain([first], all_answers)
        if is_stream:
            told.send_chunks(text_chunks(head, rest, n, include_usage=usage))
        else:
            told.send_whole(text_dict(model, rest, n))

    params = {**form_params(body), PromptError: "prompt"}
    return Work(request, body, bundle, compute, is_stream=is_stream, params=params)


async def responses(request: Request) -> Response:
    """POST /v1/responses"""
    body = await json_body(request)
    state = request.app.state
    bundle, strategy = state.shelf.find(body.get("model"))
    messages, given = chat_request(body)
    own = {name: body[name] for name in (fields.OF_SAMPLING - _OTHERS) & body.keys()}
    fusion = fields.read_fusion(body, strategy, bundle.adapters)
    messages = fields.messages({"messages": messages})
    options = fields.chat_options(own | given, state.options.sampling)
    shown = {name: options.get(name, in_group("sampling")[name].default) for name in SHOWN}
    is_stream = fields.flag(body, "stream")
    model = body.get("model") or bundle.name

    def compute(engine: Engine, out: Outlet) -> None:
        check_messages_size(engine, messages)
        asked = chat_of(engine, state.options)
        begun = begin_chat(asked, messages, cancel=out.cancel, **fusion.options, **options)
        told = Told(begun.first, fusion, out)
        for answer in noted(begun.answers, 1, out.facts):
            shape = ResponseShape(model, body, shown, answer)
            if is_stream:
                told.send_events(shape.events(has_tools=begun.has_tools))
            else:
                told.send_whole(shape.whole(has_tools=begun.has_tools))

    form = "text" if body.get("grammar") is None else "grammar"
    params: Params = {PromptError: "input", ChatTemplateError: "input", GrammarError: form}
    return Work(request, body, bundle, compute, is_stream=is_stream, params=params)


def _prompts(prompt: Any) -> list[Any]:
    """The prompts of a completion: texts, or lists of token ids."""
    is_one = isinstance(prompt, str) or (isinstance(prompt, list) and all(map(_is_token, prompt)))
    found = [prompt] if is_one else prompt
    if not isinstance(found, list) or not found or not prompt:
        raise wrong_field("prompt", prompt, "a text, a list of token ids, or a list of these")
    for each in found:
        is_ids = isinstance(each, list) and all(map(_is_token, each))
        if not each or not (isinstance(each, str) or is_ids):
            raise wrong_field("prompt", prompt, "a text, a list of token ids, or a list of these")
    if len(found) > MAX_PROMPTS:
        message = f"The field prompt has {len(found)} prompts, expected {MAX_PROMPTS} at most."
        raise Refusal(400, message, param="prompt")
    return found


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
