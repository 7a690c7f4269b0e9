"""A dialect: what a server has to know of an API to speak it; and what their answers share."""

import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from qaflora_edge.answering.generation import Generation
from qaflora_edge.ask import Ask
from qaflora_edge.dialects.options import Weighed
from qaflora_edge.formats.inputs import Json
from qaflora_edge.weighing.plan import FusionWeights

if TYPE_CHECKING:
    from qaflora_edge.prompt.calls import CallPart


def encoded(value: Any) -> bytes:
    """Encode JSON in UTF-8; half of a surrogate pair, which a model may write, is escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value).encode("ascii")


@dataclass(frozen=True)
class Wire:
    """Say how a dialect writes.

    media  of a stream
    part   writes one of its parts
    ping   keeps a silent one alive
    done   ends one that went well
    whole  writes an answer without a stream
    """

    media: str
    part: Callable[[Any], bytes]
    ping: bytes = b""
    done: bytes = b""
    whole: Callable[[Any], bytes] = encoded


def _event(value: Any) -> bytes:
    return b"data: " + encoded(value) + b"\n\n"


def _named_event(value: Any) -> bytes:
    name = value.get("type")
    head = f"event: {name}\n".encode() if name else b""
    return head + _event(value)


EVENTS = Wire("text/event-stream; charset=utf-8", _event, ping=b": ping\n\n")
NAMED_EVENTS = replace(EVENTS, part=_named_event)  # of responses and messages


@dataclass(frozen=True)
class Extras:
    """Say what answers tell besides their dialect's fields.

    returned  how much of the mix: summary, why, layers or none
    drafts_are_thoughts  a relay's draft is told as a thought; else in the field `fusion`
    is_python  for Engine.chat: no times, and a cut answer is not called one of full length
    """

    returned: str = "summary"
    drafts_are_thoughts: bool = False
    is_python: bool = False

    def thought_of(self, answer: Generation) -> str:
        """Give the draft of an answer that has ended, where it is told as a thought."""
        if answer.draft is None or not self.drafts_are_thoughts:
            return ""
        return answer.draft.text

    def mix(self, fusion: FusionWeights) -> Json:
        """Return the field `fusion` of an answer."""
        if self.returned == "none":
            return {}
        means = {name: round(mean, 6) for name, mean in fusion.means.items()}
        field: Json = {
            "strategy": fusion.strategy,
            "probe_ms": round(fusion.probe_ms, 3),
            "weights": means,
        }
        field |= fusion.relay_dict() | fusion.sure_dict()
        if self.returned in ("why", "layers"):
            field |= fusion.why_dict()
        if self.returned == "layers":
            rows = fusion.weights.tolist()  # [n_adapter][n_layer]
            field["layers"] = dict(zip(fusion.adapters, rows, strict=True))
        return {"fusion": field}

    def end(self, first: Generation) -> Json:
        """Return what is told at the end of answers, by the first of them."""
        end = self.mix(first.fusion)
        if not self.is_python:
            end["timings"] = timings(first)
        return end

    def reason(self, finish_reason: str | None) -> str | None:
        """Say why an answer ended; OpenAI's word for the time limit is that for length."""
        is_cut = finish_reason == "cancelled" and not self.is_python
        return "length" if is_cut else finish_reason


NOTHING = Extras("none", is_python=True)


def timings(answer: Generation) -> dict[str, float]:
    """Return the times of an answer in our names and in those of llama-server."""
    times = answer.timings.to_dict()
    n_read = answer.n_prompt - answer.n_cached
    prompt_ms = times["prefill_ms"]
    times["cache_n"] = answer.n_cached
    times["prompt_n"] = n_read
    times["prompt_ms"] = prompt_ms
    times["prompt_per_second"] = round(1e3 * n_read / prompt_ms, 3) if prompt_ms else 0.0
    times["predicted_n"] = answer.n_completion
    times["draft_n"] = times["guessed_n"]
    times["draft_n_accepted"] = times["guessed_n_right"]
    times["predicted_ms"] = times["decode_ms"]
    times["predicted_per_second"] = times["tokens_per_second"]
    return times


@dataclass(frozen=True)
class Reply:
    """Hold what an answer is written by, besides the answer.

    body       that asked
    model      as it is called there
    asks       what was asked
    extras     what is told besides
    facts      of a server's request, for the log: `start_s`, and `wait_ms` once it is known
    id         of the answer
    created_s  since 1970
    """

    body: Any
    model: str
    asks: Sequence[Ask]
    extras: Extras = NOTHING
    facts: Mapping[str, Any] = field(default_factory=dict)
    id: uuid.UUID = field(default_factory=uuid.uuid4)
    created_s: float = field(default_factory=time.time)


Answers = Iterator[Generation]


@dataclass(frozen=True)
class Dialect:
    """Say how a server speaks an API at one of its paths.

    summary   what the path does, for OpenAPI
    body      what it takes
    asks      reads a body as what it asks; the Ask that it gets has what holds where it says
              nothing. An empty list only loads the model
    whole     makes an answer that is sent at once, of the answers to all that is asked
    pieces    yields one that is sent as it comes
    wire      how pieces are written
    progress  for a stream with `return_progress`: makes what it sends while a prompt is prefilled
    """

    path: str
    summary: str
    body: type[Weighed]
    asks: Callable[[Any, Ask], list[Ask]]
    whole: Callable[[Reply, Answers], Any]
    pieces: Callable[[Reply, Answers], Iterable[Any]]
    wire: Wire = EVENTS
    progress: Callable[[Reply, Json], Any] | None = None


registered: dict[str, Dialect] = {}  # by their paths


def register_dialect(dialect: Dialect) -> None:
    """Let servers of this process speak a dialect of a program's own; the last of a path counts."""
    registered[dialect.path] = dialect


_NO_CALL: "CallPart" = {}


class Piece(NamedTuple):
    """Hold a piece of an answer.

    kind  draft, thought, text or call; a draft is no part of the answer
    text  of a call more of its arguments
    call  of a call, as OpenAI streams it: the first piece has its id and name; else empty
    """

    kind: str
    text: str
    call: "CallPart" = _NO_CALL


def drafting(answer: Generation, extras: Extras) -> Iterator[Piece]:
    """Yield a relay's draft, as a thought or a draft, where it is told."""
    for text in answer.drafting():
        if extras.drafts_are_thoughts:
            yield Piece("thought", text)
        elif extras.returned != "none":
            yield Piece("draft", text)


def told(answer: Generation, extras: Extras = NOTHING) -> Iterator[Piece]:
    """Yield an answer as it is written: a draft, a thought, then its text and calls of tools."""
    yield from drafting(answer, extras)
    for thought in answer.thoughts():
        yield Piece("thought", thought)
    parts = answer.calls.read(answer) if answer.calls else answer
    for part in parts:
        if isinstance(part, str):
            yield Piece("text", part)
        else:
            yield Piece("call", part["function"]["arguments"], part)


@dataclass
class AnswerBlock:
    """Hold a block of an answer, as far as it is written: pieces of one kind, or of one call.

    index  among the blocks of the answer
    call   a call's first piece, with its id and name
    id     of its own, for dialects that name blocks
    """

    index: int
    kind: str
    call: "CallPart"
    text: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


class BlockEvent(NamedTuple):
    """Tell what happens to a block.

    name     start, delta or stop
    text     what a delta adds
    is_last  of a stop: no block follows
    """

    name: str
    block: AnswerBlock
    text: str = ""
    is_last: bool = False


def block_events(pieces: Iterator[Piece]) -> Iterator[BlockEvent]:
    """Yield pieces as blocks, one after another; without any there is an empty text."""
    first = next(pieces, Piece("text", ""))
    block = AnswerBlock(0, first.kind, first.call)
    yield BlockEvent("start", block)
    for piece in itertools.chain([first], pieces):
        begins_call = "id" in piece.call and piece is not first
        if begins_call or piece.kind != block.kind:
            yield BlockEvent("stop", block)
            block = AnswerBlock(block.index + 1, piece.kind, piece.call)
            yield BlockEvent("start", block)
        if piece.text or piece.kind != "call":
            block.text += piece.text
            yield BlockEvent("delta", block, piece.text)
    yield BlockEvent("stop", block, is_last=True)
