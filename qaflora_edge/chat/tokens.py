"""Conversations: the base's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2

from qaflora_edge.backend.model import Model
from qaflora_edge.chat import template as templates
from qaflora_edge.chat.messages import Message, checked_messages
from qaflora_edge.chat.typed import TypedText
from qaflora_edge.errors import ChatTemplateError, QafloraError
from qaflora_edge.openai.tools import BEGIN


def chat_tokens(
    model: Model, messages: Sequence[Message], *, tools: Sequence[Any] | None = None
) -> list[int]:
    """Token ids of a conversation under the base's template, ready for an answer.

    What a person typed is data: a control token spelt out in a message stays text.

    Raises ChatTemplateError without a usable template, or for tools where it has none; PromptError
    for malformed messages.
    """
    checked = checked_messages(messages)
    template = _template(model)
    try:
        typed = TypedText(model, templates.literal_text(template), [checked, tools])
        marked = [
            typed.marked(message, is_assistant=message["role"] == "assistant")
            for message in checked
        ]
        variables: dict[str, Any] = {"messages": marked}
        if tools:
            _check_tools(model, template)
            variables["tools"] = typed.marked(tools)
        text = templates.render(
            template,
            bos_token=_special(model, model._lib.llama_vocab_bos(model.vocab)),
            eos_token=_special(model, model._lib.llama_vocab_eos(model.vocab)),
            **variables,
        )
    except QafloraError:
        raise
    except Exception as err:  # a template is a program of the file's author: anything may come
        raise ChatTemplateError(
            f"The chat template of {model.path.name} refused the conversation: {_reason(err)}. "
            "Give the prompt as plain text (--raw-prompt), or change the messages."
        ) from err
    tokens = typed.tokens(text)
    bos = model._lib.llama_vocab_bos(model.vocab)
    if model._lib.llama_vocab_get_add_bos(model.vocab) and tokens[:1] != [bos]:
        tokens.insert(0, bos)
    return tokens


def _template(model: Model) -> str:
    if not model.chat_template:
        raise ChatTemplateError(
            f"The base {model.path.name} has no chat template (tokenizer.chat_template is "
            "missing); give the prompt as plain text (--raw-prompt), or use an instruct model."
        )
    return str(model.chat_template)


def _check_tools(model: Model, template: str) -> None:
    if "tools" not in templates.variables(template):
        raise ChatTemplateError(
            f"The chat template of {model.path.name} knows no tools (it never reads `tools`), "
            "expected one that does, as Qwen2.5's; ask without tools, or use such a base."
        )
    if BEGIN not in templates.literal_text(template):
        raise ChatTemplateError(
            f"The chat template of {model.path.name} has tools be called in a form that we do not "
            f"read (it never writes {BEGIN}), expected Qwen2.5's; ask without tools, or use such a "
            "base."
        )


def _special(model: Model, token: int) -> str:
    return "" if token < 0 else model.piece(token, special=True).decode("utf-8", "replace")


def _reason(error: Exception) -> str:
    """What went wrong in a template, in one line."""
    if isinstance(error, RecursionError):
        return "too many expressions in each other"
    text = (str(error).strip().split("\n")[0] or type(error).__name__)[:300].rstrip(".")
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {text}"
    return text
