"""What answers have in common: OpenAI's choices and chunks, usage, logprobs, mix and times."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from qaflora_edge.answering.generation import Generation
from qaflora_edge.dialects.options import Answered
from qaflora_edge.formats.inputs import Json
from qaflora_edge.inference.sequence import TokenLogprob
from qaflora_edge.weighing.plan import FusionWeights

if TYPE_CHECKING:
    from qaflora_edge.prompt.calls import CallPart


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

    def drafting(self, answer: Generation) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield a relay's draft by pieces: each as a thought, or as part of the field `fusion`."""
        for piece in answer.drafting():
            if self.drafts_are_thoughts:
                yield piece, {}
            elif self.returned != "none":
                yield "", {"draft": piece}

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


class Shape(NamedTuple):
    """Make the choices of an answer.

    prefix   of ids
    kind     what a whole answer is called
    chunk    what a chunk is called
    choice   makes the one of a whole answer
    choices  yields those of its chunks
    thought  makes that of a chunk with a thought, or with nothing
    """

    prefix: str
    kind: str
    chunk: str
    choice: Callable[[Generation], Json]
    choices: Callable[[Generation], Iterator[Json]]
    thought: Callable[[str], Json]


@dataclass(frozen=True)
class Choices:
    """Write answers in OpenAI's choices.

    head       what an answer, or each chunk, begins with
    n          answers to each prompt
    is_stream  whether they are written as chunks
    has_usage  whether chunks end with one of the usage
    """

    head: Json
    shape: Shape
    n: int
    is_stream: bool
    has_usage: bool

    def events(self, answers: Iterable[Generation], extras: Extras = NOTHING) -> Iterator[Json]:
        write = self._chunks if self.is_stream else self._whole
        return write(answers, extras)

    def _whole(self, answers: Iterable[Generation], extras: Extras) -> Iterator[Json]:
        choices = []
        ended: list[Generation] = []
        for generation in answers:
            choice = _choice(len(ended), self.shape.choice(generation), extras)
            if thought := extras.thought_of(generation):
                choice["message"]["reasoning_content"] = thought
            choices.append(choice)
            ended.append(generation)
        fields = {"choices": choices, "usage": usage(ended, self.n)}
        yield self.head | fields | extras.end(ended[0])

    def _chunks(self, answers: Iterable[Generation], extras: Extras) -> Iterator[Json]:
        """Yield the same as chunks, one answer after another.

        The first has the mix. That of the usage has it again, with the times.
        """
        ended: list[Generation] = []
        head = dict(self.head)
        if self.has_usage:
            head["usage"] = None
        mix: Json = {}
        for index, generation in enumerate(answers):
            if index == 0:  # the answers share one draft
                mix = extras.mix(generation.fusion)
                for thought, draft in extras.drafting(generation):
                    choice = _choice(index, self.shape.thought(thought), extras)
                    chunk = head | {"choices": [choice]}
                    fusion = mix.get("fusion", {}) | draft
                    if fusion:
                        chunk["fusion"] = fusion
                    yield chunk
                    mix = {}
            for part in self.shape.choices(generation):
                choices = [_choice(index, part, extras)]
                yield head | {"choices": choices} | mix
                mix = {}
            ended.append(generation)
        if self.has_usage:
            fields = {"choices": [], "usage": usage(ended, self.n)}
            yield head | fields | extras.end(ended[0])

    def progress(
        self, stage: str, n_done: int, n_token: int, seconds: float, expected: str | None = None
    ) -> Json:
        """Make the chunk that says how far a prompt is, as llama-server does.

        expected  the answer so far, of which nothing is decided yet
        """
        progress: Json = {
            "stage": stage,
            "total": n_token,
            "processed": n_done,
            "time_ms": round(1e3 * seconds, 3),
        }
        if expected is not None:
            progress["expected"] = expected
        return self.head | {"choices": [], "prompt_progress": progress}


def choices_of(body: Answered, model_name: str, shape: Shape) -> Choices:
    """Read how the answers to a body are written."""
    head = {
        "id": f"{shape.prefix}-{uuid.uuid4()}",
        "object": shape.chunk if body.is_stream else shape.kind,
        "created": int(time.time()),
        "model": model_name,
    }
    has_usage = bool(body.stream_options and body.stream_options.include_usage)
    return Choices(head, shape, body.n or 1, body.is_stream, has_usage)


def _choice(index: int, choice: Json, extras: Extras) -> Json:
    reason = extras.reason(choice["finish_reason"])
    return {"index": index} | choice | {"finish_reason": reason}


def usage(ended: Sequence[Generation], n: int) -> Json:
    """Count tokens of answers; a prompt, and its draft, count once for its n answers."""
    firsts = ended[::n]
    n_prompt = sum(generation.n_prompt for generation in firsts)
    n_cached = sum(generation.n_cached for generation in firsts)
    n_draft = sum(generation.n_draft for generation in firsts)
    n_completion = n_draft + sum(generation.n_completion for generation in ended)
    n_thought = sum(generation.n_thought for generation in ended)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_completion,
        "total_tokens": n_prompt + n_completion,
        "prompt_tokens_details": {"cached_tokens": n_cached},
        "completion_tokens_details": {"reasoning_tokens": n_thought},
    }


class ShownTokens:
    """Hand out tokens as their text is shown; those of thoughts and of a stop text never are."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._n_token = generation.n_thought  # they came before the first text
        self._n_byte = 0  # of the tokens handed out
        self._n_text = 0  # bytes shown

    def take(self, text: str) -> list[TokenLogprob] | None:
        """Take the tokens of a next piece of text; None where nobody asks for them."""
        if not self._generation.wants_logprobs:
            return None
        self._n_text += len(text.encode("utf-8"))
        taken = []
        for entry in self._generation.logprobs[self._n_token :]:
            if self._n_byte >= self._n_text:
                break
            taken.append(entry)
            self._n_byte += entry.n_shown
        self._n_token += len(taken)
        return taken


def token_text(entry: TokenLogprob) -> str:
    return entry.data.decode("utf-8", "replace")


@dataclass
class AnswerBlock:
    """Hold a block of an answer, as far as it is written: a thought, a text, or a call of a tool.

    kind     thought, text or call
    index    among the blocks of the answer
    call     a call's first part, with its id and name
    text     of a call its arguments
    is_last  whether none follows; known at its end
    id       of its own, for dialects that name blocks
    """

    kind: str
    index: int
    call: "CallPart"
    text: str = ""
    is_last: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


class BlockEvent(NamedTuple):
    """Tell what happens to a block.

    name   start, delta or stop
    piece  what a delta adds
    """

    name: str
    block: AnswerBlock
    piece: str = ""


def block_events(
    parts: "Iterable[str | CallPart]", thoughts: Iterable[str] = ()
) -> Iterator[BlockEvent]:
    """Yield an answer as blocks, one after another; one that says nothing is an empty text.

    parts  its text, and its calls of tools in parts
    """
    block: AnswerBlock | None = None
    for kind, piece, call in _pieces(parts, thoughts):
        if block is None or kind != block.kind or call:
            n_block = 0
            if block is not None:
                n_block = block.index + 1
                yield BlockEvent("stop", block)
            block = AnswerBlock(kind, n_block, call)
            yield BlockEvent("start", block)
        if piece or kind != "call":
            block.text += piece
            yield BlockEvent("delta", block, piece)
    assert block is not None
    block.is_last = True
    yield BlockEvent("stop", block)


def _pieces(
    parts: "Iterable[str | CallPart]", thoughts: Iterable[str]
) -> "Iterator[tuple[str, str, CallPart]]":
    """Yield the kind of each piece, its text, and the call that begins with it, or {}."""
    is_empty = True
    for thought in thoughts:
        is_empty = False
        yield "thought", thought, {}
    for part in parts:
        is_empty = False
        if isinstance(part, str):
            yield "text", part, {}
        else:
            yield "call", part["function"]["arguments"], part if "id" in part else {}
    if is_empty:
        yield "text", "", {}
