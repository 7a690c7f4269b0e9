"""Read the header of a GGUF file: metadata, and where each tensor lies.

Ours because gguf's GGUFReader needs 1.5 s for SmolLM2's vocabulary and trusts what a file says of
itself. Here vocabularies are stepped over, and every count, length and offset is checked first.
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from qaflora_edge.arrays import F32
from qaflora_edge.errors import GgufFileError, InputFileError
from qaflora_edge.files import AnyPath, open_input
from qaflora_edge.formats.file_parts import read_columns
from qaflora_edge.formats.gguf_parse import (
    U64,
    GgufCursor,
    MetadataValue,
    SkippedArray,
    TensorInfo,
    brief,
)

MAX_LAYERS = 1024  # twice llama.cpp's own limit
MAX_COUNT = 1 << 24  # of other dimensions


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself, checked against its size."""

    path: Path
    architecture: str
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, TensorInfo]
    data_offset: int
    size_bytes: int

    @property
    def name(self) -> str | None:
        """What the file calls itself."""
        name = self.metadata.get("general.name")
        return name if isinstance(name, str) and name.strip() else None

    @property
    def n_layer(self) -> int:
        return self._count("block_count", MAX_LAYERS)

    @property
    def n_embd(self) -> int:
        return self._count("embedding_length")

    @property
    def n_head(self) -> int:
        return self._count("attention.head_count")

    @property
    def n_head_kv(self) -> int:
        if f"{self.architecture}.attention.head_count_kv" not in self.metadata:
            return self.n_head
        return self._count("attention.head_count_kv")

    def n_ssm(self, field: str) -> int:
        """Give a count of the recurrent layers, such as `state_size`."""
        return self._count(f"ssm.{field}")

    @property
    def n_rotary(self) -> int:
        return self._count("rope.dimension_count")

    @property
    def n_vocab(self) -> int:
        info = self.tensors.get("token_embd.weight")
        if info is None or len(info.shape) != 2:
            raise GgufFileError(
                f"Cannot tell the vocabulary's size of {self.path}: tensor token_embd.weight is "
                f"{'missing' if info is None else f'of shape {list(info.shape)}'}; expected "
                "[n_vocab, n_embd]. Use the GGUF of a language model as base."
            )
        return info.shape[0]

    def _count(self, field: str, largest: int = MAX_COUNT) -> int:
        """Give a positive whole number of the architecture, such as `block_count`."""
        key = f"{self.architecture}.{field}"
        value = self.metadata.get(key)
        if isinstance(value, tuple) and len(set(value) - {0}) == 1:
            value = max(value)  # given per layer: the same in all, or 0 in those that have none
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest:
            return value
        kind = self.metadata.get("general.type", "model")
        if kind != "model":
            raise GgufFileError(
                f"Cannot use {self.path} as a base: metadata field general.type is {brief(kind)}; "
                "expected the GGUF of a language model. Give the base that the adapter is for."
            )
        raise GgufFileError(
            f"Cannot use {self.path}: metadata field {key} is "
            f"{'missing' if value is None else brief(value)}; expected one whole number from 1 to "
            f"{largest}. "
            "Use the GGUF of a language model as base."
        )


def read_gguf_header(path: AnyPath) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises InputFileError when the file cannot be opened, GgufFileError when it is truncated,
    corrupted, or lies about a size.
    """
    path = Path(path)
    try:
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise InputFileError(
                f"Cannot read {path}: it {what}; expected a GGUF file. Check the path."
            )
        with open_input(path) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes == 0:
                raise GgufFileError(
                    f"Cannot read {path}: it is empty; expected a GGUF file. Fetch it again."
                )
            parsed = GgufCursor(path, file, size_bytes).read_header()
    except OSError as error:
        raise InputFileError(
            f"Cannot read {path}: opening or reading it failed ({error.strerror}). "
            "Check that you may read it."
        ) from error
    return GgufHeader(**vars(parsed), path=path, size_bytes=size_bytes)


def read_array(path: Path, array: SkippedArray) -> bytes:
    """Read the bytes of a metadata array of a header that was read before.

    Raises InputFileError when the file is gone, GgufFileError when it changed.
    """
    try:
        data = read_columns(path, array.offset, array.n_bytes, range(1), range(array.n_bytes))
    except OSError as error:
        raise InputFileError(
            f"Cannot read {path}: reading it again failed ({error.strerror}); expected the file "
            "that was read before. Put it back and try again."
        ) from error
    if len(data) != array.n_bytes:
        raise _changed(path)
    return data


def read_texts(path: Path, array: SkippedArray) -> list[bytes]:
    """Read an array of texts as read_array does."""
    data = read_array(path, array)
    texts, at = [], 0
    try:
        for _ in range(array.length):
            (n_bytes,) = U64.unpack_from(data, at)
            at += U64.size + n_bytes
            texts.append(data[at - n_bytes : at])
    except (struct.error, OverflowError) as error:
        raise _changed(path) from error
    if at != array.n_bytes:
        raise _changed(path)
    return texts


def _changed(path: Path) -> GgufFileError:
    return GgufFileError(f"Cannot read {path}: it changed while it was read. Try again.")


def read_values(path: Path, info: TensorInfo) -> F32:
    """Read the tensor of a header that was read before.

    returns  [*shape]  float32; of some types it can be NaN or infinite

    Raises InputFileError when the file is gone, GgufFileError when it changed or the type has no
    floats.
    """
    n_row = math.prod(info.shape[:-1])
    return read_value_block(path, info, range(n_row), range(info.shape[-1])).reshape(info.shape)


def read_value_block(path: Path, info: TensorInfo, rows: range, columns: range) -> F32:
    """Read neighbouring rows and columns of a tensor, the columns in whole blocks of its type.

    returns  [len(rows), len(columns)]  float32; of some types it can be NaN or infinite

    Raises as read_values does.
    """
    raw = read_raw_rows(path, info, rows, columns)
    return _to_float32(path, info, np.frombuffer(raw, np.uint8).reshape(len(rows), -1))


def read_raw_rows(path: Path, info: TensorInfo, rows: range, columns: range | None = None) -> bytes:
    """Read neighbouring rows as the file holds them; of all columns, or whole blocks of them.

    Raises as read_values does, but for the type.
    """
    n_block, block_bytes = GGML_QUANT_SIZES[info.ggml_type]
    row_bytes = info.shape[-1] // n_block * block_bytes
    columns = columns or range(info.shape[-1])
    part = range(*(end // n_block * block_bytes for end in (columns.start, columns.stop)))
    n_bytes = len(rows) * len(part)
    try:
        raw = read_columns(path, info.offset, row_bytes, rows, part)
    except OSError as error:
        raise InputFileError(
            f"Cannot read tensor {info.name} of {path}: reading failed ({error.strerror}); "
            "expected the file that was read before. Put it back and try again."
        ) from error
    if len(raw) != n_bytes:
        raise GgufFileError(
            f"Cannot read tensor {info.name} of {path}: the file gave {len(raw)} bytes and "
            f"{n_bytes} were expected; it changed while it was open. Try again."
        )
    return raw


def _to_float32(path: Path, info: TensorInfo, rows: NDArray[np.uint8]) -> F32:
    if info.ggml_type == GGMLQuantizationType.F32:
        return rows.view("<f4").astype(np.float32)
    if info.ggml_type == GGMLQuantizationType.F16:
        return rows.view("<f2").astype(np.float32)
    try:
        with np.errstate(invalid="ignore", over="ignore"):  # a block's scale may be NaN
            values: F32 = gguf.quants.dequantize(rows, info.ggml_type)
    except NotImplementedError as error:
        raise GgufFileError(
            f"Cannot read tensor {info.name} of {path}: its type {info.ggml_type.name} cannot "
            "be turned into floats here. Use a file of another quantisation."
        ) from error
    return values


_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}  # of a value


def kv_bytes(header: GgufHeader, kv_type: str) -> float:
    """Bytes that a token takes."""
    return _BYTES[kv_type] * n_kv_value(header)


def n_kv_value(header: GgufHeader) -> int:
    """Values that the KV cache holds for a token, by the rows of the weights that make them."""
    n = 0
    for name, info in header.tensors.items():
        if name.endswith((".attn_k.weight", ".attn_v.weight")):
            n += info.shape[0]
        elif name.endswith(".attn_qkv.weight"):
            n += max(0, info.shape[0] - header.n_embd)
    return n
