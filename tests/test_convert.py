"""Conversion of PEFT adapters: types, metadata, names, refusals.

That deltas are PEFT's own, in test_architectures.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from convert_table import stored
from refusals import refused

from qaflora_edge import errors
from qaflora_edge.convert.adapter import convert_adapter
from qaflora_edge.convert.layouts import ARCHITECTURES
from qaflora_edge.convert.plan import tensor_name

MakeBase = Callable[..., tiny.TinyBase]


@pytest.fixture
def make_base(tmp_path) -> MakeBase:
    def make(arch: str = "llama", **options: Any) -> tiny.TinyBase:
        return tiny.write_tiny_base(tmp_path / f"{arch}.gguf", arch, **options)

    return make


def test_alpha_is_that_of_most_modules(tmp_path, make_base) -> None:
    base = make_base()
    pattern = {"q_proj": 5, "k_proj": 7}
    folder = tiny.write_tiny_peft(tmp_path / "a", base, alpha=8, alpha_pattern=pattern)
    converted = convert_adapter(folder, base.path, tmp_path / "out.gguf")
    assert (converted.alpha, converted.n_module) == (8.0, 21)


TYPES = gguf.GGMLQuantizationType


@pytest.mark.parametrize(
    ("outtype", "rank", "type_a", "type_b"),
    [
        ("f16", 4, TYPES.F16, TYPES.F16),
        ("bf16", 4, TYPES.BF16, TYPES.BF16),
        ("q8_0", 4, TYPES.Q8_0, TYPES.F16),  # rows of B are one rank wide, not whole blocks
        ("q8_0", 32, TYPES.Q8_0, TYPES.Q8_0),
    ],
)
def test_types_are_those_of_upstream_and_round_by_their_precision(
    tmp_path, make_base, outtype, rank, type_a, type_b
) -> None:
    base = make_base("qwen2")
    folder = tiny.write_tiny_peft(tmp_path / "a", base, rank=rank)
    convert_adapter(folder, base.path, tmp_path / "f32.gguf", outtype="f32")
    convert_adapter(folder, base.path, tmp_path / "out.gguf", outtype=outtype)
    exact = stored(tmp_path / "f32.gguf")
    # Half a step: 2^-11 of a value in f16, 2^-8 in bf16, 1/254 of a block's largest in q8_0.
    step = {TYPES.F32: 0.0, TYPES.F16: 2**-11, TYPES.BF16: 2**-8, TYPES.Q8_0: 1 / 250}
    for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        kind = type_a if tensor.name.endswith("lora_a") else type_b
        assert tensor.tensor_type == kind
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        error = np.abs(values - exact[tensor.name]).max()
        assert error <= step[kind] * np.abs(exact[tensor.name]).max()


def test_metadata_are_those_that_llama_cpp_reads(tmp_path, make_base) -> None:
    base = make_base("gemma3")
    folder = tiny.write_tiny_peft(tmp_path / "spanish", base, alpha=16)
    convert_adapter(folder, base.path, tmp_path / "out.gguf")
    fields = {
        key: value.contents()
        for key, value in gguf.GGUFReader(tmp_path / "out.gguf").fields.items()
        if not key.startswith("GGUF.")
    }
    assert fields == {
        "general.architecture": "gemma3",
        "general.type": "adapter",
        "general.name": "spanish",
        "general.quantization_version": 2,
        "adapter.type": "lora",
        "adapter.lora.alpha": 16.0,
    }


@pytest.mark.parametrize(
    ("trained_on", "is_named"), [("owner/model-7B", True), ("/home/me/model", False)]
)
def test_the_base_it_was_trained_on_is_named(tmp_path, make_base, trained_on, is_named) -> None:
    base = make_base()
    config = {"base_model_name_or_path": trained_on}
    folder = tiny.write_tiny_peft(tmp_path / "a", base, config=config)
    converted = convert_adapter(folder, base.path, tmp_path / "out.gguf")
    assert converted.trained_on == (trained_on if is_named else None)


@pytest.mark.parametrize("prefix", ["model.language_model.layers", "language_model.model.layers"])
def test_names_inside_a_multimodal_gemma_are_understood(tmp_path, make_base, prefix) -> None:
    base = make_base("gemma3")
    plain = tiny.write_tiny_peft(tmp_path / "x" / "a", base)
    nested = tiny.write_tiny_peft(tmp_path / "y" / "a", base, prefix=prefix)
    convert_adapter(plain, base.path, tmp_path / "plain.gguf")
    convert_adapter(nested, base.path, tmp_path / "nested.gguf")
    assert (tmp_path / "plain.gguf").read_bytes() == (tmp_path / "nested.gguf").read_bytes()


def refusal(kind: type[Exception], folder: Path, base: Path, **options: Any) -> str:
    """Convert over an older file, expect an error, and check that nothing changed."""
    out = folder.parent / "out.gguf"
    out.write_bytes(b"older")
    before = sorted(folder.parent.iterdir())
    told = refused(kind, convert_adapter, folder, base, out, **options)
    assert out.read_bytes() == b"older"
    assert sorted(folder.parent.iterdir()) == before
    return told


Q0 = "model.layers.0.self_attn.q_proj"
K0 = "model.layers.0.self_attn.k_proj"
PER_LAYER = "model.language_model.per_layer_model_projection"
NESTED = "model.language_model.layers.0.self_attn.q_proj"
VISION = "model.vision_tower.layers.0.self_attn.q_proj"
OTHER = " The adapter is for another base (adapter_config.json says 'tiny')."
ONLY = (
    "expected projections of the language model's layers, embed_tokens or lm_head. Train without "
    "this module, or merge the adapter into its base."
)
# The base's architecture, tensors and layers; module -> n_out, n_in; what is said of them.
REFUSED: list[tuple[str, dict[str, tuple[int, ...]], dict[str, tuple[int, int]], str]] = [
    ("rwkv7", {}, {Q0: (64, 64)},
     "its architecture 'rwkv7' is refused, for llama.cpp multiplies with its linear attention's "
     f"matrices without adapters; expected one of {', '.join(ARCHITECTURES)}. Use another base, or "
     "try an adapter GGUF made by llama.cpp's convert_lora_to_gguf.py."),
    ("llama", {"blk.0.attn_q.weight": (64, 64)}, {"model.layers.3.self_attn.q_proj": (64, 64)},
     "module model.layers.3.self_attn.q_proj is in layer 3, and the base has layers 0 to 0."
     + OTHER),
    ("llama", {"blk.0.attn_q.weight": (64, 64)}, {Q0: (96, 96)},
     f"module {Q0} is for a weight of shape [96, 96], and blk.0.attn_q.weight of the base is "
     f"[64, 64].{OTHER}"),
    ("llama", {"token_embd.weight": (271, 64)}, {Q0: (64, 64)},
     f"module {Q0} needs tensor blk.0.attn_q.weight, which the base lacks.{OTHER}"),
    ("gemma3", {"blk.0.attn_q.weight": (64, 64)}, {VISION: (64, 64)},
     f"module {VISION} has no counterpart in a gemma3 GGUF; expected projections of the language "
     "model's layers, embed_tokens or lm_head. The adapter may be for another base "
     "(adapter_config.json says 'tiny'), or was trained on parts that a GGUF lacks."),
    ("gemma3", {"blk.0.attn_q.weight": (64, 64)}, {Q0: (64, 64), NESTED: (64, 64)},
     f"modules {Q0} and {NESTED} both name blk.0.attn_q.weight of the base; expected one LoRA for "
     "each. Save it again."),
    ("llama", {"token_embd.weight": (271, 64)}, {"model.embed_tokens": (271, 64)},
     "module model.embed_tokens has LoRA of a linear layer, and token_embd.weight of the base is "
     "not one. Train a plain LoRA."),
    ("llama", {"blk.0.attn_q.weight": (60, 64)}, {Q0: (60, 64)},
     f"module {Q0} has 60 rows, which 8 heads cannot share in pairs.{OTHER}"),
    ("qwen2", {"blk.0.attn_qkv.weight": (96, 64)}, {K0: (96, 64)},
     f"module {K0} needs tensor blk.0.attn_k.weight, and the base holds q, k and v as one, "
     "blk.0.attn_qkv.weight. Use a base that was converted without --fuse-qkv."),
    ("gemma4", {"per_layer_model_proj.weight": (32, 64)}, {PER_LAYER: (32, 64)},
     f"module {PER_LAYER} goes to per_layer_model_proj.weight, which belongs to no layer, so that "
     f"no layer's weight applies; {ONLY}"),
    ("lfm2", {"blk.0.shortconv.conv.weight": (64, 64)}, {"model.layers.0.conv.conv": (64, 64)},
     "module model.layers.0.conv.conv goes to blk.0.shortconv.conv.weight, which llama.cpp "
     f"computes without adapters for lfm2; {ONLY}"),
    ("bailingmoe", {"output.weight": (96, 64)}, {"lm_head": (96, 64)},
     "module lm_head goes to output.weight, which its converter may have scaled, which the GGUF "
     f"does not say; {ONLY}"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_the_base_is_named(tmp_path, case) -> None:
    arch, tensors, modules, message = case
    base = tiny.write_shapes(tmp_path / "base.gguf", arch, tensors, n_head=8)
    pairs = {name: (np.ones((4, n_in)), np.ones((n, 4))) for name, (n, n_in) in modules.items()}
    folder = tiny.write_pairs_of_peft(tmp_path / "a", pairs, base_model_name_or_path="tiny")
    kind = (
        errors.AdapterMismatchError if message.endswith(OTHER) else errors.UnsupportedAdapterError
    )
    assert refusal(kind, folder, base) == f"Cannot convert {folder} for {base}: {message}"


def test_value_too_large_for_the_type_is_refused(tmp_path, make_base) -> None:
    base = make_base("qwen2")
    pairs = {Q0: (np.ones((4, 64)), np.full((64, 4), 7e4))}
    folder = tiny.write_pairs_of_peft(tmp_path / "a", pairs)
    assert refusal(errors.UnsupportedAdapterError, folder, base.path) == (
        f"Cannot convert module {Q0} of {folder / 'adapter_model.safetensors'}: the largest value "
        "of lora_B is 70000, more than F16 holds. Choose output type f32, or check the adapter's "
        "alpha."
    )
    convert_adapter(folder, base.path, tmp_path / "out.gguf", outtype="bf16")


def test_unknown_output_type_is_refused(tmp_path, make_base) -> None:
    base = make_base()
    folder = tiny.write_tiny_peft(tmp_path / "a", base)
    assert refusal(errors.OptionError, folder, base.path, outtype="q4_0") == (
        f"Cannot convert {folder}: the output type is 'q4_0'; expected f32, f16, bf16, q8_0."
    )


def test_source_is_never_overwritten(tmp_path, make_base) -> None:
    base = make_base()
    folder = tiny.write_tiny_peft(tmp_path / "a", base)
    for path, what in (
        (folder / "adapter_model.safetensors", "a file of the adapter"),
        (base.path, "the base itself"),
    ):
        before = path.read_bytes()
        told = refused(errors.OutputFileError, convert_adapter, folder, base.path, path)
        assert told == f"Cannot write {path}: it is {what}. Choose another name."
        assert path.read_bytes() == before


def test_biases_that_were_trained_but_not_saved_are_refused(tmp_path, make_base) -> None:
    base = make_base("qwen2")
    folder = tiny.write_tiny_peft(tmp_path / "a", base, config={"bias": "all"})
    assert refusal(errors.UnsupportedAdapterError, folder, base.path) == (
        f"Cannot convert {folder} for {base.path}: bias is 'all' in its config, so biases such as "
        'blk.0.attn_q.bias of the base were trained, and no file holds them; expected "none". '
        'Train with bias="none".'
    )
    convert_adapter(folder, make_base("llama").path, tmp_path / "out.gguf")  # it has no biases


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_those_of_the_map_of_all_blocks(architecture) -> None:
    (arch,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    one, most = gguf.get_tensor_name_map(arch, 1), gguf.get_tensor_name_map(arch, 13)
    whole = gguf.get_tensor_name_map(arch, 12)
    assert len(most.mapping) > 500
    for hf_name in most.mapping:
        assert tensor_name(one, 12, hf_name, {}) == whole.get_name(hf_name)


@pytest.mark.parametrize("block", ["00", "-1", "0x1", "", "x", "12", "1.0"])
def test_a_block_that_is_none_has_no_name(block) -> None:
    one = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    assert tensor_name(one, 12, f"model.layers.{block}.mlp.up_proj", {}) is None
    assert tensor_name(one, 12, "model.layers.11.mlp.up_proj", {}) == "blk.11.ffn_up"
