"""Where prompts are cut: what is computed at once.

A cut depends on the tokens of the prompt and on nothing else, so that a prompt is read alike alone,
in company, and after others. It falls where messages end, so that prompts which begin with the same
messages are cut alike there, and what was read of one can be used for another, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qaflora_edge.backend.batch import n_common

# Rows of a tile in ggml's flash attention on the CPU: llama.cpp 0c1e5709, GGML_FA_TILE_Q. Whole
# tiles cost the least for each row, and so many rows are worth reading the base's matrices for.
N_TILE = 64
_N_OPENING = 16  # tokens of a chat template behind the last message, at most
_N_AT_ONCE = 256  # rows of all sequences; twice as many were no faster and take more memory


def _never(token: int) -> bool:
    return False


@dataclass(frozen=True)
class Pieces:
    """Pieces of n_full tokens; a rest of fewer than n_least joins the one before it.

    n_message  the fewest tokens of a piece that ends where a message does
    is_break   whether a token ends a message. One that is followed by what the prompt ends with,
               the beginning of an answer, ends behind that: so it does in the next turn's prompt.
    """

    n_full: int
    n_least: int
    n_message: int
    is_break: Callable[[int], bool] = _never

    @property
    def n_most(self) -> int:
        return self.n_full + self.n_least - 1

    def end(self, tokens: Sequence[int], at: int) -> int:
        """Where the piece of a prompt ends that begins at `at`."""
        most = min(len(tokens), at + self.n_most)
        opening = self._opening(tokens)
        for i in range(max(at, at + self.n_message - 1 - len(opening)), most):
            if self.is_break(tokens[i]):
                end = i + 1
                if tuple(tokens[end : end + len(opening)]) == opening:
                    end += len(opening)
                if self.n_message <= end - at <= self.n_most:
                    return end
        return most if most == len(tokens) else at + self.n_full

    def _opening(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """How an answer begins: the few tokens behind a prompt's last message."""
        for n in range(min(len(tokens), _N_OPENING + 1)):
            if self.is_break(tokens[len(tokens) - 1 - n]):
                return tuple(tokens[len(tokens) - n :])
        return ()

    def n_alike(self, read: Sequence[int], tokens: Sequence[int], n_after: int = 0) -> int:
        """How far a prompt is cut, and therefore read, as another was that begins like it.

        n_after  tokens that are read behind the prompt in any case
        returns  tokens, all but the last one that is read at most
        """
        n, at = n_common(read, tokens if n_after else tokens[:-1]), 0
        while at < n and (end := self.end(tokens, at)) <= n and self.end(read, at) == end:
            at = end
        return at


def pieces_of(n_seq: int = 1, is_break: Callable[[int], bool] = _never) -> Pieces:
    """Pieces of a prompt that n_seq sequences read together.

    Whole tiles of each sequence, however many there are: the rows computed at once grow with them.
    A message that is a piece of its own has a tile's rows of all sequences together.
    """
    n_full = N_TILE * max(1, _N_AT_ONCE // (N_TILE * n_seq))
    return Pieces(n_full, N_TILE, -(-N_TILE // n_seq), is_break)


def n_ubatch(n_seq: int = 1) -> int:
    """Rows that a context needs room for, where up to n_seq sequences read together."""
    return max(n * pieces_of(n).n_most for n in range(1, n_seq + 1))
