"""Rows of one llama_decode call: which token, where, of which sequence, with or without logits."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

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
        lengths = [len(span.tokens) for span in spans]
        ends = np.cumsum(lengths, dtype=np.int64)
        self.n_token = int(ends[-1]) if spans else 0
        self.last = [int(end) - 1 for end in ends]
        self._token = np.fromiter(_all(span.tokens for span in spans), np.int32, self.n_token)
        self._pos = np.concatenate(
            [
                np.arange(s.start, s.start + n, dtype=np.int32)
                for s, n in zip(spans, lengths, strict=True)
            ]
        )
        self._n_seq_id = np.ones(self.n_token, np.int32)
        self._seq = np.repeat(np.array([span.seq for span in spans], np.int32), lengths)
        # llama_batch.seq_id: one pointer per row, here to the row's own number
        rows = np.arange(self.n_token, dtype=np.uint64)
        self._seq_id = self._seq.ctypes.data + self._seq.itemsize * rows
        self._logits = np.zeros(self.n_token, np.int8)
        for span, last, n in zip(spans, self.last, lengths, strict=True):
            if span.outputs != "none":
                self._logits[last if span.outputs == "last" else slice(last + 1 - n, last + 1)] = 1
        self.n_output = int(self._logits.sum())
        struct = lib.llama_batch()
        struct.n_tokens = self.n_token
        for name, array in (
            ("token", self._token),
            ("pos", self._pos),
            ("n_seq_id", self._n_seq_id),
            ("seq_id", self._seq_id),
            ("logits", self._logits),
        ):
            kind = dict(struct._fields_)[name]
            setattr(struct, name, ctypes.cast(array.ctypes.data, kind))
        self.struct = struct


def _all(parts: Iterable[Sequence[int]]) -> Iterable[int]:
    for part in parts:
        yield from part


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
