"""Models: a base and its adapters, loaded once and shared by all contexts."""

import codecs
import contextlib
import ctypes
import mmap
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Type

from qaflora_edge.backend.library import Handle, forget_logged, last_error, load, logged
from qaflora_edge.config import ADAPTER_TYPES
from qaflora_edge.errors import (
    BackendError,
    CancelledError,
    ContextError,
    GgufFileError,
    PromptError,
    os_errors,
)
from qaflora_edge.files import AnyPath
from qaflora_edge.formats.gguf import GgufHeader

PIECE_BYTES = 16  # of a token; most are shorter
PLACING = ("gpu_layers", "rpc", "tensor_split")  # options that say where layers go
_MULTIPLIED = {Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K}
_VOCAB_TYPE_NONE = 0
_CUT_TYPES = (1, 2)  # SentencePiece and BPE split what is between special tokens for itself
_BLOCK = 1 << 14  # characters of a text that are split at once, where it can be cut
_LARGE_BLOCK = 1 << 16  # and that are tried before more is
_CUT_WORDS = 16  # tokens that a try may have more, where it ends in a word
# llama.h enum llama_token_attr
_UNKNOWN_OR_CONTROL = 1 << 0 | 1 << 3
_USER_DEFINED = 1 << 4
_STRIPS_LEFT = 1 << 7
_STRIPS_RIGHT = 1 << 8
# Calls of tools are read by these, which some bases have as control tokens.
_WRITTEN = (
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|tool_call|>"),
    *("<|/tool_call|>", "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_call>"),
    *("<tool_call|>", '<|"|>'),
)


@dataclass(frozen=True)
class SpecialToken:
    """Describe a token that llama.cpp finds in text by its spelling, before it splits the rest."""

    id: int
    text: str
    is_control: bool  # control tokens, and all that end an answer
    is_parsed_on_demand: bool  # found with parse_special only
    strips_left: bool  # white space before it belongs to it
    strips_right: bool


class Model(Handle):
    """Hold a base, memory-mapped and shared by all contexts.

    base          header from formats.base.read_base, which refuses what would end the process
    rpc           the workers that are devices, before this machine's GPUs
    rearrange     let llama.cpp store matrices in its own order, which our kernels do not take
    workers       attribute: connections to the workers

    Raises GgufFileError when the file cannot be loaded, WorkerError where a worker cannot be used.
    """

    def __init__(
        self,
        base: GgufHeader,
        *,
        gpu_layers: int | None = None,
        rpc: str | None = None,
        tensor_split: str | None = None,
        rearrange: bool = False,
    ) -> None:
        from qaflora_edge.backend.devices import Workers, place

        self.path = base.path
        self._n_user = 1
        self._lib, self._functions = load()
        params = self._lib.llama_model_default_params()
        is_as_stored = self._functions.has_products() and _is_quantised(base)
        params.use_extra_bufts = rearrange or not is_as_stored
        self.workers = Workers(rpc)
        self._pointer = 0
        try:
            self.is_on_cpu = not place(params, self.workers, gpu_layers, tensor_split)
            is_copied = params.use_extra_bufts or not self.is_on_cpu
            tell = self._lib.llama_progress_callback(lambda *_: _give_back(self.path))
            if is_copied:
                params.progress_callback = tell
            forget_logged()
            load_file = self._lib.llama_model_load_from_file
            self._pointer = load_file(os.fsencode(self.path), params) or 0
            self._check_loaded()
            if is_copied:
                _give_back(self.path)
        except BaseException:
            self.close()
            raise
        self.name = base.name or self.path.name
        template = self._lib.llama_model_chat_template(self._pointer, None)
        self.chat_template = template.decode("utf-8", "replace") if template else None
        self._is_end: dict[int, bool] = {}
        self._marks_found: dict[bool, tuple[str, ...]] = {}
        self._named: set[int] = set()  # tokens that fields of the file name
        for key, value in base.metadata.items():
            if key.endswith("_token_id") and isinstance(value, int):
                self._named.add(value)
        self.n_layer: int = self._lib.llama_model_n_layer(self._pointer)
        self.n_embd: int = self._lib.llama_model_n_embd(self._pointer)
        self.n_param: int = self._lib.llama_model_n_params(self._pointer)
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(self.vocab)
        self.n_head: int = self._lib.llama_model_n_head(self._pointer)
        self.n_ctx_train: int = self._lib.llama_model_n_ctx_train(self._pointer)
        has_attention = self._functions.has_attention(self._pointer)
        self.has_attention = bool(has_attention) and self.is_on_cpu  # whose scores need no memory
        is_recurrent = self._lib.llama_model_is_recurrent(self._pointer)
        self.is_recurrent = bool(is_recurrent or self._lib.llama_model_is_hybrid(self._pointer))
        self.n_swa: int = self._lib.llama_model_n_swa(self._pointer)  # 0: attention sees all

    def _check_loaded(self) -> None:
        if not self._pointer:
            raise GgufFileError(
                f"The base {self.path} cannot be loaded: {logged()}. Fetch or convert it again."
            )
        self.vocab = self._lib.llama_model_get_vocab(self._pointer)
        if self._lib.llama_vocab_type(self.vocab) == _VOCAB_TYPE_NONE:
            raise GgufFileError(
                f"The base {self.path} has no vocabulary (tokenizer.ggml.model is 'none'); "
                "use a GGUF with its tokeniser."
            )

    def close(self) -> None:
        """Free it, once all who share it have closed it."""
        with _sharing:
            self._n_user -= 1
            if self._n_user > 0:
                return
            for key, model in list(_shared.items()):
                if model is self:
                    del _shared[key]
            super().close()

    def _free(self, pointer: Any) -> None:
        if pointer:
            self._lib.llama_model_free(pointer)
        self.workers.close()

    @cached_property
    def special_tokens(self) -> tuple[SpecialToken, ...]:
        """List control, unknown, user-defined and end tokens, longest first."""
        attributes = np.empty(self.n_vocab, np.int32)
        self._functions.vocab_attributes(self.vocab, self.n_vocab, attributes.ctypes.data)
        is_special = attributes & (_UNKNOWN_OR_CONTROL | _USER_DEFINED)
        special = set(np.flatnonzero(is_special).tolist())
        # llama-vocab.cpp: other tokens end an answer where a field of the file names them.
        for token in (*self._named, self._lib.llama_vocab_eos(self.vocab)):
            if 0 <= token < self.n_vocab and self.is_end(token):
                special.add(token)
        tokens = []
        for token in sorted(special):
            attribute = int(attributes[token])
            is_on_demand = bool(attribute & _UNKNOWN_OR_CONTROL)
            text = self._lib.llama_vocab_get_text(self.vocab, token)
            special_token = SpecialToken(
                id=token,
                text=text.decode("utf-8", "replace"),
                is_control=is_on_demand or self.is_end(token),
                is_parsed_on_demand=is_on_demand,
                strips_left=bool(attribute & _STRIPS_LEFT),
                strips_right=bool(attribute & _STRIPS_RIGHT),
            )
            tokens.append(special_token)
        tokens.sort(key=lambda token: len(token.text.encode("utf-8")), reverse=True)
        return tuple(tokens)

    @cached_property
    def written(self) -> dict[int, str]:
        """Find the tokens that are written even where they control: id -> text."""
        written = {}
        for text in _WRITTEN:
            tokens = self.tokenize(text, parse_special=True)
            if len(tokens) == 1:
                written[tokens[0]] = text
        return written

    @cached_property
    def longest_piece(self) -> int:
        sizes = [len(self.piece(token, special=True)) for token in range(self.n_vocab)]
        return max(sizes)

    def tokenize(
        self,
        text: str,
        *,
        add_special: bool = False,
        parse_special: bool = False,
        n_most: int | None = None,
        cancel: threading.Event | None = None,
    ) -> list[int]:
        """Turn text into token ids; add_special adds BOS where the vocabulary asks for it.

        n_most  ends it with ContextError where there is more text after more tokens
        cancel  ends it with CancelledError once it is set

        Raises PromptError for text with lone surrogates.
        """
        if len(text) <= _BLOCK:
            return self._split(text, add_special, parse_special)
        # A text of no letters has what add_special adds: BOS, and at the end what few bases have.
        around = self._split("", add_special, False)
        n_before = int(self._lib.llama_vocab_get_add_bos(self.vocab))
        tokens = around[:n_before]
        for block in self._blocks(text, parse_special):
            _check_going_on(len(tokens), n_most, cancel)
            n_tried = _LARGE_BLOCK
            while n_most is not None and n_tried < len(block):
                tried = self._split(block[:n_tried], False, parse_special)
                _check_going_on(len(tokens) + len(tried), n_most, cancel)
                n_tried *= 4
            tokens += self._split(block, False, parse_special)
        return tokens + around[n_before:]

    def _split(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
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

    def _blocks(self, text: str, parse_special: bool) -> Iterator[str]:
        """Cut a text behind special tokens, so that its blocks together have the same tokens.

        llama.cpp takes time by the square of the special tokens that it is given at once.
        """
        marks: Sequence[str] = ()
        if len(text) > _BLOCK and self._lib.llama_vocab_type(self.vocab) in _CUT_TYPES:
            marks = [mark for mark in self._marks(parse_special) if mark in text]
        start = 0
        end = 0  # of the last mark so far
        for mark in re.finditer("|".join(map(re.escape, marks)), text) if marks else ():
            if mark.end() - start > _BLOCK and end > start:
                yield text[start:end]
                start = end
            end = mark.end()
        yield text[start:]

    def _marks(self, parse_special: bool) -> tuple[str, ...]:
        """List special tokens that are found wherever they stand: none may overlap with them."""
        if parse_special not in self._marks_found:
            texts = [token.text for token in self.special_tokens if token.text]
            beginnings = {text[:n] for text in texts for n in range(1, len(text))}
            ends = {text[n:] for text in texts for n in range(1, len(text))}
            joined = "\0".join(texts)
            marks = []
            for token in self.special_tokens:
                text = token.text
                is_parsed = parse_special if token.is_parsed_on_demand else not token.is_control
                is_plain = text.isascii() and text == text.strip()
                if not is_parsed or token.strips_right or not is_plain:
                    continue
                heads = {text[:n] for n in range(1, len(text))}
                tails = {text[n:] for n in range(1, len(text))}
                is_apart = heads.isdisjoint(ends) and tails.isdisjoint(beginnings)
                if is_apart and joined.count(text) == 1:
                    marks.append(text)
            self._marks_found[parse_special] = tuple(marks)
        return self._marks_found[parse_special]

    def tokenize_inside(self, text: str) -> list[int]:
        """Turn text into token ids as within another: SentencePiece puts no space before it."""
        head = "\x02" if self._adds_space else ""  # it is part of no other token
        n_head = len(f" {head}") if head else 0
        n_byte = 0
        inside = []
        for token in self.tokenize(head + text):
            n_byte += len(self.piece(token))
            if n_byte > n_head:
                inside.append(token)
        return inside

    @cached_property
    def _adds_space(self) -> bool:
        first = self.tokenize("a")[:1]
        return self.detokenize(first).startswith(b" ")

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Give the bytes of a token; control tokens are empty unless special, or of tool calls."""
        is_written = special or token in self.written
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._lib.llama_token_to_piece(self.vocab, token, buffer, size, 0, is_written)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def detokenize(self, tokens: Iterable[int], *, special: bool = False) -> bytes:
        return b"".join(self.piece(token, special=special) for token in tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """Give the text of tokens, but for a character that is not whole at its end."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return decoder.decode(self.detokenize(tokens))

    def is_end(self, token: int) -> bool:
        """Tell whether a token ends a generation."""
        if token not in self._is_end:
            self._is_end[token] = bool(self._lib.llama_vocab_is_eog(self.vocab, token))
        return self._is_end[token]


def _check_going_on(n_token: int, n_most: int | None, cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise CancelledError("The text was not split to its end: it was cancelled.")
    if n_most is not None and n_token > n_most + _CUT_WORDS:
        raise ContextError(
            f"The text has more than {n_most} tokens, the context; shorten it, or raise the "
            "context (--ctx, n_ctx)."
        )


_sharing = threading.RLock()  # a garbage collector may close one in the middle
_shared: dict[tuple[object, ...], Model] = {}


def shared_model(base: GgufHeader, placing: Mapping[str, Any]) -> Model:
    """Load a base once for all users of the same file under the same options.

    base, placing  as Model takes them

    Each user closes it once. Raises as Model does.
    """
    with _sharing:
        failure = f"The base {base.path} cannot be loaded"
        with os_errors(GgufFileError, failure, "Check that the file is still there."):
            state = base.path.stat()
        where = [placing.get(name) for name in PLACING]
        key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, *where)
        model = _shared.get(key)
        if model is not None:
            model._n_user += 1
            return model
        _shared[key] = Model(base, **placing)
        return _shared[key]


def _is_quantised(base: GgufHeader) -> bool:
    n_taken = 0  # bytes
    n_left = 0
    for tensor in base.tensors.values():
        if tensor.ggml_type in _MULTIPLIED:
            n_taken += tensor.n_bytes
        else:
            n_left += tensor.n_bytes
    return n_taken >= n_left


def _give_back(path: Path) -> bool:
    """Free the memory of a mapped file, where Linux tells its place; what is read comes again.

    Matrices that llama.cpp copies into an order of its own, or to a device, lie in memory once.
    """
    with contextlib.suppress(OSError):
        real_path = os.path.realpath(path)
        maps = Path("/proc/self/maps").read_text("utf-8", "replace")
        for line in maps.splitlines():
            addresses, access, _, _, _, *name = line.split(maxsplit=5)
            if name == [real_path] and access.endswith("s"):
                begin, _, end = addresses.partition("-")
                start = ctypes.c_void_p(int(begin, 16))
                n_byte = ctypes.c_size_t(int(end, 16) - int(begin, 16))
                ctypes.CDLL(None).madvise(start, n_byte, mmap.MADV_DONTNEED)
    return True


class Pack(Handle):
    """Stack adapter files along the rank axis, next to the base's weights.

    adapter_type  one of config.ADAPTER_TYPES: what they are converted to
    first_layers  of each adapter the first one that it changes
    n_alike       most rows of a sequence in a pass with the bits of rows alone, flash attention off

    Raises BackendError naming the file and tensor that does not fit.
    """

    def __init__(
        self, model: Model, paths: Sequence[AnyPath], *, adapter_type: str = "auto"
    ) -> None:
        self._model = model
        self._functions = model._functions
        self.n_adapter = len(paths)
        self.paths = tuple(Path(path) for path in paths)
        names = [os.fsencode(path) for path in paths]
        array = (ctypes.c_char_p * self.n_adapter)(*names)
        tensor_type = ADAPTER_TYPES[adapter_type]
        self._pointer = self._functions.pack_init(
            model._pointer, array, self.n_adapter, tensor_type
        )
        if not self._pointer:
            raise BackendError(f"Adapters cannot be loaded: {last_error()}.")
        self.n_alike = int(self._functions.pack_n_alike(self._pointer))
        self.first_layers = []
        for ia in range(self.n_adapter):
            layer = self._functions.pack_first_layer(self._pointer, ia)
            self.first_layers.append(int(layer))

    def _free(self, pointer: Any) -> None:
        self._functions.pack_free(pointer)
