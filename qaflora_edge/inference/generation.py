"""Tokens to text: sampling, stop strings, whole UTF-8 characters.

The heart is an iterator; joining, printing and streaming are wrappers around it.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model
from qaflora_edge.errors import CancelledError
from qaflora_edge.inference.sampler import Sampler
from qaflora_edge.weighing.numbers import FusionWeights


@dataclass
class Timings:
    """Milliseconds spent, and the speed of generation (tokens decoded after the first)."""

    probe_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    n_decoded: int = 0

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.n_decoded / self.decode_ms if self.decode_ms > 0 else 0.0

    def to_dict(self) -> dict[str, float]:
        return {
            "probe_ms": round(self.probe_ms, 3),
            "prefill_ms": round(self.prefill_ms, 3),
            "decode_ms": round(self.decode_ms, 3),
            "tokens_per_second": round(self.tokens_per_second, 3),
        }


class StopFilter:
    """Passes text on as soon as it can no longer be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def feed(self, text: str) -> str:
        """What may be shown now, once text has arrived."""
        held = self._held + text
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held, self.is_stopped = "", True
            return held[: min(found)]
        n = self._n_undecided(held)
        self._held = held[len(held) - n :]
        return held[: len(held) - n]

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        return held

    def _n_undecided(self, held: str) -> int:
        longest = min(len(held), max((len(stop) for stop in self._stops), default=1) - 1)
        for n in range(longest, 0, -1):
            if any(stop.startswith(held[-n:]) for stop in self._stops):
                return n
        return 0


@dataclass
class Generation(Iterator[str]):
    """An answer as it is generated: an iterator over pieces of text.

    finish_reason  None while it runs, then "stop" (end of generation, or a stop text) or
                   "length" (max_tokens, or the context is full) or "cancelled" (Engine.cancel)
    is_whole       False when "length" cut it where the grammar that it follows expects more
    """

    fusion: FusionWeights
    n_prompt: int
    timings: Timings = field(default_factory=Timings)
    n_completion: int = 0
    finish_reason: str | None = None
    is_whole: bool = True
    _pieces: Iterator[str] = field(default_factory=lambda: iter(()), repr=False)
    _engine: object = field(default=None, repr=False)  # lives as long as its answer

    def __next__(self) -> str:
        return next(self._pieces)

    def text(self) -> str:
        """The rest of the answer, joined."""
        return "".join(self)

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_completion,
            "total_tokens": self.n_prompt + self.n_completion,
        }


def generate_tokens(
    model: Model,
    context: Context,
    sampler: Sampler,
    generation: Generation,
    goes_on: Callable[[], bool],
) -> Iterator[int]:
    """Tokens that follow what the context holds, until an end token or a limit.

    goes_on  called before the context is used again after a pause; False once it was cancelled
    """
    n_max = context.n_ctx - generation.n_prompt + 1
    if sampler.sampling.max_tokens is not None:
        n_max = min(n_max, sampler.sampling.max_tokens)
    try:
        for i in range(n_max):
            if not goes_on():
                generation.finish_reason = "cancelled"
                return
            start = time.perf_counter()
            token = sampler.sample(context)
            if model.is_end(token):
                generation.finish_reason = "stop"
                return
            generation.n_completion += 1
            if i + 1 < n_max:
                try:
                    context.decode([token], start=generation.n_prompt + i)
                except CancelledError:  # the token is chosen; what would follow it is not known
                    generation.finish_reason = "cancelled"
                    yield token
                    return
                generation.timings.n_decoded += 1
                generation.timings.decode_ms += 1e3 * (time.perf_counter() - start)
            yield token
        generation.finish_reason = "length"
        generation.is_whole = sampler.can_end()
    finally:
        sampler.close()


def generate_text(
    tokens: Iterator[int], model: Model, stops: Sequence[str], generation: Generation
) -> Iterator[str]:
    """Pieces of text of whole characters; ends before the first stop text."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    stop_filter = StopFilter(stops)
    for token in tokens:
        piece = stop_filter.feed(decoder.decode(model.piece(token)))
        if piece:
            yield piece
        if stop_filter.is_stopped:
            generation.finish_reason = "stop"
            return
    # Bytes still in the decoder are a character that was never finished: they are dropped.
    rest = stop_filter.flush()
    if rest:
        yield rest
