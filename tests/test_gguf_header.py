"""The GGUF header reader, against gguf's own reader and against hostile files."""

import struct

import gguf
import numpy as np
import pytest
import tiny
from refusals import refused

from qaflora_edge.errors import GgufFileError, InputFileError
from qaflora_edge.formats.gguf import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    GgufCursor,
    RawArray,
    read_gguf_header,
    read_values,
)
from qaflora_edge.formats.inputs import read_bytes


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def field(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def entry(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


ARCH = field("general.architecture", 8, text("llama"))


def make(
    *fields: bytes,
    entries: tuple[bytes, ...] = (),
    data: bytes = b"",
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensor: int | None = None,
    n_field: int | None = None,
) -> bytes:
    """Build a GGUF by hand; counts can lie."""
    n_tensor = len(entries) if n_tensor is None else n_tensor
    n_field = len(fields) if n_field is None else n_field
    head = magic + struct.pack("<IQQ", version, n_tensor, n_field)
    head += b"".join(fields) + b"".join(entries)
    return head + b"\0" * (-len(head) % 32) + data


def array(key: str, kind: int, length: int, items: bytes = b"") -> bytes:
    return field(key, 9, struct.pack("<IQ", kind, length) + items)


def whole(key: str, value: int) -> bytes:
    return field(key, 4, struct.pack("<I", value))


def holding(*entries: bytes) -> bytes:
    """Build a GGUF with tensors, and 64 bytes for their values."""
    return make(ARCH, entries=entries, data=bytes(64))


def test_a_name_lacks_the_format_that_the_file_does_not_have(tmp_path) -> None:
    named = field("general.name", 8, text("Qwen2.5 Coder 1.5B Instruct AWQ"))
    path = tmp_path / "base.gguf"
    path.write_bytes(make(ARCH, named))
    assert read_gguf_header(path).name == "Qwen2.5 Coder 1.5B Instruct"


@pytest.mark.parametrize(
    ("arch", "dtype"), [("llama", "f32"), ("qwen2", "f16"), ("gemma3", "bf16"), ("llama", "q8_0")]
)
def test_header_and_values_equal_those_of_the_gguf_package(tmp_path, arch, dtype) -> None:
    base = tiny.write_tiny_base(tmp_path / "base.gguf", arch, tied=False, dtype=dtype)
    header = read_gguf_header(base.path)
    reader = gguf.GGUFReader(base.path)
    assert header.size_bytes == base.path.stat().st_size
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.shape == tuple(int(dim) for dim in tensor.shape[::-1])
        assert (info.offset, info.n_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert info.ggml_type == tensor.tensor_type
        values = read_values(header.path, info)
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, base.tensors[tensor.name])
    for key, value in header.metadata.items():
        content = reader.fields[key].contents()
        if isinstance(value, RawArray):
            assert value.length == len(content)
        else:
            assert value == (tuple(content) if isinstance(content, list) else content)


def test_count_given_per_layer_must_be_the_same_in_all(tmp_path) -> None:
    path, key = tmp_path / "a.gguf", "llama.attention.head_count_kv"
    path.write_bytes(make(ARCH, array(key, 4, 3, struct.pack("<3I", 2, 2, 2))))
    assert read_gguf_header(path).n_head_kv == 2
    path.write_bytes(make(ARCH, array(key, 4, 3, struct.pack("<3I", 2, 4, 2))))
    with pytest.raises(GgufFileError, match=r"head_count_kv is \(2, 4, 2\); expected a"):
        _ = read_gguf_header(path).n_head_kv


def test_long_arrays_stay_in_the_file(tmp_path) -> None:
    path = tmp_path / "a.gguf"
    tokens = b"".join(text(f"token {index}") for index in range(20000))
    strings = array("tokens", 8, 20000, tokens)
    scores = array("scores", 6, 20000, bytes(80000))
    path.write_bytes(make(ARCH, strings, scores, field("last", 8, text("reached"))))
    metadata = read_gguf_header(path).metadata
    for name, kind, items in (("tokens", 8, tokens), ("scores", 6, bytes(80000))):
        found = metadata[name]
        assert isinstance(found, RawArray)
        data = read_bytes(path, found.offset, found.n_bytes, GgufFileError)
        assert (found.item_type, found.length, data) == (kind, 20000, items)
    assert metadata["last"] == "reached"


ONE = entry("t", [1], 0, 0)
NOT_BEGUN = f"the end of the name of metadata field 0 is byte {32 + (1 << 62)} or later"
LATER = "byte 224 or later, after tensor 'big'"
OVERLAPPING = (entry("big", [16], 0, 0), entry("small", [1], 0, 32))
HOSTILE = [
    (make(ARCH, magic=b"PK\3\4"), r"its beginning is b'PK\x03\x04'"),
    (make(ARCH, version=3 << 24), f"the version is {3 << 24}"),  # big endian
    (make(ARCH, n_field=1 << 40), f"the number of fields is {1 << 40}"),
    (make(struct.pack("<Q", 1 << 62)), NOT_BEGUN),
    (make(field(b"\xff\xfe", 4, bytes(4))), r"the name of metadata field 0 is b'\xff\xfe'"),
    (make(ARCH, ARCH), "metadata field 'general.architecture' is given twice"),
    (make(field("k", 13, b"")), "the type of metadata field 'k' is 13"),
    (make(array("k", 9, 1)), "the element type of metadata field 'k' is 9"),
    (make(array("k", 8, 1 << 60)), "the end of metadata field 'k' is byte "),
    (make(array("k", 8, 1, bytes([255] * 8))), "the end of metadata field 'k' is byte "),
    (make(array("k", 8, 2, bytes([255] * 8))), "the end of metadata field 'k' is byte "),
    (make(), "metadata field general.architecture is missing"),
    (make(ARCH, whole("general.alignment", 24)), "metadata field general.alignment is 24"),
    (make(ARCH, whole("split.count", 3)), "metadata field split.count is 3; expected a whole mod"),
    (holding(entry("t", [1] * 5, 0, 0)), "the number of dimensions of tensor 't' is 5"),
    (holding(entry("t", [0, 3], 0, 0)), "the shape of tensor 't' is [3, 0]"),
    (holding(entry("t", [32], 999, 0)), "the type of tensor 't' is 999"),
    (holding(entry("t", [33], 8, 0)), "the width of tensor 't' is 33; expected a multiple of 32"),
    (holding(entry("t", [1], 0, 4)), "the offset of tensor 't' is 4"),
    (holding(ONE, entry("t", [1], 0, 32)), "tensor 't' is listed twice"),
    (holding(*OVERLAPPING), f"the place of tensor 'small' is byte 192; expected {LATER}"),
    (holding(entry("t", [17], 0, 0)), "the end of tensor 't' is byte 196; expected at most the fi"),
    (holding(entry("t", [1 << 62] * 2, 0, 0)), f"the end of tensor 't' is byte {128 + (1 << 126)}"),
    (b"", "the end of the magic is byte 4 or later"),
]


@pytest.mark.parametrize(("content", "found"), HOSTILE)
def test_hostile_header_is_refused_by_field(tmp_path, content, found) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    assert refused(GgufFileError, read_gguf_header, path).startswith(f"Cannot read {path}: {found}")


def test_refusals_have_four_parts(tmp_path) -> None:
    path = tmp_path / "a.gguf"
    assert refused(InputFileError, read_gguf_header, path) == (
        f"Cannot read {path}: opening or reading it failed: No such file or directory. "
        "Check that it exists and that you may read it."
    )
    path.write_bytes(make(ARCH, n_tensor=1 << 63))
    assert refused(GgufFileError, read_gguf_header, path) == (
        f"Cannot read {path}: the number of tensors is {1 << 63}; expected at most {MAX_TENSORS}. "
        "The file is truncated, corrupted or of another kind; fetch or convert it again."
    )
    path.write_bytes(make(ARCH, whole("llama.block_count", 1 << 31)))
    header = read_gguf_header(path)
    with pytest.raises(GgufFileError) as absurd:
        _ = header.n_layer
    assert str(absurd.value) == (
        f"Cannot use {path} as a base: metadata field llama.block_count is {1 << 31}; expected a "
        "whole number up to 16777216. Use the GGUF of a language model as base."
    )
    with pytest.raises(GgufFileError, match=r"token_embd\.weight is missing; expected \[n_vocab"):
        _ = header.n_vocab


def test_header_longer_than_the_limit_is_not_read(tmp_path) -> None:
    path = tmp_path / "a.gguf"
    head = make(ARCH, array("words", 8, 2, struct.pack("<Q", 1 << 40)))
    with path.open("wb") as file:  # a sparse file
        file.write(head)
        file.truncate(1 << 41)
    with pytest.raises(GgufFileError, match=f"'words' is byte .* bytes and {MAX_HEADER_BYTES}"):
        read_gguf_header(path)


def test_file_that_shrinks_while_its_header_is_read_is_named(tmp_path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(make(ARCH))
    size_bytes = path.stat().st_size
    with path.open("rb") as file, pytest.raises(GgufFileError, match="it changed while it was"):
        GgufCursor(path, file, size_bytes + 100).take(size_bytes + 1, "the header")


def test_every_truncation_is_refused(tmp_path) -> None:
    path = tmp_path / "a.gguf"
    numbers = array("array", 4, 3, struct.pack("<3I", 1, 2, 3))
    words = array("words", 8, 2, text("one") + text("two"))
    complete = make(ARCH, numbers, words, entries=(entry("t", [2, 4], 0, 0),), data=bytes(32))
    path.write_bytes(complete)
    read_gguf_header(path)
    for n_bytes in range(1, len(complete)):
        path.write_bytes(complete[:n_bytes])
        with pytest.raises(GgufFileError):
            read_gguf_header(path)


def test_file_cut_after_its_header_was_read_is_noticed(tmp_path) -> None:
    base = tiny.write_tiny_base(tmp_path / "base.gguf")
    header = read_gguf_header(base.path)
    info = header.tensors["output_norm.weight"]
    with base.path.open("rb+") as file:
        file.truncate(info.offset + 8)
    with pytest.raises(GgufFileError, match="it changed while it was read; expected a file that"):
        read_values(header.path, info)


def test_type_that_cannot_become_floats_is_named(tmp_path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(make(ARCH, entries=(entry("t", [32], 9, 0),), data=bytes(64)))  # Q8_1
    info = read_gguf_header(path).tensors["t"]
    assert refused(GgufFileError, read_values, path, info) == (
        f"Cannot read tensor t of {path}: its type Q8_1 cannot be turned into floats here. "
        "Use a file of another quantisation."
    )
