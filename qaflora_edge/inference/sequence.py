"""A sequence: one running request, from the queue to its last piece of text."""

import codecs
import itertools
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.arrays import F32
from qaflora_edge.errors import QafloraError
from qaflora_edge.inference.request import Request

if TYPE_CHECKING:
    from qaflora_edge.inference.draft import Drafter
    from qaflora_edge.inference.sampler import Sampler
    from qaflora_edge.weighing.probe import Listener

_numbers = itertools.count(1)


@dataclass
class Timings:
    """Count milliseconds; prefill_ms and decode_ms include concurrent work for other requests.

    n_decoded  tokens decoded after the first
    draft_n, draft_n_accepted  tokens that were guessed, and those of them that were right
    token_s    when each token of the answer was chosen, by time.perf_counter()
    """

    probe_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    n_decoded: int = 0
    draft_n: int = 0
    draft_n_accepted: int = 0
    token_s: list[float] = field(default_factory=list, repr=False)

    @property
    def tokens_per_second(self) -> float:
        """Give the speed of decoding."""
        return 1e3 * self.n_decoded / self.decode_ms if self.decode_ms > 0 else 0.0

    def to_dict(self) -> dict[str, float]:
        """Give `timings` of `qaflora run --json`."""
        return {
            "probe_ms": round(self.probe_ms, 3),
            "prefill_ms": round(self.prefill_ms, 3),
            "decode_ms": round(self.decode_ms, 3),
            "tokens_per_second": round(self.tokens_per_second, 3),
            "draft_n": self.draft_n,
            "draft_n_accepted": self.draft_n_accepted,
        }


@dataclass(frozen=True)
class TokenLogprob:
    """Hold one token and its log-probability.

    data     its bytes; of a control token its spelling
    logprob  in nats, before temperature, penalties, biases and grammar
    top      the likeliest tokens at its place, in order
    n_shown  bytes of it in the text: 0 for a control token
    """

    token: int
    data: bytes
    logprob: float
    top: tuple[Self, ...] = ()
    n_shown: int = 0


class Sequence:
    """Follow a request: waiting, prefill, decoding, done.

    With a listener it is weighed first: the base prefills all of its prompt, and it keeps its slot
    until Loop.resume() or Loop.end().

    n_max       most tokens of the answer
    n_ctx       tokens that its slot has to hold
    slot        of the context, None while it waits or once it is done
    n_past      tokens of prompt and answer with KV state in the slot
    n_cached    tokens of the prompt that had KV state when it got the slot
    next_token  chosen, not yet decoded
    drafter     guesses tokens after it, if anything does
    pieces      text not yet taken, each with the number of answer tokens until there
    logprobs    of each token of the answer, where the request asks for them
    logits      float32 [n_vocab] after the prompt, where the request keeps them
    error       why there is no answer; finish_reason is "error" then
    """

    def __init__(
        self,
        request: Request,
        sampler: "Sampler | None",
        n_max: int,
        n_ctx: int = 0,
        listener: "Listener | None" = None,
    ) -> None:
        self.number = next(_numbers)
        self.n_ctx, self.listener = n_ctx, listener
        self.slot: int | None = None
        self.start(request, sampler, n_max)
        self.n_past = self.n_cached = 0
        self.next_token: int | None = None
        self.answer: list[int] = []
        self.pieces: deque[tuple[str, int]] = deque()
        self.logprobs: list[TokenLogprob] = []
        self.timings = Timings()
        self.logits: F32 | None = None
        self.finish_reason: str | None = None
        self.is_whole = True
        self.error: QafloraError | None = None

    def start(self, request: Request, sampler: "Sampler | None", n_max: int) -> None:
        """Follow this request, with the same prompt as the one before."""
        self.request, self.sampler, self.n_max = request, sampler, n_max
        self.text = TextDecoder(request.sampling.stop)
        self.drafter: Drafter | None = None

    @property
    def n_prompt(self) -> int:
        """Count the tokens of the prompt."""
        return len(self.request.tokens)

    @property
    def is_prefill(self) -> bool:
        """Tell whether tokens of the prompt are left."""
        return self.n_past < self.n_prompt

    @property
    def is_weighed(self) -> bool:
        """Tell whether its listener has all of the prompt, and it waits for weights."""
        return self.listener is not None and not self.is_prefill

    @property
    def is_done(self) -> bool:
        """Tell whether it has ended."""
        return self.finish_reason is not None

    @property
    def is_cancelled(self) -> bool:
        """Tell whether it was told to end."""
        return self.request.cancellation.is_set

    def take(self, token: int, data: bytes | None) -> None:
        """Append a chosen token; data are its bytes, None where it ends the answer."""
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
        """End the answer with "stop", "length" or "cancelled"; text held back is shown now."""
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


class TextDecoder:
    """Turn the bytes of tokens into text: whole UTF-8 characters, up to the first stop text."""

    def __init__(self, stops: Many[str]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def feed(self, data: bytes) -> str:
        """Give the text that may be shown now: what can no longer begin a stop text."""
        held = self._held + self._decoder.decode(data)
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held, self.is_stopped = "", True
            return held[: min(found)]
        n = self._n_undecided(held)
        self._held = held[len(held) - n :]
        return held[: len(held) - n]

    def flush(self) -> str:
        """Give the text held back; bytes of an unfinished character are dropped."""
        held, self._held = self._held, ""
        return held

    def _n_undecided(self, held: str) -> int:
        longest = min(len(held), max((len(stop) for stop in self._stops), default=1) - 1)
        for n in range(longest, 0, -1):
            if any(stop.startswith(held[-n:]) for stop in self._stops):
                return n
        return 0


def log_softmax(logits: F32) -> NDArray[np.float64]:
    """Normalise logits float32 [n_vocab] to log-probabilities in nats, float64 [n_vocab]."""
    z = logits.astype(np.float64) - logits.max()
    return np.asarray(z - np.log(np.exp(z).sum()))


def token_logprob(
    logits: F32, token: int, n_top: int, piece: Callable[[int], bytes], n_shown: int
) -> TokenLogprob:
    """Say how likely a chosen token was.

    logits  float32 [n_vocab]
    piece   gives the bytes of a token
    n_shown  see TokenLogprob
    """
    log_p = log_softmax(logits)

    def entry(each: int) -> TokenLogprob:
        return TokenLogprob(each, piece(each), float(log_p[each]))

    n_top = min(n_top, len(log_p))
    likeliest = np.argpartition(-log_p, n_top - 1)[:n_top] if n_top else np.zeros(0, np.int64)
    ordered = likeliest[np.argsort(-log_p[likeliest], kind="stable")]
    return replace(entry(token), top=tuple(entry(int(i)) for i in ordered), n_shown=n_shown)
