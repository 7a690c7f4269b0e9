"""The prefix cache: KV states of prompts, reused by prompts with the same beginning."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from qaflora_edge.backend.batch import Pieces
from qaflora_edge.backend.probe_context import KvState, ProbeContext

_N_WORTH = 64  # tokens; to prefill fewer again is as quick as to keep them


@dataclass(frozen=True)
class _Entry:
    key: Hashable
    state: KvState


class Prefixes:
    """KV states of prefilled prompts; the least recently used one is dropped first.

    n_byte  limit of all states together; 0 keeps none

    key, in all methods: the sequences of a state. The same key stands for the same sequences of
    contexts made alike.
    """

    def __init__(self, n_byte: int) -> None:
        self._n_most = n_byte
        self._entries: list[_Entry] = []  # the most recently used one last

    @property
    def n_byte(self) -> int:
        return sum(entry.state.n_byte for entry in self._entries)

    def go_on(
        self,
        context: ProbeContext,
        key: Hashable,
        tokens: Sequence[int],
        pieces: Pieces,
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
        read = context.tokens[:n_exact]
        n_held = pieces.n_alike(read, tokens, n_after)
        entry, n_kept = self._longest(key, tokens, pieces, n_after)
        if entry is None or n_kept < n_held + _N_WORTH:
            if len(read) >= n_held + _N_WORTH:
                self.keep(key, context, n_exact)
            return context.keep_first(n_held)
        self.keep(key, context, n_exact)
        context.load_kv_state(entry.state)
        return context.keep_first(n_kept)

    def keep(self, key: Hashable, context: ProbeContext, n_exact: int | None = None) -> None:
        """Keep a copy of a context's KV state, cut to n_exact tokens."""
        if n_exact is not None and len(context.tokens) > n_exact:
            context.keep_first(n_exact)
        if not context.tokens or context.n_kv_byte > self._n_most:
            return
        state = context.kv_state()
        self.add(key, state, context.pieces(len(state.sequences)))

    def add(self, key: Hashable, state: KvState, pieces: Pieces) -> None:
        """Keep a state; drop states that it contains, and the oldest ones beyond the limit."""

        def is_in(tokens: list[int]) -> bool:
            return pieces.n_alike(state.tokens, tokens, n_after=1) == len(tokens)

        kept = [
            entry for entry in self._entries if entry.key != key or not is_in(entry.state.tokens)
        ]
        self._entries = [*kept, _Entry(key, state)]
        while self.n_byte > self._n_most:
            del self._entries[0]

    def _longest(
        self, key: Hashable, tokens: Sequence[int], pieces: Pieces, n_after: int
    ) -> tuple[_Entry | None, int]:
        """Find the entry of which most can be reused, and how many tokens; it counts as used."""
        best, n_best = None, 0
        for entry in self._entries:
            if entry.key == key:
                n = pieces.n_alike(entry.state.tokens, tokens, n_after)
                if n > n_best:
                    best, n_best = entry, n
        if best is not None:
            self._entries.remove(best)
            self._entries.append(best)
        return best, n_best
