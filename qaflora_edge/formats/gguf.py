"""Read GGUF files: metadata, where each tensor lies, and values.

Ours because gguf's GGUFReader needs 1.5 s for SmolLM2's vocabulary and trusts what a file says of
itself. Here every count, length and offset is checked first, and a vocabulary is stepped over. The
limits at the top bound the memory and the time that any file can take. The file is read and not
mapped: a mapped file that someone shortens would end the process.
"""

import math
import os
import reprlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from qaflora_edge.arrays import F32
from qaflora_edge.errors import GgufFileError, InputFileError
from qaflora_edge.files import LFS_ADVICE, AnyPath, is_lfs_pointer, open_input

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
MAX_HEADER_BYTES = 1 << 26  # the longest vocabularies have 20 MB
MAX_METADATA = 1 << 12  # keys in a file; models have less than a hundred
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1  # the format's own limit
MAX_STRING_BYTES = 1 << 24  # of a metadata value
MAX_ARCHITECTURE_LENGTH = 64
MAX_ARRAY_LENGTH = 1 << 24
MAX_KEPT = 1 << 18  # numbers of all arrays; those after them are stepped over
MAX_KEPT_ARRAY = 1 << 12  # numbers; longer arrays are stepped over
MAX_TENSOR_NAME_BYTES = 63  # llama.cpp 0c1e5709, ggml.h GGML_MAX_NAME
MAX_DIMS = 4
MAX_LAYERS = 1024  # twice llama.cpp's own limit
MAX_COUNT = 1 << 24  # of other dimensions

# Types of numbers that llama.cpp 0c1e5709 does not turn into floats, ggml.c type_traits.
NO_FLOATS = tuple(
    GGMLQuantizationType[name] for name in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")
)
READ_BYTES = 1 << 18  # read at once

# By the number of a type; 8 and 9 are no scalars.
SCALARS = {n: struct.Struct(f"<{form}") for n, form in enumerate("BbHhIif?__Qqd") if form != "_"}
STRING, ARRAY, DOUBLE = 8, 9, 12
U32, U64 = SCALARS[4], SCALARS[10]

Scalar = int | float | bool


class Double(float):
    """A number of 64 bits; llama.cpp takes only 32 where it expects a float."""


@dataclass(frozen=True)
class SkippedArray:
    """A metadata array that was stepped over: strings, or too many numbers.

    offset, n_bytes  where its items lie in the file
    """

    length: int
    offset: int
    n_bytes: int


MetadataValue = Scalar | str | tuple[Scalar, ...] | SkippedArray


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its shape in numpy order, and its bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class ParsedHeader:
    """The header's content; the offsets of tensors count from the start of the file."""

    architecture: str
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, TensorInfo]
    data_offset: int


def brief(value: object) -> str:
    """Show a value of a file in a message: short, on one line, however long or deep it is."""
    text = reprlib.repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


class GgufCursor:
    """Steps through the bytes of one file; every step is checked against its end.

    data       what was read and not yet stepped over; a vocabulary is never in memory whole
    n_dropped  bytes of the file before it
    """

    def __init__(self, path: Path, file: BinaryIO, size_bytes: int) -> None:
        self.path = path
        self.file = file
        self.data = bytearray()
        self.n_dropped = 0
        self.size_bytes = size_bytes
        self.position = 0
        self.n_kept = 0

    def fail(self, field: str, found: str, expected: str) -> NoReturn:
        raise GgufFileError(
            f"Cannot read {self.path}: {field} is {found}; expected {expected}. "
            "The file is corrupted or incomplete; fetch or convert it again."
        )

    def take(self, n_bytes: int, field: str) -> int:
        """Step over bytes and give where they begin in `data`."""
        begin = self.position
        if n_bytes > self.size_bytes - begin:
            raise GgufFileError(
                f"Cannot read {self.path}: the file ends inside {field}: {n_bytes} bytes at offset "
                f"{begin} were expected, {self.size_bytes - begin} are left. "
                "The file is truncated or corrupted; fetch or convert it again."
            )
        self.load(begin + n_bytes, field)
        self.position = begin + n_bytes
        return begin - self.n_dropped

    def load(self, end: int, field: str) -> None:
        """Read the file up to `end`, which lies inside it, and drop what was stepped over."""
        if end > MAX_HEADER_BYTES:
            found = f"longer than {MAX_HEADER_BYTES} bytes, of which {field} is a part"
            self.fail("the header", found, "a shorter one")
        if self.n_dropped + len(self.data) >= end:
            return
        n_used = min(len(self.data), self.position - self.n_dropped)
        del self.data[:n_used]
        self.n_dropped += n_used
        while self.n_dropped + len(self.data) < end:
            chunk = self.file.read(READ_BYTES)
            if not chunk:
                raise GgufFileError(
                    f"Cannot read {self.path}: it had {self.size_bytes} bytes and became shorter "
                    f"while {field} was read, at byte "
                    f"{self.n_dropped + len(self.data)}. Try again."
                )
            self.data += chunk

    def scalar(self, form: struct.Struct, field: str) -> Scalar:
        (value,) = form.unpack_from(self.data, self.take(form.size, field))
        return value  # type: ignore[no-any-return]

    def count(self, form: struct.Struct, limit: int, field: str) -> int:
        value = int(self.scalar(form, field))
        if value > limit:
            self.fail(field, str(value), f"at most {limit}")
        return value

    def text(self, limit: int, field: str, *, strict: bool) -> str:
        n_bytes = self.count(U64, limit, f"the length of {field}")
        begin = self.take(n_bytes, field)
        raw = bytes(self.data[begin : begin + n_bytes])
        try:
            return raw.decode("utf-8", errors="strict" if strict else "replace")
        except UnicodeDecodeError:
            self.fail(field, repr(raw[:64]), "UTF-8 text")

    def read_header(self) -> ParsedHeader:
        n_tensor = self.read_preamble()
        n_metadata = self.count(U64, MAX_METADATA, "the number of metadata fields")
        metadata = self.read_metadata(n_metadata)
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or not architecture:
            found = "missing" if architecture is None else brief(architecture)
            self.fail("metadata field general.architecture", found, "the name of an architecture")
        if len(architecture) > MAX_ARCHITECTURE_LENGTH:
            found, expected = f"{len(architecture)} characters long", f"{MAX_ARCHITECTURE_LENGTH}"
            self.fail("metadata field general.architecture", found, f"at most {expected}")
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        is_power = isinstance(alignment, int) and alignment > 0 and alignment.bit_count() == 1
        if not isinstance(alignment, int) or not is_power or alignment > MAX_ALIGNMENT:
            expected = f"a power of two up to {MAX_ALIGNMENT}"
            self.fail("metadata field general.alignment", brief(alignment), expected)
        self.check_not_split(metadata)
        tensors = self.read_tensors(n_tensor, alignment)
        return ParsedHeader(architecture, metadata, tensors, self.data_offset(alignment))

    def read_preamble(self) -> int:
        """Check magic and version, and give the number of tensors."""
        begin = self.take(4, "the magic bytes")
        magic = bytes(self.data[begin : begin + 4])
        if magic != MAGIC and is_lfs_pointer(self.path):
            raise GgufFileError(
                f"Cannot read {self.path}: it is a Git LFS pointer; expected the file that it "
                f"stands for. {LFS_ADVICE}"
            )
        if magic != MAGIC:
            raise GgufFileError(
                f"Cannot read {self.path}: its first bytes are {magic!r}; expected {MAGIC!r}. "
                "It is not a GGUF file; check the path, or convert the model to GGUF."
            )
        version = int(self.scalar(U32, "the version"))
        if version & 0xFFFF == 0:
            raise GgufFileError(
                f"Cannot read {self.path}: it is written for a big-endian machine; expected "
                "little-endian. Fetch or convert a little-endian file."
            )
        if version not in VERSIONS:
            raise GgufFileError(
                f"Cannot read {self.path}: it is GGUF version {version}; expected version "
                f"{' or '.join(map(str, VERSIONS))}. Fetch or convert it again."
            )
        return self.count(U64, MAX_TENSORS, "the number of tensors")

    def read_metadata(self, n_metadata: int) -> dict[str, MetadataValue]:
        metadata: dict[str, MetadataValue] = {}
        for index in range(n_metadata):
            key = self.text(MAX_KEY_BYTES, f"the name of metadata field {index}", strict=True)
            field = f"metadata field {brief(key)}"
            if key in metadata:
                self.fail(field, "given twice", "every field once")
            metadata[key] = self.read_value(int(self.scalar(U32, f"the type of {field}")), field)
        return metadata

    def read_value(self, kind: int, field: str) -> MetadataValue:
        if kind in SCALARS:
            value = self.scalar(SCALARS[kind], field)
            return Double(value) if kind == DOUBLE else value
        if kind == STRING:
            return self.text(MAX_STRING_BYTES, field, strict=False)
        if kind != ARRAY:
            self.fail(f"the type of {field}", str(kind), "a type of GGUF, 0 to 12")
        item_kind = int(self.scalar(U32, f"the element type of {field}"))
        length = self.count(U64, MAX_ARRAY_LENGTH, f"the length of {field}")
        if item_kind == STRING:
            offset = self.position
            self.skip_strings(length, field)
            return SkippedArray(length, offset, self.position - offset)
        if item_kind not in SCALARS:
            self.fail(f"the element type of {field}", str(item_kind), "a number or a string")
        form = SCALARS[item_kind]
        begin = self.take(length * form.size, field)
        if length > MAX_KEPT_ARRAY or self.n_kept + length > MAX_KEPT:
            n_bytes = length * form.size
            return SkippedArray(length, self.position - n_bytes, n_bytes)
        self.n_kept += length
        raw = self.data[begin : begin + length * form.size]
        return tuple(value for (value,) in form.iter_unpack(raw)) if raw else ()

    def skip_strings(self, length: int, field: str) -> None:
        """Step over strings; the loop is tight because vocabularies are long."""
        data, index = self.data, self.position - self.n_dropped
        unpack_length = U64.unpack_from
        for _ in range(length):
            if index + U64.size > len(data):
                self.position = self.n_dropped + index
                self.load_strings(self.position + U64.size, length, field)
                index = self.position - self.n_dropped
            index += U64.size + unpack_length(data, index)[0]
        end = self.n_dropped + index
        self.load_strings(end, length, field)
        self.position = end

    def load_strings(self, end: int, length: int, field: str) -> None:
        if end > self.size_bytes:
            raise GgufFileError(
                f"Cannot read {self.path}: the file ends inside {field}, an array of {length} "
                "strings. The file is truncated or corrupted; fetch or convert it again."
            )
        self.load(end, field)

    def check_not_split(self, metadata: Mapping[str, MetadataValue]) -> None:
        n_split = metadata.get("split.count", 0)
        if isinstance(n_split, int) and n_split > 1:
            raise GgufFileError(
                f"Cannot use {self.path}: metadata field split.count says that it is one of "
                f"{n_split} parts; expected a whole model. Join the parts with "
                "llama.cpp's `llama-gguf-split --merge`."
            )

    def data_offset(self, alignment: int) -> int:
        return -(-self.position // alignment) * alignment

    def read_tensors(self, n_tensor: int, alignment: int) -> dict[str, TensorInfo]:
        relative: dict[str, TensorInfo] = {}
        for index in range(n_tensor):
            info = self.read_tensor_info(index, alignment)
            if info.name in relative:
                self.fail(f"tensor {info.name!r}", "listed twice", "every tensor once")
            relative[info.name] = info
        data_offset = self.data_offset(alignment)
        tensors = {
            name: TensorInfo(
                name, info.shape, info.ggml_type, data_offset + info.offset, info.n_bytes
            )
            for name, info in relative.items()
        }
        self.check_places(tensors)
        return tensors

    def read_tensor_info(self, index: int, alignment: int) -> TensorInfo:
        """Read one entry; its offset is still relative to the tensor data."""
        name = self.text(MAX_TENSOR_NAME_BYTES, f"the name of tensor {index}", strict=True)
        field = f"tensor {name!r}"
        n_dims = self.count(U32, MAX_DIMS, f"the number of dimensions of {field}")
        dims = [int(self.scalar(U64, f"the shape of {field}")) for _ in range(n_dims)]
        if not dims or min(dims) < 1:
            self.fail(f"the shape of {field}", str(dims[::-1]), "positive dimensions")
        type_number = int(self.scalar(U32, f"the type of {field}"))
        offset = int(self.scalar(U64, f"the offset of {field}"))
        try:
            ggml_type = GGMLQuantizationType(type_number)
            n_block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        except (ValueError, KeyError):
            raise GgufFileError(
                f"Cannot read {self.path}: the type of {field} is {type_number}, which this "
                "version does not know. Use a file of another quantisation, or upgrade."
            ) from None
        if dims[0] % n_block:
            found, expected = f"{dims[0]} wide", f"a multiple of {n_block} for {ggml_type.name}"
            self.fail(field, found, expected)
        if offset % alignment:
            self.fail(f"the offset of {field}", str(offset), f"a multiple of {alignment}")
        n_elements = 1
        for dim in dims:
            n_elements *= dim
        n_bytes = n_elements // n_block * block_bytes
        return TensorInfo(name, tuple(dims[::-1]), ggml_type, offset, n_bytes)

    def check_places(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Check that tensors lie inside the file and do not share bytes."""
        end, previous = 0, ""
        for info in sorted(tensors.values(), key=lambda info: info.offset):
            if info.offset + info.n_bytes > self.size_bytes:
                raise GgufFileError(
                    f"Cannot read {self.path}: tensor {info.name!r} ends at byte "
                    f"{info.offset + info.n_bytes}, and the file has {self.size_bytes}. "
                    "The file is truncated or corrupted; fetch or convert it again."
                )
            if info.offset < end:
                found = f"at byte {info.offset}, inside tensor {previous!r}"
                self.fail(f"tensor {info.name!r}", found, f"byte {end} or later")
            end, previous = info.offset + info.n_bytes, info.name


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file, checked against the file's size."""

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
    """Give the bytes that a token takes in the KV cache."""
    return _BYTES[kv_type] * n_kv_value(header)


def n_kv_value(header: GgufHeader) -> int:
    """Count the values of a token in the KV cache, by the rows of the weights that make them."""
    n = 0
    for name, info in header.tensors.items():
        if name.endswith((".attn_k.weight", ".attn_v.weight")):
            n += info.shape[0]
        elif name.endswith(".attn_qkv.weight"):
            n += max(0, info.shape[0] - header.n_embd)
    return n


def parts(n: int, n_part: int) -> Iterator[range]:
    """Cut 0 to n into neighbouring parts of n_part; the last may have fewer."""
    for begin in range(0, n, n_part):
        yield range(begin, min(begin + n_part, n))


def read_columns(path: AnyPath, offset: int, row_bytes: int, rows: range, columns: range) -> bytes:
    """Read a part of a table of bytes: the same bytes out of each of neighbouring rows.

    offset   of the table in the file
    rows     neighbouring rows, and `columns` neighbouring bytes of each
    returns  len(rows) * len(columns) bytes; less where the file ends before

    Raises OSError.
    """
    with open_input(path) as file:
        if len(columns) == row_bytes:
            file.seek(offset + rows.start * row_bytes)
            return file.read(len(rows) * row_bytes)
        pieces = []
        for row in rows:
            file.seek(offset + row * row_bytes + columns.start)
            pieces.append(file.read(len(columns)))
        return b"".join(pieces)
