"""Write a mix as one plain adapter: ranks side by side, weights and scales in B."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.convert.adapter import OUTTYPES, add_metadata, write_tensors
from qaflora_edge.convert.layouts import ARCHITECTURES, Module
from qaflora_edge.convert.targets import MixedModule
from qaflora_edge.errors import UnsupportedAdapterError, WeightsError
from qaflora_edge.formats.adapter import EMBEDDING, HEAD, AdapterInfo, module_kind, read_pair
from qaflora_edge.formats.base import ARCH_FACTS
from qaflora_edge.formats.gguf import GgufHeader
from qaflora_edge.formats.names import CONFIG_FILE
from qaflora_edge.peft.folder import WEIGHTS_FILE
from qaflora_edge.progress import silent

# Kind of a tensor -> its module as Llama and most families call it; {} is the layer.
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
_LAYERS = {EMBEDDING: 0, HEAD: -1}  # which layer's weights count for tensors of none


def mix_modules(adapters: Mapping[str, AdapterInfo], weights: F32) -> list[MixedModule]:
    """Put adapters side by side in each tensor of the base; every scale is 1 then.

    weights  [n_adapter, n_layer]; an adapter that weighs 0 in a layer adds no rank there

    Raises WeightsError when nothing is added.
    """
    first_paths: dict[str, Path] = {}  # base's tensor -> the first adapter of it
    sides_a = defaultdict(list)
    sides_b = defaultdict(list)
    for info, row in zip(adapters.values(), weights, strict=True):
        for name in info.ranks:
            layer = _LAYERS[name] if name in _LAYERS else int(name.split(".")[1])
            weight = row[layer]
            if weight == 0:
                continue
            a, b, scale = read_pair(info, name)
            first_paths.setdefault(name, info.path)
            sides_a[name].append(a)
            sides_b[name].append(b * np.float32(weight * scale))
    if not first_paths:
        raise WeightsError(
            "Cannot export the mix: no adapter weighs anything where it adapts the base, which "
            "answers alone; expected one that does. Choose other weights, or another prompt."
        )
    modules = []
    for name, path in first_paths.items():
        rank_axis = -1 if name == EMBEDDING else -2
        mixed_a = np.concatenate(sides_a[name], axis=rank_axis)
        mixed_b = np.concatenate(sides_b[name], axis=-1)
        modules.append(MixedModule(name, name, path, mixed_a, mixed_b))
    return modules


def write_mix(
    path: Path, header: GgufHeader, modules: Sequence[MixedModule], name: str, outtype: str
) -> None:
    """Write a mix as an adapter GGUF that calls itself `name`.

    Raises UnsupportedAdapterError for what llama.cpp does not take.
    """
    for module in modules:
        # llama.cpp 0c1e5709 does not load a tied head's adapter, and aborts at an embedding's.
        if module.name in (EMBEDDING, HEAD) and HEAD not in header.tensors:
            raise _unsupported(
                module,
                "llama.cpp takes no adapter of an embedding that is the head too; expected "
                "projections of layers. Write a PEFT folder, with --peft",
            )
    alpha = max(module.b.shape[-1] for module in modules)  # a tensor's scale is alpha / rank
    scaled = []
    for module in modules:
        factor = np.float32(module.b.shape[-1] / alpha)
        scaled.append(replace(module, b=module.b * factor))
    with closing(gguf.GGUFWriter(path, header.architecture)) as writer:
        add_metadata(writer, name)
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        write_tensors(writer, scaled, OUTTYPES[outtype], silent)


def write_peft_mix(folder: Path, header: GgufHeader, modules: Sequence[MixedModule]) -> None:
    """Write a mix as PEFT does, in float32.

    Raises UnsupportedAdapterError for a tensor whose name in PEFT is not known.
    """
    from safetensors.numpy import save

    facts = ARCH_FACTS.get(header.architecture)
    tensors = {}
    ranks = {}
    for module in modules:
        pattern = _NAMES.get(module_kind(module.name))
        if pattern is None or facts is None or not facts.has_llama_names:
            raise _unsupported(
                module,
                f"its name in PEFT is not known for {header.architecture}; expected projections "
                "that transformers names as Llama's. Write a GGUF, without --peft",
            )
        name = pattern.format(module.name.split(".")[1])
        prefix = f"base_model.model.{name}"
        a = module.a
        b = module.b
        if module.name == EMBEDDING:
            a = a.T
            name_a = f"{prefix}.lora_embedding_A"
            name_b = f"{prefix}.lora_embedding_B"
        else:
            name_a = f"{prefix}.lora_A.weight"
            name_b = f"{prefix}.lora_B.weight"
        base_name = module.name.removesuffix(".weight")
        layout = ARCHITECTURES[header.architecture]
        (part,) = layout(Module(base_name, header, n_out=len(b), n_in=a.shape[1]))
        if part.rows is not None:
            in_order_of_peft = np.argsort(part.rows)
            b = b[in_order_of_peft]
        tensors[name_a] = np.ascontiguousarray(a)
        tensors[name_b] = np.ascontiguousarray(b)
        ranks[name] = b.shape[1]
    rank = max(ranks.values())
    smaller_ranks = {name: smaller for name, smaller in ranks.items() if smaller != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "target_modules": list(ranks),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": smaller_ranks,
        "alpha_pattern": smaller_ranks,
    }
    # save_file has an error of its own for a full disk.
    (folder / WEIGHTS_FILE).write_bytes(save(tensors, {"format": "pt"}))
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _unsupported(module: MixedModule, why: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"Cannot export the mix: {module.path} adapts {module.name}, and {why}, or leave this "
        "adapter out."
    )
