"""Contexts: sequences of one base with one pack; token ids and weights in, logits out.

Nothing here knows of strategies or bundles.
"""

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.arrays import F32, F64
from qaflora_edge.backend import library
from qaflora_edge.backend.batch import (
    N_SHALLOW,
    N_SHALLOW_OWN,
    Batch,
    Chunks,
    Outputs,
    Span,
    chunks_of,
    n_ubatch,
)
from qaflora_edge.backend.library import Stop, default_threads
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.config import KV_TYPES, MAX_CTX
from qaflora_edge.errors import BackendError, CancelledError

U8 = NDArray[np.uint8]
_DECODE_ABORTED = 2  # llama.h llama_decode
_FLASH_ATTN_AUTO, _FLASH_ATTN_OFF = -1, 0  # llama.h llama_flash_attn_type; on: 1
N_OUTPUT = 16  # most rows with logits in a pass that verifies guesses, or scores a question
_MAX_SCORES_BYTES = 256 << 20  # 8,192 tokens of a base with 25 heads
_N_CTX_MIN = 256  # tokens
N_CTX_FIRST = 1024  # of a context without a limit


@dataclass(frozen=True)
class KvState:
    """Copy the KV state of a context's sequences.

    sequences  number, ids of tokens, and uint8 [n_byte] of each
    """

    sequences: list[tuple[int, list[int], U8]]

    @property
    def tokens(self) -> list[int]:
        return self.sequences[0][1]


class Context(library.Handle):
    """Run sequences of one base with one pack, each under its own weights, 0 at first.

    n_ctx       tokens that each sequence can hold
    n_output    most outputs of one decode; by default one of each sequence
    is_unified  one pool of n_ctx tokens for all sequences, instead of a buffer for each: sequences
                may share KV state, and all rows fit one micro-batch
    is_probe    run the same tokens in all sequences and capture their states; compute no logits
    is_differential  of a probe: sequence 0 is the base, the others run the same tokens
    stop        ends decode() when it is set
    options     threads, kv_type and flash_attn of context_params
    tokens      attribute: ids of the KV state of each sequence

    Positions count from 0. A decode that fails leaves the sequences as they were before it.

    Raises BackendError when the context cannot be made.
    """

    def __init__(
        self,
        model: Model,
        pack: Pack,
        *,
        n_ctx: int,
        n_seq: int = 1,
        n_output: int | None = None,
        is_unified: bool = False,
        is_probe: bool = False,
        is_differential: bool = False,
        stop: Stop | None = None,
        **options: Any,
    ) -> None:
        self._model = model
        self._pack = pack
        self._lib = model._lib
        self._functions = model._functions
        n_buffer = 1 if is_unified else n_seq
        params = context_params(
            model,
            n_token=n_ctx * n_buffer,
            n_seq=n_seq,
            is_unified=is_unified,
            is_probe=is_probe,
            **options,
        )
        n_together = n_seq if is_probe else 1
        params.n_ubatch = min(n_ubatch(n_together), params.n_batch)
        if is_probe or n_output is not None:
            params.n_outputs_max = min(n_output or MAX_CTX, params.n_batch)
        self._params = params
        self._flags = library.CONTEXT_PROBE * is_probe
        self._flags |= library.CONTEXT_DIFFERENTIAL * is_differential
        self.is_flash_off = params.flash_attn_type == _FLASH_ATTN_OFF
        self._pointer = self._init(n_seq, n_ctx)
        self._set_up(n_ctx, params, stop)

    def _init(self, n_seq: int, n_ctx: int, advice: str = "") -> Any:
        params = ctypes.byref(self._params)
        pointer = self._functions.context_init(
            self._model._pointer, params, self._pack._pointer, self._flags
        )
        if not pointer:
            why = library.logged(library.last_error())
            size = f"{n_seq} x {n_ctx} tokens"
            raise BackendError(f"A context of {size} cannot be made: {why}.{advice}")
        return pointer

    def resize(self, n_ctx: int) -> None:
        """Give each sequence a buffer of n_ctx tokens, and keep its KV state, which has to fit.

        Kernels stay the same, so answers do. Weights have to be set again.
        Raises BackendError, and changes nothing, when the context cannot be made.
        """
        library.forget_logged()
        with self._loaded_again():
            self._params.n_ctx = n_ctx * self.n_seq
            self._params.n_batch = n_ctx * self.n_seq
            advice = " Ask for fewer tokens, or limit all requests (--ctx, n_ctx)."
            old = self._pointer
            self._pointer = self._init(self.n_seq, n_ctx, advice)
            self._set_up(n_ctx, self._params, self._stop)
            self._free(old)  # last: Ctrl-C may raise after it

    def _set_up(self, n_ctx: int, params: Any, stop: Stop | None) -> None:
        self.n_seq = int(params.n_seq_max)
        self.n_ctx = n_ctx
        self._is_unified = bool(params.kv_unified)
        self._n_batch = int(params.n_batch)
        self._n_output = int(params.n_outputs_max)
        self.tokens: list[list[int]] = [[] for _ in range(self.n_seq)]
        self._memory = self._lib.llama_get_memory(self._pointer)
        self._stop = stop
        if stop is not None:
            stop.watch(self._lib, self._pointer)

    def _free(self, pointer: Any) -> None:
        self._lib.llama_free(pointer)

    def chunks(self, n_seq: int = 1) -> Chunks:
        """Choose how a prompt is cut that n_seq sequences prefill together."""
        n_shallow = MAX_CTX
        if self._model.is_on_cpu:
            n_shallow = N_SHALLOW_OWN if self._model.has_attention else N_SHALLOW
        return chunks_of(n_seq, self._model.is_end, n_shallow=n_shallow)

    def clear(self, seq: int | None = None, *, is_zeroed: bool = False) -> None:
        """Forget all tokens of one sequence, or of all; after close() do nothing.

        is_zeroed  zero the memory of all sequences: see clean()
        """
        if self._pointer is None:  # the steps of a query may end after close()
            return
        if seq is None:
            self._lib.llama_memory_clear(self._memory, is_zeroed)
            self.tokens = [[] for _ in range(self.n_seq)]
        else:
            self._rm(seq, -1)
            self.tokens[seq] = []

    def clean(self, seq: int) -> None:
        """Forget a sequence with states that may be NaN, and zero the memory of all.

        Attention multiplies masked cells by 0, and NaN stays NaN: the next sequence in the same
        buffer would meet it. Other sequences are loaded again.
        """
        self.clear(seq)
        with self._loaded_again():
            self.clear(is_zeroed=True)

    @contextlib.contextmanager
    def _loaded_again(self) -> Iterator[None]:
        """Keep the KV state of all sequences over a block that replaces their memory."""
        state = self.kv_state()
        yield
        self.load_kv_state(state)

    def kv_state(self) -> KvState:
        """Copy the KV state, for a context made with the same options."""
        sequences = []
        for seq, tokens in enumerate(self.tokens):
            if tokens:
                sequences.append((seq, list(tokens), self._sequence(seq)))
        return KvState(sequences)

    def kv_state_of(self, seq: int) -> KvState:
        """Copy the KV state of one sequence, as the first of another context."""
        return KvState([(0, list(self.tokens[seq]), self._sequence(seq))])

    def load_kv_state(self, state: KvState) -> None:
        """Replace the KV state by another context's, prefilled under the weights that are set here.

        Raises BackendError, and is empty then, for another shape.
        """
        self.clear()
        try:
            for seq, tokens, data in state.sequences:
                self._load(seq, data, tokens)
        except BackendError:
            self.clear()
            raise

    def keep(self, n_token: int, seq: int) -> int:
        """Keep the first n_token tokens of one sequence, and forget the rest.

        returns  n_token, or 0 where the memory cannot forget its end (recurrent, moved windows)
        """
        held = self.tokens[seq]
        if n_token >= len(held):
            return len(held)
        is_lost = False
        if self._model.n_swa:
            window_start = max(0, n_token - self._model.n_swa)
            first = self._lib.llama_memory_seq_pos_min(self._memory, seq)
            is_lost = first > window_start
        if n_token == 0 or is_lost or not self._rm(seq, n_token):
            self.clear(seq)
            return 0
        del held[n_token:]
        return n_token

    def _rm(self, seq: int, start: int) -> bool:
        return bool(self._lib.llama_memory_seq_rm(self._memory, seq, start, -1))

    def keep_first(self, n: int) -> int:
        """Keep the first n tokens of all sequences, and forget the rest.

        returns  n, or 0 where the memory cannot forget its end
        """
        held = [seq for seq in range(self.n_seq) if self.tokens[seq]]
        n_kept = {self.keep(n, seq) for seq in held}
        if n_kept == {n}:
            return n
        self.clear()
        return 0

    def load_sequence(self, seq: int, state: KvState) -> None:
        """Replace the KV state of one sequence by the first of another context.

        Raises BackendError, and leaves it empty then, for another shape.
        """
        self.clear(seq)
        _, tokens, data = state.sequences[0]
        self._load(seq, data, tokens)

    def n_byte_of(self, seq: int) -> int:
        return int(self._lib.llama_state_seq_get_size(self._pointer, seq))

    def copy(self, source: int, target: int) -> None:
        """Copy the KV state of one sequence to another; sequences of one pool share it."""
        tokens = self.tokens[source]
        self.clear(target)
        if self._is_unified:
            self._lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)
            self.tokens[target] = list(tokens)
        elif tokens:
            self._load(target, self._sequence(source), tokens)

    def _load(self, seq: int, data: U8, tokens: Sequence[int]) -> None:
        n = self._lib.llama_state_seq_set_data(self._pointer, as_bytes(data), data.size, seq)
        if n != data.size:
            self.clear(seq)
            raise BackendError(
                f"A KV state cannot be reused: {n} of {data.size} bytes of sequence {seq} "
                f"went in: {library.logged()}."
            )
        self.tokens[seq] = list(tokens)

    def _sequence(self, seq: int) -> U8:
        n_byte = int(self._lib.llama_state_seq_get_size(self._pointer, seq))
        data = mapped(n_byte)
        n = self._lib.llama_state_seq_get_data(self._pointer, as_bytes(data), data.size, seq)
        if n != data.size:
            raise BackendError(f"A KV state cannot be copied: {n} of {data.size} bytes came.")
        return data

    def set_weights(self, weights: F32, *, seq: int = 0) -> None:
        """Weigh adapters by [n_adapter, n_layer] for one sequence, from the next decode on."""
        array = np.ascontiguousarray(weights, dtype=np.float32)
        if not self._functions.set_weights(self._pointer, seq, array.ctypes.data, array.size):
            raise BackendError(f"Weights cannot be set: {library.last_error()}.")

    def decode(
        self,
        tokens: Sequence[int],
        *,
        start: int = 0,
        outputs: Outputs = "last",
        n_seq: int | None = None,
    ) -> None:
        """Run the same tokens through the first n_seq sequences (all), from position start on.

        Raises as decode_spans does.
        """
        n_seq = n_seq or self.n_seq
        self.decode_spans([Span(seq, tokens, start, outputs) for seq in range(n_seq)])

    def decode_spans(self, spans: Sequence[Span]) -> list[int]:
        """Run tokens of some sequences, each after its tokens up to the span's start.

        returns  the row of each span's last token, for logits() and sample()

        Raises BackendError when llama_decode fails, CancelledError when it was told to stop.
        """
        batch = Batch(self._lib, spans)
        # Else it would end the process in llama.cpp.
        assert self._pointer is not None, "the context is closed"
        assert batch.n_token <= self._n_batch, (batch.n_token, self._n_batch)
        assert batch.n_output <= self._n_output, (batch.n_output, self._n_output)
        assert max(span.seq for span in spans) < self.n_seq, spans
        code = self._functions.decode(self._pointer, ctypes.byref(batch.struct))
        if code == 0:
            for span in spans:
                self.tokens[span.seq][span.start :] = span.tokens
            return batch.last
        # llama.cpp 0c1e5709, llama_context::decode: earlier micro-batches of the call stay
        for span in spans:
            if not self._rm(span.seq, span.start):
                self.clear(span.seq)
        if code == _DECODE_ABORTED:
            self._check_cancelled()
        why = library.last_error() or library.logged()
        raise BackendError(f"llama_decode failed with code {code}: {why}.")

    def _check_cancelled(self) -> None:
        if self._stop is not None and self._stop.is_set:
            raise cancelled()

    def logits(self, row: int = -1) -> F32:
        """Copy the logits of an output row of the last decode: float32 [n_vocab]; -1: the last."""
        return self.logits_view(row).copy()

    def logits_view(self, row: int = -1) -> F32:
        """Give the same in llama.cpp's own memory, which the next decode overwrites."""
        pointer = self._lib.llama_get_logits_ith(self._pointer, row)
        if not pointer:
            raise BackendError(f"Row {row} of the last batch has no logits.")
        return np.ctypeslib.as_array(pointer, shape=(self._model.n_vocab,))

    def capture_begin(self, what: str = "last") -> None:
        """Forget what was captured, and capture this from now on.

        what  "inputs" of the query projections for every row, or "none"; of a probe also states:
              those of the "last" output row, or the "mean" of all output rows
        """
        if not self._functions.capture_begin(self._pointer, library.CAPTURE[what]):
            raise BackendError(f"States cannot be captured: {library.last_error()}.")

    def inputs(self, seq: int, n_row: int) -> F32:
        """Give inputs of the query projections: float32 [n_row, n_layer, n_embd].

        n_row  how many of this sequence there were since capture_begin
        """
        shape = (n_row, self._model.n_layer, self._model.n_embd)
        inputs = np.empty(shape, np.float32)
        return self._captured(self._functions.get_inputs, seq, inputs)

    def states(self, seq: int) -> F32:
        """Give the states of one sequence after each block: float32 [n_layer, n_embd]."""
        shape = (self._model.n_layer, self._model.n_embd)
        states = np.empty(shape, np.float32)
        return self._captured(self._functions.get_states, seq, states)

    def divergence(self, base: F32, adapted: F32, lens: str) -> F64:
        """Compute the KL of the base's next-token distribution to each adapter's, in nats.

        base     [n_layer, n_embd]             states without adapter
        adapted  [n_adapter, n_layer, n_embd]  states with one adapter each
        returns  float64 [n_adapter, n_layer], >= 0
        """
        base = np.ascontiguousarray(base, np.float32)
        adapted = np.ascontiguousarray(adapted, np.float32)
        result = np.zeros(adapted.shape[:2], np.float64)
        if not self._functions.divergence(
            self._pointer,
            library.LENS[lens],
            len(adapted),
            base.ctypes.data,
            adapted.ctypes.data,
            result.ctypes.data,
        ):
            self._check_cancelled()
            raise BackendError(f"Divergences cannot be computed: {library.last_error()}.")
        return result

    def _captured(self, get: Callable[..., int], seq: int, values: F32) -> F32:
        if not get(self._pointer, seq, values.ctypes.data, values.size):
            raise BackendError(f"Captured states cannot be read: {library.last_error()}.")
        return values

    def sample(self, sampler: Any, row: int = -1) -> int:
        """Draw a token by a llama_sampler chain from the logits of a row."""
        return int(self._lib.llama_sampler_sample(sampler, self._pointer, row))


def cancelled() -> CancelledError:
    return CancelledError(
        "The call was cancelled (Engine.cancel) before there was an answer; ask again."
    )


def mapped(n_byte: int) -> U8:
    """Allocate memory that goes back to the system when it is dropped; malloc would keep it."""
    if sys.platform == "win32":
        memory = mmap.mmap(-1, n_byte)
    else:
        memory = mmap.mmap(-1, n_byte, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8)


def as_bytes(array: U8) -> Any:
    """Give a pointer to bytes, for a call during which the array lives."""
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def n_ctx_for(n_token: int) -> int:
    """Size a context for so many tokens; it grows by doubling."""
    return max(_N_CTX_MIN, 1 << (n_token - 1).bit_length())


def context_params(
    model: Model,
    *,
    n_token: int,
    n_seq: int = 1,
    threads: int | None = None,
    kv_type: str = "f16",
    flash_attn: bool | None = None,
    is_unified: bool = False,
    is_probe: bool = False,
) -> Any:
    """Make llama_context_params, and forget the reasons of earlier failures.

    n_token     tokens of all sequences together, and of one batch
    flash_attn  None: where it is quicker on the CPU; else llama.cpp looks at what the device can

    On the CPU flash attention computes tiles of many rows: quick for prefill, and slow for the
    single rows of decoding, the slower the longer the context. Without it values cannot be
    quantised, and where attention is llama.cpp's, all scores of a chunk are in memory at once.
    Scoring computes as answers do.
    """
    library.forget_logged()
    params = model._lib.llama_context_default_params()
    params.n_ctx = n_token
    params.n_batch = n_token
    params.n_ubatch = min(params.n_ubatch, n_token)
    params.n_seq_max = n_seq
    params.n_outputs_max = n_seq
    params.n_threads = threads or default_threads()
    params.n_threads_batch = params.n_threads
    params.type_k = KV_TYPES[kv_type]
    params.type_v = KV_TYPES[kv_type]
    if flash_attn is None and model.is_on_cpu:
        n_ctx = n_token if is_unified else n_token // n_seq
        scores_bytes = 0 if model.has_attention else 4 * model.n_head * n_ctx * n_ubatch()
        is_slow = not is_probe and kv_type in ("f16", "f32")
        flash_attn = not is_slow or scores_bytes > _MAX_SCORES_BYTES
    params.flash_attn_type = _FLASH_ATTN_AUTO if flash_attn is None else int(flash_attn)
    params.kv_unified = is_unified
    params.no_perf = False
    return params
