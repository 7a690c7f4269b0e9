"""Read GGUF files: metadata, the place of each tensor, and values.

gguf's GGUFReader needs 1.5 s for SmolLM2's vocabulary and trusts the file. Here every count, length
and offset is checked first, and a vocabulary stays bytes. The limits bound memory and time.
The file is not mapped: a mapped file that someone shortens would end the process.
"""

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from qaflora_edge.arrays import F32
from qaflora_edge.errors import GgufFileError, changed_file
from qaflora_edge.files import AnyPath
from qaflora_edge.formats.inputs import open_input, read_bytes, reading

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENTS = tuple(1 << n for n in range(17))
MAX_HEADER_BYTES = 1 << 26  # and so of every text and array; the longest vocabularies have 20 MB
MAX_METADATA = 1 << 10  # keys in a file; models have less than a hundred
MAX_TENSORS = 1 << 16
MAX_NAME_LENGTH = 64  # of an architecture
MAX_PARSED_ARRAY = 1 << 10  # numbers
MAX_DIMS = 4
MAX_COUNT = 1 << 24  # of layers, heads and other dimensions
READ_BYTES = 1 << 18  # read at once

# By the number of a type; 8 and 9 are no scalars.
SCALARS = {n: struct.Struct(f"<{form}") for n, form in enumerate("BbHhIif?__Qqd") if form != "_"}
STRING = 8
ARRAY = 9
U32 = SCALARS[4]
U64 = SCALARS[10]
# By the number of dimensions: they, the type and the offset of a tensor.
PLACES = tuple(struct.Struct(f"<{n_dims}QIQ") for n_dims in range(MAX_DIMS + 1))

Scalar = int | float | bool


@dataclass(frozen=True)
class RawArray:
    """A metadata array of strings, or of more than MAX_PARSED_ARRAY numbers.

    item_type        of its items
    offset, n_bytes  where they lie in the file; each string follows its length, a U64
    """

    item_type: int
    length: int
    offset: int
    n_bytes: int


MetadataValue = Scalar | str | tuple[Scalar, ...] | RawArray


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its shape in numpy order, and its bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    offset: int
    n_bytes: int


DIVERGED = "The training diverged or the file is corrupted; use an earlier checkpoint."
ADVICE = "The file is truncated, corrupted or of another kind; fetch or convert it again."


class GgufCursor:
    """Steps through the header of a file; every step is checked against the file's end.

    data  what was read of the file so far
    """

    def __init__(self, path: Path, file: BinaryIO, size_bytes: int) -> None:
        self.path = path
        self.file = file
        self.size_bytes = size_bytes
        self.max_bytes = min(size_bytes, MAX_HEADER_BYTES)
        self.data = bytearray()
        self.position = 0

    def fail(self, field: str, found: object, expected: str, advice: str = ADVICE) -> NoReturn:
        raise GgufFileError(
            f"Cannot read {self.path}: {field} is {found}; expected {expected}. {advice}"
        )

    def take(self, n_bytes: int, field: str) -> int:
        """Step over bytes, and give where they begin."""
        begin = self.position
        self.position += n_bytes
        self.load(self.position, field)
        return begin

    def load(self, end: int, field: str) -> None:
        """Read the file up to `end` at least."""
        if end > self.max_bytes:
            expected = f"a header inside the file's {self.size_bytes} bytes and {MAX_HEADER_BYTES}"
            self.fail(f"the end of {field}", f"byte {end} or later", expected)
        while len(self.data) < end:
            chunk = self.file.read(READ_BYTES)
            if not chunk:
                raise changed_file(self.path, GgufFileError)
            self.data += chunk

    def scalar(self, form: struct.Struct, field: str) -> Scalar:
        (value,) = form.unpack_from(self.data, self.take(form.size, field))
        return value  # type: ignore[no-any-return]

    def count(self, form: struct.Struct, limit: int, field: str) -> int:
        value = int(self.scalar(form, field))
        if value > limit:
            self.fail(field, value, f"at most {limit}")
        return value

    def text(self, field: str, *, strict: bool = True) -> str:
        n_bytes = int(self.scalar(U64, f"the length of {field}"))
        begin = self.take(n_bytes, field)
        raw = bytes(self.data[begin : begin + n_bytes])
        try:
            return raw.decode("utf-8", errors="strict" if strict else "replace")
        except UnicodeDecodeError:
            self.fail(field, repr(raw[:64]), "UTF-8 text")

    def read_header(self) -> "GgufHeader":
        self.take(4, "the magic")
        if self.data[:4] != MAGIC:
            self.fail("its beginning", repr(bytes(self.data[:4])), f"{MAGIC!r} of a GGUF file")
        version = self.scalar(U32, "the version")
        if version not in VERSIONS:
            self.fail("the version", version, "2 or 3, little-endian")
        n_tensor = self.count(U64, MAX_TENSORS, "the number of tensors")
        metadata = self.read_metadata(self.count(U64, MAX_METADATA, "the number of fields"))
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or not 0 < len(architecture) <= MAX_NAME_LENGTH:
            found = f"{architecture!r:.99}" if architecture else "missing"
            expected = f"a name of at most {MAX_NAME_LENGTH} characters"
            self.fail("metadata field general.architecture", found, expected)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if alignment not in ALIGNMENTS or not isinstance(alignment, int):
            expected = f"a power of two up to {ALIGNMENTS[-1]}"
            self.fail("metadata field general.alignment", f"{alignment!r:.99}", expected)
        n_split = metadata.get("split.count", 0)
        if isinstance(n_split, int) and n_split > 1:
            advice = "Join the parts with llama.cpp's `llama-gguf-split --merge`."
            self.fail("metadata field split.count", n_split, "a whole model", advice)
        relative: dict[str, TensorInfo] = {}  # with offsets from the tensor data
        for index in range(n_tensor):
            info = self.read_tensor_info(index, alignment)
            if relative.setdefault(info.name, info) is not info:
                self.fail(f"tensor {info.name!r}", "listed twice", "every tensor once")
        begin = -(-self.position // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, x in relative.items():  # `replace` is slow, and bundles have many tensors
            tensors[name] = TensorInfo(name, x.shape, x.ggml_type, begin + x.offset, x.n_bytes)
        self.check_places(tensors)
        return GgufHeader(self.path, architecture, metadata, tensors, self.size_bytes)

    def read_metadata(self, n_metadata: int) -> dict[str, MetadataValue]:
        metadata: dict[str, MetadataValue] = {}
        for index in range(n_metadata):
            key = self.text(f"the name of metadata field {index}")
            field = f"metadata field {key!r:.99}"
            if key in metadata:
                self.fail(field, "given twice", "every field once")
            metadata[key] = self.read_value(int(self.scalar(U32, f"the type of {field}")), field)
        return metadata

    def read_value(self, value_type: int, field: str) -> MetadataValue:
        if value_type in SCALARS:
            return self.scalar(SCALARS[value_type], field)
        if value_type == STRING:
            return self.text(field, strict=False)
        if value_type != ARRAY:
            self.fail(f"the type of {field}", value_type, "a type of GGUF, 0 to 12")
        item_type = int(self.scalar(U32, f"the element type of {field}"))
        length = int(self.scalar(U64, f"the length of {field}"))
        begin = self.position
        if item_type == STRING:
            self.skip_strings(length, field)
        elif item_type in SCALARS:
            self.take(length * SCALARS[item_type].size, field)
        else:
            self.fail(f"the element type of {field}", item_type, "a number or a string")
        if item_type == STRING or length > MAX_PARSED_ARRAY:
            return RawArray(item_type, length, begin, self.position - begin)
        items = bytes(self.data[begin : self.position])
        return tuple(value for (value,) in SCALARS[item_type].iter_unpack(items))

    def skip_strings(self, length: int, field: str) -> None:
        """Step over strings; the loop is tight because vocabularies are long."""
        data = self.data
        position = self.position
        unpack_length = U64.unpack_from
        for _ in range(length):
            try:
                position += 8 + unpack_length(data, position)[0]
            except (struct.error, IndexError, OverflowError):  # behind what was read of the file
                self.load(position + U64.size, field)
                position += 8 + unpack_length(data, position)[0]
        self.load(position, field)
        self.position = position

    def read_tensor_info(self, index: int, alignment: int) -> TensorInfo:
        name = self.text(f"the name of tensor {index}")
        field = f"tensor {name!r}"
        n_dims = self.count(U32, MAX_DIMS, f"the number of dimensions of {field}")
        place = self.take(PLACES[n_dims].size, f"the shape, type and offset of {field}")
        *dims, type_number, offset = PLACES[n_dims].unpack_from(self.data, place)
        if not dims or min(dims) < 1:
            self.fail(f"the shape of {field}", dims[::-1], "positive dimensions")
        try:
            ggml_type = GGMLQuantizationType(type_number)
            n_block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        except (ValueError, KeyError):
            self.fail(f"the type of {field}", type_number, "one that this version knows")
        if dims[0] % n_block:
            expected = f"a multiple of {n_block} for {ggml_type.name}"
            self.fail(f"the width of {field}", dims[0], expected)
        if offset % alignment:
            self.fail(f"the offset of {field}", offset, f"a multiple of {alignment}")
        n_bytes = math.prod(dims) // n_block * block_bytes
        return TensorInfo(name, tuple(dims[::-1]), ggml_type, offset, n_bytes)

    def check_places(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Check that tensors lie inside the file and do not share bytes."""
        end = 0
        previous = ""
        for info in sorted(tensors.values(), key=lambda info: info.offset):
            if info.offset < end:
                expected = f"byte {end} or later, after tensor {previous!r}"
                self.fail(f"the place of tensor {info.name!r}", f"byte {info.offset}", expected)
            end = info.offset + info.n_bytes
            previous = info.name
            if end > self.size_bytes:
                expected = f"at most the file's {self.size_bytes}"
                self.fail(f"the end of tensor {info.name!r}", f"byte {end}", expected)


_OTHER_FORMAT = re.compile(r"[ _-](AWQ|GPTQ)(?![A-Za-z])", re.IGNORECASE)


def plain_name(name: str) -> str:
    """Give a model's name without the format of the weights that its GGUF was made from."""
    return _OTHER_FORMAT.sub("", name)


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file, checked against the file's size."""

    path: Path
    architecture: str
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, TensorInfo]
    size_bytes: int

    @property
    def name(self) -> str | None:
        name = self.metadata.get("general.name")
        return plain_name(name) if isinstance(name, str) and name.strip() else None

    @property
    def n_layer(self) -> int:
        return self.count("block_count")

    @property
    def n_embd(self) -> int:
        return self.count("embedding_length")

    @property
    def n_head(self) -> int:
        return self.count("attention.head_count")

    @property
    def n_head_kv(self) -> int:
        is_given = f"{self.architecture}.attention.head_count_kv" in self.metadata
        return self.count("attention.head_count_kv") if is_given else self.n_head

    @property
    def n_vocab(self) -> int:
        info = self.tensors.get("token_embd.weight")
        if info is None or len(info.shape) != 2:
            found = "missing" if info is None else f"of shape {list(info.shape)}"
            raise self._no_model(f"tensor token_embd.weight is {found}", "[n_vocab, n_embd]")
        return info.shape[0]

    def count(self, field: str) -> int:
        """Give a positive whole number of the architecture, such as `block_count`."""
        key = f"{self.architecture}.{field}"
        value = self.metadata.get(key)
        if isinstance(value, tuple) and len(set(value) - {0}) == 1:
            value = max(value)  # given per layer: the same in all, or 0 in those that have none
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_COUNT:
            return value
        found = "missing" if value is None else f"{value!r:.99}"
        expected = f"a whole number up to {MAX_COUNT}"
        raise self._no_model(f"metadata field {key} is {found}", expected)

    def read_array(self, array: RawArray) -> bytes:
        """Read an array of the metadata. Raises as read_bytes does."""
        return read_bytes(self.path, array.offset, array.n_bytes, GgufFileError)

    def _no_model(self, found: str, expected: str) -> GgufFileError:
        return GgufFileError(
            f"Cannot use {self.path} as a base: {found}; expected {expected}. "
            "Use the GGUF of a language model as base."
        )


def read_gguf_header(path: AnyPath) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises InputFileError for one that cannot be opened, GgufFileError for a cut one or wrong sizes.
    """
    path = Path(path)
    with reading(path), open_input(path) as file:
        return GgufCursor(path, file, os.fstat(file.fileno()).st_size).read_header()


def read_values(path: Path, info: TensorInfo, file: BinaryIO | None = None) -> F32:
    """Read the tensor of a header that was read before.

    file     the path's, where it is open: of many tensors opening takes a third of the time
    returns  [*shape]  float32; of some types it can be NaN or infinite

    Raises as read_bytes does, and GgufFileError where the type has no floats.
    """
    raw = read_bytes(path, info.offset, info.n_bytes, GgufFileError, file)
    data = np.frombuffer(raw, np.uint8)
    try:
        with np.errstate(invalid="ignore", over="ignore"):  # a block's scale may be NaN
            rows = data.reshape(math.prod(info.shape[:-1]), -1)
            values: F32 = dequantize(rows, info.ggml_type)
    except NotImplementedError as error:
        raise GgufFileError(
            f"Cannot read tensor {info.name} of {path}: its type {info.ggml_type.name} cannot "
            "be turned into floats here. Use a file of another quantisation."
        ) from error
    return values.reshape(info.shape)
