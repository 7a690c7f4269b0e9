"""Adapters of experts, converted: the delta of each expert is what numpy says of the source."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from numpy.typing import NDArray
from refusals import refused
from test_mlx import write_mlx
from tiny import F64, write_pairs_of_peft

from qaflora_edge.convert import plan
from qaflora_edge.convert.adapter import ConvertedAdapter, convert_adapter
from qaflora_edge.convert.layouts import MIXTURES
from qaflora_edge.convert.planned import StackedExperts
from qaflora_edge.errors import (
    AdapterMismatchError,
    ConversionError,
    PeftConfigError,
    QafloraError,
    UnsupportedAdapterError,
)

N_EXPERT, N_FF, N_EMBD, RANK = 3, 48, 32, 4
EXPERTS = "model.layers.0.mlp.experts"
GATE_UP = {"target_parameters": ["experts.gate_up_proj"]}
OLD_EXPERTS = "model.layers.0.block_sparse_moe.experts"


def write_base(
    path: Path, arch: str = "qwen3moe", *, n_ff: int = N_FF, fused: bool = False
) -> Path:
    """Write a base of one layer of experts, all zeros; its shapes are what is of interest."""
    shapes = {"gate": (n_ff, N_EMBD), "up": (n_ff, N_EMBD), "down": (N_EMBD, n_ff)}
    if fused:
        shapes = {"gate_up": (2 * n_ff, N_EMBD), "down": (N_EMBD, n_ff)}
    named = {f"blk.0.ffn_{part}_exps.weight": (N_EXPERT, *shape) for part, shape in shapes.items()}
    return tiny.write_shapes(path, arch, named)


def drawn(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def deltas(converted: ConvertedAdapter) -> dict[str, F64]:
    """Give what llama.cpp adds: part of the experts -> float64 [n_expert, n_out, n_in]."""
    tensors = {
        tensor.name: np.asarray(tensor.data, np.float64)
        for tensor in gguf.GGUFReader(converted.path).tensors
    }
    found = {}
    for name, b in tensors.items():
        if name.endswith(".lora_b"):
            a = tensors[name.replace("lora_b", "lora_a")]
            part = name.removeprefix("blk.0.ffn_").partition("_exps")[0]
            found[part] = converted.alpha / b.shape[-1] * b @ a
    return found


def convert(folder: Path, base: Path) -> ConvertedAdapter:
    return convert_adapter(folder, base, folder / "out.gguf", outtype="f32", verify=True)


def refusal(kind: type[QafloraError], folder: Path, base: Path) -> str:
    return refused(kind, convert, folder, base)


def stacked_pair(n_in: int, n_out: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A and B of a parameter, as PEFT's ParamWrapper has them."""
    return drawn(RANK * N_EXPERT, n_in), drawn(n_out, RANK * N_EXPERT)


def stacked_delta(a: NDArray[np.float32], b: NDArray[np.float32]) -> F64:
    """PEFT's own formula: [n_expert, n_out, n_in]."""
    first = a.astype(np.float64).reshape(N_EXPERT, RANK, -1)
    second = b.astype(np.float64).reshape(len(b), RANK, N_EXPERT)
    delta: F64 = 2.0 * np.einsum("ore,eri->eoi", second, first)
    return delta


@pytest.mark.parametrize("names", [("mlp", "up_proj"), ("block_sparse_moe", "w3")])
def test_experts_of_their_own_are_stacked(tmp_path, names) -> None:
    """Of another rank and scale each; one has none, and its delta is zero."""
    block, up = names
    base = write_base(tmp_path / "base.gguf", "llama")
    experts = f"model.layers.0.{block}.experts"
    tensors = {
        f"{experts}.0.{up}": (drawn(RANK, N_EMBD), drawn(N_FF, RANK)),
        f"{experts}.2.{up}": (drawn(7, N_EMBD), drawn(N_FF, 7)),
    }
    patterns = {"rank_pattern": {f"experts.2.{up}": 7}, "alpha_pattern": {f"2.{up}": 3.5}}
    converted = convert(write_pairs_of_peft(tmp_path / "a", tensors, **patterns), base)
    (a0, b0), (a2, b2) = tensors.values()
    expected = np.zeros((N_EXPERT, N_FF, N_EMBD))
    expected[0] = 2.0 * b0.astype(np.float64) @ a0.astype(np.float64)
    expected[2] = 0.5 * b2.astype(np.float64) @ a2.astype(np.float64)
    assert (converted.rank, converted.targets) == (7, ("ffn_up_exps",))
    np.testing.assert_allclose(deltas(converted)["up"], expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss"])
@pytest.mark.parametrize("fused", [False, True])
def test_parameter_of_gate_and_up_is_taken_apart(tmp_path, arch, fused) -> None:
    base = write_base(tmp_path / "base.gguf", arch, fused=fused)
    pairs = {
        f"{EXPERTS}.base_layer": stacked_pair(N_EMBD, 2 * N_FF),
        EXPERTS: stacked_pair(N_FF, N_EMBD),
    }
    targets = [f"{EXPERTS}.down_proj", f"{EXPERTS}.gate_up_proj"]
    folder = write_pairs_of_peft(tmp_path / "a", pairs, target_parameters=targets)
    found = deltas(convert(folder, base))
    gate_up, down = (stacked_delta(*pair) for pair in pairs.values())
    gate, up = gate_up[:, :N_FF], gate_up[:, N_FF:]
    if arch == "gpt-oss":
        gate, up = gate_up[:, ::2], gate_up[:, 1::2]
    expected = {"gate": gate, "up": up, "down": down}
    if fused:
        expected = {"gate_up": np.concatenate([gate, up], axis=1), "down": down}
    assert found.keys() == expected.keys()
    for part, delta in expected.items():
        np.testing.assert_allclose(found[part], delta, rtol=2e-6, atol=1e-5)


def test_older_peft_had_a_and_b_the_other_way_round(tmp_path) -> None:
    """As PEFT 0.18 saw a parameter of [n_expert, n_out, n_in]: its A has n_out columns."""
    base = write_base(tmp_path / "base.gguf")
    a, b = stacked_pair(2 * N_FF, N_EMBD)
    folder = write_pairs_of_peft(tmp_path / "a", {EXPERTS: (a, b)}, **GATE_UP)
    found = deltas(convert(folder, base))
    expected = stacked_delta(a, b).swapaxes(1, 2)
    both = np.concatenate([found["gate"], found["up"]], axis=1)
    np.testing.assert_allclose(both, expected, rtol=2e-6, atol=1e-5)


def test_square_experts_need_a_version(tmp_path) -> None:
    """Of n_embd = 2 n_ff, as OLMoE's, A and B of gate_up_proj fit either way round."""
    base = write_base(tmp_path / "base.gguf", n_ff=N_EMBD // 2)
    a, b = stacked_pair(N_EMBD, N_EMBD)
    folder, pairs = tmp_path / "a", {EXPERTS: (a, b)}
    for version in (None, "0.19.0", "0.19.1.dev0", "0.19.1rc1"):
        write_pairs_of_peft(folder, pairs, **GATE_UP, peft_version=version)
        assert refusal(UnsupportedAdapterError, folder, base) == (
            f"Cannot convert {folder} for {base}: the experts of {EXPERTS}.gate_up_proj are "
            f"square, and peft_version is {version!r} in its config; expected 0.19.1 or later, for "
            "earlier ones may have A and B the other way round. Load it with what trained it, "
            "merge it and train again, or set peft_version if it is later."
        )
    for version in ("0.19.1", "0.21.2.dev0"):
        write_pairs_of_peft(folder, pairs, **GATE_UP, peft_version=version)
        found = deltas(convert(folder, base))
        both = np.concatenate([found["gate"], found["up"]], axis=1)
        np.testing.assert_allclose(both, stacked_delta(a, b), rtol=2e-6, atol=1e-5)


def test_mistake_is_found(tmp_path, monkeypatch) -> None:
    base = write_base(tmp_path / "base.gguf")
    pairs = {EXPERTS: stacked_pair(N_EMBD, 2 * N_FF)}
    folder = write_pairs_of_peft(tmp_path / "a", pairs, **GATE_UP)
    right = StackedExperts.values
    monkeypatch.setattr(StackedExperts, "values", lambda self, side: right(self, side)[::-1])
    with pytest.raises(ConversionError, match=r"2 of 2 modules differ .* \(blk\.0\.ffn_"):
        convert(folder, base)


SINGLE = f"{EXPERTS}.0.up_proj"
PAIR = (np.ones((RANK, N_EMBD)), np.ones((N_FF, RANK)))
WAY = (
    "has LoRA of experts in a way that is not known here; expected a module for each expert, such "
    "as mlp.experts.0.gate_proj, or target_parameters such as mlp.experts.gate_up_proj. Train "
    "without experts, or merge the adapter into its base."
)
OTHER = " The adapter is for another base."
STACKED = (np.ones((RANK * N_EXPERT, N_EMBD)), np.ones((90, RANK * N_EXPERT)))
# Options of the base, the adapter's pairs, fields of its config, and the message behind its start.
REFUSED: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ({}, {EXPERTS: PAIR}, {}, f"module {EXPERTS} {WAY}"),
    ({}, {f"{EXPERTS}.0.router": PAIR}, {}, f"module {EXPERTS}.0.router {WAY}"),
    ({}, {f"vision.{SINGLE}": PAIR}, {}, f"module vision.{SINGLE} {WAY}"),
    ({}, {f"{EXPERTS}.3.up_proj": PAIR}, {},
     f"module {EXPERTS}.3.up_proj is for a weight of shape [{N_FF}, {N_EMBD}] of expert 3, and "
     f"blk.0.ffn_up_exps.weight of the base is [{N_EXPERT}, {N_FF}, {N_EMBD}].{OTHER}"),
    ({}, {SINGLE: (np.ones((RANK, 31)), PAIR[1])}, {},
     f"module {SINGLE} is for a weight of shape [{N_FF}, 31] of expert 0, and "
     f"blk.0.ffn_up_exps.weight of the base is [{N_EXPERT}, {N_FF}, {N_EMBD}].{OTHER}"),
    ({}, {"model.layers.1.mlp.experts.0.up_proj": PAIR}, {},
     "module model.layers.1.mlp.experts.0.up_proj is in layer 1, and the base has layers 0 to 0."
     + OTHER),
    ({}, {EXPERTS: STACKED}, GATE_UP,
     f"{EXPERTS}.gate_up_proj is for experts of shape [{N_EXPERT}, 90, {N_EMBD}], and the base's "
     f"are [{N_EXPERT}, {2 * N_FF}, {N_EMBD}].{OTHER}"),
    ({}, {SINGLE: PAIR, f"{OLD_EXPERTS}.0.w3": PAIR}, {},
     f"modules {SINGLE} and {OLD_EXPERTS}.0.w3 are of the same experts; expected one LoRA for "
     "each. Save it again."),
    ({"fused": True}, {SINGLE: PAIR}, {},
     f"module {SINGLE} needs tensor blk.0.ffn_up_exps.weight, and the base holds gate and up as "
     "one, blk.0.ffn_gate_up_exps.weight. Use a base that was converted without "
     "--fuse-gate-up-exps."),
    ({"arch": "lfm2"}, {SINGLE: PAIR}, {},
     f"module {SINGLE} has LoRA of experts, and how 'lfm2' stacks them was not reviewed; expected "
     f"one of {', '.join(MIXTURES)}. Train without experts, or merge the adapter into its base."),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_experts_that_do_not_fit_are_named(tmp_path, case) -> None:
    base_options, pairs, fields, message = case
    base = write_base(tmp_path / "base.gguf", **base_options)
    folder = write_pairs_of_peft(tmp_path / "a", pairs, **fields)
    kind = AdapterMismatchError if message.endswith(OTHER) else UnsupportedAdapterError
    assert refusal(kind, folder, base) == f"Cannot convert {folder} for {base}: {message}"


def test_filling_up_has_a_limit(tmp_path, monkeypatch) -> None:
    base = write_base(tmp_path / "base.gguf")
    folder = write_pairs_of_peft(tmp_path / "a", {SINGLE: PAIR})
    n_bytes = 4 * N_EXPERT * RANK * N_FF
    monkeypatch.setattr(plan, "MAX_STACKED_BYTES", n_bytes)
    convert(folder, base)
    monkeypatch.setattr(plan, "MAX_STACKED_BYTES", n_bytes - 1)
    assert refusal(UnsupportedAdapterError, folder, base) == (
        f"Cannot convert {folder} for {base}: {N_EXPERT} experts filled up to rank {RANK}, the "
        f"largest for blk.0.ffn_up_exps.weight, take {n_bytes} bytes; expected at most "
        f"{n_bytes - 1}. Train the experts with one rank, or a smaller one."
    )


def test_square_experts_of_mlx_have_one_order(tmp_path) -> None:
    base = write_base(tmp_path / "base.gguf", n_ff=N_EMBD)
    a, b = drawn(N_EXPERT, RANK, N_EMBD), drawn(N_EXPERT, N_EMBD, RANK)
    name = "model.layers.0.mlp.switch_mlp.down_proj"
    tensors = {f"{name}.lora_a": a, f"{name}.lora_b": b}
    folder = write_mlx(tmp_path / "a", tensors, lora_parameters={"rank": RANK, "scale": 2.0})
    found = deltas(convert(folder, base))["down"]
    np.testing.assert_allclose(found, 2.0 * b.astype(np.float64) @ a, rtol=2e-6, atol=1e-5)
    other = write_base(tmp_path / "other.gguf", n_ff=N_FF)
    with pytest.raises(AdapterMismatchError, match=r"is for experts of shape \[3, 32, 32\], and"):
        convert(folder, other)


def test_parameters_and_tensors_must_belong_together(tmp_path) -> None:
    base = write_base(tmp_path / "base.gguf")
    pairs = {EXPERTS: stacked_pair(N_FF, N_EMBD)}
    both = ["experts.gate_up_proj", "experts.down_proj"]
    folder = write_pairs_of_peft(tmp_path / "a", pairs, target_parameters=both)
    assert refusal(PeftConfigError, folder, base) == (
        f"Cannot use {folder / 'adapter_config.json'}: target_parameters names 2 parameters of "
        f"module {EXPERTS} (gate_up_proj, down_proj), and 1 have tensors; expected as many. The "
        "two files do not belong together; save the adapter again."
    )
    write_pairs_of_peft(folder, pairs, target_parameters="experts.down_proj")
    with pytest.raises(PeftConfigError, match=r'target_parameters is "experts\.down_proj", exp'):
        convert(folder, base)
    write_pairs_of_peft(folder, {EXPERTS: PAIR}, target_parameters=both[1:], r=RANK + 1)
    with pytest.raises(PeftConfigError, match=r"expected \[5 times the number of experts, n_in\]"):
        convert(folder, base)


def test_other_parameters_of_experts_are_refused_by_name(tmp_path) -> None:
    base = write_base(tmp_path / "base.gguf", "gpt-oss")
    targets = ["experts.gate_up_proj_bias"]
    folder = write_pairs_of_peft(tmp_path / "a", {EXPERTS: PAIR}, target_parameters=targets)
    assert refusal(UnsupportedAdapterError, folder, base) == (
        f"Cannot use {folder / 'adapter_config.json'}: target_parameters names gate_up_proj_bias "
        f"of module {EXPERTS}; expected gate_up_proj or down_proj of experts, for others cannot be "
        "represented. Train without it, or merge the adapter into its base."
    )
