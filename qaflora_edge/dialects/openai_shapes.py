"""What OpenAI's answers have in common: choices, chunks, usage, log-probabilities."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from qaflora_edge.dialects.extras import NOTHING, Extras
from qaflora_edge.inference.generation import Generation
from qaflora_edge.inference.sequence import TokenLogprob


class Shape(NamedTuple):
    """Make the choices of an answer.

    choice   makes the one of a whole answer
    choices  yields those of its chunks
    thought  makes that of a chunk with a thought, or with nothing
    """

    choice: Callable[[Generation], dict[str, Any]]
    choices: Callable[[Generation], Iterator[dict[str, Any]]]
    thought: Callable[[str], dict[str, Any]]


def answer_dict(
    head: dict[str, Any],
    answers: Iterable[Generation],
    shape: Shape,
    n: int = 1,
    extras: Extras = NOTHING,
) -> dict[str, Any]:
    """Put whole answers, n to each prompt, into OpenAI's shape; see answer_head."""
    choices = []
    ended = []
    for index, generation in enumerate(answers):
        choice = shape.choice(generation)
        if generation.draft is not None and extras.drafts_are_thoughts:
            choice["message"]["reasoning_content"] = generation.draft.text
        choices.append({"index": index, **extras.reworded(choice)})
        ended.append(generation)
    return {**head, "choices": choices, "usage": usage(ended, n), **extras.end(ended[0])}


def answer_chunks(
    head: dict[str, Any],
    answers: Iterable[Generation],
    shape: Shape,
    n: int = 1,
    *,
    include_usage: bool = False,
    extras: Extras = NOTHING,
) -> Iterator[dict[str, Any]]:
    """Yield the same as chunks, one answer after another.

    The first has the mix. That of the usage has it again, with the times.
    """
    ended: list[Generation] = []
    if include_usage:
        head = {**head, "usage": None}
    for index, generation in enumerate(answers):
        mix = {} if ended else extras.mix(generation.fusion)
        pieces = iter(()) if ended else generation.drafting()  # the answers share one draft
        for piece in pieces:
            thought = piece if extras.drafts_are_thoughts else ""
            choice = {"index": index, **shape.thought(thought)}
            drafted = {} if thought else extras.draft(piece)
            if not thought and not drafted:
                continue
            fusion = {**mix.get("fusion", {}), **drafted.get("fusion", {})}
            yield {**head, "choices": [choice], **({"fusion": fusion} if fusion else {})}
            mix = {}
        for choice in shape.choices(generation):
            yield {**head, "choices": [{"index": index, **extras.reworded(choice)}], **mix}
            mix = {}
        ended.append(generation)
    if include_usage:
        yield {**head, "choices": [], "usage": usage(ended, n), **extras.end(ended[0])}


def answer_events(
    head: dict[str, Any],
    answers: Iterable[Generation],
    shape: Shape,
    n: int,
    *,
    is_stream: bool,
    include_usage: bool,
    extras: Extras,
) -> Iterator[dict[str, Any]]:
    """Yield what is sent of answers: chunks of a stream, or one whole answer."""
    if is_stream:
        yield from answer_chunks(
            head, answers, shape, n, include_usage=include_usage, extras=extras
        )
    else:
        yield answer_dict(head, answers, shape, n, extras)


def prompt_progress(
    head: dict[str, Any],
    stage: str,
    n_done: int,
    n_token: int,
    seconds: float,
    expected: str | None = None,
) -> dict[str, Any]:
    """Make the chunk that says how far a prompt is, as llama-server does.

    expected  the answer so far, of which nothing is decided yet
    """
    time_ms = round(1e3 * seconds, 3)
    progress = {"stage": stage, "total": n_token, "processed": n_done, "time_ms": time_ms}
    if expected is not None:
        progress["expected"] = expected
    return {**head, "choices": [], "prompt_progress": progress}


def usage(ended: Sequence[Generation], n: int) -> dict[str, Any]:
    """Count tokens of answers; a prompt counts once for its n answers."""
    n_prompt = sum(generation.n_prompt for generation in ended[::n])
    n_cached = sum(generation.n_cached for generation in ended[::n])
    n_completion = sum(generation.n_completion for generation in ended)
    n_completion += sum(generation.n_draft for generation in ended[::n])  # which n share
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_completion,
        "total_tokens": n_prompt + n_completion,
        "prompt_tokens_details": {"cached_tokens": n_cached},
        "completion_tokens_details": {"reasoning_tokens": sum(each.n_thought for each in ended)},
    }


def answer_head(kind: str, model_name: str) -> dict[str, Any]:
    """Make what an answer, or each chunk of one, begins with.

    kind  text_completion, chat.completion or chat.completion.chunk
    """
    return {
        "id": f"{'chat' * kind.startswith('chat')}cmpl-{uuid.uuid4()}",
        "object": kind,
        "created": int(time.time()),
        "model": model_name,
    }


class ShownTokens:
    """Hand out tokens as their text is shown; those of thoughts and of a stop text never are."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._n_token = generation.n_thought  # they came before the first text
        self._n_byte = self._n_text = 0

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


def chat_logprobs(entries: Sequence[TokenLogprob] | None) -> Any:
    """Make the field `logprobs` of a choice of chat completions."""
    if entries is None:
        return None
    content = [
        {**_of_chat(entry), "top_logprobs": [_of_chat(each) for each in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _of_chat(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": token_text(entry), "logprob": entry.logprob, "bytes": list(entry.data)}


def token_text(entry: TokenLogprob) -> str:
    return entry.data.decode("utf-8", "replace")
