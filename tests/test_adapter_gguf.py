"""Inspection of adapter GGUFs, and their check against a base."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from refusals import refused

from qaflora_edge.errors import AdapterMismatchError, GgufFileError, UnsupportedAdapterError
from qaflora_edge.formats.adapter import check_adapter, check_values, read_adapter_gguf, read_pair
from qaflora_edge.formats.base import NO_FLOATS
from qaflora_edge.formats.gguf import read_gguf_header

Q0 = "blk.0.attn_q.weight"
UP0 = "blk.0.ffn_up_exps.weight"
PAIR = {f"{Q0}.lora_a": (4, 64), f"{Q0}.lora_b": (64, 4)}


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], **fields: Any) -> Path:
    """Write an adapter of zeros; a field of None is left out."""
    values: dict[str, Any] = {"kind": "adapter", "adapter": "lora", "alpha": 8.0, "arch": "llama"}
    values |= fields
    writer = gguf.GGUFWriter(path, values["arch"])
    for key, name in (("general.type", "kind"), ("adapter.type", "adapter")):
        if values[name] is not None:
            writer.add_string(key, values[name])
    if values["alpha"] is not None:
        writer.add_float32("adapter.lora.alpha", values["alpha"])
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    tiny.finish(writer)
    return path


def refusal(kind: type[Exception], path: Path, base: tiny.TinyBase | None = None) -> str:
    """Give the message of the expected error, of reading or, with a base, of the check."""
    header = base and read_gguf_header(base.path)
    if header is None:
        return refused(kind, read_adapter_gguf, path)
    return refused(kind, check_adapter, read_adapter_gguf(path), header)


EMBEDDING = "token_embd.weight"
PLAIN = UnsupportedAdapterError
ALPHA = "metadata field adapter.lora.alpha is"
FIELDS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kind": None}, GgufFileError, "metadata field general.type is missing; expected 'adapter'"),
    ({"adapter": "x"}, GgufFileError, "metadata field adapter.type is 'x'; expected 'lora'"),
    ({"alpha": None}, GgufFileError, f"{ALPHA} missing; expected a float other than 0"),
    ({"alpha": 0.0}, GgufFileError, f"{ALPHA} 0.0"),
    ({"alpha": float("nan")}, GgufFileError, f"{ALPHA} nan"),
]
SHAPES: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = [
    (Q0, (5, 64), (64, 4)),
    (EMBEDDING, (4, 271), (64, 4)),
    (Q0, (2, 4, 64), (64, 4)),
    (Q0, (64,), (64, 4)),
    (UP0, (4, 64), (64, 4)),
    (UP0, (2, 4, 64), (3, 96, 4)),
]


def pair(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.lora_a": a, f"{name}.lora_b": b}


@pytest.mark.parametrize(("fields", "kind", "found"), FIELDS)
def test_wrong_field_of_an_adapter_is_named(tmp_path, fields, kind, found) -> None:
    path = write(tmp_path / "a.gguf", PAIR, **fields)
    assert refusal(kind, path).startswith(f"Cannot use adapter {path}: {found}")


def test_shapes_that_are_no_pair_are_shown(tmp_path) -> None:
    for name, a, b in SHAPES:
        path = write(tmp_path / "a.gguf", pair(name, a, b))
        found = f"{name}.lora_a is {list(a)} and lora_b {list(b)}; expected {2 + (name == UP0)} dim"
        assert refusal(GgufFileError, path).startswith(f"Cannot use adapter {path}: {found}")


def test_tensors_are_pairs(tmp_path) -> None:
    path = tmp_path / "a.gguf"
    more = write(path, {**PAIR, "blk.0.attn_q.bias": (64,)})
    assert f"{path}: it has tensor blk.0.attn_q.bias, which a" in refusal(PLAIN, more)
    half = write(path, {f"{Q0}.lora_a": (4, 64)})
    assert f"{path}: {Q0} has one half of a pair" in refusal(GgufFileError, half)
    assert refusal(GgufFileError, write(path, {})) == (
        f"Cannot use adapter {path}: it has no tensors; expected pairs of lora_a and lora_b. "
        "Convert the adapter again."
    )


TRAINED = "Use an adapter that was trained on this base."


def test_other_architecture_is_refused(tmp_path, base) -> None:
    path = write(tmp_path / "a.gguf", PAIR, arch="qwen2")
    assert refusal(AdapterMismatchError, path, base) == (
        f"Cannot use adapter {path} with base {base.path}: the adapter is for architecture "
        f"'qwen2', the base is 'llama'. {TRAINED}"
    )


def test_shape_that_does_not_fit_the_base_is_named(tmp_path, base) -> None:
    cases: list[tuple[str, tuple[int, int], list[int], list[int]]] = [
        (Q0, (4, 96), [64, 96], [64, 64]),
        ("output.weight", (4, 64), [64, 64], [271, 64]),
        (EMBEDDING, (270, 4), [270, 64], [271, 64]),
    ]
    for name, a, found, expected in cases:
        path = write(tmp_path / "a.gguf", pair(name, a, (64, 4)))
        assert refusal(AdapterMismatchError, path, base) == (
            f"Cannot use adapter {path} with base {base.path}: it adapts {name} as shape {found}, "
            f"and the base has {expected}; expected equal shapes. {TRAINED}"
        )


def test_experts_of_the_base_are_compared(tmp_path) -> None:
    base = read_gguf_header(write(tmp_path / "base.gguf", {UP0: (2, 96, 64)}))
    info = read_adapter_gguf(write(tmp_path / "a.gguf", pair(UP0, (2, 4, 64), (2, 96, 4))))
    check_adapter(info, base)
    assert (info.rank, info.targets) == (4, ("ffn_up_exps",))
    assert [part.shape for part in read_pair(info, UP0)[:2]] == [(2, 4, 64), (2, 96, 4)]
    # llama.cpp takes another number of experts and reads out of bounds.
    info = read_adapter_gguf(write(tmp_path / "b.gguf", pair(UP0, (3, 4, 64), (3, 96, 4))))
    with pytest.raises(
        AdapterMismatchError, match=r"\[3, 96, 64\], and the base has \[2, 96, 64\]"
    ):
        check_adapter(info, base)


IGNORED = (
    "expected projections of the language model's layers, token_embd or output. "
    "Train without this module, or merge the adapter into its base."
)


def test_tensor_that_is_ignored_is_refused(tmp_path, base) -> None:
    for name, why in (
        ("blk.0.attn_norm.weight", "llama.cpp computes without adapters for llama"),
        ("mm.0.weight", "belongs to no layer, so that no layer's weight applies"),
    ):
        path = write(tmp_path / "a.gguf", pair(name, (4, 64), (64, 4)))
        assert refusal(UnsupportedAdapterError, path, base) == (
            f"Cannot use adapter {path} with base {base.path}: it adapts {name}, which {why}; "
            f"{IGNORED}"
        )


def test_activated_adapter_is_refused(tmp_path) -> None:
    """llama.cpp adds it from certain tokens on, and not to all of a prompt."""
    writer = tiny.begin_adapter(tmp_path / "a.gguf")
    writer.add_array("adapter.alora.invocation_tokens", [1])
    tiny.finish(writer)
    assert refusal(UnsupportedAdapterError, tmp_path / "a.gguf") == (
        f"Cannot use adapter {tmp_path / 'a.gguf'}: metadata field adapter.alora.invocation_tokens "
        "makes it an activated LoRA; expected an adapter without it. Train a plain LoRA."
    )


def test_types_without_floats_are_those_of_llama_cpp(llama_cpp_source) -> None:
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


@pytest.mark.parametrize(
    ("outtype", "n_bad"), [("f32", 1), ("f16", 1), ("bf16", 1), ("q8_0", 32), ("q4_0", 32)]
)
def test_values_that_are_no_numbers_are_counted(tmp_path, outtype, n_bad) -> None:
    """Of types in blocks, the scale of one: it makes the whole block so."""
    kind = gguf.GGMLQuantizationType[outtype.upper()]
    values = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    if n_bad == 1:
        values[1, 7] = np.nan
    stored = gguf.quants.quantize(values, kind)
    if n_bad == 32:
        stored[1, :2] = np.array([np.inf], "<f2").view(np.uint8)
    name = "blk.0.attn_q.weight.lora_a"
    writer = tiny.begin_adapter(tmp_path / "a.gguf")
    writer.add_tensor(name, stored, raw_dtype=kind)
    writer.add_tensor("blk.0.attn_q.weight.lora_b", np.ones((64, 3), np.float32))
    tiny.finish(writer)
    told = refused(GgufFileError, check_values, read_adapter_gguf(tmp_path / "a.gguf"))
    assert f": {n_bad} of the 192 values of tensor {name} are NaN" in told
