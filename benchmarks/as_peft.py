"""Write an adapter GGUF as the PEFT folder that other engines read.

    python benchmarks/as_peft.py ADAPTER.gguf FOLDER

It takes adapters of bases with Llama's names of modules, Qwen2's among them, whose rows are in
their order in the GGUF too (Llama's q and k are not).
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SIDES = {"lora_a": "lora_A", "lora_b": "lora_B"}


def write_peft(adapter: Path, folder: Path) -> Path:
    """Write adapter_config.json and adapter_model.safetensors; give the second's path."""
    reader = gguf.GGUFReader(adapter)
    tensors = {}
    ranks = set()
    targets = set()
    for tensor in reader.tensors:
        _, layer, stem, _, part = tensor.name.split(".")
        module = MODULES[stem]
        matrix = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if part == "lora_a":
            ranks.add(len(matrix))
        targets.add(module.split(".")[1])
        name = f"base_model.model.model.layers.{layer}.{module}.{SIDES[part]}.weight"
        tensors[name] = np.ascontiguousarray(matrix, np.float32)
    (rank,) = ranks
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": reader.fields["adapter.lora.alpha"].contents(),
        "target_modules": sorted(targets),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path)
    return path


if __name__ == "__main__":
    write_peft(*map(Path, sys.argv[1:]))
