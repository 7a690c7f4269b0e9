"""A request: a prompt with its weights, and what ends it early."""

import threading
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.ask import Sampling, Thinking

if TYPE_CHECKING:
    from qaflora_edge.backend.batch import Chunks


class Cancellation:
    """Tell whether a call was told to end: by set(), or an event of the caller."""

    def __init__(self, event: threading.Event | None = None) -> None:
        self._is_set = False
        self._event = event

    @property
    def is_set(self) -> bool:
        return self._is_set or (self._event is not None and self._event.is_set())

    def set(self) -> None:
        self._is_set = True


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
        """Give bytes that are equal where the weights of the KV state to reuse are."""
        return b"base" if self.n_base else self.weights.tobytes()

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
