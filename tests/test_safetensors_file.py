"""The safetensors reader against files that lie. That it reads true ones right: test_peft.py."""

import json
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from qaflora_edge.errors import InputFileError, SafetensorsFileError
from qaflora_edge.formats.safetensors import MAX_HEADER_BYTES, PIECE_VALUES, read_safetensors


def raw(header: object, data: bytes = b"", n_header: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if n_header is None else n_header).to_bytes(8, "little") + text + data


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


DAMAGED = "The file is truncated or corrupted; fetch or save it again."
DTYPES = "F64, I64, U64, F32, I32, U32, F16, BF16, I16, U16, F8_E4M3, F8_E5M2, I8, U8, BOOL"
ATTACKS: dict[str, tuple[bytes, str, str, str]] = {
    "short": (b"\0\0\0", "the file", "3 bytes long", "a header first"),
    "huge header": (raw({}, n_header=1 << 60), "the header's length", str(1 << 60),
                    f"<= {MAX_HEADER_BYTES}"),
    "header past the end": (raw({}, n_header=99), "the header's length", "99", "<= 2"),
    "entry": (raw({"t": 3}), "tensor t", "3", "an object"),
    "dtype": (raw(one(dtype="F128"), bytes(8)), "the dtype of tensor t", "'F128'", DTYPES),
    "dtype that is a list": (raw(one(dtype=[]), bytes(8)), "the dtype of tensor t", "[]", DTYPES),
    "negative shape": (raw(one(shape=[-2]), bytes(8)), "the shape of tensor t", "[-2]",
                       "a list of up to 8 whole numbers"),
    "shape of floats": (raw(one(shape=[2.0]), bytes(8)), "the shape of tensor t", "[2.0]",
                        "a list of up to 8 whole numbers"),
    "shape of truths": (raw(one(shape=[True]), bytes(8)), "the shape of tensor t", "[True]",
                        "a list of up to 8 whole numbers"),
    "size": (raw(one(shape=[3]), bytes(8)), "the size in bytes of tensor t", "8",
             "12 for F32 [3]"),
    "overflowing shape": (raw(one(shape=[1 << 40, 1 << 40]), bytes(8)),
                          "the size in bytes of tensor t", "8",
                          f"{1 << 82} for F32 [{1 << 40}, {1 << 40}]"),
    "dimension of thousands of digits": (
        raw(b'{"t":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,8]}}', bytes(8)),
        "the shape of tensor t", "[" + "9" * 79, "a list of up to 8 whole numbers"),
    "offsets": (raw(one(offsets=[8, 0]), bytes(8)), "data_offsets of tensor t", "[8, 0]",
                "two offsets, begin and end"),
    "one offset": (raw(one(offsets=[8]), bytes(8)), "data_offsets of tensor t", "[8]",
                   "two offsets, begin and end"),
    "hole": (raw(one(offsets=[4, 12]), bytes(12)), "the offset of tensor t", "4",
             "0, where the tensor before it ends"),
    "shared bytes": (
        raw({**one(), "u": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
        "the offset of tensor u", "4", "8, where the tensor before it ends"),
    "long name": (raw({"t" * 300: one()["t"]}, bytes(8)), "the name of a tensor",
                  "300 characters long", "1 to 256 characters"),
}  # fmt: skip


@pytest.mark.parametrize("case", ATTACKS)
def test_attack_on_the_format_is_refused_by_field(tmp_path: Path, case: str) -> None:
    content, field, found, expected = ATTACKS[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(SafetensorsFileError) as caught:
        read_safetensors(path)
    assert str(caught.value) == (
        f"Cannot read {path}: {field} is {found}; expected {expected}. {DAMAGED}"
    )


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0"])
def test_file_of_another_size_is_refused(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(change(raw(one(), bytes(8))))
    with pytest.raises(SafetensorsFileError, match=re.escape(DAMAGED)):
        read_safetensors(path)


def test_header_with_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    entry = b'"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    path.write_bytes(raw(b"{" + entry + b"," + entry + b"}", bytes(8)))
    with pytest.raises(SafetensorsFileError) as caught:
        read_safetensors(path)
    assert str(caught.value) == (
        f"Cannot read {path}: its header is not a JSON object (the key 't' is given twice). "
        "The file is corrupted or not a safetensors file; fetch or save it again."
    )


def test_integers_cannot_be_weights(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw(one(dtype="I32"), bytes(8)))
    with pytest.raises(SafetensorsFileError) as caught:
        read_safetensors(path)["t"].read()
    assert str(caught.value) == (
        f"Cannot use tensor t of {path}: its dtype is I32; expected F32, F16, BF16. "
        "Save the adapter in one of these."
    )


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (5, 7), (2, 3, 4), (300, 1000)])
def test_values_are_read_by_pieces_and_transposed(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    path = tmp_path / "a.safetensors"
    tiny.write_safetensors(path, {"first": np.ones(3, np.float32), "t": np.asarray(values)})
    tensor = read_safetensors(path)["t"]
    np.testing.assert_array_equal(tensor.read(), values)
    np.testing.assert_array_equal(tensor.read(transposed=True), values.T)


def test_memory_holds_the_values_once(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tiny.write_safetensors(path, {"t": np.ones((4000, 1000), np.float32)}, "BF16")
    tensor = read_safetensors(path)["t"]
    for transposed in (False, True):
        tracemalloc.start()
        values = tensor.read(transposed=transposed)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < values.nbytes + 32 * PIECE_VALUES


def test_matrix_larger_than_any_lora_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    n_bytes = 1 << 33
    header = raw(one(shape=[n_bytes // 4], offsets=[0, n_bytes]))
    with path.open("wb") as file:  # a sparse file: it says 8 GiB and takes a few blocks
        file.write(header)
        file.truncate(len(header) + n_bytes)
    with pytest.raises(SafetensorsFileError) as caught:
        read_safetensors(path)["t"].read()
    assert str(caught.value) == (
        f"Cannot use tensor t of {path}: it has {n_bytes} bytes; expected at most {1 << 32}, which "
        "no matrix of a LoRA exceeds. Check that it is a plain LoRA."
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX")
def test_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputFileError) as caught:
        read_safetensors(tmp_path / "pipe")
    assert str(caught.value) == (
        f"Cannot read {tmp_path / 'pipe'}: opening or reading it failed (it is a named pipe, not a "
        "file). Check that it exists and that you may read it."
    )
