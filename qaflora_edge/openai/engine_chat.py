"""Engine.chat: a conversation answered in OpenAI's shape."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from qaflora_edge.chat.messages import Message
from qaflora_edge.inference.generation import Generation
from qaflora_edge.openai.call_options import openai_options
from qaflora_edge.openai.completions import completion_chunks, completion_dict, response_schema
from qaflora_edge.openai.tools import chosen_tools, one_form


class EngineChat:
    """What an Engine has of OpenAI's chat completions, over its own chat_tokens and answers."""

    if TYPE_CHECKING:

        @property
        def name(self) -> str: ...

        def chat_tokens(
            self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = ()
        ) -> list[int]: ...

        def answers(self, prompt: Any, n: int, **options: Any) -> Iterator[Generation]: ...

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **options: Any
    ) -> dict[str, Any]: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **options: Any
    ) -> Iterator[dict[str, Any]]: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: bool, **options: Any
    ) -> dict[str, Any] | Iterator[dict[str, Any]]: ...
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: bool = False,
        n: int = 1,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        response_format: Mapping[str, Any] | None = None,
        stream_options: Mapping[str, Any] | None = None,
        grammar: str | None = None,
        **options: Any,
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Answer a conversation in OpenAI's shape: a dict, or chunks with stream=True.

        n                answers (choices); the conversation is weighed and read once
        tools, tool_choice  for bases whose template reads tools and that write <tool_call>
        response_format  {"type": "json_object"}, or {"type": "json_schema", "json_schema": ...}
        stream_options   {"include_usage": True} ends the chunks with one of the usage
        options          as generate takes them, and OpenAI's others where they change nothing

        The conversation is weighed and read before this returns.
        """
        schema = response_schema(response_format)
        told, call_grammar = chosen_tools(tools, tool_choice)
        grammar = one_form(grammar, schema, call_grammar)
        tokens = self.chat_tokens(messages, tools=told)
        options = {**openai_options(options), "grammar": grammar, "json_schema": schema}
        answers = self.answers(tokens, n, **options)
        answers = itertools.chain([next(answers)], answers)
        if not stream:
            return completion_dict(self.name, answers, has_tools=bool(told))
        usage = bool((stream_options or {}).get("include_usage"))
        return completion_chunks(self.name, answers, has_tools=bool(told), include_usage=usage)
