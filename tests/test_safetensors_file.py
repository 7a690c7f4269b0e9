"""The safetensors reader against files that lie. That it reads true ones right: test_peft.py."""

import json
from typing import Any

import pytest
from refusals import refused

from qaflora_edge.errors import SafetensorsFileError
from qaflora_edge.peft.modules import read_safetensors


def raw(header: object, data: bytes = b"", n_header: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if n_header is None else n_header).to_bytes(8, "little") + text + data


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


DAMAGED = "The file is truncated, corrupted or not a safetensors file; fetch or save it again."
ATTACKS: dict[str, tuple[bytes, str]] = {
    "short": (b"\0\0\0", "its header cannot be used"),
    "huge header": (raw({}, n_header=1 << 60), f"its header cannot be used (it has {1 << 60}"),
    "header past the end": (raw({}, n_header=99), "its header cannot be used"),
    "shape of truths": (raw(one(shape=[True, 2]), bytes(8)), "its header cannot be used"),
    "hole": (raw(one(offsets=[4, 12]), bytes(12)), "its header cannot be used"),
    "shared bytes": (
        raw({**one(), "u": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
        "its header cannot be used",
    ),
    "longer": (raw(one(), bytes(9)), "its header cannot be used"),
    "name": (raw({"t" * 300: one()["t"]}, bytes(8)), "its header cannot be used (a tensor's name"),
    "twice": (
        raw(
            b"{" + json.dumps(one())[1:-1].encode() + b"," + json.dumps(one())[1:].encode(),
            bytes(8),
        ),
        "its header cannot be used (the key 't' is given twice)",
    ),
}


@pytest.mark.parametrize("case", ATTACKS)
def test_attack_on_the_format_is_refused(tmp_path, case) -> None:
    content, found = ATTACKS[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    told = refused(SafetensorsFileError, read_safetensors, path)
    assert told.startswith(f"Cannot read {path}: {found}")
    assert told.endswith(f". {DAMAGED}")


def test_integers_cannot_be_weights(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw(one(dtype="I32"), bytes(8)))
    assert refused(SafetensorsFileError, read_safetensors(path)["t"].read) == (
        f"Cannot use tensor t of {path}: its dtype is I32; expected F32, F16, BF16. "
        "Save the adapter in one of these."
    )


def test_matrix_larger_than_any_lora_is_not_read(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    n_bytes = 1 << 33
    header = raw(one(shape=[n_bytes // 4], offsets=[0, n_bytes]))
    with path.open("wb") as file:  # a sparse file: it says 8 GiB and takes a few blocks
        file.write(header)
        file.truncate(len(header) + n_bytes)
    assert refused(SafetensorsFileError, read_safetensors(path)["t"].read) == (
        f"Cannot use tensor t of {path}: it has {n_bytes} bytes; expected at most {1 << 32} of a "
        "matrix. Check that it is a plain LoRA."
    )
