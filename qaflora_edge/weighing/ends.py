"""Reading the ends of a query by the adapters, and all of it by the base: quick, and not exact."""

from collections.abc import Hashable, Sequence
from typing import Literal

from qaflora_edge.backend.probe_context import KvState, ProbeContext
from qaflora_edge.weighing.prefixes import Prefixes
from qaflora_edge.weighing.reading import Steps, read_tokens
from qaflora_edge.weighing.strategy import Span

N_FIRST, N_FIRST_MOST = 8, 64  # tokens that adapters read of a query's beginning
N_OPENING, N_CLOSING = 16, 32  # tokens that are left of a question in its abridged form
_N_BEGINNING = 8  # beginnings that are kept

# 0, or how many tokens at a query's end adapters read; "fast": by how long the question is.
Tail = int | Literal["fast"]
_FAST_SHARE = 0.65  # of what follows the question's start: weights within 0.03 of the exact ones
_FAST_LEAST = 8  # tokens
_FAST_WHOLE = 64  # tokens behind the beginning that are read whole: ends would take as long


def n_first(question: Span) -> int:
    """How many tokens count as a query's beginning: what stands before its question, if any."""
    return min(question[0] or N_FIRST, N_FIRST_MOST)


def abridged(tokens: Sequence[int], question: Span) -> tuple[Sequence[int], Span]:
    """A query without the middle of a long question, and where the question stands in it."""
    start, end = question
    if end - start <= N_OPENING + N_CLOSING:
        return tokens, question
    left = [*tokens[: start + N_OPENING], *tokens[end - N_CLOSING :]]
    return left, (start, start + N_OPENING + N_CLOSING)


class Beginnings:
    """What sequences of a context made of queries' first tokens; the last few are kept."""

    def __init__(self) -> None:
        self._states: dict[Hashable, KvState] = {}  # used last: at the end

    def __contains__(self, key: Hashable) -> bool:
        return key in self._states

    def read(
        self, context: ProbeContext, key: Hashable, tokens: Sequence[int], n_seq: int
    ) -> Steps[KvState]:
        """What was made of a beginning; it is read in an empty context where that is not known.

        key  whose states they are, and of which tokens
        """
        state = self._states.pop(key, None)
        if state is None:
            yield from read_tokens(context, tokens, 0, "none", n_seq=n_seq)
            state = context.kv_state()
            context.clear()
        self._states[key] = state
        if len(self._states) > _N_BEGINNING:
            del self._states[next(iter(self._states))]
        return state


class Ends:
    """What was read of queries so.

    tail      which tokens at a query's end adapters read; 0: queries are read whole
    prefixes  where what the base read is kept

    An adapter reads the first tokens as well, which attention rests on whatever they are: what
    stands before a question in chat form. That is the same for all questions, and read once. What
    lies between is read by the base alone, and adapters attend to what it made of it.
    """

    def __init__(self, tail: Tail, prefixes: Prefixes) -> None:
        self._tail, self._prefixes = tail, prefixes
        self._beginnings = Beginnings()
        self._n_base: int | None = None  # tokens of the base's in the context; None: no ends
        self._key: Hashable = None  # how the base read them

    @property
    def are_held(self) -> bool:
        """Whether the context holds ends, and not what was read whole."""
        return self._n_base is not None

    def n_first(self, n_token: int, question: Span) -> int:
        """How many tokens adapters read of a query's beginning; 0 where it is read whole."""
        n = n_first(question)
        n_behind = n_token - n
        if self._tail == "fast" and n_behind <= _FAST_WHOLE:
            return 0
        return n if 0 < self._n_last(n_token, question) < n_behind else 0

    def _n_last(self, n_token: int, question: Span) -> int:
        if self._tail == "fast":
            return max(_FAST_LEAST, round(_FAST_SHARE * (n_token - question[0])))
        return self._tail

    def n_unread(self, n_token: int, question: Span) -> int:
        """How many of a query's tokens adapters do not read."""
        n = self.n_first(n_token, question)
        return n_token - n - self._n_last(n_token, question) if n else 0

    def read(
        self,
        context: ProbeContext,
        rows: tuple[int, ...],
        tokens: Sequence[int],
        question: Span,
    ) -> Steps[None]:
        """Read a query in a context that holds ends or nothing.

        rows  of the adapters, whose weights are set
        """
        n_first, n_last = (n(len(tokens), question) for n in (self.n_first, self._n_last))
        n_seq, n_head = 1 + len(rows), len(tokens) - n_last
        key, how = (rows, tuple(tokens[:n_first])), ("ends", rows, n_first)
        if key not in self._beginnings or how != self._key:
            self.forget(context)
        beginning = yield from self._beginnings.read(context, key, tokens[:n_first], n_seq)
        self._keep_base_only(context)
        head, pieces = tokens[:n_head], context.pieces()
        at = self._prefixes.go_on(context, how, head, pieces, n_exact=self._n_base, n_after=n_last)
        self._n_base, self._key = n_head, how
        if at == 0:
            sequences, weights = beginning.sequences[:1], beginning.weights[:1]
            context.load_kv_state(KvState(beginning.tokens, sequences, weights))
            at, cut = n_first, pieces.end(head, 0)
            if at < cut:
                context.decode(head[at:cut], start=at, outputs="none", n_seq=1)
                at = cut
                yield at
        if at < n_head:
            yield from read_tokens(context, head, at, "none", n_seq=1)
        context.share_behind(beginning)
        yield from read_tokens(context, tokens, n_head, "last", n_seq=n_seq)

    def forget(self, context: ProbeContext) -> None:
        """Hold nothing, but keep what is of use to other queries."""
        self._keep_base_only(context)
        self._prefixes.keep(self._key, context, self._n_base)
        context.clear()
        self._n_base = None

    @staticmethod
    def _keep_base_only(context: ProbeContext) -> None:
        for seq in range(1, context.n_seq):
            context.clear(seq)
