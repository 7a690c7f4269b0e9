"""Plan a conversion: where each module of a PEFT adapter goes, and with which scale. No I/O."""

import re
from dataclasses import dataclass

import gguf

from qaflora_edge.convert.expert_plan import is_of_experts, plan_experts
from qaflora_edge.convert.experts import PlannedExperts, Target, common_alpha, scale_factor
from qaflora_edge.convert.layouts import ARCHITECTURES, REFUSED, Index, Layout, LayoutError, Part
from qaflora_edge.errors import AdapterMismatchError, QafloraError, UnsupportedAdapterError
from qaflora_edge.formats.base import ARCH_FACTS, is_bypassed
from qaflora_edge.formats.gguf import GgufHeader
from qaflora_edge.peft.folder import PeftAdapter
from qaflora_edge.peft.modules import PeftModule

# A language model inside a multimodal one, and what its modules are called on their own; these are
# tried after the name itself, in order.
_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head": "lm_head",
    "model.text_model.": "model.",
}
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d{1,9})\.")
_BLOCK = re.compile(r"(?<=\.)(?:0|[1-9]\d*)(?=\.)")


@dataclass(frozen=True)
class PlannedModule(Target):
    """One tensor of the base, and the module whose delta it takes.

    factor   what B is multiplied by
    rows     [n_out]  the row of the source's B for each of the tensor's; None: all as they are
    columns  [n_in]   the column of the source's A for each of the tensor's; None: all as they are
    """

    factor: float
    rows: Index | None = None
    columns: Index | None = None

    @property
    def n_out(self) -> int:
        return self.source.n_out if self.rows is None else len(self.rows)

    @property
    def rank(self) -> int:
        return self.source.rank

    @property
    def is_rescaled(self) -> bool:
        return self.factor != 1.0


Planned = PlannedModule | PlannedExperts


def plan_modules(adapter: PeftAdapter, header: GgufHeader) -> tuple[float, list[Planned]]:
    """Name every module for the base, check that it fits, and choose the file's one alpha.

    Raises UnsupportedAdapterError for what cannot be represented, AdapterMismatchError for what
    does not fit the base.
    """
    subject = f"Cannot convert {adapter.folder} for {header.path}"
    try:
        return _plan(adapter, header)
    except UnsupportedAdapterError as error:
        raise UnsupportedAdapterError(f"{subject}: {error}") from error
    except AdapterMismatchError as error:
        raise AdapterMismatchError(
            f"{subject}: {error} The adapter is for another base{adapter.trained_on}."
        ) from error


def _plan(adapter: PeftAdapter, header: GgufHeader) -> tuple[float, list[Planned]]:
    layout = _reviewed_layout(header)
    _check_biases(adapter, header)
    name_map = _tensor_names(header)
    alpha = common_alpha(list(adapter.modules.values()))
    planned: dict[str, PlannedModule] = {}
    experts = [module for module in adapter.modules.values() if is_of_experts(module)]
    for module in adapter.modules.values():
        if is_of_experts(module):
            continue
        factor = scale_factor(module.scale, module.rank, alpha)
        for part in _place(adapter, module, header, layout, name_map):
            base_name = f"{part.tensor}.weight"
            if base_name in planned:
                raise UnsupportedAdapterError(
                    f"modules {planned[base_name].source.name} and {module.name} both name "
                    f"{base_name} of the base; expected one LoRA for each. Save it again."
                )
            planned[base_name] = PlannedModule(module, base_name, factor, part.rows, part.columns)
            _check_reached(planned[base_name], header)
            _check_shape(planned[base_name], header)
    everything: list[Planned] = [*planned.values(), *plan_experts(adapter, experts, header, alpha)]
    return alpha, sorted(everything, key=lambda module: _natural_key(module.base_name))


def _reviewed_layout(header: GgufHeader) -> Layout:
    if header.architecture in ARCHITECTURES:
        return ARCHITECTURES[header.architecture]
    why = REFUSED.get(header.architecture, "it is not known here")
    raise UnsupportedAdapterError(
        f"its architecture {header.architecture!r} is refused, for {why}; expected one of "
        f"{', '.join(ARCHITECTURES)}. Use another base, or try an adapter GGUF made by llama.cpp's "
        "convert_lora_to_gguf.py."
    )


def _check_biases(adapter: PeftAdapter, header: GgufHeader) -> None:
    """Refuse trained biases that the adapter's file lacks; a base without biases has none."""
    bias = next((name for name in header.tensors if name.endswith(".bias")), None)
    if adapter.config.bias != "none" and bias is not None:
        raise UnsupportedAdapterError(
            f"bias is {adapter.config.bias!r} in its config, so biases such as {bias} of the base "
            "were trained, and no file holds "
            'them; expected "none". Train with bias="none".'
        )


def _tensor_names(header: GgufHeader) -> gguf.TensorNameMap:
    """Give gguf's map from HF's names to those of the base's tensors, of block 0 for all blocks.

    That of all blocks would take megabytes.
    """
    model_arch = next(
        (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture), None
    )
    if model_arch is None:
        raise UnsupportedAdapterError(
            f"the installed gguf package does not know its architecture {header.architecture!r}. "
            "Install a newer gguf."
        )
    return gguf.get_tensor_name_map(model_arch, 1)


def tensor_name(name_map: gguf.TensorNameMap, n_layer: int, hf_name: str) -> str | None:
    """Look HF's name up in the map of block 0; None for an unknown one."""
    block = _BLOCK.search(hf_name)
    if block is None:
        name: str | None = name_map.get_name(hf_name)
        return name
    if int(block[0]) >= n_layer:
        return None
    name = name_map.get_name(f"{hf_name[: block.start()]}0{hf_name[block.end() :]}")
    return name and name.replace("blk.0.", f"blk.{block[0]}.", 1)


def _place(
    adapter: PeftAdapter,
    module: PeftModule,
    header: GgufHeader,
    layout: Layout,
    name_map: gguf.TensorNameMap,
) -> tuple[Part, ...]:
    """Give the tensors of the base that a module goes to, and the order of its rows there."""
    name = _mapped(adapter, module, header, name_map)
    stem = name.rpartition(".")[2]
    if module.is_embedding != (stem == "token_embd"):
        kind = "an embedding" if module.is_embedding else "a linear layer"
        raise UnsupportedAdapterError(
            f"module {module.name} has LoRA of {kind}, and {stem}.weight of the base is not one. "
            "Train a plain LoRA."
        )
    try:
        return layout(name, header, (module.n_out, module.n_in))
    except LayoutError as error:
        raise AdapterMismatchError(f"module {module.name} has {error}.") from error


def _mapped(
    adapter: PeftAdapter, module: PeftModule, header: GgufHeader, name_map: gguf.TensorNameMap
) -> str:
    """Give the name of a module's tensor, such as blk.0.attn_q."""
    for hf_name in _spellings(module.name):
        # Some of gguf's maps leave out a head that is tied, and adapters of it fit nevertheless.
        name = tensor_name(name_map, header.n_layer, hf_name) or {"lm_head": "output"}.get(hf_name)
        name = name or _unmapped_name(header, hf_name)
        if name:
            return name
    raise _unknown_module(adapter, module, header)


def _unmapped_name(header: GgufHeader, hf_name: str) -> str | None:
    """Look up a module that gguf's map lacks, for it is taken apart: blk.0.attn_qkv."""
    block = _BLOCK.search(hf_name)
    if block is None or int(block[0]) >= header.n_layer:
        return None
    stem = ARCH_FACTS[header.architecture].unmapped.get(hf_name[block.end() + 1 :])
    return stem and f"blk.{block[0]}.{stem}"


def _spellings(name: str) -> list[str]:
    """Give a module's name, and what it is called in a model of text alone."""
    names = [name]
    for prefix, replacement in _PREFIXES.items():
        if name.startswith(prefix):
            names.append(replacement + name.removeprefix(prefix))
    return names


def _unknown_module(adapter: PeftAdapter, module: PeftModule, header: GgufHeader) -> QafloraError:
    layer = _LAYER.search(f".{module.name}")
    is_text = not re.search(r"(^|[._])(vision|visual|audio)", module.name)
    if layer and is_text and int(layer[1]) >= header.n_layer:
        return AdapterMismatchError(
            f"module {module.name} is in layer {layer[1]}, and the base has layers 0 to "
            f"{header.n_layer - 1}."
        )
    return UnsupportedAdapterError(
        f"module {module.name} has no counterpart in a {header.architecture} GGUF; expected "
        "projections of the language model's layers, embed_tokens or lm_head. The adapter may be "
        f"for another base{adapter.trained_on}, or was trained on parts that a GGUF lacks."
    )


def _check_reached(module: PlannedModule, header: GgufHeader) -> None:
    """Refuse tensors that no adapter enters, or no layer's weight, or that are not HF's."""
    name = module.base_name
    if is_bypassed(header.architecture, name):
        why = f"llama.cpp computes without adapters for {header.architecture}"
    elif name in ARCH_FACTS[header.architecture].scaled:
        why = "its converter may have scaled, which the GGUF does not say"
    elif not name.startswith(("blk.", "token_embd.", "output.")):
        why = "belongs to no layer, so that no layer's weight applies"
    else:
        return
    raise UnsupportedAdapterError(
        f"module {module.source.name} goes to {name}, which {why}; expected projections of the "
        "language model's layers, embed_tokens or lm_head. Train without this module, or merge "
        "the adapter into its base."
    )


def _check_shape(module: PlannedModule, header: GgufHeader) -> None:
    source = module.source
    expected_name = module.base_name
    if expected_name == "output.weight" and expected_name not in header.tensors:
        expected_name = "token_embd.weight"  # a tied head
    info = header.tensors.get(expected_name)
    shape = (source.n_in, module.n_out) if source.is_embedding else (module.n_out, source.n_in)
    if info is None:
        raise _missing_tensor(module, header)
    if info.shape != shape:
        raise AdapterMismatchError(
            f"module {source.name} is for a weight of shape {list(shape)}, and {expected_name} of "
            f"the base is {list(info.shape)}."
        )


def _missing_tensor(module: PlannedModule, header: GgufHeader) -> QafloraError:
    fused = re.sub(r"\.attn_[qkv]\.", ".attn_qkv.", module.base_name)
    if fused != module.base_name and fused in header.tensors:
        return UnsupportedAdapterError(
            f"module {module.source.name} needs tensor {module.base_name}, and the base holds q, k "
            f"and v as one, {fused}. Use a base that was converted without --fuse-qkv."
        )
    return AdapterMismatchError(
        f"module {module.source.name} needs tensor {module.base_name}, which the base lacks."
    )


def _natural_key(base_name: str) -> tuple[int, str]:
    parts = base_name.split(".")
    return (int(parts[1]), parts[2]) if parts[0] == "blk" else (-1, base_name)
