"""What the native library holds: a model, a pack of adapters, contexts. Each has close().

Nothing here knows what a strategy or a bundle is: token ids and weights go in, states and
logits come out.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qaflora_edge import native
from qaflora_edge.errors import (
    BackendError,
    CancelledError,
    GgufFileError,
    OptionError,
    PromptError,
)
from qaflora_edge.stop import Stop

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

KV_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}  # llama_cpp's GGML_TYPE_*
MAX_THREADS = 512  # ggml.h GGML_MAX_N_THREADS: ggml aborts the process above it
MAX_CTX = 2**24  # tokens; some sequences of so many still fit llama.cpp's 32-bit counts
_LOG_LEVEL_ERROR = 4  # ggml.h GGML_LOG_LEVEL_ERROR
_VOCAB_TYPE_NONE = 0
# llama.h enum llama_token_attr
_ATTR_UNKNOWN, _ATTR_CONTROL, _ATTR_USER_DEFINED = 1 << 0, 1 << 3, 1 << 4
_ATTR_LSTRIP, _ATTR_RSTRIP = 1 << 7, 1 << 8
_DECODE_ABORTED = 2  # llama.h llama_decode
N_UBATCH = 256  # tokens computed at once; twice as many were no faster and take more memory
_errors: deque[str] = deque(maxlen=4)
_log_callback: Any = None


def library() -> tuple[Any, Any]:
    """The binding and our functions, with the library's log kept off the terminal."""
    global _log_callback
    binding, functions = native.load()
    if _log_callback is None:

        def keep_errors(level: int, text: bytes, _: object) -> None:
            if level == _LOG_LEVEL_ERROR:
                _errors.append(text.decode("utf-8", "replace").strip())

        _log_callback = binding.llama_log_callback(keep_errors)
        binding.llama_log_set(_log_callback, None)
    return binding, functions


def said() -> str:
    """What llama.cpp gave as the reasons of its last failure."""
    return "; ".join(_errors) or "no reason given"


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
    _errors.clear()
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


def _floats(array: F32) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


class _Handle:
    """Something of the library that is freed once, by close().

    There is no __del__: a garbage collector may take a model before its contexts.
    """

    _pointer: Any = None

    def close(self) -> None:
        if self._pointer is not None:
            pointer, self._pointer = self._pointer, None
            self._free(pointer)

    def _free(self, pointer: Any) -> None:
        raise NotImplementedError

    def __enter__(self):  # type: ignore[no-untyped-def]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class SpecialToken:
    """A token that llama.cpp finds in text by its spelling, before it splits the rest."""

    id: int
    text: str
    attributes: int  # llama.h llama_token_attr
    is_control: bool  # control tokens, and all that end an answer

    @property
    def is_parsed_on_demand(self) -> bool:
        """Whether it is found with parse_special only; others are found always."""
        return bool(self.attributes & (_ATTR_UNKNOWN | _ATTR_CONTROL))

    @property
    def strips_left(self) -> bool:
        return bool(self.attributes & _ATTR_LSTRIP)

    @property
    def strips_right(self) -> bool:
        return bool(self.attributes & _ATTR_RSTRIP)


class Model(_Handle):
    """A base, memory-mapped and shared by all contexts.

    Raises GgufFileError when the file cannot be loaded.
    """

    def __init__(self, path: str | os.PathLike[str], *, gpu_layers: int | None = None) -> None:
        self.path = Path(path)
        self._lib, self._functions = library()
        if not self.path.is_file():
            raise GgufFileError(
                f"The base {self.path} does not exist; give the path of a GGUF file, "
                "or fetch one with `qaflora pull`."
            )
        params = self._lib.llama_model_default_params()
        if gpu_layers is not None:
            params.n_gpu_layers = gpu_layers
        _errors.clear()
        self._pointer = self._lib.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._pointer:
            self._pointer = None
            raise GgufFileError(
                f"The base {self.path} cannot be loaded: {said()}. Fetch or convert it again."
            )
        self.vocab = self._lib.llama_model_get_vocab(self._pointer)
        if self._lib.llama_vocab_type(self.vocab) == _VOCAB_TYPE_NONE:
            self.close()
            raise GgufFileError(
                f"The base {self.path} has no vocabulary (tokenizer.ggml.model is 'none'); "
                "use a GGUF with its tokeniser."
            )
        self.name = self.metadata("general.name") or self.path.name
        template = self._lib.llama_model_chat_template(self._pointer, None)
        self.chat_template = template.decode("utf-8", "replace") if template else None
        self.n_layer: int = self._lib.llama_model_n_layer(self._pointer)
        self.n_embd: int = self._lib.llama_model_n_embd(self._pointer)
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(self.vocab)
        self.n_ctx_train: int = self._lib.llama_model_n_ctx_train(self._pointer)
        self.n_swa: int = self._lib.llama_model_n_swa(self._pointer)  # 0: attention sees all

    def _free(self, pointer: Any) -> None:
        self._lib.llama_model_free(pointer)

    def metadata(self, key: str) -> str | None:
        """One scalar of the GGUF's metadata as text, or None."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._lib.llama_model_meta_val_str(self._pointer, key.encode(), buffer, size)
            if n < 0:
                return None
            if n < size:
                return buffer.value.decode("utf-8", "replace")
            size = n + 1

    @cached_property
    def special_tokens(self) -> tuple[SpecialToken, ...]:
        """Control, unknown and user-defined tokens, and those that end an answer; longest first."""
        found = []
        for token in range(self.n_vocab):
            attributes = int(self._lib.llama_vocab_get_attr(self.vocab, token))
            is_control = bool(attributes & (_ATTR_UNKNOWN | _ATTR_CONTROL)) or self.is_end(token)
            if is_control or attributes & _ATTR_USER_DEFINED:
                text = self._lib.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace")
                found.append(SpecialToken(token, text, attributes, is_control))
        return tuple(sorted(found, key=lambda token: -len(token.text.encode("utf-8"))))

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of text; add_special adds BOS where the vocabulary asks for it.

        Raises PromptError for text with lone surrogates.
        """
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as err:
            raise PromptError(
                f"Character {err.start} of the prompt is {text[err.start]!r}, expected text that "
                "UTF-8 can write; decode the prompt from its bytes again."
            ) from err
        size = len(data) + 8
        while True:
            tokens = (ctypes.c_int32 * size)()
            n = self._lib.llama_tokenize(
                self.vocab, data, len(data), tokens, size, add_special, parse_special
            )
            if n >= 0:
                return list(tokens[:n])
            size = -n

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes a token stands for; control tokens are empty unless special."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._lib.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def is_end(self, token: int) -> bool:
        """Whether the token ends a generation."""
        return bool(self._lib.llama_vocab_is_eog(self.vocab, token))


class Pack(_Handle):
    """Adapter files, stacked along the rank axis beside the base's weights.

    Raises BackendError naming the file and tensor that does not fit.
    """

    def __init__(self, model: Model, paths: Sequence[str | os.PathLike[str]]) -> None:
        self._model = model
        self._functions = model._functions
        self.n_adapter = len(paths)
        self.paths = tuple(Path(path) for path in paths)
        array = (ctypes.c_char_p * len(paths))(*(os.fsencode(path) for path in paths))
        self._pointer = self._functions.pack_init(model._pointer, array, len(paths))
        if not self._pointer:
            raise BackendError(f"Adapters cannot be loaded: {native.last_error()}.")

    def _free(self, pointer: Any) -> None:
        self._functions.pack_free(pointer)

    @property
    def size_bytes(self) -> int:
        return int(self._functions.pack_size_bytes(self._pointer))


class Context(_Handle):
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
                + (f" llama.cpp says: {said()}." if _errors else "")
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
            if code == _DECODE_ABORTED and self._stop is not None and self._stop.is_set:
                raise CancelledError(
                    "The call was cancelled (Engine.cancel) while a prompt was read, before there "
                    "was an answer; ask again."
                )
            raise BackendError(f"llama_decode failed with code {code}: {said()}.")

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
            raise BackendError(f"Divergences cannot be computed: {native.last_error()}.")
        return result

    def project(self, rows: F32) -> F32:
        """Logits [n_row, n_vocab] that the base's head gives to rows [n_row, n_embd]."""
        rows = np.ascontiguousarray(rows, np.float32)
        logits = np.empty((len(rows), self._model.n_vocab), np.float32)
        if not self._functions.project(self._pointer, len(rows), _floats(rows), _floats(logits)):
            raise BackendError(f"Rows cannot be projected: {native.last_error()}.")
        return logits

    def final_norm(self, rows: F32) -> F32:
        """The base's final norm of rows [n_row, n_embd], the same shape."""
        rows = np.ascontiguousarray(rows, np.float32)
        normed = np.empty_like(rows)
        if not self._functions.final_norm(self._pointer, len(rows), _floats(rows), _floats(normed)):
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
