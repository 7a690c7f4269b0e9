"""A context of several sequences, driven row by row: what a batch holds is up to the test."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tiny import F32

from qaflora_edge.backend import library as native
from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.formats.base import read_base
from qaflora_edge.formats.gguf import read_values


def project(context: Context, rows: F32, *, is_normed: bool = False) -> F32:
    """Logits [n_row, n_vocab] of rows [n_row, n_embd] by the base's head.

    is_normed  False: the base's final norm comes first
    """
    functions, pointer = context._functions, context._pointer
    rows = np.array(rows, np.float32, order="C")
    if not is_normed:
        rows = final_norm(context._model, rows)
    logits = np.empty((len(rows), context._model.n_vocab), np.float32)
    assert functions.project(pointer, len(rows), rows.ctypes.data, logits.ctypes.data)
    return logits


def final_norm(model: Model, rows: F32) -> F32:
    """The base's final norm, which takes the mean square, of rows [n_row, n_embd]."""
    base = read_base(model.path)
    gain = read_values(model.path, base.tensors["output_norm.weight"])
    epsilon = base.metadata[f"{base.architecture}.attention.layer_norm_rms_epsilon"]
    squares = np.square(rows, dtype=np.float64).mean(axis=1, keepdims=True)
    return np.array(gain * rows / np.sqrt(squares + epsilon), np.float32, order="C")


class Stats(ctypes.Structure):
    """struct qaflora_stats: counters of one context."""

    _names = ("n_graph_built", "n_decoded", "lens_us", "divergence_us")
    _fields_ = [(name, ctypes.c_int64) for name in _names]


def stats(pointer: int) -> Stats:
    function = native.load()[0]._lib.qaflora_get_stats
    function.restype, function.argtypes = Stats, [ctypes.c_void_p]
    return function(pointer)


@dataclass(frozen=True)
class Row:
    """One token of one sequence."""

    token: int
    pos: int
    seq: int
    output: bool = False


def rows_of(tokens: Sequence[int], *, seq: int = 0, start: int = 0) -> list[Row]:
    """The tokens of a sequence, the last of them an output."""
    last = len(tokens) - 1
    return [Row(token, start + i, seq, i == last) for i, token in enumerate(tokens)]


class RawContext:
    """F32 KV, no flash attention, two threads; other parameters of llama.cpp as named."""

    def __init__(
        self, model: Model, pack: Pack, *, flags: int = 0, n_seq: int = 1, **params: object
    ) -> None:
        self.lib, self._functions = native.load()
        self._model = model
        self._params = self.lib.llama_context_default_params()
        defaults = {
            "n_ctx": 256 * n_seq,
            "n_batch": 256,
            "n_seq_max": n_seq,
            "type_k": 0,
            "type_v": 0,
            "flash_attn_type": 0,
            "n_threads": 2,
            "n_threads_batch": 2,
            "kv_unified": False,
        }
        for name, value in (defaults | params).items():
            setattr(self._params, name, value)
        self.pointer = self._functions.context_init(
            model._pointer, ctypes.byref(self._params), pack._pointer, flags
        )

    def decode(self, rows: Sequence[Row]) -> int:
        """What llama_decode returns."""
        batch = self.lib.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, row in enumerate(rows):
            batch.token[i], batch.pos[i] = row.token, row.pos
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row.seq
            batch.logits[i] = row.output
        code = int(self.lib.llama_decode(self.pointer, batch))
        self.lib.llama_batch_free(batch)
        return code

    def abort_when(self, is_due: Callable[[], bool] | None) -> None:
        """Let llama.cpp ask before every node of a graph whether to end."""
        kind = self.lib.ggml_abort_callback
        self._callback = kind(lambda _: is_due()) if is_due else ctypes.cast(None, kind)
        self.lib.llama_set_abort_callback(self.pointer, self._callback, None)

    def set_weights(self, seq: int, weights: F32) -> None:
        array = np.ascontiguousarray(weights, np.float32)
        assert self._functions.set_weights(self.pointer, seq, array.ctypes.data, array.size)

    def capture_begin(self) -> None:
        assert self._functions.capture_begin(self.pointer, native.CAPTURE["last"])

    def states(self, seq: int) -> F32:
        """[n_layer, n_embd]"""
        states = np.empty((self._model.n_layer, self._model.n_embd), np.float32)
        assert self._functions.get_states(self.pointer, seq, states.ctypes.data, states.size)
        return states

    def logits(self, row: int) -> F32 | None:
        """[n_vocab] of a row of the last batch, or None where llama.cpp has none."""
        pointer = self.lib.llama_get_logits_ith(self.pointer, row)
        if not pointer:
            return None
        return np.ctypeslib.as_array(pointer, shape=(self._model.n_vocab,)).copy()

    def pos_max(self, seq: int) -> int:
        """The last position that a sequence holds, or -1."""
        memory = self.lib.llama_get_memory(self.pointer)
        return int(self.lib.llama_memory_seq_pos_max(memory, seq))

    def forget(self, seq: int, start: int = 0) -> None:
        memory = self.lib.llama_get_memory(self.pointer)
        assert self.lib.llama_memory_seq_rm(memory, seq, start, -1)

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.pointer), False)

    @property
    def n_decoded(self) -> int:
        """Micro-batches computed so far."""
        return int(stats(self.pointer).n_decoded)

    def close(self) -> None:
        self.lib.llama_free(self.pointer)
