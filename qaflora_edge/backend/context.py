"""Sequences of one base with one pack: token ids and weights go in, states and logits come out.

Nothing here knows what a strategy or a bundle is.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.backend import native
from qaflora_edge.backend.library import Handle, forget_said, has_said, said
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.backend.stop import Stop
from qaflora_edge.config import KV_TYPES
from qaflora_edge.errors import BackendError, CancelledError, OptionError

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_DECODE_ABORTED = 2  # llama.h llama_decode
N_UBATCH = 256  # tokens computed at once; twice as many were no faster and take more memory


def context_params(
    lib: Any,
    *,
    n_token: int,
    n_seq: int = 1,
    threads: int | None = None,
    kv_type: str = "f16",
    flash_attn: bool = True,
) -> Any:
    """llama_context_params, and the reasons of earlier failures forgotten.

    n_token  that all sequences together can hold, and that one batch can have
    """
    forget_said()
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = n_token
    params.n_ubatch = min(params.n_ubatch, n_token)
    params.n_seq_max = params.n_outputs_max = n_seq
    params.n_threads = params.n_threads_batch = threads or default_threads()
    params.type_k = params.type_v = KV_TYPES[kv_type]
    params.flash_attn_type = 1 if flash_attn else 0
    params.kv_unified = False
    params.no_perf = False
    return params


@dataclass(frozen=True)
class Held:
    """What the sequences of a context held: token ids, and uint8 [n_byte] of each sequence."""

    tokens: list[int]
    sequences: list[NDArray[np.uint8]]


class Context(Handle):
    """Sequences of one base with one pack; every sequence has its own weights, 0 at first.

    n_ctx        tokens that each sequence can hold
    probe        capture states and compute no logits
    differential see method: sequence 0 is the base, the others run the same tokens
    inputs       of a probe: capture what query projections read as well
    all_outputs  of a probe: decode(outputs="all") will be asked for, which takes more memory
    stop         when it is set, decode() ends

    `tokens` is what sequence 0 holds; positions count from 0.

    Raises BackendError when the context cannot be made.
    """

    def __init__(
        self,
        model: Model,
        pack: Pack,
        *,
        n_ctx: int,
        n_seq: int = 1,
        threads: int | None = None,
        kv_type: str = "f16",
        flash_attn: bool = True,
        probe: bool = False,
        differential: bool = False,
        inputs: bool = False,
        all_outputs: bool = False,
        stop: Stop | None = None,
    ) -> None:
        if kv_type not in KV_TYPES:
            raise OptionError(
                f"Option kv_type is {kv_type!r}, expected one of {', '.join(KV_TYPES)}."
            )
        self._model, self._pack = model, pack
        self._lib, self._functions = model._lib, model._functions
        self.n_seq, self.n_ctx = n_seq, n_ctx
        self.tokens: list[int] = []
        self._has_all_outputs = all_outputs
        params = context_params(
            self._lib,
            n_token=n_ctx * n_seq,
            n_seq=n_seq,
            threads=threads,
            kv_type=kv_type,
            flash_attn=flash_attn,
        )
        params.n_ubatch = min(N_UBATCH, params.n_batch)
        if all_outputs:
            params.n_outputs_max = 0  # llama.cpp's own limit
        flags = (
            (native.CONTEXT_PROBE if probe else 0)
            | (native.CONTEXT_DIFFERENTIAL if differential else 0)
            | (native.CONTEXT_INPUTS if inputs else 0)
        )
        self._pointer = self._functions.context_init(
            model._pointer, ctypes.byref(params), pack._pointer, flags
        )
        if not self._pointer:
            raise BackendError(
                f"A context of {n_seq} x {n_ctx} tokens cannot be made: {native.last_error()}."
                + (f" llama.cpp says: {said()}." if has_said() else "")
            )
        self._memory = self._lib.llama_get_memory(self._pointer)
        self._stop = stop
        if stop is not None:
            stop.watch(self._lib, self._pointer)

    def _free(self, pointer: Any) -> None:
        self._lib.llama_free(pointer)

    def clear(self) -> None:
        """Forget all tokens of all sequences."""
        self._lib.llama_memory_clear(self._memory, False)
        self.tokens = []

    def keep_common(self, tokens: Sequence[int]) -> int:
        """Keep what all sequences hold of a prompt's beginning, and forget the rest.

        returns  how many tokens are kept: at most all but the last one, and 0 where the memory
                 cannot forget its end (sliding windows that have moved on)
        """
        n = 0
        while n < min(len(self.tokens), len(tokens) - 1) and self.tokens[n] == tokens[n]:
            n += 1
        window_start = max(0, n - self._model.n_swa)
        if self._model.n_swa and (
            self._lib.llama_memory_seq_pos_min(self._memory, 0) > window_start
        ):
            n = 0
        if n == 0 or not self._lib.llama_memory_seq_rm(self._memory, -1, n, -1):
            self.clear()
            return 0
        del self.tokens[n:]
        return n

    def copy_first(self) -> None:
        """Let all sequences hold what the first one does."""
        for seq in range(1, self.n_seq):
            self._lib.llama_memory_seq_cp(self._memory, 0, seq, -1, -1)

    def held(self) -> Held:
        """A copy of what the sequences hold, for a context of the same shape with more room."""
        sequences = []
        for seq in range(self.n_seq):
            data = np.empty(self._lib.llama_state_seq_get_size(self._pointer, seq), np.uint8)
            n = self._lib.llama_state_seq_get_data(self._pointer, _bytes(data), data.size, seq)
            if n != data.size:
                raise BackendError(
                    f"What was read cannot be copied: {n} of {data.size} bytes came."
                )
            sequences.append(data)
        return Held(list(self.tokens), sequences)

    def hold(self, held: Held) -> None:
        """Hold what another context held, in place of what is here.

        Raises BackendError, and holds nothing, when that is not of this shape.
        """
        self.clear()
        for seq, data in enumerate(held.sequences):
            n = self._lib.llama_state_seq_set_data(self._pointer, _bytes(data), data.size, seq)
            if n != data.size:
                self.clear()
                raise BackendError(
                    f"What was read before cannot be taken over: {n} of {data.size} bytes of "
                    f"sequence {seq} went in: {said()}."
                )
        self.tokens = list(held.tokens)

    def set_weights(self, weights: F32, *, seq: int = 0) -> None:
        """Weigh adapters for one sequence from the next decode on.

        weights  [n_adapter, n_layer]
        """
        array = np.ascontiguousarray(weights, dtype=np.float32)
        if not self._functions.set_weights(self._pointer, seq, _floats(array), array.size):
            raise BackendError(f"Weights cannot be set: {native.last_error()}.")

    def decode(
        self,
        tokens: Sequence[int],
        *,
        start: int = 0,
        outputs: str = "last",
        n_seq: int | None = None,
    ) -> None:
        """Run the same tokens through the sequences, from position start on.

        outputs  "last" token or "all" tokens of each sequence, or "none"
        n_seq    only the first so many sequences

        Raises BackendError when llama_decode fails, CancelledError when it was told to stop; the
        sequences are empty then.
        """
        if outputs == "all" and not self._has_all_outputs:
            raise BackendError(
                "This context has no room for all outputs; make it with all_outputs."
            )
        n, n_seq = len(tokens), n_seq or self.n_seq
        batch = self._lib.llama_batch_init(n * n_seq, 0, 1)
        try:
            batch.n_tokens = n * n_seq
            for seq in range(n_seq):
                for i, token in enumerate(tokens):
                    row = seq * n + i
                    batch.token[row] = token
                    batch.pos[row] = start + i
                    batch.n_seq_id[row] = 1
                    batch.seq_id[row][0] = seq
                    batch.logits[row] = outputs == "all" or (outputs == "last" and i == n - 1)
            code = self._lib.llama_decode(self._pointer, batch)
        finally:
            self._lib.llama_batch_free(batch)
        self.tokens[start:] = tokens
        if code != 0:
            self.clear()
            if code == _DECODE_ABORTED:
                self._check_cancelled()
            raise BackendError(f"llama_decode failed with code {code}: {said()}.")

    def _check_cancelled(self) -> None:
        """Raise CancelledError where work failed because it was told to stop."""
        if self._stop is not None and self._stop.is_set:
            raise CancelledError(
                "The call was cancelled (Engine.cancel) while a prompt was read, before there "
                "was an answer; ask again."
            )

    def logits(self) -> F32:
        """float32 [n_vocab] of the last token decoded."""
        pointer = self._lib.llama_get_logits_ith(self._pointer, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._model.n_vocab,)).copy()

    def sample(self, sampler: Any) -> int:
        """A token drawn by a llama_sampler chain from the last token's logits."""
        return int(self._lib.llama_sampler_sample(sampler, self._pointer, -1))

    def capture_begin(self, pool: str = "last") -> None:
        """Forget captured states; keep the "last" output row, or the "mean" of all rows."""
        if not self._functions.capture_begin(self._pointer, native.CAPTURE[pool]):
            raise BackendError(f"States cannot be captured: {native.last_error()}.")

    def states(self, seq: int) -> F32:
        """float32 [n_layer, n_embd] of one sequence after each block."""
        states = np.empty((self._model.n_layer, self._model.n_embd), np.float32)
        if not self._functions.get_states(self._pointer, seq, _floats(states), states.size):
            raise BackendError(f"States cannot be read: {native.last_error()}.")
        return states

    def inputs(self, seq: int) -> F32:
        """float32 [n_layer, n_embd]: what the query projections read for the last output row."""
        inputs = np.empty((self._model.n_layer, self._model.n_embd), np.float32)
        if not self._functions.get_inputs(self._pointer, seq, _floats(inputs), inputs.size):
            raise BackendError(f"Inputs cannot be read: {native.last_error()}.")
        return inputs

    def divergence(self, base: F32, adapted: F32, lens: str) -> F64:
        """KL of the base's next-token distribution to each adapter's, in nats.

        base     [n_layer, n_embd]             states without adapter
        adapted  [n_adapter, n_layer, n_embd]  states with one adapter each
        returns  float64 [n_adapter, n_layer], >= 0
        """
        base = np.ascontiguousarray(base, np.float32)
        adapted = np.ascontiguousarray(adapted, np.float32)
        result = np.zeros(adapted.shape[:2], np.float64)
        if not self._functions.divergence(
            self._pointer,
            native.LENS[lens],
            len(adapted),
            _floats(base),
            _floats(adapted),
            result.ctypes.data_as(ctypes.POINTER(ctypes.c_double)),
        ):
            self._check_cancelled()
            raise BackendError(f"Divergences cannot be computed: {native.last_error()}.")
        return result

    def project(self, rows: F32) -> F32:
        """Logits [n_row, n_vocab] that the base's head gives to rows [n_row, n_embd]."""
        rows = np.ascontiguousarray(rows, np.float32)
        logits = np.empty((len(rows), self._model.n_vocab), np.float32)
        if not self._functions.project(self._pointer, len(rows), _floats(rows), _floats(logits)):
            self._check_cancelled()
            raise BackendError(f"Rows cannot be projected: {native.last_error()}.")
        return logits

    def final_norm(self, rows: F32) -> F32:
        """The base's final norm of rows [n_row, n_embd], the same shape."""
        rows = np.ascontiguousarray(rows, np.float32)
        normed = np.empty_like(rows)
        if not self._functions.final_norm(self._pointer, len(rows), _floats(rows), _floats(normed)):
            self._check_cancelled()
            raise BackendError(f"Rows cannot be normed: {native.last_error()}.")
        return normed

    @property
    def lens_ms(self) -> tuple[float, float]:
        """Milliseconds so far in divergence(): projecting states, and what follows."""
        stats = self._functions.get_stats(self._pointer)
        return stats.lens_us / 1e3, stats.divergence_us / 1e3

    @property
    def n_graph_built(self) -> int:
        """Graphs this context has built so far, those of reservations included."""
        return int(self._functions.get_stats(self._pointer).n_graph_built)

    @property
    def n_decoded(self) -> int:
        """Micro-batches this context has computed so far."""
        return int(self._functions.get_stats(self._pointer).n_decoded)


def default_threads() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def _bytes(array: NDArray[np.uint8]) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _floats(array: F32) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
