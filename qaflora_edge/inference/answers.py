"""Answers: prompts read under weights, and what is generated after them."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model
from qaflora_edge.errors import BackendError, BusyError
from qaflora_edge.inference.generation import Generation, Timings, generate_text, generate_tokens
from qaflora_edge.inference.lifetime import Lifetime
from qaflora_edge.inference.sampler import Sampler
from qaflora_edge.weighing.numbers import FusionWeights

F32 = NDArray[np.float32]


class Answers:
    """The context that answers; the last prompt that it read is the one that it can go on with.

    loaded  names of all adapters of the pack, of which a FusionWeights may have some
    """

    def __init__(
        self, model: Model, context: Context, loaded: Sequence[str], lifetime: Lifetime
    ) -> None:
        self._model, self._context, self._loaded = model, context, tuple(loaded)
        self._lifetime = lifetime
        self._turn = self._cancelled = 0
        self._prompt: list[int] = []  # the last one
        self._weights: F32 | None = None  # under which all was read that the context holds

    def read(
        self,
        tokens: Sequence[int],
        fusion: FusionWeights,
        *,
        keep_history: bool = False,
        goes_on: bool = False,
    ) -> None:
        """Read a prompt under weights.

        keep_history  what the context holds of it stays, whatever the weights were
        goes_on       it stays where they were the same, and the prompt begins with the last one

        Raises BackendError when the logits after it are NaN.
        """
        self._turn += 1
        weights = np.zeros((len(self._loaded), self._model.n_layer), np.float32)
        weights[[self._loaded.index(name) for name in fusion.adapters]] = fusion.weights
        is_same = self._weights is not None and np.array_equal(weights, self._weights)
        n_kept = 0
        if keep_history or (goes_on and is_same and self._is_begun_with(tokens)):
            n_kept = self._context.keep_common(tokens)
        else:
            self._context.clear()
        self._prompt = list(tokens)
        self._weights = weights if is_same or not n_kept else None
        self._context.set_weights(weights)
        self._context.decode(tokens[n_kept:], start=n_kept)
        if np.isnan(self._context.logits()).any():
            self._context.clear()
            raise BackendError(
                "The logits after the prompt are NaN, expected numbers: an adapter that weighs "
                f"more than 0 here ({', '.join(fusion.adapters) or 'none'}), or the base, is "
                "damaged. Convert or fetch it again, or leave it out."
            )

    def _is_begun_with(self, tokens: Sequence[int]) -> bool:
        """Whether a prompt is the last one with more behind it, as the next turn of a chat is."""
        n = len(self._prompt)
        return n < len(tokens) and list(tokens[:n]) == self._prompt

    def begin(
        self,
        tokens: Sequence[int],
        fusion: FusionWeights,
        sampler: Sampler,
        *,
        keep_history: bool,
    ) -> Generation:
        """Read a prompt; the answer comes as it is asked for."""
        start = time.perf_counter()
        self.read(tokens, fusion, keep_history=keep_history, goes_on=True)
        timings = Timings(fusion.probe_ms, 1e3 * (time.perf_counter() - start))
        generation = Generation(fusion, len(tokens), timings)
        # Not a cycle, so that an answer that is dropped frees what it holds at once.
        own = weakref.proxy(generation)
        goes_on = self._goes_on(self._turn)
        generated = generate_tokens(self._model, self._context, sampler, own, goes_on)
        pieces = generate_text(generated, self._model, sampler.sampling.stop, own)
        generation._pieces = _Guarded(pieces, self._lifetime.in_use)
        return generation

    def cancel(self) -> None:
        """End the answer that goes on, if any; another thread may be waiting for its text."""
        self._cancelled = self._turn

    @property
    def is_cancelled(self) -> bool:
        """Whether cancel() was called since the last prompt was read."""
        return self._cancelled == self._turn

    def _goes_on(self, turn: int) -> Callable[[], bool]:
        def goes_on() -> bool:
            if self._lifetime.is_closed or self._turn != turn:
                raise BusyError(
                    "This answer cannot go on: its Engine was closed or answered another prompt "
                    "in between. Finish an answer before the next call, or make a second Engine."
                )
            return self._cancelled != turn

        return goes_on


class _Guarded(Iterator[str]):
    """Pieces of text; the Engine is in use only while one is being made."""

    def __init__(self, pieces: Iterator[str], in_use: Callable[[], Any]) -> None:
        self._pieces, self._in_use = pieces, in_use

    def __next__(self) -> str:
        with self._in_use():
            piece = next(self._pieces, None)
        if piece is None:
            raise StopIteration
        return piece
