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
from qaflora_edge.convert.layouts import ARCHITECTURES
from qaflora_edge.convert.targets import MixedModule
from qaflora_edge.errors import UnsupportedAdapterError, WeightsError
from qaflora_edge.formats.adapter import EMBEDDING, HEAD, AdapterInfo, module_kind, read_pair
from qaflora_edge.formats.base import ARCH_FACTS
from qaflora_edge.formats.gguf import GgufHeader
from qaflora_edge.peft.config import CONFIG_FILE
from qaflora_edge.peft.folder import WEIGHTS_FILE
from qaflora_edge.progress import silent

# Kind of a tensor -> its module as Llama and most families call it; {} is the layer.
_NAMES = {"token_embd": "model.embed_tokens", "output": "lm_head"}
_NAMES |= {f"attn_{part}": f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"}
_NAMES |= {f"ffn_{part}": f"model.layers.{{}}.mlp.{part}_proj" for part in ("gate", "up", "down")}
_NAMES["attn_output"] = "model.layers.{}.self_attn.o_proj"


def mix_modules(adapters: Mapping[str, AdapterInfo], weights: F32) -> list[MixedModule]:
    """Put adapters side by side in each tensor of the base; every scale is 1 then.

    weights  [n_adapter, n_layer]; an adapter that weighs 0 in a layer adds no rank there

    Raises WeightsError when nothing is added.
    """
    parts = defaultdict(list)
    for info, row in zip(adapters.values(), weights, strict=True):
        for name in info.ranks:
            layer = {EMBEDDING: 0, HEAD: -1}.get(name)
            weight = row[int(name.split(".")[1]) if layer is None else layer]
            if weight != 0:
                a, b, scale = read_pair(info, name)
                parts[name].append((info.path, a, b * np.float32(weight * scale)))
    if not parts:
        raise WeightsError(
            "Cannot export the mix: no adapter weighs anything where it adapts the base, which "
            "answers alone; expected one that does. Choose other weights, or another prompt."
        )
    modules = []
    for name, of_adapters in parts.items():
        (path, *_), a, b = zip(*of_adapters, strict=True)
        a = np.concatenate(a, axis=-1 if name == EMBEDDING else -2)
        modules.append(MixedModule(name, name, path, a, np.concatenate(b, axis=-1)))
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
    modules = [replace(m, b=m.b * np.float32(m.b.shape[-1] / alpha)) for m in modules]
    with closing(gguf.GGUFWriter(path, header.architecture)) as writer:
        add_metadata(writer, name)
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        write_tensors(writer, modules, OUTTYPES[outtype], silent)


def write_peft_mix(folder: Path, header: GgufHeader, modules: Sequence[MixedModule]) -> None:
    """Write a mix as PEFT does, in float32.

    Raises UnsupportedAdapterError for a tensor whose name in PEFT is not known.
    """
    from safetensors.numpy import save

    tensors, ranks = {}, {}
    for module in modules:
        name, facts = _NAMES.get(module_kind(module.name)), ARCH_FACTS.get(header.architecture)
        if name is None or facts is None or not facts.has_llama_names:
            raise _unsupported(
                module,
                f"its name in PEFT is not known for {header.architecture}; expected projections "
                "that transformers names as Llama's. Write a GGUF, without --peft",
            )
        name = name.format(module.name.split(".")[1])
        a, b, end = module.a, module.b, "lora_{}.weight"
        if module.name == EMBEDDING:
            a, end = a.T, "lora_embedding_{}"
        base_name, shape = module.name.removesuffix(".weight"), (len(b), a.shape[1])
        (part,) = ARCHITECTURES[header.architecture](base_name, header, shape)
        b = b if part.rows is None else b[np.argsort(part.rows)]  # in HF's order
        for side, values in (("A", a), ("B", b)):
            tensors[f"base_model.model.{name}.{end}".format(side)] = np.ascontiguousarray(values)
        ranks[name] = b.shape[1]
    rank = max(ranks.values())
    others = {name: smaller for name, smaller in ranks.items() if smaller != rank}
    config: dict[str, object] = {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    config |= {"base_model_name_or_path": None, "target_modules": [*ranks]}
    config |= {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others}
    # save_file has an error of its own for a full disk.
    (folder / WEIGHTS_FILE).write_bytes(save(tensors, {"format": "pt"}))
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _unsupported(module: MixedModule, why: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"Cannot export the mix: {module.path} adapts {module.name}, and {why}, or leave this "
        "adapter out."
    )
