"""Adapters of MLX, against the formula of its own LoRALinear.fuse."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from numpy.typing import NDArray
from test_peft import check_field, refusal

from qaflora_edge.convert.adapter import convert_adapter
from qaflora_edge.errors import (
    InputFileError,
    PeftConfigError,
    SafetensorsFileError,
    UnsupportedAdapterError,
)
from qaflora_edge.peft.folder import read_peft

Q0 = "model.layers.0.self_attn.q_proj"
PAIR = {f"{Q0}.lora_a": np.ones((64, 4), np.float32), f"{Q0}.lora_b": np.ones((4, 64), np.float32)}


def write_mlx(folder: Path, tensors: Mapping[str, Any] | None = None, **config: Any) -> Path:
    """Write a folder as mlx_lm.lora does; a field of None is left out."""
    folder.mkdir(exist_ok=True)
    fields = {
        "adapter_path": "adapters",
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 20.0},
        "model": "mlx-community/Tiny-4bit",
        "num_layers": 16,
        **config,
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=4))
    tiny.write_safetensors(folder / "adapters.safetensors", PAIR if tensors is None else tensors)
    return folder


def random_pairs(base: tiny.TinyBase, layers: list[int]) -> dict[str, NDArray[np.float32]]:
    """Draw lora_a [n_in, rank] and lora_b [rank, n_out] for every projection of some layers."""
    rng = np.random.default_rng(3)
    tensors = {}
    for layer in layers:
        for module, stem in tiny.PROJECTIONS.items():
            n_out, n_in = base.shape(stem)
            name = f"model.layers.{layer}.{module}"
            tensors[f"{name}.lora_a"] = rng.standard_normal((n_in, 4)).astype(np.float32)
            tensors[f"{name}.lora_b"] = rng.standard_normal((4, n_out)).astype(np.float32)
    return tensors


def test_delta_equals_what_mlx_fuses(tmp_path) -> None:
    base = tiny.write_tiny_base(tmp_path / "base.gguf", "qwen2")
    tensors = random_pairs(base, [1, 2])
    folder = write_mlx(tmp_path / "a", tensors)
    convert_adapter(folder, base.path, tmp_path / "out.gguf", outtype="f32")
    found = tiny.stored_deltas(tmp_path / "out.gguf")
    modules = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    assert len(found) == len(modules)
    for module in modules:
        a, b = (tensors[f"{module}.lora_{side}"].astype(np.float64) for side in "ab")
        expected = (20.0 * b.T) @ a.T  # mlx-lm d78bf58e, tuner/lora.py LoRALinear.fuse
        _, _, layer, projection = module.split(".", 3)
        delta = found[f"blk.{layer}.{tiny.PROJECTIONS[projection]}.weight"]
        np.testing.assert_allclose(delta, expected, rtol=1e-12, atol=1e-9)


FIELDS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"fine_tune_type": "loha"}, "fine_tune_type", '"loha"', "'lora'"),
    ({"lora_parameters": None}, "lora_parameters", "missing", "an object with rank and scale"),
    ({"lora_parameters": {"scale": 2.0}}, "lora_parameters.rank", "missing",
     "a whole number from 1 to 16384"),
    ({"lora_parameters": {"rank": 4, "scale": 1.0, "keys": 3}}, "lora_parameters.keys", "3",
     "a text or a list of names"),
    ({"model": 3}, "model", "3", "a name"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "field", "found", "expected"), FIELDS)
def test_wrong_field_is_named(tmp_path, config, field, found, expected) -> None:
    check_field(write_mlx(tmp_path / "a", **config), f"field {field}", found, expected)


def test_scale_that_depends_on_the_version_is_refused(tmp_path) -> None:
    parameters = {"rank": 4, "alpha": 16.0, "scale": 10.0}
    folder = write_mlx(tmp_path / "a", lora_parameters=parameters, fine_tune_type=None)
    assert refusal(PeftConfigError, folder) == (
        f"Cannot use {folder / 'adapter_config.json'}: lora_parameters.alpha is 16.0 with a scale; "
        "MLX used it until June 2024 and ignores it since, and without fine_tune_type the scale "
        "cannot be known; expected none, or 4 as the rank. Remove alpha if a later version trained "
        "the adapter; else multiply scale by alpha / rank and remove it."
    )
    # What mlx_lm.lora wrote and ignored from September 2024 to April 2025.
    (module,) = read_peft(write_mlx(folder, lora_parameters=parameters)).modules.values()
    assert module.scale == 10.0


EXPERTS = "model.layers.0.mlp.switch_mlp"


def test_experts_are_those_that_mlx_fuses(tmp_path) -> None:
    base = tiny.write_tiny_base(tmp_path / "base.gguf", n_layer=1, n_expert=3)
    rng = np.random.default_rng(4)
    tensors = {}
    for part in ("gate", "up", "down"):
        n_out, n_in = base.shape(f"ffn_{part}")
        tensors[f"{EXPERTS}.{part}_proj.lora_a"] = rng.standard_normal((3, 4, n_in))
        tensors[f"{EXPERTS}.{part}_proj.lora_b"] = rng.standard_normal((3, n_out, 4))
    tensors = {name: values.astype(np.float32) for name, values in tensors.items()}
    folder = write_mlx(tmp_path / "a", tensors)
    out = tmp_path / "out.gguf"
    convert_adapter(folder, base.path, out, outtype="f32", verify=True)
    found = tiny.stored_deltas(out)
    assert len(found) == 3
    for part in ("gate", "up", "down"):
        a, b = (tensors[f"{EXPERTS}.{part}_proj.lora_{side}"].astype(np.float64) for side in "ab")
        expected = 20.0 * b @ a  # mlx-lm ef3c28db, tuner/lora.py LoRASwitchLinear.fuse
        delta = found[f"blk.0.ffn_{part}_exps.weight"]
        np.testing.assert_allclose(delta, expected, rtol=1e-12, atol=1e-9)
    convert_adapter(folder, base.path, out, outtype="q8_0", verify=True)  # of other blocks


APART = "The two files do not belong together; save the adapter again"
FUSE = (
    "and a plain LoRA cannot represent it. Fuse it into its base with mlx_lm.fuse, or train a "
    "plain LoRA."
)
UP = f"{EXPERTS}.up_proj.lora_"


def pair(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, NDArray[np.float32]]:
    return {f"{name}a": np.ones(a, np.float32), f"{name}b": np.ones(b, np.float32)}


def unfit(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[Any, ...]:
    return (PeftConfigError, {}, pair(UP, a, b), "adapter_config.json",
            f"experts {EXPERTS}.up_proj have rank 4 by lora_parameters, but lora_a is {list(a)} "
            f"and lora_b {list(b)}; expected [n_expert, 4, n_in] and [n_expert, n_out, 4]. "
            f"{APART}.")  # fmt: skip


# The error, fields of the config, the tensors, the file that is named, and what is said of it.
REFUSALS = [
    (UnsupportedAdapterError, {"fine_tune_type": "dora"}, PAIR, "adapter_config.json",
     f"fine_tune_type is 'dora'; DoRA also rescales the base's weights, {FUSE}"),
    (UnsupportedAdapterError, {"fine_tune_type": None, "use_dora": True}, PAIR,
     "adapter_config.json",
     f"fine_tune_type is 'dora'; DoRA also rescales the base's weights, {FUSE}"),
    (UnsupportedAdapterError, {"fine_tune_type": "full"}, PAIR, "adapter_config.json",
     f"fine_tune_type is 'full'; whole matrices were trained, which are not low-rank, {FUSE}"),
    (UnsupportedAdapterError, {}, {**PAIR, f"{Q0}.m": np.ones(64, np.float32)},
     "adapters.safetensors",
     f"tensor {Q0}.m is a DoRA magnitude vector; expected only lora_a and lora_b, for a plain LoRA "
     "cannot represent more. Train a plain LoRA."),
    (UnsupportedAdapterError, {}, {**PAIR, f"{Q0}.scales": np.ones(64, np.float32)},
     "adapters.safetensors",
     f"tensor {Q0}.scales is not known here; expected only lora_a and lora_b, for a plain LoRA "
     "cannot represent more. Train a plain LoRA."),
    (UnsupportedAdapterError, {}, pair("model.embed_tokens.lora_", (99, 4), (4, 64)),
     "adapters.safetensors",
     "module model.embed_tokens is an embedding with a LoRA, which MLX applies to a tied head as "
     "well; expected LoRA on linear layers. Train without it."),
    (PeftConfigError,
     {"lora_parameters": {"rank": 4, "scale": 1.0, "keys": ["self_attn.v_proj"]}}, PAIR,
     "adapter_config.json",
     f"module {Q0} has tensors, but lora_parameters.keys does not name it; expected every module "
     f"that has tensors. {APART}."),
    (SafetensorsFileError, {}, {f"{Q0}.lora_b": PAIR[f"{Q0}.lora_b"]}, "adapters.safetensors",
     f"module {Q0} has lora_b but no lora_a; expected both. The file is incomplete; save the "
     "adapter again."),
    (PeftConfigError, {"lora_parameters": {"rank": 8, "scale": 1.0}}, PAIR, "adapter_config.json",
     f"module {Q0} has rank 8 by lora_parameters, but lora_a is [64, 4] and lora_b [4, 64]; "
     f"expected [n_in, 8] and [8, n_out]. {APART}."),
    unfit((3, 4, 64), (2, 96, 4)),
    unfit((3, 5, 64), (3, 96, 5)),
    unfit((64, 4), (4, 96)),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused(tmp_path, case) -> None:
    kind, config, tensors, file, message = case
    folder = write_mlx(tmp_path / "a", tensors, **config)
    assert refusal(kind, folder) == f"Cannot use {folder / file}: {message}"


def test_missing_weights_are_named(tmp_path) -> None:
    folder = write_mlx(tmp_path / "a", {})
    assert refusal(SafetensorsFileError, folder) == (
        f"Cannot use the adapter {folder}: its weights hold no lora_a or lora_b; expected a "
        "trained LoRA. Save the adapter again."
    )
    (folder / "adapters.safetensors").unlink()
    assert refusal(InputFileError, folder) == (
        f"Cannot read the adapter {folder}: adapters.safetensors is missing, which belongs to an "
        "adapter_config.json of MLX. Give the folder that mlx_lm.lora wrote."
    )
