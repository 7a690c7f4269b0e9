"""KV state that one query leaves to the next, and how a prompt is prefilled after it.

How much can be reused is Chunks.n_shared's matter, here and in a slot of answers.
"""

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from qaflora_edge.backend.batch import Chunks, Outputs
from qaflora_edge.backend.context import Context, KvState, n_ctx_for

T = TypeVar("T")
Ids = Sequence[int]  # of tokens
# Yields the number of prefilled tokens, or None, between micro-batches; returns its result.
Steps = Generator[int | None, None, T]
_N_WORTH = 64  # tokens; to prefill fewer again is as quick as to keep them


@contextmanager
def wiped_on_failure(context: Context) -> Iterator[None]:
    """Empty a context when a block fails; a cancelled query's GeneratorExit counts."""
    try:
        yield
    except BaseException:
        context.clear(is_zeroed=True)
        raise


def prefill(
    context: Context, tokens: Ids, start: int, outputs: Outputs, *, n_tail: int = 0, n_seq: int = 1
) -> Steps[None]:
    """Run tokens[start:] through the first n_seq sequences, a micro-batch at a time.

    n_tail  tokens at the end that are left out, or are all that is left, as Chunks.cut takes them
    """
    cuts = [*context.chunks(n_seq).cut(tokens, start, n_tail)]
    for at, end in cuts:
        is_last = (at, end) == cuts[-1]
        shown: Outputs = outputs if is_last or outputs == "all" else "none"
        context.decode(tokens[at:end], start=at, outputs=shown, n_seq=n_seq)
        if not is_last:
            yield end


class Prefixes:
    """Cache KV states of prefilled prompts; the least recently used one is dropped first.

    n_byte  limit of all states together; 0 keeps none

    key, in all methods: stands for a state's sequences, of contexts that were made alike.
    """

    def __init__(self, n_byte: int) -> None:
        self._n_most = n_byte
        self._entries: list[tuple[Hashable, KvState]] = []  # the most recently used one last

    @property
    def n_byte(self) -> int:
        return sum(state.n_byte for _, state in self._entries)

    def go_on(
        self,
        context: Context,
        key: Hashable,
        tokens: Ids,
        chunks: Chunks,
        *,
        n_exact: int | None = None,
        n_after: int = 0,
    ) -> int:
        """Reuse the KV state of a prompt's beginning, from this context or another prompt.

        n_exact  tokens that the context holds in the chunks of a whole prompt; by default all
        n_after  tokens that will follow the prompt in any case
        returns  how many tokens are held: up to where both prompts have the same chunks, so that
                 the rest comes out the same bits as in a prefill of all
        """
        read = context.tokens[0][:n_exact]
        n_held = chunks.n_shared(read, tokens, n_after)
        n_kept = 0  # tokens of the best state that is kept
        best = -1
        for index, (other_key, state) in enumerate(self._entries):
            if other_key != key:
                continue
            n_shared = chunks.n_shared(state.tokens, tokens, n_after)
            if n_shared > n_kept:
                n_kept = n_shared
                best = index
        if n_kept:
            self._entries.append(self._entries.pop(best))
        if n_kept < n_held + _N_WORTH:
            if len(read) >= n_held + _N_WORTH:
                self.keep(key, context, n_exact)
            return context.keep_first(n_held)
        _, state = self._entries[-1]
        self.keep(key, context, n_exact)
        context.load_kv_state(state)
        return context.keep_first(n_kept)

    def keep(self, key: Hashable, context: Context, n_exact: int | None = None) -> None:
        """Keep a copy of a context's KV state, cut to n_exact tokens.

        States that it contains are dropped, and the oldest ones beyond the limit.
        """
        if n_exact is not None and len(context.tokens[0]) > n_exact:
            context.keep_first(n_exact)
        if not context.tokens[0] or context.n_kv_byte > self._n_most:
            return
        state = context.kv_state()
        chunks = context.chunks(len(state.sequences))
        kept = []
        for other_key, other in self._entries:
            n_shared = chunks.n_shared(state.tokens, other.tokens, n_after=1)
            is_contained = n_shared == len(other.tokens)
            if other_key != key or not is_contained:
                kept.append((other_key, other))
        kept.append((key, state))
        self._entries = kept
        while self.n_byte > self._n_most:
            del self._entries[0]


class GrowingContext:
    """Keep a context; replace it by a larger one for a longer query, KV state included.

    make  makes one from n_ctx
    """

    def __init__(self, make: Callable[..., Context]) -> None:
        self._make = make
        self.context: Context | None = None

    def for_query(self, n_token: int) -> Context:
        """Give a context with room for a query."""
        held = self.context
        if held is not None and held.n_ctx >= n_token:
            return held
        state = None if held is None else held.kv_state()
        self.close()
        self.context = self._make(n_ctx=n_ctx_for(n_token))
        if state is not None:
            self.context.load_kv_state(state)
        return self.context

    def close(self) -> None:
        if self.context is not None:
            self.context.close()
        self.context = None
