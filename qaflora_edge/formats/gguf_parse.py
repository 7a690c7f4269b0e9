"""Step through the header of a GGUF file with every count, length and offset checked.

A vocabulary is stepped over, not kept. The format's limits and ours stand at the top; together
they bound the memory and the time that any file can take. The file is read and not mapped: a
mapped file that someone shortens meanwhile would end the process.
"""

import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qaflora_edge.errors import GgufFileError
from qaflora_edge.files import LFS_ADVICE, is_lfs_pointer

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
