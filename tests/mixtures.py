"""Adapters of a mixture's experts, for the tiny models of the zoo."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from specimen import F32


def expert_parameters(model: Any) -> list[str]:
    """Name the parameters that stack experts, one expert after the other."""
    names = ("experts.gate_up_proj", "experts.down_proj")
    return [name for name, _ in model.named_parameters() if name.endswith(names)]


# Modules of experts that transformers 4 had; of the other models it stacked them as well.
_MIXTRAL = ("block_sparse_moe", "w1", "w3", "w2")
_SINGLE_EXPERTS = {
    **dict.fromkeys(("mixtral", "minimax_m2"), _MIXTRAL),
    "lfm2_moe": ("feed_forward", "w1", "w3", "w2"),
    **dict.fromkeys(("granitemoe", "gpt_oss"), ()),
}
_OTHERS = ("mlp", "gate_proj", "up_proj", "down_proj")


def write_single_experts(model: Any, folder: Path, last_logits: Callable[[Any], F32]) -> F32 | None:
    """Write an adapter as PEFT did under transformers 4, with a module for each expert.

    last_logits  gives a model's logits

    returns  [n_vocab]  logits of the model with the adapter merged in float64, or None if it has
             no such modules
    """
    parameters = expert_parameters(model)
    places = _SINGLE_EXPERTS.get(model.config.model_type, _OTHERS)
    if not parameters or not places:
        return None
    block, gate, up, down = places
    rng = np.random.default_rng(3)
    tensors: dict[str, F32] = {}

    def draw(layer: str, expert: int, projection: str, n_out: int, n_in: int) -> torch.Tensor:
        a, b = tiny.random_pair(rng, (n_out, n_in), 4, 0.3)
        name = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{projection}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
        return torch.from_numpy(2.0 * b.astype(np.float64) @ a.astype(np.float64))

    kept = {name: model.get_parameter(name).detach().clone() for name in parameters}
    with torch.no_grad():
        for name in parameters:
            layer = name.partition("layers.")[2].partition(".")[0]
            for expert, weight in enumerate(model.get_parameter(name)):
                n_out, n_in = weight.shape
                if name.endswith("down_proj"):
                    delta = draw(layer, expert, down, n_out, n_in)
                else:
                    halves = [draw(layer, expert, part, n_out // 2, n_in) for part in (gate, up)]
                    delta = torch.cat(halves)
                weight.copy_(weight.double() + delta)
        logits = last_logits(model)
        for name, values in kept.items():
            model.get_parameter(name).copy_(values)
    folder.mkdir(parents=True)
    tiny.write_safetensors(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [gate, up, down]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return logits
