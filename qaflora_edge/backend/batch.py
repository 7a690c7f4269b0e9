"""Batches: rows of one llama_decode call, and how prompts are cut into chunks."""

import math
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qaflora_edge.config import MAX_CTX

Outputs = Literal["last", "all", "none"] | Sequence[int]  # of which tokens; or their places


@dataclass(frozen=True)
class Span:
    """Name tokens of one sequence from position `start` on, and which have an output."""

    seq: int
    tokens: Sequence[int]
    start: int = 0
    outputs: Outputs = "last"


class Batch:
    """Own a llama_batch of consecutive spans.

    n_token, n_output  rows in all, and those with an output
    last               row of each span's last token
    """

    def __init__(self, lib: Any, spans: Sequence[Span]) -> None:
        # Arrays without numpy: after each decode the caches hold the model, and code that was
        # just run is slow again. numpy's took 142 us of a token here, where warm it takes 23.
        token = array("i")
        pos = array("i")
        seq = array("i")
        logits = array("b")
        self.last: list[int] = []
        for span in spans:
            n = len(span.tokens)
            token.extend(span.tokens)
            pos.extend(range(span.start, span.start + n))
            seq.extend([span.seq] * n)
            logits.extend([span.outputs == "all"] * n)
            if span.outputs == "last":
                logits[-1] = 1
            elif not isinstance(span.outputs, str):
                for at in span.outputs:
                    logits[at - n] = 1
            self.last.append(len(token) - 1)
        self.n_token = len(token)
        self.n_output = sum(logits)
        n_seq_id = array("i", [1]) * self.n_token
        # llama_batch.seq_id: one pointer per row, here to the row's own number
        first, _ = seq.buffer_info()
        end = first + seq.itemsize * self.n_token
        seq_id = array("Q", range(first, end, seq.itemsize))
        self._arrays = (token, pos, n_seq_id, seq_id, logits, seq)  # the struct points at them
        packed = struct.pack(  # llama.h struct llama_batch
            "@iPPPPPP",
            self.n_token,
            token.buffer_info()[0],
            0,  # embd
            pos.buffer_info()[0],
            n_seq_id.buffer_info()[0],
            seq_id.buffer_info()[0],
            logits.buffer_info()[0],
        )
        self.struct = lib.llama_batch.from_buffer_copy(packed)


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the tokens that two sequences have in common from the start."""
    low = 0
    high = min(len(a), len(b))
    a = list(a[:high])
    b = list(b[:high])
    while low < high:  # a slice is compared far faster than item by item
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


# Rows of a tile in ggml's flash attention on the CPU: llama.cpp 0c1e5709, GGML_FA_TILE_Q. Whole
# tiles cost the least for each row, and so many rows are worth reading the base's matrices for.
N_TILE = 64
N_SHALLOW = 2048  # tokens, from where on attention takes a CPU more and more of a chunk's time
N_SHALLOW_OWN = 4096  # the same where it is our own, in a third of the time
_N_ROW_LEAST = 16  # of a chunk: fewer take as long for each row as decoding does
_N_OPENING = 16  # tokens of a chat template behind the last message, at most
_N_AT_ONCE = 256  # rows of all sequences; twice as many were no faster and take more memory


@dataclass(frozen=True)
class Chunks:
    """Cut prompts into chunks of n_full tokens; a rest below n_least joins the chunk before it.

    A cut depends on the prompt's tokens alone: prefill gives the same bits whatever else is
    computed. Cuts fall where messages end, so that prompts with the same first messages share
    chunks, and reuse each other's KV state bit for bit.

    n_message  the fewest tokens of a chunk that ends with a message
    n_shallow  after so many tokens chunks get shorter: each row looks at all tokens before it, and
               others wait for the chunk. Rows times tokens before them stay the same.
    is_break   whether a token ends a message. The chunk ends after the opening of an answer where
               that follows, as it does in the next turn's prompt.
    is_exact   whether the base's KV states are the same bits however a prompt is cut
    """

    n_full: int
    n_least: int
    n_message: int
    is_break: Callable[[int], bool] = lambda token: False
    n_shallow: int = MAX_CTX
    is_exact: bool = False

    @property
    def n_most(self) -> int:
        return self.n_full + self.n_least - 1

    def end(self, tokens: Sequence[int], at: int, n_tail: int = 0) -> int:
        """Find the end of the chunk that begins at `at`.

        n_tail  where an answer begins, the chunk ends so many tokens before; the rest of a prompt
                that ends there is one more chunk
        """
        limit = len(tokens) - n_tail
        if at >= limit:
            limit = len(tokens)
        n_full = self._n_full_at(at)
        n_message = min(self.n_message, n_full)
        most = self._most(at, limit)
        opening = self._opening(tokens)
        n_opening = len(opening)
        first = at + max(0, n_message - 1 - n_opening)
        for i in range(first, min(most + n_tail, len(tokens))):
            if not self.is_break(tokens[i]):
                continue
            end = i + 1
            if tuple(tokens[end : end + n_opening]) == opening:
                end += n_opening - n_tail
            if n_message <= end - at <= self.n_most and end <= limit:
                return end
        return self.longest_end(at, limit)

    def longest_end(self, at: int, limit: int) -> int:
        """Find the end of the longest chunk that begins at `at`, whatever the tokens are."""
        most = self._most(at, limit)
        return most if most == limit else at + self._n_full_at(at)

    def _most(self, at: int, limit: int) -> int:
        n_full = self._n_full_at(at)
        return min(limit, at + n_full + min(self.n_least, n_full) - 1)

    def _n_full_at(self, at: int) -> int:
        """Count the tokens of a chunk after so many others, in whole tiles while they are large."""
        if at <= self.n_shallow:
            return self.n_full
        n_row = _N_AT_ONCE * self.n_shallow // at
        n_unit = N_TILE if n_row >= N_TILE else _N_ROW_LEAST
        n_whole = n_row // n_unit * n_unit
        return min(self.n_full, max(_N_ROW_LEAST, n_whole))

    def n_row_as_long(self, at: int, n: int) -> int:
        """Count the rows of a prompt's beginning that take as long as n rows after `at` tokens."""
        return n * max(1, at // self.n_shallow)

    def cut(self, tokens: Sequence[int], at: int = 0, n_tail: int = 0) -> Iterator[tuple[int, int]]:
        """Give the begin and the end of each chunk: of the last n_tail tokens, or of all before."""
        limit = len(tokens) - n_tail
        if at >= limit:
            limit = len(tokens)
        while at < limit:
            end = self.end(tokens, at, n_tail)
            yield at, end
            at = end

    def _opening(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Give the few tokens after a prompt's last message, which open the answer."""
        n_token = len(tokens)
        for begin in range(n_token, max(0, n_token - _N_OPENING - 1), -1):
            if self.is_break(tokens[begin - 1]):
                return tuple(tokens[begin:])
        return ()

    def n_shared(
        self,
        read: Sequence[int],
        tokens: Sequence[int],
        n_after: int = 0,
        *,
        n_tail: int = 0,
        n_there: int | None = None,
        n_tail_there: int | None = None,
    ) -> int:
        """Count the tokens in chunks that a prompt shares with one prefilled earlier.

        Of what the base has prefilled all tokens count where that is exact.

        n_after  tokens that are prefilled after the prompt in any case
        n_tail   as end() takes it, for both prompts
        n_there  tokens of the earlier prompt that can be reused; None: all
        n_tail_there  n_tail of the earlier prompt; None: the same
        returns  at most all tokens but the last n_tail, and the last one that is prefilled
        """
        n_last = n_tail if n_after else max(1, n_tail)  # tokens that are prefilled in any case
        n_most = min(n_common(read, tokens), len(tokens) - n_last)
        if n_tail_there is None:
            n_tail_there = n_tail
        if n_there is not None:
            n_most = min(n_most, n_there)
        if self.is_exact and n_tail and n_tail_there:
            return n_most
        at = 0
        while at < n_most:
            end = self.end(tokens, at, n_tail)
            if end > n_most or self.end(read, at, n_tail_there) != end:
                break
            at = end
        return at


def chunks_of(
    n_seq: int = 1,
    is_break: Callable[[int], bool] = lambda token: False,
    *,
    n_shallow: int = MAX_CTX,
) -> Chunks:
    """Choose the chunks of a prompt that n_seq sequences prefill together.

    Chunks are whole tiles of each sequence, so the rows computed at once grow with n_seq. A message
    that is a chunk of its own has at least a tile's rows of all sequences together.
    """
    n_tile = max(1, _N_AT_ONCE // (N_TILE * n_seq))
    n_message = math.ceil(N_TILE / n_seq)
    return Chunks(n_tile * N_TILE, N_TILE, n_message, is_break, n_shallow)


def n_ubatch(n_seq: int = 1) -> int:
    """Count the rows of the largest micro-batch, where up to n_seq sequences prefill together."""
    sizes = [n * chunks_of(n).n_most for n in range(1, n_seq + 1)]
    return max(sizes)
