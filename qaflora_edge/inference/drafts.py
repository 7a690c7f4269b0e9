"""Drafts: answers of single adapters, or the base, that a strategy reads before it decides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qaflora_edge.arrays import F32
from qaflora_edge.backend.batch import Span
from qaflora_edge.backend.branches import Branches, Steps, prefill
from qaflora_edge.backend.context import Context, KvState
from qaflora_edge.backend.model import Model
from qaflora_edge.inference.sampler import no_numbers
from qaflora_edge.inference.sequence import DraftState, Request, surprise
from qaflora_edge.weighing.plan import BASE, Draft

N_TOGETHER = 7  # drafts of one batch
_N_AT_ONCE = 2  # drafts of a batch; of more, the first begins before the others: it is shown
_N_BYTE_KEPT = 64 << 20  # of the largest KV state that goes on as an answer


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
class DraftSoFar:
    """Hold the first draft of a batch as it comes: of many, one step ahead of the others.

    tokens  of its text so far
    """

    tokens: Sequence[int] = ()


class Drafter:
    """Decode drafts of one prompt together: greedy, each under one adapter at weight 1.

    The base prefills the prompt but for its end. All drafts are branches of it.
    """

    def __init__(self, model: Model, branches: Branches) -> None:
        self._model = model
        self._branches = branches

    def draft(
        self,
        request: Request,
        weights: dict[str, F32],
        begun: dict[str, DraftState],
        n_token: int,
        read: Callable[[], KvState | None],
        after_prompt: F32 | None,
        first: DraftSoFar,
    ) -> Steps[list[DraftState]]:
        """Give a draft under each of these weights, of n_token tokens or whole, in one batch.

        request  the prompt under the base, with n_base
        weights  name -> float32 [n_adapter, n_layer] of all adapters; N_TOGETHER names at most
        begun    name -> what there is of its draft, which goes on
        read     gives the base's KV state of the prompt, where it is known
        after_prompt  the base's logits [n_vocab] behind it, where they are known
        first    what a user may see of it meanwhile

        Yields between batches, how many tokens are shown. Raises BackendError for logits that are
        NaN.
        """
        n_prompt = len(request.tokens)
        n_tail = n_prompt - request.n_base
        # What was begun has cells of its own; all others share the base's.
        n_copied = sum(name in begun and begun[name].kv_state is not None for name in weights)
        n_longest = n_tail + 2 * n_token  # the first goes on while the others catch up
        n_most = (1 + n_copied) * n_prompt + len(weights) * n_longest
        rows = []
        for seq, name in enumerate(weights, start=1):
            unread = list(request.tokens[request.n_base :])
            rows.append(_Row(seq, name, weights[name], unread))
        with self._branches.context(n_most, read()) as context:
            context.set_weights(request.weights)
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
            first.tokens = rows[0].tokens
            yield len(first.tokens)
            if len(rows) > _N_AT_ONCE and rows[0].name not in begun:
                yield from self._decode(context, rows[:1], 1)
            yield from self._decode(context, rows, n_token)
            return [self._state_of(context, row) for row in rows]

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

    def _state_of(self, context: Context, row: _Row) -> DraftState:
        """Give a draft, and its KV state where that is small: an answer may begin with both."""
        text = self._model.text(row.tokens)
        draft = Draft(row.name, tuple(row.tokens), text, tuple(row.logprobs), row.is_whole)
        is_small = context.n_byte_of(row.seq) <= _N_BYTE_KEPT
        return DraftState(draft, row.weights, context.kv_state_of(row.seq) if is_small else None)


def _begin(context: Context, row: _Row, begun: DraftState | None) -> None:
    """Begin a draft in a sequence, or go on with what there is of it."""
    context.set_weights(row.weights, seq=row.seq)
    if begun is not None:
        row.tokens = list(begun.draft.tokens)
        row.logprobs = list(begun.draft.logprobs)
    if begun is not None and begun.kv_state is not None:
        context.load_sequence(row.seq, begun.kv_state)
        row.unread = row.tokens[-1:]
    elif not context.tokens[row.seq]:
        context.copy(0, row.seq)
        row.unread += row.tokens
