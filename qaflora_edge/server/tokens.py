"""Routes that answer nothing: the weights of a prompt, and its tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from qaflora_edge.chat.messages import checked_messages
from qaflora_edge.engine import Engine
from qaflora_edge.errors import PromptError
from qaflora_edge.inference.prompts import Prompt, check_size, checked_tokens, token_ids
from qaflora_edge.server import fields
from qaflora_edge.server.body import json_body
from qaflora_edge.server.options import MAX_LIGHT_CHARS, ServerOptions
from qaflora_edge.server.refusals import Params, wrong_field
from qaflora_edge.server.stream import encoded
from qaflora_edge.server.work import Outlet, Work

MAX_TOKENS = 1 << 20


def spelt(engine: Engine, prompt: Prompt) -> str:
    """The text of a prompt, control tokens spelt out. Raises PromptError for what is no token."""
    if isinstance(prompt, str):
        return prompt
    with engine._call():
        tokens = checked_tokens(engine._model, token_ids(prompt), MAX_TOKENS)
        return engine._model.detokenize(tokens, special=True).decode("utf-8", "replace")


class _RawChat:
    """An Engine that takes a conversation line by line, without the base's template."""

    def __init__(self, engine: Engine) -> None:
        self.name, self.answers, self._engine = engine.name, engine.answers, engine

    def chat_tokens(
        self, messages: Sequence[Any], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        if tools:
            raise wrong_field("tools", list(tools), "none: chats have no template (--raw-prompt)")
        lines = [message["content"] for message in checked_messages(messages)]
        return self._engine.tokenize("\n".join(lines) + "\n")


def chat_of(engine: Engine, options: ServerOptions) -> Engine | _RawChat:
    """What makes tokens of a conversation, and answers it."""
    return _RawChat(engine) if options.raw_prompt else engine


def check_messages_size(engine: Engine, messages: Sequence[Any]) -> None:
    """Raise ContextError for messages that cannot fit, before a template is filled with them."""
    texts: list[str] = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, list) else [{"text": content}]
        found = [part.get("text") for part in parts if isinstance(part, Mapping)]
        texts += [text for text in found if isinstance(text, str)]
    check_texts_size(engine, texts)


def check_texts_size(engine: Engine, texts: Sequence[str]) -> None:
    """Raise ContextError for texts that cannot fit together."""
    with engine._call():
        check_size(engine._model, texts, engine.n_ctx)


def token_list(engine: Engine, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
    """Token ids of a text of any length."""
    with engine._call():
        return engine._model.tokenize(text, add_special=add_special, parse_special=parse_special)


async def weights(request: Request) -> Response:
    """POST /v1/weights"""
    body = await json_body(request)
    state = request.app.state
    bundle, strategy = state.shelf.find(body.get("model"))
    fusion = fields.read_fusion(body, strategy, bundle.adapters)
    chosen = fusion.weights
    if not isinstance(chosen, str | None):
        name = "fusion.weights" if body.get("lora") is None else "lora"
        raise wrong_field(name, chosen, "a strategy: these are known already")
    prompt: Any
    prompt, is_chat = body.get("prompt"), body.get("messages") is not None
    if is_chat == (prompt is not None):
        raise wrong_field("prompt", prompt, "either prompt or messages")
    if not is_chat and not isinstance(prompt, str | list):
        raise wrong_field("prompt", prompt, "a text or token ids")
    messages = fields.messages(body) if is_chat else []

    def compute(engine: Engine, out: Outlet) -> None:
        check_messages_size(engine, messages)
        check_texts_size(engine, [prompt] if isinstance(prompt, str) else [])
        asked = chat_of(engine, state.options)
        tokens: Any = asked.chat_tokens(messages) if is_chat else engine.tokenize(prompt)
        found = engine.weights(tokens, strategy=chosen, adapters=fusion.adapters, cancel=out.cancel)
        out.facts |= {"strategy": found.strategy, "probe_ms": found.probe_ms}
        out.facts["prompt_tokens"] = found.prompt_tokens
        out.send(fusion.headers(found))
        out.send(encoded(found.to_dict()))

    params: Params = {} if is_chat else {PromptError: "prompt"}
    return Work(request, body, bundle, compute, params=params)


async def tokenize(request: Request) -> Response:
    """POST /tokenize"""
    body = await json_body(request)
    state = request.app.state
    bundle, _ = state.shelf.find(body.get("model"))
    text: Any = body.get("content")
    is_chat = body.get("messages") is not None
    if is_chat == isinstance(text, str):
        raise wrong_field("content", text, "a text, or else messages")
    messages = fields.messages(body) if is_chat else []
    add_special = fields.flag(body, "add_special")
    parse_special = body.get("parse_special") is None or fields.flag(body, "parse_special")
    with_pieces = fields.flag(body, "with_pieces")

    def compute(engine: Engine, out: Outlet) -> None:
        if is_chat:
            check_messages_size(engine, messages)
            found = chat_of(engine, state.options).chat_tokens(messages)
        else:
            found = token_list(engine, text, add_special=add_special, parse_special=parse_special)
        tokens: Sequence[Any] = found
        if with_pieces:
            tokens = [{"id": each, "piece": _piece(engine, each)} for each in found]
        out.send(encoded({"tokens": tokens}))

    is_light = is_chat or len(text) <= MAX_LIGHT_CHARS
    return Work(request, body, bundle, compute, is_light=is_light)


def _piece(engine: Engine, token: int) -> str | list[int]:
    """The text of a token; its bytes where they are no text, as llama-server has it."""
    data = engine._model.piece(token, special=True)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return list(data)


async def detokenize(request: Request) -> Response:
    """POST /detokenize"""
    body = await json_body(request)
    bundle, _ = request.app.state.shelf.find(body.get("model"))
    tokens = body.get("tokens")
    if not isinstance(tokens, list):
        raise wrong_field("tokens", tokens, "a list of token ids")

    def compute(engine: Engine, out: Outlet) -> None:
        out.send(encoded({"content": spelt(engine, tokens) if tokens else ""}))

    return Work(request, body, bundle, compute, is_light=True, params={PromptError: "tokens"})
