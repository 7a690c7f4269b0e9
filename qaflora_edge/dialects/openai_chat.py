"""OpenAI's chat completions; and choices, usage and logprobs, which its texts share."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from msgspec import Meta, structs

from qaflora_edge.answering.generation import Generation
from qaflora_edge.ask import Ask, Chat, asked
from qaflora_edge.dialects.dialect import EVENTS, Answers, Dialect, Extras, Reply, drafting, told
from qaflora_edge.dialects.options import (
    FIXED,
    UNUSED,
    Flag,
    Messages,
    NTop,
    StreamOptions,
    Tooled,
    check_off,
    chosen_tools,
    n_logprob,
    sampling_of,
    thinking,
)
from qaflora_edge.errors import wrong_field, wrong_option
from qaflora_edge.formats.inputs import Json, Object
from qaflora_edge.inference.sequence import TokenLogprob

if TYPE_CHECKING:
    pass


class ChatBody(Tooled, frozen=True, kw_only=True):
    """Ask /v1/chat/completions."""

    messages: Messages
    continue_final_message: Flag = None
    add_generation_prompt: Flag = None
    chat_template_kwargs: Annotated[
        Json | None, Meta(title='an object, as in {"enable_thinking": false}')
    ] = None
    reasoning_effort: Annotated[str | None, Meta(title="a text such as none, low or high")] = None
    logprobs: Flag = None
    top_logprobs: NTop | None = None
    response_format: Annotated[
        Json | None, Meta(title='an object, as in {"type": "json_object"}')
    ] = None

    @property
    def effort(self) -> str | None:
        return self.reasoning_effort


# Of Engine.chat: the fields of a body, but for those of requests alone.
_FIELDS = {field.name for field in structs.fields(ChatBody)} - {
    *("model", "fusion", "lora", "stream", "stream_options", "return_progress")
}


def asks(body: ChatBody, defaults: Ask) -> list[Ask]:
    """Read a body.

    defaults  hold where it says nothing: how tokens are chosen, who is weighed
    """
    check_off("chat", body, FIXED)
    schema = response_schema(body.response_format)
    own_schema = body.json_schema  # llama-server's field
    if schema is not None and own_schema is not None:
        raise wrong_field("json_schema", own_schema, "nothing next to response_format")
    if schema is None:
        schema = own_schema
    ask = replace(
        defaults,
        prompt=conversation(body),
        sampling=sampling_of(
            body, defaults.sampling, logprobs=n_logprob(body.logprobs, body.top_logprobs)
        ),
        json_schema=defaults.json_schema if schema is None else schema,
        n=1 if body.n is None else body.n,
    )
    return [ask]


def conversation(body: ChatBody) -> Chat:
    """Read the messages, the tools, and what the chat template is told."""
    variables = body.chat_template_kwargs
    of_effort = thinking(body.reasoning_effort)
    if of_effort is not None and isinstance(variables, Mapping | None):
        variables = of_effort | dict(variables or {})
    return Chat(
        body.messages,
        chosen_tools(body.tools, body.tool_choice, body.parallel_tool_calls),
        continue_final_message=body.continue_final_message,
        add_generation_prompt=body.add_generation_prompt,
        chat_template_kwargs=variables,
    )


def response_schema(response_format: Object | None) -> Any:
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
    if kind == "json_schema":
        wrapped = response_format.get("json_schema", response_format)  # flat in responses
        schema = wrapped.get("schema") if isinstance(wrapped, Mapping) else None
        if isinstance(schema, Mapping):
            return schema
    form = "{'type': 'json_schema', 'json_schema': {'schema': ...}}"
    expected = f"{{'type': 'json_object'}} or {form}"
    raise wrong_option("response_format", response_format, expected)


CHUNKS = replace(EVENTS, done=b"data: [DONE]\n\n")


class Shape(NamedTuple):
    """Write answers in OpenAI's choices.

    prefix   of ids
    kind     what a whole answer is called
    chunk    what a chunk is called
    choice   makes the one of a whole answer
    choices  yields those of its chunks
    thought  makes that of a chunk with a thought, or with nothing
    """

    prefix: str
    kind: str
    chunk: str
    choice: Callable[[Generation, Extras], Json]
    choices: Callable[[Generation], Iterator[Json]]
    thought: Callable[[str], Json]

    def whole(self, reply: Reply, answers: Answers) -> Json:
        choices = []
        ended: list[Generation] = []
        for generation in answers:
            choice = self.choice(generation, reply.extras)
            choices.append(_choice(len(ended), choice, reply.extras))
            ended.append(generation)
        fields = {"choices": choices, "usage": usage(ended, reply)}
        return self._head(reply, self.kind) | fields | reply.extras.end(ended[0])

    def pieces(self, reply: Reply, answers: Answers) -> Iterator[Json]:
        """Yield the same as chunks, one answer after another.

        The first has the mix. That of the usage has it again, with the times.
        """
        extras = reply.extras
        options = reply.body.stream_options
        has_usage = bool(options and options.include_usage)
        ended: list[Generation] = []
        head = self._head(reply, self.chunk)
        if has_usage:
            head["usage"] = None
        mix: Json = {}
        for index, generation in enumerate(answers):
            if index == 0:  # the answers share one draft
                mix = extras.mix(generation.fusion)
                for piece in drafting(generation, extras):
                    thought = piece.text if piece.kind == "thought" else ""
                    choice = _choice(index, self.thought(thought), extras)
                    if piece.kind == "draft":
                        mix = {"fusion": mix.get("fusion", {}) | {"draft": piece.text}}
                    yield head | {"choices": [choice]} | mix
                    mix = {}
            for part in self.choices(generation):
                choices = [_choice(index, part, extras)]
                yield head | {"choices": choices} | mix
                mix = {}
            ended.append(generation)
        if has_usage:
            fields = {"choices": [], "usage": usage(ended, reply)}
            yield head | fields | extras.end(ended[0])

    def progress(self, reply: Reply, progress: Json) -> Json:
        """Make the chunk that says how far a prompt is, as llama-server does."""
        return self._head(reply, self.chunk) | {"choices": [], "prompt_progress": progress}

    def _head(self, reply: Reply, kind: str) -> Json:
        return {
            "id": f"{self.prefix}-{reply.id}",
            "object": kind,
            "created": int(reply.created_s),
            "model": reply.model,
        }


def _choice(index: int, choice: Json, extras: Extras) -> Json:
    reason = extras.reason(choice["finish_reason"])
    return {"index": index} | choice | {"finish_reason": reason}


def usage(ended: Sequence[Generation], reply: Reply) -> Json:
    """Count tokens of answers; a prompt, and its draft, count once for all of its answers."""
    firsts = ended[:: reply.asks[0].n]
    n_prompt = sum(generation.n_prompt for generation in firsts)
    n_cached = sum(generation.n_cached for generation in firsts)
    n_draft = sum(generation.n_draft for generation in firsts)
    n_completion = n_draft + sum(generation.n_completion for generation in ended)
    n_thought = sum(generation.n_thought for generation in ended)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_completion,
        "total_tokens": n_prompt + n_completion,
        "prompt_tokens_details": {"cached_tokens": n_cached},
        "completion_tokens_details": {"reasoning_tokens": n_thought},
    }


class ShownTokens:
    """Hand out tokens as their text is shown; those of thoughts and of a stop text never are."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._n_token = 0  # handed out
        self._n_byte = 0  # of the tokens handed out
        self._n_text = 0  # bytes shown

    def take(self, text: str) -> list[TokenLogprob] | None:
        """Take the tokens of a next piece of text; None where nobody asks for them."""
        if not self._generation.wants_logprobs:
            return None
        self._n_text += len(text.encode("utf-8"))
        taken = []
        n_before = self._generation.n_thought + self._n_token  # thoughts came before any text
        for entry in self._generation.logprobs[n_before:]:
            if self._n_byte >= self._n_text:
                break
            taken.append(entry)
            self._n_byte += entry.n_shown
        self._n_token += len(taken)
        return taken


def token_text(entry: TokenLogprob) -> str:
    return entry.data.decode("utf-8", "replace")


def _whole(generation: Generation, extras: Extras) -> Json:
    text = generation.text()
    logprobs = chat_logprobs(ShownTokens(generation).take(text))
    calls: list[Json] = []
    if generation.calls:
        text, calls = generation.calls.parse(text)
    # Strict clients look for the third and the fourth.
    message: Json = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
    if thought := extras.thought_of(generation) or generation.reasoning:
        message["reasoning_content"] = thought
    if calls:
        message["content"] = text or None
        message["tool_calls"] = calls
    reason = _reason(generation, is_call=bool(calls))
    return {"message": message, "logprobs": logprobs, "finish_reason": reason}


def _delta(delta: Any, logprobs: Any = None, finish_reason: str | None = None) -> Json:
    return {"delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _thought(thought: str) -> Json:
    return _delta({"reasoning_content": thought} if thought else {"role": "assistant"})


def _chunks(generation: Generation) -> Iterator[Json]:
    yield _delta({"role": "assistant"})
    shown = ShownTokens(generation)
    is_call = False
    for piece in told(generation):
        if piece.kind == "thought":
            yield _thought(piece.text)
        elif piece.kind == "text":
            yield _delta({"content": piece.text}, chat_logprobs(shown.take(piece.text)))
        else:
            is_call = True
            yield _delta({"tool_calls": [piece.call]})
    yield _delta({}, None, _reason(generation, is_call=is_call))


SHAPE = Shape("chatcmpl", "chat.completion", "chat.completion.chunk", _whole, _chunks, _thought)
CHAT = Dialect(
    "/v1/chat/completions",
    "Answer a conversation.",
    ChatBody,
    asks,
    SHAPE.whole,
    SHAPE.pieces,
    CHUNKS,
    SHAPE.progress,
)


def arguments_of(call: Object) -> Json | None:
    """Read a call's arguments; None where they are cut, or no object."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (ValueError, RecursionError):
        return None
    return arguments if isinstance(arguments, dict) else None


def _reason(generation: Generation, *, is_call: bool) -> str | None:
    is_done = generation.finish_reason == "stop"
    return "tool_calls" if is_call and is_done else generation.finish_reason


def chat_logprobs(entries: Sequence[TokenLogprob] | None) -> Any:
    if entries is None:
        return None
    content = []
    for entry in entries:
        token = _token(entry)
        token["top_logprobs"] = [_token(likely) for likely in entry.top]
        content.append(token)
    return {"content": content, "refusal": None}


def _token(entry: TokenLogprob) -> Json:
    return {"token": token_text(entry), "logprob": entry.logprob, "bytes": list(entry.data)}


class Answer(Json):
    """Give the fields of an answer as attributes too: answer.choices[0].message.content."""

    _MAY_LACK = frozenset(
        {"content", "reasoning_content", "role", "tool_calls", "usage", "logprobs"}
    )

    def __getattr__(self, name: str) -> Any:
        if name in self or name in self._MAY_LACK:
            return self.get(name)
        raise AttributeError(f"This part of an answer has no {name}, only {', '.join(self)}.")


def with_attributes(value: Any) -> Any:
    if isinstance(value, dict):
        return Answer({key: with_attributes(part) for key, part in value.items()})
    return [*map(with_attributes, value)] if isinstance(value, list) else value


def answer_chat(
    engine: Any,
    messages: Sequence[Any],
    *,
    stream: bool,
    stream_options: Object | None = None,
    **options: Any,
) -> Answer | Iterator[Answer]:
    """Answer as Engine.chat does: a dict, or chunks with stream; the first answer has begun."""
    if not isinstance(stream_options, Mapping | None):
        raise wrong_option(
            "stream_options", stream_options, "an object such as {'include_usage': True}"
        )
    has_usage = bool(stream_options and stream_options.get("include_usage"))
    fields: Json = {"messages": messages, "stream": stream}
    keywords = {}  # of Engine.generate
    for name, value in options.items():
        if name in _FIELDS:
            fields[name] = value
        elif value is not None and name not in UNUSED:
            keywords[name] = value
    body = ChatBody(stream_options=StreamOptions(include_usage=has_usage), **fields)
    questions = asks(body, asked((), **keywords))
    answers = engine.submit_all(questions[0])
    answers = itertools.chain([next(answers)], answers)
    reply = Reply(body, engine.name, questions)
    if stream:
        return map(with_attributes, SHAPE.pieces(reply, answers))
    return Answer(with_attributes(SHAPE.whole(reply, answers)))
