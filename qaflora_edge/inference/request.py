"""A request: prompt and weights, how tokens are chosen, what ends it early.

Prompts are checked here against the vocabulary and the context.
"""

import operator
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.config import DEFAULTS, check
from qaflora_edge.errors import ContextError, OptionError, PromptError

if TYPE_CHECKING:
    from qaflora_edge.backend.batch import Chunks
    from qaflora_edge.backend.model import Model

_PIECE_BYTES = 16  # of a token; most are shorter

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Sampling:
    """Say how tokens are chosen and when to stop: the options of `config` in group sampling.

    make_sampling checks them.

    max_tokens   None: until the context is full
    temperature  0, or below 1e-6: greedy
    seed         None: a new one each time
    stop         texts that end the answer; they are not part of it
    grammar      what the answer follows: GBNF text, or a constraint.Grammar
    logit_bias   token id, as a number or in digits -> what is added to its logit
    logprobs     None, or how many of the likeliest tokens are kept beside each one that is chosen
    reasoning_budget  tokens of a thought after which it is closed; -1: no limit
    """

    max_tokens: int | None = DEFAULTS["max_tokens"]
    temperature: float = DEFAULTS["temperature"]
    top_p: float = DEFAULTS["top_p"]
    seed: int | None = DEFAULTS["seed"]
    stop: tuple[str, ...] = DEFAULTS["stop"]
    grammar: str | None = DEFAULTS["grammar"]
    top_k: int = DEFAULTS["top_k"]
    min_p: float = DEFAULTS["min_p"]
    repeat_penalty: float = DEFAULTS["repeat_penalty"]
    frequency_penalty: float = DEFAULTS["frequency_penalty"]
    presence_penalty: float = DEFAULTS["presence_penalty"]
    logit_bias: Mapping[int | str, float] | None = DEFAULTS["logit_bias"]
    logprobs: int | None = DEFAULTS["logprobs"]
    reasoning_budget: int = DEFAULTS["reasoning_budget"]


def make_sampling(stop: Any, **options: Any) -> Sampling:
    """Make a Sampling from a caller's options: stop as one text, several or None.

    Raises OptionError for an unknown option, or a wrong value.
    """
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    check("sampling", {**options, "stop": stops})
    return Sampling(stop=tuple(stops), **options)


def one_of(weights: Any, strategy: str | None) -> Any:
    """Give weights, or else the strategy. Raises OptionError for both."""
    if weights is not None and strategy is not None:
        raise OptionError(f"Options strategy={strategy!r} and weights are given, expected one.")
    return weights if strategy is None else strategy


class Cancellation:
    """Tell whether a call was told to end: by set(), an event of the caller, or a call around it.

    around  ends this one too
    """

    def __init__(
        self, event: threading.Event | None = None, around: "Cancellation | None" = None
    ) -> None:
        self._is_set = False
        self._event = event
        self._around = around

    @property
    def is_set(self) -> bool:
        if self._is_set:
            return True
        if self._around is not None and self._around.is_set:
            return True
        return self._event is not None and self._event.is_set()

    def set(self) -> None:
        self._is_set = True


@dataclass(frozen=True)
class Thinking:
    """Say how a base writes a thought before its answer to one prompt.

    begin, end  the tags around it
    is_open     whether the prompt has begun it
    n_weighed   tokens of the prompt before a thought that the chat template began: all, if none
    closing     tokens that end a thought
    tags        token -> bytes, of tags that are tokens of their own
    """

    begin: str = "<think>"
    end: str = "</think>"
    is_open: bool = False
    n_weighed: int = 0
    closing: Sequence[int] = ()
    tags: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Request:
    """Ask for an answer: a prompt, its weights, and how tokens are chosen.

    tokens        ids of the prompt
    weights       float32 [n_adapter, n_layer], of all loaded adapters
    adapters      names of the adapters in use, for messages
    n_base        tokens that the base prefills: all but the last few, or 0. Their KV state depends
                  on nothing but the tokens.
    thinking      how the base thinks, where thoughts are kept apart from the answer
    """

    tokens: tuple[int, ...]
    weights: F32
    sampling: Sampling = field(default_factory=Sampling)
    adapters: tuple[str, ...] = ()
    n_base: int = 0
    thinking: Thinking | None = None
    cancellation: Cancellation = field(default_factory=Cancellation)

    @cached_property
    def _nothing(self) -> F32:
        return np.zeros_like(self.weights)

    @property
    def weights_key(self) -> bytes:
        """Give bytes that are equal where weights and chunks of the KV state to reuse are."""
        return b"base, %d" % self.n_tail if self.n_base else self.weights.tobytes()

    def next_weights(self, n_past: int) -> F32:
        """Give the weights of the token at this position: float32 [n_adapter, n_layer]."""
        return self._nothing if n_past < self.n_base else self.weights

    def chunk_end(self, chunks: "Chunks", at: int) -> int:
        """Find the end of the prompt's chunk that begins at `at`."""
        return chunks.end(self.tokens, at, self.n_tail)

    @property
    def n_tail(self) -> int:
        """Count the tokens after those that the base prefills."""
        return len(self.tokens) - self.n_base if self.n_base else 0


def check_size(model: "Model", texts: Iterable[str], n_ctx: int) -> None:
    """Raise ContextError for texts that cannot fit; cutting megabytes into tokens takes seconds."""
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if size > n_ctx * _PIECE_BYTES and size > n_ctx * model.longest_piece:
        raise ContextError(
            f"The prompt has {size} bytes, more than the context of {n_ctx} tokens can hold; "
            "shorten it, or raise the context (--ctx, n_ctx)."
        )


def whole(prompt: Any) -> Any:
    """Give a list in place of an iterator."""
    return list(prompt) if isinstance(prompt, Iterator) else prompt


def is_conversation(prompt: Any) -> bool:
    """Tell messages from texts and ids."""
    return isinstance(prompt, Sequence) and any(isinstance(each, Mapping) for each in prompt)


def are_many(prompt: Any) -> bool:
    """Tell a list of prompts from one: a text, messages, or a sequence of ids."""
    if isinstance(prompt, str | Mapping) or not isinstance(prompt, Iterable):
        return False  # one, if a wrong one
    return not is_conversation(prompt) and any(not isinstance(each, Integral) for each in prompt)


def token_ids(prompt: Any, what: str = "prompt") -> list[int]:
    """Check ids. Raises PromptError for what is no sequence of whole numbers."""
    try:
        if not isinstance(prompt, bytes | bytearray | Mapping):  # they would give numbers or keys
            return [operator.index(token) for token in prompt]
    except TypeError:
        pass
    raise PromptError(f"The {what} is {prompt!r:.100}, expected a text or a sequence of token ids.")


def checked_tokens(
    model: "Model", tokens: list[int], n_ctx: int, what: str = "prompt"
) -> list[int]:
    """Check tokens. Raises PromptError for none, too many, or one out of range."""
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
