"""Rows of one llama_decode call: which token, where, of which sequence, with or without logits."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Outputs = Literal["last", "all", "none"]


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence, from position `start` on, and which of them have an output."""

    seq: int
    tokens: Sequence[int]
    start: int = 0
    outputs: Outputs = "last"


class Batch:
    """A llama_batch of spans, one behind the other; its memory is ours and lives as long.

    n_token, n_output  rows in all, and those with an output
    last               row of each span's last token
    """

    def __init__(self, lib: Any, spans: Sequence[Span]) -> None:
        # Arrays without numpy: after each decode the caches hold the model, and code that was
        # just run is slow again. numpy's took 142 us of a token here, where warm it takes 23.
        token, pos, seq, logits = array("i"), array("i"), array("i"), array("b")
        self.last: list[int] = []
        for span in spans:
            n = len(span.tokens)
            token.extend(span.tokens)
            pos.extend(range(span.start, span.start + n))
            seq.extend([span.seq] * n)
            logits.extend([span.outputs == "all"] * n)
            if span.outputs == "last":
                logits[-1] = 1
            self.last.append(len(token) - 1)
        self.n_token, self.n_output = len(token), sum(logits)
        n_seq_id = array("i", [1]) * self.n_token
        # llama_batch.seq_id: one pointer per row, here to the row's own number
        first = seq.buffer_info()[0]
        seq_id = array("Q", range(first, first + seq.itemsize * self.n_token, seq.itemsize))
        self._arrays = (token, pos, n_seq_id, seq_id, logits, seq)
        places = [values.buffer_info()[0] for values in self._arrays[:5]]
        # llama.h struct llama_batch: n_tokens, token, embd, pos, n_seq_id, seq_id, logits
        packed = struct.pack("@iPPPPPP", self.n_token, places[0], 0, *places[1:])
        self.struct = lib.llama_batch.from_buffer_copy(packed)


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    low, high = 0, min(len(a), len(b))
    a, b = list(a[:high]), list(b[:high])
    while low < high:  # a slice is compared far faster than item by item
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
