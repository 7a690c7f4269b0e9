"""Where prompts are cut: what is computed at once.

The cut depends on how many tokens there are to read and on nothing else, so that a prompt is read
alike alone and in company.
"""

from __future__ import annotations

from dataclasses import dataclass

# ggml's flash attention on the CPU computes tiles where a sequence has this many rows, and row by
# row below: llama.cpp 0c1e5709, ggml-cpu/ops.cpp, ggml_compute_forward_flash_attn_ext_f16.
N_TILE = 64
_N_AT_ONCE = 256  # rows of all sequences; twice as many were no faster and take more memory


@dataclass(frozen=True)
class Pieces:
    """Pieces of n_full tokens, and a last one of n_least to n_most: too short a rest joins it."""

    n_full: int
    n_least: int

    @property
    def n_most(self) -> int:
        return self.n_full + self.n_least - 1

    def next(self, n_left: int) -> int:
        """How many of the tokens that are left come at once."""
        return n_left if n_left <= self.n_most else self.n_full


def pieces_of(n_seq: int = 1) -> Pieces:
    """Pieces of a prompt that n_seq sequences read together.

    Whole tiles of each sequence, however many there are: the rows computed at once grow with them.
    """
    return Pieces(N_TILE * max(1, _N_AT_ONCE // (N_TILE * n_seq)), N_TILE)


def n_ubatch(n_seq: int = 1) -> int:
    """Rows that a context needs room for, where up to n_seq sequences read together."""
    return max(n * pieces_of(n).n_most for n in range(1, n_seq + 1))
