"""A request, and the sequence that follows it from the queue to its last piece of text."""

import codecs
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.arrays import F32
from qaflora_edge.ask import Sampling, Thinking
from qaflora_edge.errors import QafloraError

if TYPE_CHECKING:
    from qaflora_edge.backend.batch import Chunks
    from qaflora_edge.backend.context import KvState
    from qaflora_edge.inference.guesses import Guesser
    from qaflora_edge.inference.sampler import Sampler
    from qaflora_edge.weighing.added import Listener
    from qaflora_edge.weighing.plan import Draft

_numbers = itertools.count(1)


class CallEvent(threading.Event):
    """End a call when it is set, and count the seconds of the steps that computed for it.

    What the call waited for others is not among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.computed_s = 0.0


class Cancellation:
    """Tell whether a call was told to end: by set(), or an event of the caller.

    number  attribute: in the order that calls came, whatever they begin later
    """

    def __init__(self, event: threading.Event | None = None) -> None:
        self.number = next(_numbers)
        self._is_set = False
        self._event = event

    @property
    def is_set(self) -> bool:
        return self._is_set or (self._event is not None and self._event.is_set())

    def set(self) -> None:
        self._is_set = True

    def count(self, seconds: float) -> None:
        """Note that a step computed for this call."""
        if isinstance(self._event, CallEvent):
            self._event.computed_s += seconds


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

    @cached_property
    def n_read_by_base(self) -> int:
        """Count the prompt's first tokens that are read without an adapter, where n_base is set."""
        is_base_alone = not self.weights.any()
        return len(self.tokens) if self.n_base and is_base_alone else self.n_base

    @property
    def weights_key(self) -> bytes:
        """Give bytes that are equal where the weights of the KV state to reuse are."""
        return b"base" if self.n_base else self.weights.tobytes()

    def next_weights(self, n_past: int) -> F32:
        """Give the weights of the token at this position: float32 [n_adapter, n_layer]."""
        return self._nothing if n_past < self.n_base else self.weights

    def chunk_end(self, chunks: "Chunks", at: int) -> int:
        """Find the end of the prompt's chunk that begins at `at`.

        What the base reads is cut where that is quickest, if all cuts give the same bits.
        """
        if chunks.is_exact and at < self.n_base:
            return chunks.longest_end(at, self.n_read_by_base)
        return chunks.end(self.tokens, at, self.n_tail)

    @property
    def n_tail(self) -> int:
        """Count the tokens after those that the base prefills."""
        return len(self.tokens) - self.n_base if self.n_base else 0


@dataclass
class Timings:
    """Count milliseconds; prefill_ms and decode_ms include concurrent work for other requests.

    n_decoded  tokens decoded after the first
    guessed_n, guessed_n_right  tokens that were guessed, and those of them that were right
    token_s    when each token of the answer was chosen, by time.perf_counter()
    """

    probe_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    n_decoded: int = 0
    guessed_n: int = 0
    guessed_n_right: int = 0
    token_s: list[float] = field(default_factory=list, repr=False)

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.n_decoded / self.decode_ms if self.decode_ms > 0 else 0.0

    def to_dict(self) -> dict[str, float]:
        """Give `timings` of `qaflora run --json`."""
        return {
            "probe_ms": round(self.probe_ms, 3),
            "prefill_ms": round(self.prefill_ms, 3),
            "decode_ms": round(self.decode_ms, 3),
            "tokens_per_second": round(self.tokens_per_second, 3),
            "guessed_n": self.guessed_n,
            "guessed_n_right": self.guessed_n_right,
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


@dataclass(frozen=True)
class DraftState:
    """Hold an answer's beginning that was drafted elsewhere, under the same weights.

    weights  float32 [n_adapter, n_layer], of all loaded adapters
    kv_state  of the prompt and of the draft, but for its last token unless that is whole; None
              where it would take much memory
    """

    draft: "Draft"
    weights: F32
    kv_state: "KvState | None"


class State(Enum):
    """Name what a sequence does: it goes through these in order, and may end in any of them."""

    WAITING = auto()
    PREFILL = auto()
    WEIGHED = auto()  # its listener has all of the prompt; it waits for weights
    DECODE = auto()
    DONE = auto()


@dataclass(eq=False, repr=False)
class RunningSequence:
    """Follow a request from state to state.

    With a listener it is weighed first: the base prefills all of its prompt, and it keeps its slot
    until Loop.resume() or Loop.end().

    n_ctx       tokens that its slot has to hold
    slot        of the context, None while it waits or once it is done
    n_past      tokens of prompt and answer with KV state in the slot
    n_cached    tokens of the prompt that had KV state when it got the slot
    draft_state  the beginning of its answer, where that need not be computed
    is_told     whether its caller has something of it: cancelled, it ends and does not fail
    pieces      text not yet taken, each with the number of answer tokens until there, and whether
                it is of the thought
    n_thought   tokens of a thought: those before the answer's first
    tags        what is written around a thought, where it is a token
    logprobs    of each token of the answer, where the request asks for them
    logits      float32 [n_vocab] after the prompt, where the answer has no tokens
    error       why there is no answer; finish_reason is "error" then
    """

    request: Request
    sampler: "Sampler | None"
    n_max: int
    n_ctx: int = 0
    listener: "Listener | None" = None
    number: int = field(default_factory=_numbers.__next__)
    slot: int | None = None
    n_past: int = 0
    n_cached: int = 0
    answer: list[int] = field(default_factory=list)
    pieces: deque[tuple[str, int, bool]] = field(default_factory=deque)
    n_thought: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    logits: F32 | None = None
    finish_reason: str | None = None
    is_whole: bool = True
    error: QafloraError | None = None

    def __post_init__(self) -> None:
        self.start(self.request, self.sampler, self.n_max)

    def start(self, request: Request, sampler: "Sampler | None", n_max: int) -> None:
        """Follow this request, with the same prompt as the one before."""
        self.request = request
        self.sampler = sampler
        self.n_max = n_max
        self.guesser: Guesser | None = None
        self.draft_state: DraftState | None = None
        self.is_told = False
        thinking = request.thinking
        has_grammar = request.sampling.grammar is not None
        self._split = ThoughtSplitter(thinking, is_exact=has_grammar)
        self.text = TextDecoder(request.sampling.stop, self._split)
        self.tags = thinking.tags if thinking else {}
        self._n_open = 0  # tokens since the thought began
        self._lead_thought()

    @property
    def arrival(self) -> tuple[int, int]:
        """Give its place in the order of arrival: of its call, then among that call's."""
        return self.request.cancellation.number, self.number

    @property
    def n_prompt(self) -> int:
        return len(self.request.tokens)

    @property
    def state(self) -> State:
        if self.finish_reason is not None:
            return State.DONE
        if self.slot is None:
            return State.WAITING
        if self.n_past < self.n_prompt:
            return State.PREFILL
        return State.DECODE if self.listener is None else State.WEIGHED

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_cancelled(self) -> bool:
        return self.request.cancellation.is_set

    def take(self, token: int, data: bytes | None) -> None:
        """Append a chosen token; data are its bytes, None where it ends the answer."""
        if data is None:
            self.finish("stop")
            return
        self.answer.append(token)
        self.timings.token_s.append(time.perf_counter())
        was_open = self._split.is_open
        was_thought = self._split.is_thought
        self._show(self.text.feed(data))
        self._n_open += was_open
        if self._split.is_thought:
            self.n_thought = len(self.answer)
        elif was_thought and self.logprobs:  # it may begin with the end of the tag
            self.logprobs[-1] = replace(self.logprobs[-1], n_shown=self.text.n_byte)
        self._lead_thought()
        if self.text.stop is not None:
            self.finish("stop")
        elif len(self.answer) >= self.n_max:
            self.finish("length")

    def finish(self, reason: str) -> None:
        """End the answer with "stop", "length" or "cancelled"; text held back is shown now."""
        if self.is_done:
            return
        self._show(self.text.flush())
        if reason == "length" and self.sampler is not None:
            self.is_whole = self.sampler.can_end()
        self._end(reason)

    def _show(self, text: str) -> None:
        for piece, is_thought in ((self.text.thought, True), (text, False)):
            if piece:
                self.pieces.append((piece, len(self.answer), is_thought))

    def _lead_thought(self) -> None:
        """Lift the grammar within a thought, and close a thought that has used up its budget."""
        if self.sampler is not None:
            self.sampler.is_free = self._split.is_open
            if 0 <= self.request.sampling.reasoning_budget <= self._n_open:
                self.close_thought()

    def close_thought(self) -> bool:
        """Let the tag that ends a thought come next; False where none is open, or it is coming."""
        assert self.sampler is not None
        if not self._split.is_open or self.sampler.forced:
            return False
        assert self.request.thinking is not None
        self.sampler.forced = [*self.request.thinking.closing]
        return True

    def fail(self, error: QafloraError) -> None:
        if not self.is_done:
            self.error = error
            self._end("error")

    def _end(self, reason: str) -> None:
        if self.sampler is not None:
            self.sampler.close()
        self.finish_reason = reason


class TextDecoder:
    """Turn the bytes of tokens into text: whole UTF-8 characters, up to the first stop text.

    split    takes a thought out; stop texts are looked for in the answer alone
    thought  attribute: what may be shown now of the thought
    n_byte   attribute: bytes of the answer in what was fed last
    stop     attribute: the stop text that came; None: none yet
    """

    def __init__(self, stops: Sequence[str], split: "ThoughtSplitter | None" = None) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = tuple(stops)
        self._split = split or ThoughtSplitter(None)
        self._held = ""
        self.thought = ""
        self.n_byte = 0
        self.stop: str | None = None

    def feed(self, data: bytes) -> str:
        """Give the text that may be shown now: what can no longer begin a stop text."""
        self.thought, text = self._split.feed(self._decoder.decode(data))
        self.n_byte = len(text.encode())
        held = self._held + text
        stops = [stop for stop in self._stops if stop in held]
        if stops:
            self._held = ""
            self.stop = min(stops, key=held.find)
            return held[: held.find(self.stop)]
        n_shown = len(held) - _n_begun(held, self._stops)
        self._held = held[n_shown:]
        return held[:n_shown]

    def flush(self) -> str:
        """Give the text held back; bytes of an unfinished character are dropped."""
        self.thought, text = self._split.feed("", is_last=True)
        shown = self._held + text
        self._held = ""
        return shown


class ThoughtSplitter:
    """Split text into a thought and the answer after it, at tags that may come in pieces.

    White space around tags is left out.

    thinking  how the base thinks; None: all is the answer
    is_exact  whether a grammar begins right after the thought: what comes with the tag is left out
    is_open   attribute: whether the end of a thought has to come
    is_thought  attribute: whether there is a thought, and nothing of the answer yet
    """

    def __init__(self, thinking: Thinking | None, *, is_exact: bool = False) -> None:
        self._thinking = thinking
        self._is_exact = is_exact
        self.is_open = thinking is not None and thinking.is_open
        self.is_thought = self.is_open
        self._held = ""
        self._is_shown = False

    def feed(self, text: str, *, is_last: bool = False) -> tuple[str, str]:
        """Give what may be shown now of the thought, and of the answer."""
        thinking = self._thinking
        if thinking is None:
            return "", text
        text = self._held + text
        self._held = ""
        thought = ""
        if not self.is_thought:
            start = text.lstrip()
            if thinking.begin.startswith(start) and start != thinking.begin and not is_last:
                self._held = text
                return "", ""
            self.is_thought = start.startswith(thinking.begin)
            self.is_open = self.is_thought
            if self.is_thought:
                text = start.removeprefix(thinking.begin)
        if self.is_open:
            thought, tag, text = text.partition(thinking.end)
            self.is_open = not tag
            n_begun = 0  # characters that may begin the tag
            if self.is_open and not is_last:
                n_begun = _n_begun(thought, [thinking.end])
            shown = thought[: len(thought) - n_begun].rstrip()
            if self.is_open:
                self._held = thought[len(shown) :]
            thought = shown if self._is_shown else shown.lstrip()
            self._is_shown = self._is_shown or bool(thought)
            if self._is_exact:
                text = ""
        if self.is_thought and not self._is_exact:
            text = text.lstrip()
        if text:
            self._thinking = None
            self.is_thought = False
        return thought, text


def _n_begun(text: str, ends: Sequence[str]) -> int:
    """Count the characters at a text's end with which one of other texts may begin."""
    longest = min(len(text), max((len(end) for end in ends), default=1) - 1)
    for n in range(longest, 0, -1):
        if any(end.startswith(text[-n:]) for end in ends):
            return n
    return 0


def log_softmax(logits: F32) -> NDArray[np.float64]:
    """Normalise logits float32 [n_vocab] to log-probabilities in nats, float64 [n_vocab]."""
    z = logits.astype(np.float64) - logits.max()
    return np.asarray(z - np.log(np.exp(z).sum()))


def surprise(logits: F32, token: int) -> float:
    """Give -log of a token's probability in nats, quickly: in single precision."""
    highest = logits.max()
    return float(np.log(np.exp(logits - highest).sum()) + highest - logits[token])


def token_logprob(
    logits: F32, token: int, n_top: int, piece: Callable[[int], bytes], n_shown: int
) -> TokenLogprob:
    """Say how likely a chosen token was.

    logits  float32 [n_vocab]
    piece   gives the bytes of a token
    n_shown  see TokenLogprob
    """
    log_p = log_softmax(logits)

    def entry(token: int) -> TokenLogprob:
        return TokenLogprob(token, piece(token), float(log_p[token]))

    n_top = min(n_top, len(log_p))
    top: tuple[TokenLogprob, ...] = ()
    if n_top:
        likeliest = np.argpartition(-log_p, n_top - 1)[:n_top]
        order = np.argsort(-log_p[likeliest], kind="stable")
        top = tuple(entry(int(other)) for other in likeliest[order])
    return replace(entry(token), top=top, n_shown=n_shown)
