"""What prompts begin with, as it was read: kept for other prompts that begin so."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from qaflora_edge.backend.batch import Pieces
from qaflora_edge.backend.probe_context import KvState, ProbeContext

_N_WORTH = 64  # tokens: fewer are read again as quickly as they are kept


@dataclass(frozen=True)
class _Entry:
    key: Hashable
    state: KvState


class Prefixes:
    """KV states of prompts that were read, those used the longest ago dropped first.

    n_byte  of all states together at most; 0 keeps none

    key, in all methods: whose states they are. The same key stands for the same sequences of
    contexts that were made alike.
    """

    def __init__(self, n_byte: int) -> None:
        self._n_most = n_byte
        self._entries: list[_Entry] = []  # used last: at the end

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
        """Let a context hold what was read of a prompt's beginning, by it or by others.

        n_exact  how many of its tokens the context read in the pieces of a prompt; by default all
        n_after  tokens that are read behind the prompt in any case
        returns  how many tokens: up to where the prompt is cut as those others were, so that what
                 follows comes out the same bits as if all of it had been read now
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
        """Keep what a context holds, or its first n_exact tokens; it forgets the others."""
        if n_exact is not None and len(context.tokens) > n_exact:
            context.keep_first(n_exact)
        if not context.tokens or context.n_kv_byte > self._n_most:
            return
        state = context.kv_state()
        self.add(key, state, context.pieces(len(state.sequences)))

    def add(self, key: Hashable, state: KvState, pieces: Pieces) -> None:
        """Keep a state, and drop what there is no room for and what can be had from it as well."""

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
        """The entry of which most can be used, and how many tokens; it counts as used."""
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
