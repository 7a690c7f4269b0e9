"""OpenAI's chat completions."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qaflora_edge.ask import Ask, Chat, asked
from qaflora_edge.dialects.openai_shapes import (
    Shape,
    ShownTokens,
    answer_chunks,
    answer_dict,
    answer_head,
    chat_logprobs,
)
from qaflora_edge.dialects.options import (
    ALIASES,
    FIXED,
    UNUSED,
    chosen_tools,
    sampling_of,
    thinking,
)
from qaflora_edge.errors import wrong_option
from qaflora_edge.inference.generation import Generation

if TYPE_CHECKING:
    from qaflora_edge.prompt.calls import CallPart

_FIELDS = frozenset(
    {"n", "tools", "tool_choice", "parallel_tool_calls", "response_format", "reasoning_effort"}
    | {"continue_final_message", "add_generation_prompt", "chat_template_kwargs"}
    | {"logprobs", "top_logprobs", *ALIASES, *FIXED, *UNUSED}
)
_EMPTY: dict[str, Any] = {"refusal": None, "annotations": []}  # that strict clients look for


def ask(body: Mapping[str, Any], defaults: Ask) -> Ask:
    """Read a body.

    defaults  hold where it says nothing: how tokens are chosen, who is weighed

    Raises OptionError for what cannot be followed.
    """
    schema = response_schema(body.get("response_format"))
    return replace(
        defaults,
        prompt=conversation(body),
        sampling=sampling_of(body, defaults.sampling),
        json_schema=defaults.json_schema if schema is None else schema,
        n=body.get("n", 1),
    )


def conversation(body: Mapping[str, Any]) -> Chat:
    """Read the messages, the tools, and what the chat template is told."""
    variables = body.get("chat_template_kwargs")
    effort = body.get("reasoning_effort")
    if effort is not None and isinstance(variables, Mapping | None):
        variables = {**thinking(effort), **(variables or {})}
    return Chat(
        body["messages"],
        chosen_tools(body.get("tools"), body.get("tool_choice"), body.get("parallel_tool_calls")),
        continue_final_message=body.get("continue_final_message"),
        add_generation_prompt=body.get("add_generation_prompt"),
        chat_template_kwargs=variables,
    )


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


def _choice(generation: Generation) -> dict[str, Any]:
    text = generation.text()
    logprobs = chat_logprobs(ShownTokens(generation).take(text))
    calls: list[dict[str, Any]] = []
    if generation.calls:
        text, calls = generation.calls.parse(text)
    message: dict[str, Any] = {"role": "assistant", "content": text, **_EMPTY}
    if generation.reasoning:
        message["reasoning_content"] = generation.reasoning
    if calls:
        message["content"] = text or None
        message["tool_calls"] = calls
    reason = _reason(generation, is_call=bool(calls))
    return {"message": message, "logprobs": logprobs, "finish_reason": reason}


def _thought(thought: str) -> dict[str, Any]:
    delta = {"reasoning_content": thought} if thought else {"role": "assistant"}
    return {"delta": delta, "logprobs": None, "finish_reason": None}


def _choices(generation: Generation) -> Iterator[dict[str, Any]]:
    """Yield the choices of chunks; calls of tools come as they are written."""
    nothing = {"logprobs": None, "finish_reason": None}
    yield {"delta": {"role": "assistant"}, **nothing}
    for thought in generation.thoughts():
        yield _thought(thought)
    shown = ShownTokens(generation)
    is_call = False
    for part in answer_parts(generation):
        if isinstance(part, str):
            logprobs = chat_logprobs(shown.take(part))
            yield {"delta": {"content": part}, **nothing, "logprobs": logprobs}
        else:
            is_call = True
            yield {"delta": {"tool_calls": [part]}, **nothing}
    yield {"delta": {}, **nothing, "finish_reason": _reason(generation, is_call=is_call)}


SHAPE = Shape(_choice, _choices, _thought)


def answer_parts(generation: Generation) -> "Iterator[str | CallPart]":
    """Yield an answer's text, and its calls of tools in parts."""
    return generation.calls.read(generation) if generation.calls else generation


def _reason(generation: Generation, *, is_call: bool) -> str | None:
    is_done = generation.finish_reason == "stop"
    return "tool_calls" if is_call and is_done else generation.finish_reason


# Engine.chat


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
    body = {name: value for name, value in options.items() if name in _FIELDS}
    ours = {k: v for k, v in options.items() if k not in _FIELDS and v is not None}
    question = ask({**body, "messages": messages}, asked((), **ours))
    answers = engine.submit_all(question)
    answers = itertools.chain([next(answers)], answers)
    if not stream:
        head = answer_head("chat.completion", engine.name)
        return Answer(with_attributes(answer_dict(head, answers, SHAPE, question.n)))
    head = answer_head("chat.completion.chunk", engine.name)
    usage = bool((stream_options or {}).get("include_usage"))
    chunks = answer_chunks(head, answers, SHAPE, question.n, include_usage=usage)
    return map(with_attributes, chunks)
