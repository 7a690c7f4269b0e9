"""Inspection of adapter GGUFs, and their check against a base."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny

from qaflora_edge.errors import AdapterMismatchError, GgufFileError, UnsupportedAdapterError
from qaflora_edge.formats.adapter import (
    NO_FLOATS,
    AdapterInfo,
    check_adapter,
    check_values,
    read_adapter_gguf,
    read_pair,
)
from qaflora_edge.formats.gguf import read_gguf_header

Q0 = "blk.0.attn_q.weight"
UP0 = "blk.0.ffn_up_exps.weight"
PAIR = {f"{Q0}.lora_a": (4, 64), f"{Q0}.lora_b": (64, 4)}


@pytest.fixture
def base(tmp_path: Path) -> tiny.TinyBase:
    return tiny.write_tiny_base(tmp_path / "base.gguf")


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], **fields: Any) -> Path:
    """Write an adapter of zeros; a field of None is left out."""
    values: dict[str, Any] = {"kind": "adapter", "adapter": "lora", "alpha": 8.0, "arch": "llama"}
    values |= fields
    writer = gguf.GGUFWriter(path, values["arch"])
    if values["kind"] is not None:
        writer.add_type(values["kind"])
    if values["adapter"] is not None:
        writer.add_string("adapter.type", values["adapter"])
    if values["alpha"] is not None:
        add = {int: writer.add_uint32, np.float64: writer.add_float64}.get(
            type(values["alpha"]), writer.add_float32
        )
        add("adapter.lora.alpha", values["alpha"])
    if "tokens" in values:
        writer.add_array("adapter.alora.invocation_tokens", values["tokens"])
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    tiny.finish(writer)
    return path


def _read_and_check(path: Path, base: tiny.TinyBase | None) -> None:
    info = read_adapter_gguf(path)
    if base is not None:
        check_adapter(info, read_gguf_header(base.path))


def refusal(kind: type[Exception], path: Path, base: tiny.TinyBase | None = None) -> str:
    """Give the message of the expected error, of reading or, with a base, of the check."""
    with pytest.raises(kind) as caught:
        _read_and_check(path, base)
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.parametrize(("arch", "outtype"), [("llama", "f32"), ("gemma3", "q8_0")])
def test_what_was_written_is_read(tmp_path: Path, arch: str, outtype: str) -> None:
    base = tiny.write_tiny_base(tmp_path / "base.gguf", arch, tied=False)
    targets = ("ffn_down", "attn_q", "output", "token_embd")
    adapter = tiny.write_tiny_adapter(
        tmp_path / "a.gguf", base, rank=6, alpha=12.5, targets=targets, outtype=outtype, seed=4
    )
    info = read_adapter_gguf(adapter.path)
    check_adapter(info, read_gguf_header(base.path))
    assert isinstance(info, AdapterInfo)
    assert (info.name, info.architecture) == ("tiny adapter 4", arch)
    assert (info.alpha, info.rank) == (12.5, 6)
    assert info.targets == ("attn_q", "ffn_down", "output", "token_embd")
    assert info.ranks == dict.fromkeys(adapter.b, 6)
    assert {name: tensor.shape for name, tensor in info.tensors.items()} == {
        f"{name}.lora_{side}": values.shape
        for side, arrays in (("a", adapter.a), ("b", adapter.b))
        for name, values in arrays.items()
    }


def test_head_of_a_tied_base_is_accepted(tmp_path: Path, base: tiny.TinyBase) -> None:
    assert base.tied
    adapter = tiny.write_tiny_adapter(tmp_path / "a.gguf", base, targets=["output"])
    check_adapter(read_adapter_gguf(adapter.path), read_gguf_header(base.path))


# --- files that are no sound adapters -------------------------------------------------------------


Q_A, Q_B, UP_A, UP_B = f"{Q0}.lora_a", f"{Q0}.lora_b", f"{UP0}.lora_a", f"{UP0}.lora_b"
EMBEDDING = "token_embd.weight"
PLAIN = UnsupportedAdapterError
ALPHA = "metadata field adapter.lora.alpha is"
WRONG: list[tuple[dict[str, tuple[int, ...]], dict[str, Any], type[Exception], str]] = [
    (PAIR, {"kind": None}, GgufFileError, "metadata field general.type is missing; expected 'adap"),
    (PAIR, {"adapter": "x"}, GgufFileError, "metadata field adapter.type is 'x'; expected 'lora'"),
    (PAIR, {"alpha": None}, GgufFileError, f"{ALPHA} missing; expected a float of 32 bits"),
    (PAIR, {"alpha": 0.0}, GgufFileError, f"{ALPHA} 0.0"),
    (PAIR, {"alpha": float("nan")}, GgufFileError, f"{ALPHA} nan"),
    (PAIR, {"alpha": np.float64(8)}, GgufFileError, f"{ALPHA} 8.0 of 64 bits"),
    (PAIR, {"tokens": [1]}, PLAIN, "metadata field adapter.alora.invocation_tokens makes it an"),
    ({**PAIR, "blk.0.attn_q.bias": (64,)}, {}, PLAIN, "it has tensor blk.0.attn_q.bias, which a"),
    ({Q_A: (4, 64)}, {}, GgufFileError, f"{Q0} has one half of a pair"),
    ({}, {}, GgufFileError, "it has no tensors"),
    ({Q_A: (5, 64), Q_B: (64, 4)}, {}, GgufFileError, f"{Q_A} is [5, 64] and lora_b [64, 4]"),
    (
        {f"{EMBEDDING}.lora_a": (4, 271), f"{EMBEDDING}.lora_b": (64, 4)},
        {},
        GgufFileError,
        f"{EMBEDDING}.lora_a is [4, 271] and lora_b [64, 4]; expected one rank",
    ),
    ({Q_A: (2, 4, 64), Q_B: (64, 4)}, {}, PLAIN, f"{Q_A} is [2, 4, 64] and lora_b [64, 4]"),
    ({Q_A: (64,), Q_B: (64, 4)}, {}, PLAIN, f"{Q_A} is [64] and lora_b [64, 4]; expected 2 dim"),
    (
        {UP_A: (4, 64), UP_B: (64, 4)},
        {},
        PLAIN,
        f"{UP_A} is [4, 64] and lora_b [64, 4]; exp",
    ),
    ({UP_A: (2, 4, 64), UP_B: (2, 96, 3)}, {}, GgufFileError, f"{UP_A} is [2, 4, 64] and lora_b"),
    ({UP_A: (2, 4, 64), UP_B: (3, 96, 4)}, {}, GgufFileError, f"{UP_A} is [2, 4, 64] and lora_b"),
    ({Q_A: (16385, 1), Q_B: (1, 16385)}, {}, GgufFileError, f"{Q0} has rank 16385; expected at"),
]


@pytest.mark.parametrize(("shapes", "fields", "kind", "found"), WRONG)
def test_what_is_no_sound_adapter_is_refused(
    tmp_path: Path,
    shapes: dict[str, tuple[int, ...]],
    fields: dict[str, Any],
    kind: type[Exception],
    found: str,
) -> None:
    path = write(tmp_path / "a.gguf", shapes, **fields)
    assert refusal(kind, path).startswith(f"Cannot use adapter {path}: {found}")


def test_a_refusal_has_four_parts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", {})
    assert refusal(GgufFileError, path) == (
        f"Cannot use adapter {path}: it has no tensors; expected pairs of lora_a and lora_b. "
        "Convert the adapter again."
    )


# --- adapters for another base --------------------------------------------------------------

TRAINED = "Use an adapter that was trained on this base."


def test_other_architecture_is_refused(tmp_path: Path, base: tiny.TinyBase) -> None:
    path = write(tmp_path / "a.gguf", PAIR, arch="qwen2")
    assert refusal(AdapterMismatchError, path, base) == (
        f"Cannot use adapter {path} with base {base.path}: the adapter is for architecture "
        f"'qwen2', the base is 'llama'. {TRAINED}"
    )


@pytest.mark.parametrize(
    ("name", "a", "b", "found", "expected"),
    [
        (Q0, (4, 96), (64, 4), [64, 96], [64, 64]),
        (Q0, (4, 64), (32, 4), [32, 64], [64, 64]),
        ("output.weight", (4, 64), (64, 4), [64, 64], [271, 64]),
        ("token_embd.weight", (270, 4), (64, 4), [270, 64], [271, 64]),
    ],
)
def test_shape_that_does_not_fit_the_base_is_named(
    tmp_path: Path,
    base: tiny.TinyBase,
    name: str,
    a: tuple[int, int],
    b: tuple[int, int],
    found: list[int],
    expected: list[int],
) -> None:
    path = write(tmp_path / "a.gguf", {f"{name}.lora_a": a, f"{name}.lora_b": b})
    assert refusal(AdapterMismatchError, path, base) == (
        f"Cannot use adapter {path} with base {base.path}: it adapts {name} as shape {found}, and "
        f"the base has {expected}; expected equal shapes. {TRAINED}"
    )


def test_experts_of_the_base_are_compared(tmp_path: Path) -> None:
    base = read_gguf_header(write(tmp_path / "base.gguf", {UP0: (2, 96, 64)}))
    shapes = {f"{UP0}.lora_a": (2, 4, 64), f"{UP0}.lora_b": (2, 96, 4)}
    info = read_adapter_gguf(write(tmp_path / "a.gguf", shapes))
    check_adapter(info, base)
    assert (info.rank, info.targets) == (4, ("ffn_up_exps",))
    assert [part.shape for part in read_pair(info, UP0)[:2]] == [(2, 4, 64), (2, 96, 4)]
    # llama.cpp takes another number of experts and reads out of bounds.
    shapes = {f"{UP0}.lora_a": (3, 4, 64), f"{UP0}.lora_b": (3, 96, 4)}
    path = write(tmp_path / "b.gguf", shapes)
    with pytest.raises(AdapterMismatchError) as caught:
        check_adapter(read_adapter_gguf(path), base)
    assert str(caught.value) == (
        f"Cannot use adapter {path} with base {base.path}: it adapts {UP0} as shape [3, 96, 64], "
        f"and the base has [2, 96, 64]; expected equal shapes. {TRAINED}"
    )


# --- what llama.cpp would ignore, or stop at ------------------------------------------------------


def test_tensor_that_llama_cpp_ignores_is_refused(tmp_path: Path, base: tiny.TinyBase) -> None:
    name = "blk.0.attn_norm.weight"
    path = write(tmp_path / "a.gguf", {f"{name}.lora_a": (4, 64), f"{name}.lora_b": (64, 4)})
    assert refusal(UnsupportedAdapterError, path, base) == (
        f"Cannot use adapter {path} with base {base.path}: it adapts {name}, which llama.cpp "
        "computes without adapters for llama, and this part would be ignored; expected tensors "
        "that it adapts. Train without this module, or merge the adapter into its base."
    )


def test_tensor_of_no_layer_is_refused(tmp_path: Path, base: tiny.TinyBase) -> None:
    name = "per_layer_model_proj.weight"
    path = write(tmp_path / "a.gguf", {f"{name}.lora_a": (4, 64), f"{name}.lora_b": (64, 4)})
    assert refusal(UnsupportedAdapterError, path, base) == (
        f"Cannot use adapter {path} with base {base.path}: it adapts {name}, which belongs to no "
        "layer, so that no layer's weight applies; expected blk.N., token_embd.weight or "
        "output.weight. Train without this module."
    )


def test_types_without_floats_are_those_of_llama_cpp(llama_cpp_source: Path) -> None:
    text = (llama_cpp_source / "ggml" / "src" / "ggml.c").read_text("utf-8")
    traits = re.findall(r"\n    \[GGML_TYPE_(\w+)\] = \{(.*?)\n    \}", text, re.DOTALL)
    assert len(traits) > 30
    types = gguf.GGMLQuantizationType
    expected = {
        types[name]
        for name, body in traits
        if ".to_float" not in body and name in types.__members__ and name != "F32"
    }
    assert set(NO_FLOATS) == expected


@pytest.mark.parametrize("kind", ["I32", "F64", "Q8_K"])
def test_type_that_holds_no_floats_is_refused(tmp_path: Path, kind: str) -> None:
    raw_type = gguf.GGMLQuantizationType[kind]
    n_block, block_bytes = gguf.GGML_QUANT_SIZES[raw_type]
    writer = tiny.begin_adapter(tmp_path / "a.gguf")
    data = np.zeros((4, 256 // n_block * block_bytes), np.uint8)
    writer.add_tensor(f"{Q0}.lora_a", data, raw_dtype=raw_type)
    writer.add_tensor(f"{Q0}.lora_b", np.zeros((64, 4), np.float32))
    tiny.finish(writer)
    path = tmp_path / "a.gguf"
    assert refusal(GgufFileError, path) == (
        f"Cannot use adapter {path}: tensor {Q0}.lora_a is of type {kind}; expected F32, F16, BF16 "
        "or a quantised type. Convert the adapter again."
    )


@pytest.mark.parametrize(
    ("outtype", "n_bad"), [("f32", 1), ("f16", 1), ("bf16", 1), ("q8_0", 32), ("q4_0", 32)]
)
def test_values_that_are_no_numbers_are_counted(tmp_path: Path, outtype: str, n_bad: int) -> None:
    """Of types in blocks, the scale of one: it makes the whole block so."""
    value = np.nan if n_bad == 1 else np.inf
    kind = gguf.GGMLQuantizationType[outtype.upper()]
    values = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    stored = gguf.quants.quantize(values, kind)
    writer = tiny.begin_adapter(tmp_path / "a.gguf")
    for side, data in (("a", stored), ("b", np.ones((64, 3), np.float32))):
        raw_kind = kind if side == "a" else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{side}", data, raw_dtype=raw_kind)
    tiny.finish(writer)
    info = read_adapter_gguf(tmp_path / "a.gguf")
    check_values(info)
    tensor = info.tensors["blk.0.attn_q.weight.lora_a"]
    as_stored = {"f32": np.array([value], "<f4"), "f16": np.array([value], "<f2")}
    bits = np.array([value], "<f4").view("<u4") >> 16
    as_stored |= {"bf16": bits.astype("<u2"), "q8_0": as_stored["f16"], "q4_0": as_stored["f16"]}
    block_bytes = tensor.n_bytes // 3 // 2 if n_bad == 32 else 0
    with info.path.open("rb+") as file:
        file.seek(tensor.offset + 3 * block_bytes)
        file.write(as_stored[outtype].tobytes())
    with pytest.raises(GgufFileError) as caught:
        check_values(info)
    assert f": {n_bad} of the 192 values of tensor {tensor.name} are NaN" in str(caught.value)
