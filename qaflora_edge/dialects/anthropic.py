"""Anthropic's messages: their bodies, and a generation as a message or its events."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from qaflora_edge.answering.generation import Generation
from qaflora_edge.ask import Ask, Chat, Tools
from qaflora_edge.dialects import openai_chat
from qaflora_edge.dialects.dialect import (
    NAMED_EVENTS,
    AnswerBlock,
    Answers,
    BlockEvent,
    Dialect,
    Reply,
    block_events,
    drafting,
    told,
)
from qaflora_edge.dialects.options import (
    MAX_MESSAGES,
    MAX_STOPS,
    MAX_TOOLS,
    Count,
    Flag,
    Text,
    Weighed,
    chosen_tools,
    said,
    thinking,
)
from qaflora_edge.errors import wrong_field
from qaflora_edge.formats.inputs import Json
from qaflora_edge.prompt.calls import CallPart


class TextBlock(Struct, tag="text"):
    """Hold a text."""

    text: str


class ThinkingBlock(Struct, tag="thinking"):
    """Hold a thought of an earlier answer."""

    thinking: str


class RedactedThinkingBlock(Struct, tag="redacted_thinking"):
    """Hold a thought that only their own models can read."""


class ToolUseBlock(Struct, tag="tool_use"):
    """Hold a call of a tool in an earlier answer."""

    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Struct, tag="tool_result"):
    """Hold what a tool gave."""

    tool_use_id: str
    content: str | list[TextBlock] | None = None


Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock


class Message(Struct):
    """Hold a turn: a text, or blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(Struct, kw_only=True):
    """Describe a tool of the client; those of their server are of other types."""

    type: Literal["custom"] | None = None
    name: str
    input_schema: dict[str, Any]
    description: str | None = None


class ToolChoice(Struct):
    """Say whether a tool may or has to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct):
    """Say whether to think first: any type but `disabled` does."""

    type: str
    budget_tokens: Count | None = None


class OutputFormat(Struct):
    """Give the schema of an answer."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct):
    """Say how an answer is written; their `effort` has no effect."""

    format: OutputFormat | None = None


class TokensBody(Weighed, frozen=True, kw_only=True):
    """Ask /v1/messages/count_tokens."""

    messages: Annotated[
        list[Message],
        Meta(
            title=f"a list of messages, {MAX_MESSAGES} at most",
            min_length=1,
            max_length=MAX_MESSAGES,
        ),
    ]
    system: str | list[TextBlock] | None = None
    tools: (
        Annotated[
            list[Tool], Meta(title=f"a list of {MAX_TOOLS} tools at most", max_length=MAX_TOOLS)
        ]
        | None
    ) = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None

    @property
    def effort(self) -> bool | None:
        return None if self.thinking is None else self.thinking.type != "disabled"


class MessagesBody(TokensBody, frozen=True, kw_only=True):
    """Ask /v1/messages."""

    max_tokens: Count
    stream: Flag = None
    stop_sequences: (
        Annotated[
            list[Text], Meta(title=f"a list of {MAX_STOPS} texts at most", max_length=MAX_STOPS)
        ]
        | None
    ) = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    output_config: OutputConfig | None = None

    @property
    def is_stream(self) -> bool:
        return bool(self.stream)


def asks(body: MessagesBody, defaults: Ask) -> list[Ask]:
    """Read a body; the defaults hold where it says nothing."""
    options: Json = {
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences,
    }
    if body.thinking is not None:
        options["reasoning_budget"] = body.thinking.budget_tokens
    schema: Any = defaults.json_schema
    if body.output_config is not None and body.output_config.format is not None:
        schema = body.output_config.format.schema
    ask = replace(
        defaults,
        prompt=conversation(body),
        sampling=defaults.sampling.updated(said(options)),
        json_schema=schema,
    )
    return [ask]


def conversation(body: TokensBody) -> Chat:
    """Read the messages and the tools, in OpenAI's shape."""
    messages: list[Json] = []
    if body.system:
        messages.append({"role": "system", "content": _joined(body.system)})
    for number, message in enumerate(body.messages):
        if isinstance(message.content, str):
            messages.append({"role": message.role, "content": message.content})
        elif message.role == "assistant":
            messages.append(_answer(number, message.content))
        else:
            messages += _turns(number, message.role, message.content)
    return Chat(messages, _tools(body), chat_template_kwargs=thinking(body.effort))


def _joined(content: str | Iterable[TextBlock] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(block.text for block in content)


def _answer(number: int, blocks: Sequence[Block]) -> Json:
    texts = []
    thoughts = []
    calls = []
    for i, block in enumerate(blocks):
        match block:
            case TextBlock(text=text):
                texts.append(text)
            case ThinkingBlock(thinking=thought):
                thoughts.append(thought)
            case ToolUseBlock(id=call_id, name=name, input=arguments):
                function = {"name": name, "arguments": arguments}
                calls.append({"id": call_id, "type": "function", "function": function})
            case RedactedThinkingBlock():
                pass
            case _:
                raise _misplaced(number, i, block, "an assistant")
    message: Json = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _turns(number: int, role: str, blocks: Sequence[Block]) -> list[Json]:
    """Read a user's blocks: texts in a row are one message, and each result of a tool is one."""
    turns: list[Json] = []
    for i, block in enumerate(blocks):
        match block:
            case TextBlock(text=text):
                if not turns or turns[-1]["role"] != role:
                    turns.append({"role": role, "content": ""})
                turns[-1]["content"] += text
            case ToolResultBlock(tool_use_id=call_id, content=content):
                result = {"role": "tool", "tool_call_id": call_id, "content": _joined(content)}
                turns.append(result)
            case _:
                raise _misplaced(number, i, block, f"a {role}")
    return turns


def _misplaced(number: int, i: int, block: Block, who: str) -> Exception:
    kind = block.__struct_config__.tag
    return wrong_field(f"messages[{number}].content[{i}].type", kind, f"a block of {who}")


def _tools(body: TokensBody) -> Tools | None:
    tools = []
    for tool in body.tools or ():
        function = {
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.input_schema,
        }
        tools.append({"type": "function", "function": function})
    choice = body.tool_choice
    if choice is None:
        return chosen_tools(tools, None)
    names = [tool.name for tool in body.tools or ()]
    chosen: Any = choice.type
    if choice.type == "tool":
        if choice.name not in names:
            raise wrong_field("tool_choice.name", choice.name, f"the name of a tool: {names}")
        chosen = {"type": "function", "function": {"name": choice.name}}
    elif choice.type == "any":
        if not names:
            raise wrong_field("tool_choice.type", "any", "tools to choose from")
        chosen = "required"
    return chosen_tools(tools, chosen, not choice.disable_parallel_tool_use)


def _head(reply: Reply) -> Json:
    """Make a message that is in progress."""
    return {
        "id": f"msg_{reply.id.hex}",
        "type": "message",
        "role": "assistant",
        "model": reply.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def whole(reply: Reply, answers: Answers) -> Json:
    """Make the whole message."""
    generation = next(answers)
    message = openai_chat.SHAPE.choice(generation, reply.extras)["message"]
    content: list[Json] = []
    if "reasoning_content" in message:
        content.append(_thinking_block(message["reasoning_content"]))
    calls = message.get("tool_calls", ())
    text = message["content"]
    if text or not calls:
        content.append(_text_block(text))
    for call in calls:
        arguments = openai_chat.arguments_of(call) or {}
        content.append(_tool_block(call, arguments))
    fields = {"content": content, "usage": _usage(generation)}
    stop = _stop(generation, is_call=bool(calls))
    return _head(reply) | fields | stop | reply.extras.mix(generation.fusion)


def pieces(reply: Reply, answers: Answers) -> Iterator[Json]:
    """Yield an answer as events. Pieces of a relay's draft stand in pings, which clients skip."""
    generation = next(answers)
    extras = reply.extras
    begun = _head(reply) | {"usage": _usage(generation)} | extras.mix(generation.fusion)
    yield {"type": "message_start", "message": begun}
    if not extras.drafts_are_thoughts:
        for draft in drafting(generation, extras):
            yield {"type": "ping", "fusion": {"draft": draft.text}}
    is_call = False
    for event in block_events(told(generation, extras)):
        is_call = is_call or event.block.kind == "call"
        yield _event(event)
    end = {"type": "message_delta", "delta": _stop(generation, is_call=is_call)}
    yield end | {"usage": _usage(generation)} | extras.mix(generation.fusion)
    yield {"type": "message_stop"}


def _usage(generation: Generation) -> Json:
    return {
        "input_tokens": generation.n_prompt - generation.n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": generation.n_cached,
        "output_tokens": generation.n_draft + generation.n_completion,
    }


def _stop(generation: Generation, *, is_call: bool) -> Json:
    """Say why an answer ended; their word for the time limit is that for length."""
    reason = "end_turn"
    stop = None
    if generation.finish_reason != "stop":
        reason = "max_tokens"
    elif is_call:
        reason = "tool_use"
    elif generation.stop is not None:
        reason = "stop_sequence"
        stop = generation.stop
    return {"stop_reason": reason, "stop_sequence": stop}


# Kind of a block -> the type of what is added to it, and the field that has it.
_DELTAS = {
    "thought": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}


def _event(event: BlockEvent) -> Json:
    block = event.block
    fields: Json = {"type": f"content_block_{event.name}", "index": block.index}
    if event.name == "start":
        fields["content_block"] = _content(block)
    elif event.name == "delta":
        kind, field = _DELTAS[block.kind]
        fields["delta"] = {"type": kind, field: event.text}
    return fields


def _content(block: AnswerBlock) -> Json:
    if block.kind == "thought":
        return _thinking_block(block.text)
    if block.kind == "text":
        return _text_block(block.text)
    return _tool_block(block.call, {})


def _thinking_block(thought: str) -> Json:
    return {"type": "thinking", "thinking": thought, "signature": ""}


def _text_block(text: str) -> Json:
    return {"type": "text", "text": text}


def _tool_block(call: CallPart, arguments: Json) -> Json:
    name = call["function"]["name"]
    return {"type": "tool_use", "id": call["id"], "name": name, "input": arguments}


MESSAGES = Dialect(
    "/v1/messages",
    "Answer as a message, in the shape of Anthropic.",
    MessagesBody,
    asks,
    whole,
    pieces,
    replace(NAMED_EVENTS, ping=b'event: ping\ndata: {"type": "ping"}\n\n'),
)
