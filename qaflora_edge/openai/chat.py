"""Answers in the shape of OpenAI's chat completions."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from qaflora_edge.errors import wrong_option
from qaflora_edge.inference.generation import Generation
from qaflora_edge.openai.completions import (
    Shape,
    ShownTokens,
    answer_chunks,
    answer_dict,
    answer_head,
    chat_logprobs,
)
from qaflora_edge.openai.options import openai_options
from qaflora_edge.openai.tools import Tools, answer_form, chosen_tools
from qaflora_edge.prompt.calls import call_format

_EMPTY: dict[str, Any] = {"refusal": None, "annotations": []}  # that strict clients look for


class Answer(dict[str, Any]):
    """Give the fields of an answer as attributes too: answer.choices[0].message.content."""

    _MAY_LACK = frozenset(
        {"content", "reasoning_content", "role", "tool_calls", "usage", "logprobs"}
    )

    def __getattr__(self, name: str) -> Any:
        if name in self or name in self._MAY_LACK:
            return self.get(name)
        raise AttributeError(f"This part of an answer has no {name}, only {', '.join(self)}.")


def with_attributes(value: Any) -> Any:
    """Make every object in a value an Answer."""
    if isinstance(value, dict):
        return Answer({key: with_attributes(each) for key, each in value.items()})
    return [*map(with_attributes, value)] if isinstance(value, list) else value


def answer_chat(
    engine: Any,
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
    answers, told = begin_chat(engine, messages, **openai_options(options))
    shape, n = chat_shape(told), options.get("n", 1)
    if not stream:
        head = answer_head("chat.completion", engine.name)
        return Answer(with_attributes(answer_dict(head, answers, shape, n)))
    usage = bool((stream_options or {}).get("include_usage"))
    head = answer_head("chat.completion.chunk", engine.name)
    return map(with_attributes, answer_chunks(head, answers, shape, n, include_usage=usage))


def begin_chat(
    engine: Any,
    messages: Sequence[Any],
    *,
    n: int = 1,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool | None = None,
    response_format: Mapping[str, Any] | None = None,
    grammar: str | None = None,
    stop: str | Sequence[str] | None = None,
    continue_final_message: bool | None = None,
    add_generation_prompt: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Iterator[Generation], Tools | None]:
    """Begin to answer a conversation; it is weighed and prefilled when this returns.

    engine   an Engine
    options  as Engine.generate takes them

    Returns the answers, and the tools that the base was told of, which it may call.
    """
    checked, called = chosen_tools(tools, tool_choice)
    style = call_format(engine._model.chat_template) if checked else None
    told = Tools(checked, style, parallel_tool_calls is False) if style else None
    form = answer_form(grammar, response_schema(response_format), told, called)
    if told and told.is_single and len(told.format.end) > 1:  # the second call is not waited for
        stop = [*((stop,) if isinstance(stop, str) else stop or ()), told.format.end.strip()]
    tokens = engine.chat_tokens(
        messages,
        tools=checked,
        continue_final_message=continue_final_message,
        add_generation_prompt=add_generation_prompt,
        chat_template_kwargs=chat_template_kwargs,
    )
    answers = engine.answers(tokens, n, grammar=form, stop=stop, **options)
    first = next(answers)
    return itertools.chain([first], answers), told


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


def chat_shape(tools: Tools | None) -> Shape:
    """Return the shape of answers to a conversation; a tool call comes whole, as a last chunk."""
    return Shape(partial(_choice, tools=tools), partial(_choices, tools=tools))


def _choice(generation: Generation, tools: Tools | None) -> dict[str, Any]:
    text = generation.text()
    logprobs = chat_logprobs(ShownTokens(generation).take(text))
    text, calls = tools.parse(text) if tools else (text, [])
    message: dict[str, Any] = {"role": "assistant", "content": text, **_EMPTY}
    if generation.reasoning:
        message["reasoning_content"] = generation.reasoning
    if calls:
        message |= {"content": text or None, "tool_calls": calls}
    return {"message": message, "logprobs": logprobs, "finish_reason": _reason(generation, calls)}


def _choices(generation: Generation, tools: Tools | None) -> Iterator[dict[str, Any]]:
    nothing = {"logprobs": None, "finish_reason": None}
    yield {"delta": {"role": "assistant"}, **nothing}
    for thought in generation.thoughts():
        yield {"delta": {"reasoning_content": thought}, **nothing}
    shown = ShownTokens(generation)
    calls: list[dict[str, Any]] = []
    for text in tools.shown(generation, calls) if tools else generation:
        yield {"delta": {"content": text}, **nothing, "logprobs": chat_logprobs(shown.take(text))}
    if calls:
        numbered = [{"index": i, **call} for i, call in enumerate(calls)]
        yield {"delta": {"tool_calls": numbered}, **nothing}
    yield {"delta": {}, **nothing, "finish_reason": _reason(generation, calls)}


def _reason(generation: Generation, calls: list[dict[str, Any]]) -> str | None:
    is_call = bool(calls) and generation.finish_reason == "stop"
    return "tool_calls" if is_call else generation.finish_reason
