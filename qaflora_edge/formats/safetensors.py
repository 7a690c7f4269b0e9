"""Read safetensors files: little-endian header length, JSON header, raw tensors.

Ours because the safetensors package hands numpy no bfloat16, and because an error must name the
file and the tensor. The header is checked as the format demands: known dtypes, dtype x shape equal
to the bytes, tensors side by side without holes from the header to the end of the file.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.errors import InputFileError, SafetensorsFileError
from qaflora_edge.files import LFS_ADVICE, AnyPath, is_lfs_pointer, open_input
from qaflora_edge.formats.gguf import parts, read_columns
from qaflora_edge.formats.json_text import read_json_object

MAX_HEADER_BYTES = 1 << 24  # the format allows 100 MB; an adapter needs a few hundred KB
MAX_NAME_LENGTH = 256
MAX_DIMS = 8
MAX_READ_BYTES = 1 << 32  # of one tensor; rank 4096 on 256,000 tokens as F32
MAX_COUNT = (1 << 63) - 1  # of a dimension or an offset
PIECE_VALUES = 1 << 14  # that are read and turned at a time
DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
FLOAT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: shape in numpy order, bytes from the start of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    def read(self, *, transposed: bool = False) -> F32:
        """Read the values, a slice of rows at a time so that they are in memory once.

        returns  [*shape]  float32, finite; the dimensions in reverse when transposed

        Raises SafetensorsFileError when the type is no float or a value is NaN or infinite.
        """
        self._check_readable()
        values = np.empty(self.shape[::-1] if transposed else self.shape, np.float32)
        rows = np.atleast_1d(values.T if transposed else values)
        for begin, piece in self.pieces():
            place = rows[begin : begin + len(piece)]
            place[...] = piece.reshape(place.shape)
        return values

    def pieces(self) -> Iterator[tuple[int, F32]]:
        """Read the values by slices of rows: the first row of each, and float32 [some rows, n].

        Raises SafetensorsFileError, of values that are not finite after the last slice.
        """
        self._check_readable()
        n_row = self.shape[0] if self.shape else 1
        n_value = math.prod(self.shape)
        n_piece_row = max(1, PIECE_VALUES * n_row // max(1, n_value))
        n_bad = 0
        for rows in parts(n_row if n_value else 0, n_piece_row):
            piece = self.read_block(rows, range(n_value // n_row))
            n_bad += piece.size - int(np.count_nonzero(np.isfinite(piece)))
            yield rows.start, piece
        if n_bad:
            raise SafetensorsFileError(
                f"Cannot use tensor {self.name} of {self.path}: {n_bad} of its {n_value} "
                "values are NaN or infinite; expected finite numbers. The training diverged or "
                "the file is corrupted; use an earlier checkpoint or fetch it again."
            )

    def read_block(self, rows: range, columns: range) -> F32:
        """Read neighbouring rows and columns, and nothing else of the file.

        returns  [len(rows), len(columns)]  float32, which may be NaN or infinite

        Raises InputFileError when the file is gone, SafetensorsFileError when it became shorter or
        the type is no float.
        """
        self._check_readable()
        n = DTYPE_BYTES[self.dtype]
        part = range(columns.start * n, columns.stop * n)
        try:
            raw = read_columns(self.path, self.offset, math.prod(self.shape[1:]) * n, rows, part)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        n_expected = len(rows) * len(part)
        if len(raw) != n_expected:
            raise SafetensorsFileError(
                f"Cannot read tensor {self.name} of {self.path}: the file gave {len(raw)} bytes "
                f"and {n_expected} were expected; it changed while it was open. Try again."
            )
        return _to_float32(raw, self.dtype).reshape(len(rows), len(columns))

    def _check_readable(self) -> None:
        if self.dtype not in FLOAT_DTYPES:
            raise SafetensorsFileError(
                f"Cannot use tensor {self.name} of {self.path}: its dtype is {self.dtype}; "
                f"expected {', '.join(FLOAT_DTYPES)}. Save the adapter in one of these."
            )
        if self.n_bytes > MAX_READ_BYTES:
            raise SafetensorsFileError(
                f"Cannot use tensor {self.name} of {self.path}: it has {self.n_bytes} bytes; "
                f"expected at most {MAX_READ_BYTES}, which no matrix of a LoRA exceeds. "
                "Check that it is a plain LoRA."
            )


def _to_float32(raw: bytes, dtype: str) -> F32:
    """returns  [n]  float32, which may be a view of `raw`"""
    if dtype == "BF16":  # the upper half of a float32
        bits = np.frombuffer(raw, "<u2").astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return np.frombuffer(raw, "<f4" if dtype == "F32" else "<f2").astype(np.float32, copy=False)


def read_safetensors(path: AnyPath) -> dict[str, StoredTensor]:
    """Read and check the header of a safetensors file; values are read later, one by one.

    Raises InputFileError when it cannot be opened, SafetensorsFileError when it is not sound.
    """
    path = Path(path)
    if is_lfs_pointer(path):
        raise SafetensorsFileError(
            f"Cannot read {path}: it is a Git LFS pointer; expected the file that it stands for. "
            f"{LFS_ADVICE}"
        )
    try:
        with open_input(path) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            n_header = int.from_bytes(_read_exactly(file.read(8), 8, path), "little")
            if n_header > MAX_HEADER_BYTES:
                raise _damaged(path, "the header's length", n_header, f"<= {MAX_HEADER_BYTES}")
            if n_header > size_bytes - 8:
                raise _damaged(path, "the header's length", n_header, f"<= {size_bytes - 8}")
            header_bytes = _read_exactly(file.read(n_header), n_header, path)
    except OSError as error:
        raise _unreadable(path, error) from error
    entries = _parse_header(path, header_bytes)
    tensors = {
        name: _parse_entry(path, name, entry, 8 + n_header, size_bytes)
        for name, entry in entries.items()
    }
    _check_places(path, tensors, 8 + n_header, size_bytes)
    return tensors


def _parse_header(path: Path, header_bytes: bytes) -> dict[str, Any]:
    try:
        entries = read_json_object(header_bytes)
    except ValueError as error:  # JSON and UTF-8 errors are ValueErrors
        raise SafetensorsFileError(
            f"Cannot read {path}: its header is not a JSON object ({error}). "
            "The file is corrupted or not a safetensors file; fetch or save it again."
        ) from error
    entries.pop("__metadata__", None)
    return entries


def _parse_entry(
    path: Path, name: str, entry: object, data_offset: int, size_bytes: int
) -> StoredTensor:
    if not name or len(name) > MAX_NAME_LENGTH:
        expected = f"1 to {MAX_NAME_LENGTH} characters"
        raise _damaged(path, "the name of a tensor", f"{len(name)} characters long", expected)
    field = f"tensor {name}"
    if not isinstance(entry, Mapping):
        raise _damaged(path, field, repr(entry)[:80], "an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _damaged(path, f"the dtype of {field}", repr(dtype)[:80], ", ".join(DTYPE_BYTES))
    if not _is_counts(shape) or len(shape) > MAX_DIMS:
        expected = f"a list of up to {MAX_DIMS} whole numbers"
        raise _damaged(path, f"the shape of {field}", repr(shape)[:80], expected)
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        expected = "two offsets, begin and end"
        raise _damaged(path, f"data_offsets of {field}", repr(offsets)[:80], expected)
    n_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if n_bytes != offsets[1] - offsets[0]:
        expected = f"{n_bytes} for {dtype} {list(shape)}"
        raise _damaged(path, f"the size in bytes of {field}", offsets[1] - offsets[0], expected)
    if data_offset + offsets[1] > size_bytes:
        expected = f"<= {size_bytes}, the size of the file"
        raise _damaged(path, f"the last byte of {field}", data_offset + offsets[1], expected)
    return StoredTensor(path, name, dtype, tuple(shape), data_offset + offsets[0], n_bytes)


def _is_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= MAX_COUNT for item in value
    )


def _check_places(
    path: Path, tensors: Mapping[str, StoredTensor], begin: int, size_bytes: int
) -> None:
    """Check that the tensors fill the data without a hole and without sharing bytes."""
    end = begin
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.n_bytes)):
        if tensor.offset != end:
            raise _damaged(
                path,
                f"the offset of tensor {tensor.name}",
                tensor.offset - begin,
                f"{end - begin}, where the tensor before it ends",
            )
        end += tensor.n_bytes
    if end != size_bytes:
        raise _damaged(
            path,
            "the size of the file",
            f"{size_bytes} bytes",
            f"{end}, where its last tensor ends",
        )


def _read_exactly(data: bytes, n_bytes: int, path: Path) -> bytes:
    if len(data) != n_bytes:
        raise _damaged(path, "the file", f"{len(data)} bytes long", "a header first")
    return data


def _unreadable(path: Path, error: OSError) -> InputFileError:
    return InputFileError(
        f"Cannot read {path}: opening or reading it failed ({error.strerror}). "
        "Check that it exists and that you may read it."
    )


def _damaged(path: Path, field: str, found: object, expected: str) -> SafetensorsFileError:
    return SafetensorsFileError(
        f"Cannot read {path}: {field} is {found}; expected {expected}. "
        "The file is truncated or corrupted; fetch or save it again."
    )
