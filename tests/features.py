"""What PEFT can save beside a plain LoRA, each tried: rows of a table in the docs."""

import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny
from families import FAMILIES

from qaflora_edge.convert.adapter import convert_adapter
from qaflora_edge.errors import UnsupportedAdapterError

MERGE = "merge it into the base, or train a plain LoRA"


@dataclass(frozen=True)
class Feature:
    """A way to configure PEFT, and what to do where it is refused."""

    config: dict[str, Any] = field(default_factory=dict)
    kind: str = "LoraConfig"
    advice: str = ""
    family: str = "Llama"


FEATURES = {
    "plain LoRA": Feature(),
    "`use_rslora`": Feature({"use_rslora": True}),
    "`rank_pattern`": Feature({"rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2}}),
    "`alpha_pattern`": Feature({"alpha_pattern": {"v_proj": 3, "down_proj": 2.5}}),
    "`target_modules` as a pattern": Feature({"target_modules": r".*\.(v_proj|down_proj)"}),
    "`target_modules` as `all-linear`": Feature({"target_modules": "all-linear"}),
    "`layers_to_transform`": Feature({"layers_to_transform": [1]}),
    "`exclude_modules`": Feature({"exclude_modules": ["q_proj"]}),
    "DoRA (`use_dora`)": Feature({"use_dora": True}, advice=MERGE),
    "`bias`, of layers without any": Feature({"bias": "lora_only"}),
    "`bias`, of layers with one": Feature({"bias": "lora_only"}, advice=MERGE, family="Qwen2"),
    "`lora_bias`": Feature({"lora_bias": True}, advice=MERGE),
    "`modules_to_save`": Feature({"modules_to_save": ["lm_head"]}, advice=MERGE),
    "`layer_replication`": Feature({"layer_replication": [[0, 2], [1, 2]]}, advice=MERGE),
    "`trainable_token_indices`": Feature({"trainable_token_indices": [3, 4]}, advice=MERGE),
    "activated LoRA (`alora_invocation_tokens`)": Feature(
        {"alora_invocation_tokens": [3, 4]}, advice="train a plain LoRA"
    ),
    "`init_lora_weights: pissa`": Feature(
        {"init_lora_weights": "pissa"},
        advice="save it with `path_initial_model_for_weight_conversion`",
    ),
    "experts (`target_parameters`)": Feature(
        {"target_modules": ["v_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        family="Mixtral",
    ),
    "LoHa": Feature(kind="LoHaConfig", advice=MERGE),
    "LoKr": Feature(kind="LoKrConfig", advice=MERGE),
    "IA3": Feature({"feedforward_modules": ["down_proj"]}, kind="IA3Config", advice=MERGE),
    "VeRA": Feature({"target_modules": ["q_proj", "o_proj"]}, kind="VeraConfig", advice=MERGE),
    "AdaLoRA": Feature({"total_step": 10}, kind="AdaLoraConfig", advice=MERGE),
    "OFT": Feature({"oft_block_size": 8}, kind="OFTConfig", advice=MERGE),
    "prefix tuning": Feature(
        {"num_virtual_tokens": 4}, kind="PrefixTuningConfig", advice="train a plain LoRA"
    ),
    "prompt tuning": Feature(
        {"num_virtual_tokens": 4}, kind="PromptTuningConfig", advice="train a plain LoRA"
    ),
}


def outcome(feature: Feature, parent: Path) -> str:
    """Say "exact" or "refused" of a feature; what is converted and wrong raises AssertionError."""
    import peft
    import zoo

    folder = Path(tempfile.mkdtemp(dir=parent))
    family = FAMILIES[feature.family]
    n_expert = family.options.get("num_local_experts", 0)
    base = tiny.write_tiny_base(
        folder / "base.gguf", family.arch, n_layer=2, tied=False, n_expert=n_expert
    )
    options = dict(feature.config)
    if "Tuning" not in feature.kind:
        options.setdefault("target_modules", list(tiny.HF_TARGETS))
    if feature.kind == "LoraConfig":
        options |= {"r": 4, "lora_alpha": 8}
    with warnings.catch_warnings():  # of peft about its own options
        warnings.simplefilter("ignore")
        config = getattr(peft, feature.kind)(task_type="CAUSAL_LM", **options)
        wrapped = peft.get_peft_model(zoo.make_model(family), config)
        if feature.kind == "LoraConfig":
            zoo.randomise(wrapped)
        wrapped.save_pretrained(folder / "peft")
    try:
        convert_adapter(folder / "peft", base.path, folder / "out.gguf", outtype="f32")
    except UnsupportedAdapterError:
        return "refused"
    deltas = _deltas(folder / "out.gguf")
    n_compared = 0
    for name, module in wrapped.named_modules():
        _, _, place = name.rpartition("layers.")
        layer, _, projection = place.partition(".")
        if projection == "mlp.experts":  # its gate_up_proj, which is adapted alone
            expected = module.get_delta_weight("default").detach().double().numpy()
            parts = [deltas[f"blk.{layer}.ffn_{part}_exps.weight"] for part in ("gate", "up")]
            np.testing.assert_allclose(
                np.concatenate(parts, axis=1), expected, rtol=2e-6, atol=1e-7
            )
            n_compared += 1
        stem = tiny.PROJECTIONS.get(projection)
        if not hasattr(module, "lora_A") or stem in (None, "attn_q", "attn_k"):
            continue  # rows of q and k are reordered, which test_convert compares
        expected = module.get_delta_weight("default").detach().double().numpy()
        found = deltas[f"blk.{layer}.{stem}.weight"]
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)
        n_compared += 1
    assert n_compared > 0
    return "exact"


def _deltas(path: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Give what llama.cpp adds to each tensor: float64 [n_out, n_in], of each expert."""
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        for tensor in reader.tensors
    }
    bases = {name.rpartition(".")[0] for name in tensors}
    return {
        base: alpha
        / tensors[f"{base}.lora_b"].shape[-1]
        * (tensors[f"{base}.lora_b"] @ tensors[f"{base}.lora_a"])
        for base in bases
    }
