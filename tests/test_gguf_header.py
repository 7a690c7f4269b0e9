"""The GGUF header reader, against gguf's own reader and against hostile files."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny

from qaflora_edge.errors import GgufFileError, InputFileError
from qaflora_edge.formats.gguf import (
    MAX_ARRAY_LENGTH,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    GgufCursor,
    SkippedArray,
    read_gguf_header,
    read_values,
)


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


@pytest.mark.parametrize(
    ("arch", "dtype"), [("llama", "f32"), ("qwen2", "f16"), ("gemma3", "bf16"), ("llama", "q8_0")]
)
def test_header_and_values_equal_those_of_the_gguf_package(
    tmp_path: Path, arch: str, dtype: str
) -> None:
    base = tiny.write_tiny_base(tmp_path / "base.gguf", arch, tied=False, dtype=dtype)
    header = read_gguf_header(base.path)
    reader = gguf.GGUFReader(base.path)
    assert header.data_offset == reader.data_offset
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
        if isinstance(value, SkippedArray):
            assert value.length == len(content)
        else:
            assert value == (tuple(content) if isinstance(content, list) else content)


def test_counts_come_from_the_architecture(tmp_path: Path) -> None:
    base = tiny.write_tiny_base(tmp_path / "base.gguf", "qwen2")
    header = read_gguf_header(base.path)
    assert header.architecture == "qwen2"
    assert (header.n_layer, header.n_embd, header.n_vocab) == (3, 64, base.n_vocab)
    assert (header.n_head, header.n_head_kv) == (4, 2)


def test_count_given_per_layer_must_be_the_same_in_all(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    array = struct.pack("<IQ3I", 4, 3, 2, 2, 2)
    path.write_bytes(make(ARCH, field("llama.attention.head_count_kv", 9, array)))
    assert read_gguf_header(path).n_head_kv == 2
    array = struct.pack("<IQ3I", 4, 3, 2, 4, 2)
    path.write_bytes(make(ARCH, field("llama.attention.head_count_kv", 9, array)))
    with pytest.raises(GgufFileError) as caught:
        _ = read_gguf_header(path).n_head_kv
    assert str(caught.value) == (
        f"Cannot use {path}: metadata field llama.attention.head_count_kv is (2, 4, 2); expected "
        "one whole number from 1 to 16777216. Use the GGUF of a language model as base."
    )


def test_missing_vocabulary_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(make(ARCH))
    with pytest.raises(GgufFileError) as caught:
        _ = read_gguf_header(path).n_vocab
    assert str(caught.value) == (
        f"Cannot tell the vocabulary's size of {path}: tensor token_embd.weight is missing; "
        "expected [n_vocab, n_embd]. Use the GGUF of a language model as base."
    )


def test_long_arrays_are_stepped_over(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    tokens = b"".join(text(f"token {index}") for index in range(20000))
    strings = field("tokens", 9, struct.pack("<IQ", 8, 20000) + tokens)
    scores = field("scores", 9, struct.pack("<IQ", 6, 20000) + bytes(80000))
    last = field("last", 8, text("reached"))
    path.write_bytes(make(ARCH, strings, scores, last))
    metadata = read_gguf_header(path).metadata
    data, expected = path.read_bytes(), {"tokens": tokens, "scores": bytes(80000)}
    for name, content in expected.items():
        array = metadata[name]
        assert isinstance(array, SkippedArray)
        assert array.length == 20000
        assert data[array.offset : array.offset + array.n_bytes] == content
    assert metadata["last"] == "reached"


def test_many_short_arrays_do_not_fill_the_memory(tmp_path: Path) -> None:
    """4096 fields of 4096 numbers each would take half a gigabyte in a header of 64 MB."""
    path = tmp_path / "a.gguf"
    array = struct.pack("<IQ", 6, 4096) + bytes(4 * 4096)
    path.write_bytes(make(ARCH, *(field(f"x{index}", 9, array) for index in range(70))))
    metadata = read_gguf_header(path).metadata
    kept = [index for index in range(70) if isinstance(metadata[f"x{index}"], tuple)]
    assert kept == list(range(64))
    assert isinstance(metadata["x64"], SkippedArray)


CORRUPT = "The file is corrupted or incomplete; fetch or convert it again."
HOSTILE = {
    "magic": (
        make(ARCH, magic=b"PK\3\4"),
        "its first bytes are b'PK\\x03\\x04'; expected b'GGUF'. It is not a GGUF file; check the "
        "path, or convert the model to GGUF.",
    ),
    "git lfs": (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n".encode(),
        "it is a Git LFS pointer; expected the file that it stands for. Run `git lfs install` and "
        "`git lfs pull` in its folder, or fetch the file itself.",
    ),
    "version": (
        make(ARCH, version=1),
        "it is GGUF version 1; expected version 2 or 3. Fetch or convert it again.",
    ),
    "big endian": (
        make(ARCH, version=3 << 24),
        "it is written for a big-endian machine; expected little-endian. "
        "Fetch or convert a little-endian file.",
    ),
    "number of tensors": (
        make(ARCH, n_tensor=1 << 63),
        f"the number of tensors is {1 << 63}; expected at most {MAX_TENSORS}. {CORRUPT}",
    ),
    "number of fields": (
        make(ARCH, n_field=1 << 40),
        f"the number of metadata fields is {1 << 40}; expected at most 4096. {CORRUPT}",
    ),
    "length of a key": (
        make(struct.pack("<Q", 1 << 62)),
        f"the length of the name of metadata field 0 is {1 << 62}; expected at most 65535. "
        f"{CORRUPT}",
    ),
    "text of a key": (
        make(field(b"\xff\xfe", 4, bytes(4))),
        f"the name of metadata field 0 is b'\\xff\\xfe'; expected UTF-8 text. {CORRUPT}",
    ),
    "field twice": (
        make(ARCH, ARCH),
        "metadata field 'general.architecture' is given twice; expected every field once. "
        f"{CORRUPT}",
    ),
    "type of a field": (
        make(field("k", 13, b"")),
        f"the type of metadata field 'k' is 13; expected a type of GGUF, 0 to 12. {CORRUPT}",
    ),
    "array of arrays": (
        make(field("k", 9, struct.pack("<IQ", 9, 1))),
        f"the element type of metadata field 'k' is 9; expected a number or a string. {CORRUPT}",
    ),
    "length of an array": (
        make(field("k", 9, struct.pack("<IQ", 8, 1 << 60))),
        f"the length of metadata field 'k' is {1 << 60}; expected at most {MAX_ARRAY_LENGTH}. "
        f"{CORRUPT}",
    ),
    "strings past the end": (
        make(field("k", 9, struct.pack("<IQ", 8, 1000) + text("a"))),
        "the file ends inside metadata field 'k', an array of 1000 strings. "
        "The file is truncated or corrupted; fetch or convert it again.",
    ),
    "string longer than the file": (
        make(field("k", 9, struct.pack("<IQQ", 8, 1, (1 << 64) - 1))),
        "the file ends inside metadata field 'k', an array of 1 strings. "
        "The file is truncated or corrupted; fetch or convert it again.",
    ),
    "no architecture": (
        make(),
        "metadata field general.architecture is missing; expected the name of an architecture. "
        f"{CORRUPT}",
    ),
    "alignment": (
        make(ARCH, field("general.alignment", 4, struct.pack("<I", 24))),
        f"metadata field general.alignment is 24; expected a power of two up to 65536. {CORRUPT}",
    ),
    "dimensions": (
        make(ARCH, entries=(entry("t", [1] * 5, 0, 0),)),
        f"the number of dimensions of tensor 't' is 5; expected at most 4. {CORRUPT}",
    ),
    "empty dimension": (
        make(ARCH, entries=(entry("t", [0, 3], 0, 0),)),
        f"the shape of tensor 't' is [3, 0]; expected positive dimensions. {CORRUPT}",
    ),
    "name of a tensor": (
        make(ARCH, entries=(entry("t" * 64, [1], 0, 0),)),
        f"the length of the name of tensor 0 is 64; expected at most 63. {CORRUPT}",
    ),
    "unknown type": (
        make(ARCH, entries=(entry("t", [32], 999, 0),)),
        "the type of tensor 't' is 999, which this version does not know. "
        "Use a file of another quantisation, or upgrade.",
    ),
    "row not of whole blocks": (
        make(ARCH, entries=(entry("t", [33], 8, 0),), data=bytes(64)),
        f"tensor 't' is 33 wide; expected a multiple of 32 for Q8_0. {CORRUPT}",
    ),
    "offset not aligned": (
        make(ARCH, entries=(entry("t", [1], 0, 4),), data=bytes(64)),
        f"the offset of tensor 't' is 4; expected a multiple of 32. {CORRUPT}",
    ),
    "tensor twice": (
        make(ARCH, entries=(entry("t", [1], 0, 0), entry("t", [1], 0, 32)), data=bytes(64)),
        f"tensor 't' is listed twice; expected every tensor once. {CORRUPT}",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_is_refused_by_field(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufFileError) as caught:
        read_gguf_header(path)
    assert str(caught.value) == f"Cannot read {path}: {message}"


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    entries = (entry("big", [16], 0, 0), entry("small", [1], 0, 32))
    path.write_bytes(make(ARCH, entries=entries, data=bytes(64)))
    data_offset = path.stat().st_size - 64
    with pytest.raises(GgufFileError) as caught:
        read_gguf_header(path)
    assert str(caught.value) == (
        f"Cannot read {path}: tensor 'small' is at byte {data_offset + 32}, inside tensor 'big'; "
        f"expected byte {data_offset + 64} or later. {CORRUPT}"
    )


@pytest.mark.parametrize("dims", [[1 << 62, 1 << 62], [17]])
def test_tensor_past_the_end_is_refused(tmp_path: Path, dims: list[int]) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(make(ARCH, entries=(entry("t", dims, 0, 0),), data=bytes(64)))
    size_bytes = path.stat().st_size
    end = size_bytes - 64 + 4 * int(np.prod([int(dim) for dim in dims], dtype=object))
    with pytest.raises(GgufFileError) as caught:
        read_gguf_header(path)
    assert str(caught.value) == (
        f"Cannot read {path}: tensor 't' ends at byte {end}, and the file has {size_bytes}. "
        "The file is truncated or corrupted; fetch or convert it again."
    )


def test_header_longer_than_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    head = make(ARCH, field("words", 9, struct.pack("<IQ", 8, 2) + struct.pack("<Q", 1 << 40)))
    with path.open("wb") as file:  # a sparse file
        file.write(head)
        file.truncate(1 << 41)
    with pytest.raises(GgufFileError) as caught:
        read_gguf_header(path)
    assert str(caught.value) == (
        f"Cannot read {path}: the header is longer than {MAX_HEADER_BYTES} bytes, of which "
        f"metadata field 'words' is a part; expected a shorter one. {CORRUPT}"
    )


def test_absurd_number_of_layers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(make(ARCH, field("llama.block_count", 4, struct.pack("<I", 1 << 31))))
    with pytest.raises(GgufFileError) as caught:
        _ = read_gguf_header(path).n_layer
    assert str(caught.value) == (
        f"Cannot use {path}: metadata field llama.block_count is {1 << 31}; expected one whole "
        "number from 1 to 1024. Use the GGUF of a language model as base."
    )


def test_file_that_shrinks_while_its_header_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(make(ARCH))
    size_bytes = path.stat().st_size
    with path.open("rb") as file, pytest.raises(GgufFileError) as caught:
        GgufCursor(path, file, size_bytes + 100).take(size_bytes + 1, "the header")
    assert str(caught.value) == (
        f"Cannot read {path}: it had {size_bytes + 100} bytes and became shorter while the header "
        f"was read, at byte {size_bytes}. Try again."
    )


def test_split_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(make(ARCH, field("split.count", 2, struct.pack("<H", 3))))
    with pytest.raises(GgufFileError) as caught:
        read_gguf_header(path)
    assert str(caught.value) == (
        f"Cannot use {path}: metadata field split.count says that it is one of 3 parts; expected a "
        "whole model. Join the parts with llama.cpp's `llama-gguf-split --merge`."
    )


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    array = field("array", 9, struct.pack("<IQ3I", 4, 3, 1, 2, 3))
    words = field("words", 9, struct.pack("<IQ", 8, 2) + text("one") + text("two"))
    whole = make(ARCH, array, words, entries=(entry("t", [2, 4], 0, 0),), data=bytes(32))
    path.write_bytes(whole)
    read_gguf_header(path)
    for n_bytes in range(1, len(whole)):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(GgufFileError):
            read_gguf_header(path)


def test_missing_and_empty_files_and_folders_are_named(tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    with pytest.raises(InputFileError) as caught:
        read_gguf_header(path)
    assert str(caught.value) == (
        f"Cannot read {path}: it does not exist; expected a GGUF file. Check the path."
    )
    with pytest.raises(InputFileError) as caught:
        read_gguf_header(tmp_path)
    assert str(caught.value) == (
        f"Cannot read {tmp_path}: it is not a file; expected a GGUF file. Check the path."
    )
    path.write_bytes(b"")
    with pytest.raises(GgufFileError) as caught:
        read_gguf_header(path)
    assert str(caught.value) == (
        f"Cannot read {path}: it is empty; expected a GGUF file. Fetch it again."
    )


def test_file_cut_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    base = tiny.write_tiny_base(tmp_path / "base.gguf")
    header = read_gguf_header(base.path)
    info = header.tensors["output_norm.weight"]
    with base.path.open("rb+") as file:
        file.truncate(info.offset + 8)
    with pytest.raises(GgufFileError) as caught:
        read_values(header.path, info)
    assert str(caught.value) == (
        f"Cannot read tensor output_norm.weight of {base.path}: the file gave 8 bytes and 256 were "
        "expected; it changed while it was open. Try again."
    )


def test_type_that_cannot_become_floats_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(make(ARCH, entries=(entry("t", [32], 9, 0),), data=bytes(64)))  # Q8_1
    info = read_gguf_header(path).tensors["t"]
    with pytest.raises(GgufFileError) as caught:
        read_values(path, info)
    assert str(caught.value) == (
        f"Cannot read tensor t of {path}: its type Q8_1 cannot be turned into floats here. "
        "Use a file of another quantisation."
    )
