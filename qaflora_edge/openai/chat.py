"""Answers in the shape of OpenAI's chat completions."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qaflora_edge.chat.messages import END
from qaflora_edge.errors import wrong_option
from qaflora_edge.inference.generation import Generation
from qaflora_edge.openai.completions import ShownTokens, answer_head, chat_logprobs, usage
from qaflora_edge.openai.options import openai_options
from qaflora_edge.openai.tools import answer_form, chosen_tools, parse_calls, shown_text

_EMPTY: dict[str, Any] = {"refusal": None, "annotations": []}  # that strict clients look for


class Answering(Protocol):
    """What answers conversations: an Engine."""

    @property
    def name(self) -> str: ...

    def chat_tokens(
        self, messages: Sequence[Any], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]: ...

    def answers(self, prompt: Any, n: int, **options: Any) -> Iterator[Generation]: ...


class Answer(dict[str, Any]):
    """An object of an answer, its fields also as attributes: answer.choices[0].message.content."""

    _MAY_LACK = frozenset({"content", "role", "tool_calls", "usage", "logprobs"})

    def __getattr__(self, name: str) -> Any:
        if name in self or name in self._MAY_LACK:
            return self.get(name)
        raise AttributeError(f"This part of an answer has no {name}, only {', '.join(self)}.")


def with_attributes(value: Any) -> Any:
    """Make every object in a value an Answer."""
    if isinstance(value, dict):
        return Answer({key: with_attributes(each) for key, each in value.items()})
    return [*map(with_attributes, value)] if isinstance(value, list) else value


@dataclass(frozen=True)
class BegunChat:
    """Answers to a conversation, of which the first has begun.

    has_tools  whether the base was told of tools, so that it may call them
    """

    first: Generation
    answers: Iterator[Generation]
    has_tools: bool


def answer_chat(
    engine: Answering,
    messages: Sequence[Any],
    *,
    stream: bool,
    stream_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Answer | Iterator[Answer]:
    """Answer as Engine.chat does: a dict, or chunks with stream; the first answer has begun."""
    if not isinstance(stream_options, Mapping | None):
        raise wrong_option(
            "stream_options", stream_options, "an object such as {'include_usage': True}"
        )
    begun = begin_chat(engine, messages, **openai_options(options))
    if not stream:
        found = completion_dict(engine.name, begun.answers, has_tools=begun.has_tools)
        return Answer(with_attributes(found))
    chunks = completion_chunks(
        answer_head("chat.completion.chunk", engine.name),
        begun.answers,
        has_tools=begun.has_tools,
        include_usage=bool((stream_options or {}).get("include_usage")),
    )
    return map(with_attributes, chunks)


def begin_chat(
    engine: Answering,
    messages: Sequence[Any],
    *,
    n: int = 1,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool | None = None,
    response_format: Mapping[str, Any] | None = None,
    grammar: str | None = None,
    stop: str | Sequence[str] | None = None,
    **options: Any,
) -> BegunChat:
    """Begin to answer a conversation; it is weighed and prefilled when this returns.

    options  as Engine.generate takes them
    """
    told, call = chosen_tools(tools, tool_choice)
    form = answer_form(grammar, response_schema(response_format), told, call)
    if told and parallel_tool_calls is False:
        stop = [*((stop,) if isinstance(stop, str) else stop or ()), END]
    tokens = engine.chat_tokens(messages, tools=told)
    answers = engine.answers(tokens, n, grammar=form, stop=stop, **options)
    first = next(answers)
    return BegunChat(first, itertools.chain([first], answers), bool(told))


def response_schema(response_format: Mapping[str, Any] | None) -> Any:
    """Read the JSON schema out of OpenAI's response_format; None is free text.

    Raises OptionError when it is none of text, json_object and json_schema.
    """
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema")  # as llama-cpp-python has it
        return {"type": "object"} if schema is None else schema
    # Responses have no inner object.
    wrapped = response_format.get("json_schema", response_format) if kind == "json_schema" else None
    if not isinstance(wrapped, Mapping) or not isinstance(wrapped.get("schema"), Mapping):
        schema = "{'type': 'json_schema', 'json_schema': {'schema': ...}}"
        expected = f"{{'type': 'json_object'}} or {schema}"
        raise wrong_option("response_format", response_format, expected)
    return wrapped["schema"]


def completion_dict(
    model_name: str, answers: Iterable[Generation], *, has_tools: bool = False
) -> dict[str, Any]:
    """Put whole answers to one conversation into OpenAI's shape; each is a choice."""
    choices, ended = [], []
    for index, generation in enumerate(answers):
        shown, text = ShownTokens(generation), generation.text()
        logprobs = chat_logprobs(shown.take(text)) if shown.is_asked else None
        text, calls = parse_calls(text) if has_tools else (text, [])
        message: dict[str, Any] = {"role": "assistant", "content": text, **_EMPTY}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        reason = _reason(generation, calls)
        choices.append(
            {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}
        )
        ended.append(generation)
    head = answer_head("chat.completion", model_name)
    return {**head, "choices": choices, "usage": usage(ended, len(ended))}


def completion_chunks(
    head: dict[str, Any],
    answers: Iterable[Generation],
    *,
    has_tools: bool = False,
    include_usage: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield the same as chunks: the role, then pieces, then the reason of the end.

    Choices come one after another. A tool call comes whole, at the end of its choice.

    head  see answer_head
    """
    if include_usage:
        head = {**head, "usage": None}
    ended: list[Generation] = []
    for index, generation in enumerate(answers):
        shown = ShownTokens(generation)
        for delta, reason in _deltas(generation, has_tools):
            entries = shown.take(delta.get("content") or "")
            logprobs = chat_logprobs(entries) if entries else None
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            yield {**head, "choices": [choice]}
        ended.append(generation)
    if include_usage:
        yield {**head, "choices": [], "usage": usage(ended, len(ended))}


def _deltas(generation: Generation, has_tools: bool) -> Iterator[tuple[dict[str, Any], str | None]]:
    yield {"role": "assistant"}, None
    calls: list[dict[str, Any]] = []
    for text in shown_text(generation, calls) if has_tools else generation:
        yield {"content": text}, None
    if calls:
        yield {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]}, None
    yield {}, _reason(generation, calls)


def _reason(generation: Generation, calls: list[dict[str, Any]]) -> str | None:
    is_call = bool(calls) and generation.finish_reason == "stop"
    return "tool_calls" if is_call else generation.finish_reason
