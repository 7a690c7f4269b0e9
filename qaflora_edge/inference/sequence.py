"""A sequence: what one running request needs, from the queue to its last piece of text."""

import itertools
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from qaflora_edge.arrays import F32
from qaflora_edge.errors import QafloraError
from qaflora_edge.inference.logprobs import TokenLogprob
from qaflora_edge.inference.request import Request
from qaflora_edge.inference.text import TextDecoder

_numbers = itertools.count(1)


@dataclass
class Timings:
    """Milliseconds spent, and the speed of generation (tokens decoded after the first).

    prefill_ms and decode_ms have the work for others in them that was done meanwhile.

    token_s  when each token of the answer was chosen, by time.perf_counter()
    """

    probe_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    n_decoded: int = 0
    token_s: list[float] = field(default_factory=list, repr=False)

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


class TokenSampler(Protocol):
    """What chooses an answer's tokens: see sampler.Sampler."""

    @property
    def constraint(self) -> Any: ...

    def sample(self, context: Any, row: int, mask: Any = None) -> int: ...

    def can_end(self) -> bool: ...

    def close(self) -> None: ...


class Sequence:
    """A request on its way: waiting, then prefill, then decoding, then done.

    n_max       most tokens of the answer
    slot        of the context, None while it waits or once it is done
    n_past      tokens of prompt and answer whose KV state the slot holds
    next_token  chosen, not yet decoded
    pieces      of text that nobody has taken yet, each with the tokens of the answer until there
    logprobs    of each token of the answer, where the request asks for them
    logits      float32 [n_vocab] after the prompt, where the request keeps them
    error       why there is no answer; finish_reason is "error" then
    """

    def __init__(self, request: Request, sampler: TokenSampler | None, n_max: int) -> None:
        self.number = next(_numbers)
        self.request, self.sampler, self.n_max = request, sampler, n_max
        self.slot: int | None = None
        self.n_past = 0
        self.next_token: int | None = None
        self.answer: list[int] = []
        self.text = TextDecoder(request.sampling.stop)
        self.pieces: deque[tuple[str, int]] = deque()
        self.logprobs: list[TokenLogprob] = []
        self.timings = Timings()
        self.logits: F32 | None = None
        self.finish_reason: str | None = None
        self.is_whole = True
        self.error: QafloraError | None = None
        self.created_s = time.perf_counter()

    @property
    def n_prompt(self) -> int:
        return len(self.request.tokens)

    @property
    def is_prefill(self) -> bool:
        return self.n_past < self.n_prompt

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_cancelled(self) -> bool:
        return self.request.cancellation.is_set

    def take(self, token: int, data: bytes | None) -> None:
        """Go on with a chosen token.

        data  its bytes; None where it ends the answer
        """
        if data is None:
            self.finish("stop")
            return
        self.answer.append(token)
        self.timings.token_s.append(time.perf_counter())
        if piece := self.text.feed(data):
            self.pieces.append((piece, len(self.answer)))
        if self.text.is_stopped:
            self.finish("stop")
        elif len(self.answer) >= self.n_max:
            self.finish("length")
        else:
            self.next_token = token

    def finish(self, reason: str) -> None:
        """End the answer: "stop", "length" or "cancelled"; what was held back of it is text now."""
        if self.is_done:
            return
        if rest := self.text.flush():
            self.pieces.append((rest, len(self.answer)))
        if reason == "length" and self.sampler is not None:
            self.is_whole = self.sampler.can_end()
        self._end(reason)

    def fail(self, error: QafloraError) -> None:
        """End without a whole answer."""
        if not self.is_done:
            self.error = error
            self._end("error")

    def _end(self, reason: str) -> None:
        self.next_token = None
        if self.sampler is not None:
            self.sampler.close()
        self.finish_reason = reason
