"""Drafts: answers of single adapters, or the base, that a strategy reads before it decides."""

import codecs
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from qaflora_edge.arrays import F32
from qaflora_edge.backend.batch import Span
from qaflora_edge.backend.context import Context, KvState
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.backend.prefix import GrowingContext, Steps, prefill, wiped_on_failure
from qaflora_edge.errors import BackendError
from qaflora_edge.inference.sampler import no_numbers
from qaflora_edge.inference.sequence import Request, RunningSequence, Written, surprise
from qaflora_edge.weighing.drafted import BASE, IN_WORDS, N_TOGETHER, Draft

_N_AROUND = 8  # tokens around a draft, at most
_N_SEQ = 1 + N_TOGETHER  # and the base's prompt
_N_AT_ONCE = 2  # drafts of a batch; of more, the first begins before the others: it is shown
_N_BYTE_KEPT = 64 << 20  # of the largest KV state that goes on as an answer
_N_CTX_KEPT = 4096  # tokens of the largest context that is kept between queries


@dataclass
class _Row:
    """Follow one draft in its sequence of the context.

    unread  tokens with no KV state yet
    """

    seq: int
    name: str
    weights: F32
    unread: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    is_whole: bool = False

    def lacks(self, n_token: int) -> bool:
        return not self.is_whole and len(self.tokens) < n_token

    def choose(self, model: Model, logits: F32) -> None:
        """Add the likeliest token. Raises BackendError for logits that are NaN."""
        token = int(logits.argmax())
        logprob = -surprise(logits, token)
        if logprob != logprob:
            raise no_numbers("The logits of a draft", f" ({self.name or BASE})")
        self.unread = [token]
        if model.is_end(token):
            self.is_whole = True
        else:
            self.tokens.append(token)
            self.logprobs.append(logprob)


@dataclass
class Shown:
    """Hold the first draft of a batch as it comes: of many, one step ahead of the others.

    tokens  of its text so far
    """

    tokens: Sequence[int] = ()


class Drafter:
    """Decode drafts of one prompt together: greedy, each under one adapter at weight 1.

    The base prefills the prompt but for its end. All drafts share that KV state, in a context that
    the first query opens.
    """

    def __init__(self, model: Model, pack: Pack, options: dict[str, Any]) -> None:
        self._model = model
        shape: Any = {"n_seq": _N_SEQ, "n_output": _N_SEQ, "is_unified": True}
        self._contexts = GrowingContext(partial(Context, model, pack, **shape, **options))
        self.close = self._contexts.close

    def draft(
        self,
        request: Request,
        weights: dict[str, F32],
        begun: dict[str, Written],
        n_token: int,
        read: Callable[[], KvState | None],
        after_prompt: F32 | None,
        shown: Shown,
    ) -> Steps[list[Written]]:
        """Give a draft under each of these weights, of n_token tokens or whole, in one batch.

        request  the prompt under the base, with n_base
        weights  name -> float32 [n_adapter, n_layer] of all adapters; N_TOGETHER names at most
        begun    name -> what there is of its draft, which goes on
        read     gives the base's KV state of the prompt, where it is known
        after_prompt  the base's logits [n_vocab] behind it, where they are known
        shown    what a user may see meanwhile

        Yields between batches, how many tokens are shown. Raises BackendError for logits that are
        NaN.
        """
        n_prompt = len(request.tokens)
        n_tail = n_prompt - request.n_base
        # What was begun has cells of its own; all others share the base's.
        n_copied = sum(name in begun and begun[name].state is not None for name in weights)
        n_longest = n_tail + 2 * n_token  # the first goes on while the others catch up
        n_most = (1 + n_copied) * n_prompt + len(weights) * n_longest
        context = self._contexts.for_query(n_most)
        rows = []
        for seq, name in enumerate(weights, start=1):
            unread = list(request.tokens[request.n_base :])
            rows.append(_Row(seq, name, weights[name], unread))
        try:
            with wiped_on_failure(context):
                if (state := read()) is not None:
                    with contextlib.suppress(BackendError):  # another shape: it is prefilled
                        context.load_kv_state(state)
                is_whole = len(context.tokens[0]) == n_prompt
                for row in rows:
                    is_new = row.name not in begun
                    if row.name == BASE and is_new and is_whole and after_prompt is not None:
                        context.copy(0, row.seq)
                        row.choose(self._model, after_prompt)
                n_held = context.keep(request.n_base, 0)
                if n_held < request.n_base:
                    for _ in prefill(context, request.tokens, n_held, "none", n_tail=n_tail):
                        yield None  # tokens of a draft are counted, not those of the prompt
                for row in rows:
                    _begin(context, row, begun.get(row.name))
                shown.tokens = rows[0].tokens
                yield len(shown.tokens)
                if len(rows) > _N_AT_ONCE and rows[0].name not in begun:
                    yield from self._decode(context, rows[:1], 1)
                yield from self._decode(context, rows, n_token)
                drafts = [self._written(context, row) for row in rows]
            context.clear()
        finally:
            if context.n_ctx > _N_CTX_KEPT:
                self._contexts.close()
        return drafts

    def _decode(self, context: Context, rows: Sequence[_Row], n_token: int) -> Steps[None]:
        """Decode until each draft has n_token tokens, or is whole.

        The first goes on while another does not: it probably begins the answer.
        """
        while any(row.lacks(n_token) for row in rows):
            running = [row for row in rows if row.lacks(n_token) or row is rows[0]]
            running = [row for row in running if not row.is_whole]
            spans = [Span(row.seq, row.unread, len(context.tokens[row.seq])) for row in running]
            outputs = context.decode_spans(spans)
            for row, output in zip(running, outputs, strict=True):
                row.choose(self._model, context.logits_view(output))
            yield len(rows[0].tokens)

    def _written(self, context: Context, row: _Row) -> Written:
        """Give a draft, and its KV state where that is small: an answer may begin with both."""
        text = text_of(self._model, row.tokens)
        draft = Draft(row.name, tuple(row.tokens), text, tuple(row.logprobs), row.is_whole)
        is_small = context.n_byte_of(row.seq) <= _N_BYTE_KEPT
        return Written(draft, row.weights, context.kv_state_of(row.seq) if is_small else None)


def _begin(context: Context, row: _Row, begun: Written | None) -> None:
    """Begin a draft in a sequence, or go on with what there is of it."""
    context.set_weights(row.weights, seq=row.seq)
    if begun is not None:
        row.tokens = list(begun.draft.tokens)
        row.logprobs = list(begun.draft.logprobs)
    if begun is not None and begun.state is not None:
        context.load_sequence(row.seq, begun.state)
        row.unread = row.tokens[-1:]
    elif not context.tokens[row.seq]:
        context.copy(0, row.seq)
        row.unread += row.tokens


def finished_draft(model: Model, sequence: RunningSequence, name: str) -> Draft:
    """Give the draft that one request has written; name: of its adapter, or BASE."""
    return Draft(
        adapter=name,
        tokens=tuple(sequence.answer),
        text=text_of(model, sequence.answer),
        logprobs=tuple(each.logprob for each in sequence.logprobs),
        is_whole=sequence.finish_reason == "stop",
    )


def text_of(model: Model, tokens: Sequence[int]) -> str:
    """Give the text of tokens, but for a character that is not whole at its end."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return decoder.decode(model.detokenize(tokens))


def in_words(
    model: Model, tokens: Sequence[int], question: tuple[int, int] | None, n_ctx: int
) -> list[int]:
    """Ask for an answer in words, behind the question of a prompt, where there is room."""
    told = model.tokenize_inside(IN_WORDS)
    if question is None or len(tokens) + len(told) >= n_ctx:
        return [*tokens]
    end = question[1]
    return [*tokens[:end], *told, *tokens[end:]]


def with_draft(
    model: Model,
    tokens: Sequence[int],
    question: tuple[int, int] | None,
    draft: Draft,
    n_ctx: int,
    *,
    is_behind: bool = False,
) -> list[int]:
    """Put a draft in parentheses before the question, or behind it, as if it had been asked so.

    tokens    of the prompt
    question  begin and end of the question in it, as prompt.tokens.find_question gives them
    n_ctx     tokens of the context; a draft takes half of what is free there, at most

    The base answers in the language that comes last, and forms copy a draft that comes first more
    often; but an adapter of the question's language repeats a question that comes last.

    A control token that is spelt out in the draft stays text. Without room, or words, the prompt
    stays as it is.
    """
    if question is None:
        return [*tokens]
    start, end = question
    n_room = (n_ctx - len(tokens)) // 2
    said = text_of(model, draft.tokens[: max(0, n_room)]).strip()
    if not said:
        return [*tokens]
    if is_behind:
        told = model.tokenize_inside(f" ({said})")
        prompt = [*tokens[:end], *told, *tokens[end:]]
    else:
        asked = model.detokenize(tokens[start:end]).decode("utf-8", "replace")
        words = asked.lstrip(" ")
        space = asked[: len(asked) - len(words)]  # SentencePiece's first word brings its own
        told = model.tokenize_inside(f"{space}({said})\n\n{words}")
        prompt = [*tokens[:start], *told, *tokens[end:]]
    n_more = len(prompt) - len(tokens)  # bytes that are no text become more tokens
    has_room = n_more <= n_room + _N_AROUND and len(prompt) < n_ctx
    return prompt if has_room else [*tokens]
