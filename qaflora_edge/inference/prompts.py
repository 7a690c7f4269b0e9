"""Prompts: text or token ids, checked against the context and the vocabulary."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qaflora_edge.backend.model import Model
from qaflora_edge.errors import ContextError, PromptError

_PIECE_BYTES = 16  # of a token; most are shorter

Prompt = str | Sequence[int]


def prompt_tokens(model: Model, prompt: Prompt, n_ctx: int, *, parse_special: bool) -> list[int]:
    """Token ids of text as it is, with BOS where the base asks for it, or of ids.

    Raises PromptError when it is empty, longer than n_ctx, or has an id out of range.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("The prompt is empty; give at least one character.")
        check_size(model, [prompt], n_ctx)
        tokens = model.tokenize(prompt, add_special=True, parse_special=parse_special)
    else:
        tokens = token_ids(prompt)
    return checked_tokens(model, tokens, n_ctx)


def check_size(model: Model, texts: Iterable[str], n_ctx: int) -> None:
    """Raise ContextError for texts that cannot fit; cutting megabytes into tokens takes seconds."""
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if size > n_ctx * _PIECE_BYTES and size > n_ctx * model.longest_piece:
        raise ContextError(
            f"The prompt has {size} bytes, more than the context of {n_ctx} tokens can hold; "
            "shorten it, or raise the context (--ctx, n_ctx)."
        )


def token_ids(prompt: Any, what: str = "prompt") -> list[int]:
    """Ids of what is no text. Raises PromptError when it is no sequence of whole numbers."""
    try:
        if not isinstance(prompt, bytes | bytearray | Mapping):  # they would give numbers or keys
            return [operator.index(token) for token in prompt]
    except TypeError:
        pass
    raise PromptError(f"The {what} is {prompt!r:.100}, expected a text or a sequence of token ids.")


def checked_tokens(model: Model, tokens: list[int], n_ctx: int, what: str = "prompt") -> list[int]:
    """The same tokens; PromptError when there are none, too many, or one is out of range."""
    if not tokens:
        raise PromptError("The prompt is empty; give at least one token.")
    if len(tokens) > n_ctx:
        raise ContextError(
            f"The {what} has {len(tokens)} tokens, the context {n_ctx}; shorten it, "
            f"or raise the context (--ctx, n_ctx; this base was trained for "
            f"{model.n_ctx_train})."
        )
    for i, token in enumerate(tokens):
        if not 0 <= token < model.n_vocab:
            raise PromptError(
                f"Token {i} of the {what} is {token}, expected an id from 0 to {model.n_vocab - 1}."
            )
    return tokens
