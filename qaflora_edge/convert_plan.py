"""Plan a conversion: where each module of a PEFT adapter goes, and with which scale. No I/O.

A new architecture is a line in ARCHITECTURES.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import gguf
import numpy as np

from qaflora_edge.errors import AdapterMismatchError, UnsupportedAdapterError
from qaflora_edge.gguf_header import GgufHeader
from qaflora_edge.peft import PeftAdapter, PeftModule


@dataclass(frozen=True)
class Architecture:
    """How one architecture's HF names and rows become GGUF's.

    model_arch  gguf's name table to use
    permutes    rows of q and k are stored in the order of ggml's rope
    prefixes    a start of HF's module names -> what the name table expects
    """

    model_arch: gguf.MODEL_ARCH
    permutes: bool = False
    prefixes: Mapping[str, str] | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    # llama.cpp 0c1e5709, conversion/llama.py LlamaModel.modify_tensors
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, permutes=True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2),
    "gemma3": Architecture(
        gguf.MODEL_ARCH.GEMMA3,
        prefixes={
            "model.language_model.": "model.",
            "language_model.model.": "model.",
            "language_model.lm_head": "lm_head",
        },
    ),
}


@dataclass(frozen=True)
class PlannedModule:
    """One module on its way: where it goes and what its B is multiplied by."""

    source: PeftModule
    base_name: str  # such as blk.0.attn_q.weight
    factor: float
    n_head: int | None  # rows of B are permuted by so many heads

    @property
    def kind(self) -> str:
        return self.base_name.split(".")[-2]


def plan_modules(adapter: PeftAdapter, header: GgufHeader) -> tuple[float, list[PlannedModule]]:
    """Name every module for the base, check that it fits, and choose the file's one alpha."""
    architecture = ARCHITECTURES.get(header.architecture)
    if architecture is None:
        raise UnsupportedAdapterError(
            f"Cannot convert an adapter for {header.path}: its architecture is "
            f"{header.architecture!r}; supported are {', '.join(ARCHITECTURES)}. "
            "Convert it with llama.cpp's convert_lora_to_gguf.py and use the adapter GGUF."
        )
    names = _base_names(adapter, header, architecture)
    alpha = common_alpha(list(adapter.modules.values()))
    modules = [
        PlannedModule(
            source=module,
            base_name=names[module.name],
            factor=scale_factor(module.scale, module.rank, alpha),
            n_head=_permuted_heads(names[module.name], header) if architecture.permutes else None,
        )
        for module in adapter.modules.values()
    ]
    for module in modules:
        _check_shape(adapter, module, header)
    return alpha, sorted(modules, key=lambda module: _natural_key(module.base_name))


def common_alpha(modules: Sequence[PeftModule]) -> float:
    """Choose the alpha under which most modules need no change; a float32 value.

    A GGUF holds one alpha, and the runtime's scale is alpha / rank of the tensor.
    """
    counts = Counter(float(np.float32(module.scale * module.rank)) for module in modules)
    return max(counts, key=lambda alpha: (counts[alpha], alpha))


def scale_factor(scale: float, rank: int, alpha: float) -> float:
    """Give what B is multiplied by so that alpha / rank gives `scale`; exactly 1 if it does."""
    if float(np.float32(scale * rank)) == alpha:
        return 1.0
    return scale * rank / alpha


def _base_names(
    adapter: PeftAdapter, header: GgufHeader, architecture: Architecture
) -> dict[str, str]:
    """Map each module of the adapter to the base's tensor, such as blk.0.attn_q.weight."""
    name_map = gguf.get_tensor_name_map(architecture.model_arch, header.n_layer)
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for module in adapter.modules.values():
        hf_name = _canonical(module.name, architecture)
        stem = name_map.get_name(hf_name)
        if stem is None:
            raise _unknown_module(adapter, module, hf_name, header)
        if module.is_embedding != (stem == "token_embd"):
            kind = "an embedding" if module.is_embedding else "a linear layer"
            raise UnsupportedAdapterError(
                f"Cannot convert {adapter.folder}: module {module.name} has LoRA of {kind}, and "
                f"{stem}.weight of the base is not one. Train a plain LoRA."
            )
        if stem in taken:
            raise UnsupportedAdapterError(
                f"Cannot convert {adapter.folder}: modules {taken[stem]} and {module.name} both "
                f"name {stem}.weight of the base; expected one LoRA for each. Save it again."
            )
        taken[stem] = module.name
        names[module.name] = f"{stem}.weight"
    return names


def _canonical(name: str, architecture: Architecture) -> str:
    for prefix, replacement in (architecture.prefixes or {}).items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def _unknown_module(
    adapter: PeftAdapter, module: PeftModule, hf_name: str, header: GgufHeader
) -> Exception:
    layer = re.match(r"model\.layers\.(\d{1,9})\.", hf_name)
    if layer and int(layer[1]) >= header.n_layer:
        return AdapterMismatchError(
            f"Cannot convert {adapter.folder} for {header.path}: module {module.name} is in layer "
            f"{layer[1]}, and the base has layers 0 to {header.n_layer - 1}. "
            f"The adapter is for another base{_trained_on(adapter)}."
        )
    return UnsupportedAdapterError(
        f"Cannot convert {adapter.folder}: module {module.name} has no counterpart in a "
        f"{header.architecture} GGUF; expected projections of the language model's layers, "
        f"embed_tokens or lm_head. The adapter may be for another base{_trained_on(adapter)}, or "
        "was trained on parts that a GGUF lacks."
    )


def _trained_on(adapter: PeftAdapter) -> str:
    name = adapter.config.base_name
    return f" (adapter_config.json says {name[:200]!r})" if name else ""


def _permuted_heads(base_name: str, header: GgufHeader) -> int | None:
    kind = base_name.split(".")[-2]
    return {"attn_q": header.n_head, "attn_k": header.n_head_kv}.get(kind)


def _check_shape(adapter: PeftAdapter, module: PlannedModule, header: GgufHeader) -> None:
    source = module.source
    expected_name = module.base_name
    if expected_name == "output.weight" and expected_name not in header.tensors:
        expected_name = "token_embd.weight"  # a tied head
    info = header.tensors.get(expected_name)
    shape = (source.n_in, source.n_out) if source.is_embedding else (source.n_out, source.n_in)
    if info is None:
        raise AdapterMismatchError(
            f"Cannot convert {adapter.folder} for {header.path}: module {source.name} needs tensor "
            f"{expected_name}, which the base lacks. "
            f"The adapter is for another base{_trained_on(adapter)}."
        )
    if info.shape != shape:
        raise AdapterMismatchError(
            f"Cannot convert {adapter.folder} for {header.path}: module {source.name} is for a "
            f"weight of shape {list(shape)}, and {expected_name} of the base is "
            f"{list(info.shape)}. The adapter is for another base{_trained_on(adapter)}."
        )
    if module.n_head is not None and source.n_out % (2 * module.n_head):
        raise AdapterMismatchError(
            f"Cannot convert {adapter.folder} for {header.path}: {expected_name} has "
            f"{source.n_out} rows, which {module.n_head} heads cannot share in pairs. "
            "The base's head count is wrong; fetch or convert the base again."
        )


def _natural_key(base_name: str) -> tuple[int, str]:
    parts = base_name.split(".")
    return (int(parts[1]), parts[2]) if parts[0] == "blk" else (-1, base_name)
