"""Plan a conversion: which tensor of the base takes which module's delta. No I/O.

Adapters hold LoRA of a mixture's experts in one of two ways: a module for each expert
(`experts.3.gate_proj`, as in transformers 4), or one pair for a parameter that stacks them
(`experts.gate_up_proj`, PEFT's `target_parameters`), in which gate and up share A. MLX has a pair
for each of gate, up and down (`switch_mlp.gate_proj`).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from qaflora_edge.convert import layouts
from qaflora_edge.convert.planned import Planned, PlannedModule, SingleExperts, StackedExperts
from qaflora_edge.errors import AdapterMismatchError, UnsupportedAdapterError
from qaflora_edge.formats.adapter import why_not_adapted
from qaflora_edge.formats.base import ARCH_FACTS
from qaflora_edge.formats.gguf import GgufHeader
from qaflora_edge.peft.folder import PeftAdapter
from qaflora_edge.peft.modules import PeftModule

MAX_STACKED_BYTES = 1 << 32  # of lora_a or lora_b as F32: 512 experts of rank 256 and 8192 inputs
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
_ANY_EXPERTS = re.compile(r"\.experts?(\.|$)")
_EXPERTS = re.compile(
    r"((model|language_model|text_model)\.)*layers\.(?P<layer>\d{1,9})\."
    r"(mlp|block_sparse_moe|feed_forward)\.(experts|switch_mlp)"
    r"(\.(?P<expert>0|[1-9]\d{0,6}))?\.(?P<projection>[^.]+)"
)
_EXPERT_STEMS = {
    **{"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up"},
    **{"w1": "gate", "w3": "up", "w2": "down"},  # Mixtral and MiniMax
}
# Since this PEFT, A always reads the layer's input. Before, it depended on the shape of the
# parameter and on transformers, which turned it around again (PEFT's pull request 3165).
_PEFT_OF_ONE_ORDER = (0, 19, 1, True)
_NO_EXPERTS = "Train without experts, or merge the adapter into its base."


@dataclass(frozen=True)
class _Pair:
    """An adapter and the base it is planned for; errors name both."""

    adapter: PeftAdapter
    header: GgufHeader

    def unsupported(self, why: str) -> UnsupportedAdapterError:
        return UnsupportedAdapterError(
            f"Cannot convert {self.adapter.folder} for {self.header.path}: {why}"
        )

    def mismatch(self, why: str) -> AdapterMismatchError:
        return AdapterMismatchError(
            f"Cannot convert {self.adapter.folder} for {self.header.path}: {why} The adapter is "
            f"for another base{self.adapter.trained_on}."
        )

    def check_layer(self, module: str, layer: int) -> None:
        if layer >= self.header.n_layer:
            raise self.mismatch(
                f"module {module} is in layer {layer}, and the base has layers 0 to "
                f"{self.header.n_layer - 1}."
            )


def plan_modules(adapter: PeftAdapter, header: GgufHeader) -> tuple[float, list[Planned]]:
    """Name every module for the base, check that it fits, and choose the file's one alpha.

    Raises UnsupportedAdapterError for what a LoRA cannot hold, AdapterMismatchError if it misfits.
    """
    pair = _Pair(adapter, header)
    layout = _reviewed_layout(pair)
    bias = next((name for name in header.tensors if name.endswith(".bias")), None)
    if adapter.config.bias != "none" and bias is not None:
        raise pair.unsupported(
            f"bias is {adapter.config.bias!r} in its config, so biases such as {bias} of the base "
            'were trained, and no file holds them; expected "none". Train with bias="none".'
        )
    name_map = _tensor_names(pair)
    alpha = _common_alpha(adapter.modules.values())
    planned: dict[str, Planned] = {}
    experts = []
    for module in adapter.modules.values():
        if module.n_expert > 0 or _ANY_EXPERTS.search(module.name):
            experts.append(module)
            continue
        factor = _scale_factor(module.scale, module.rank, alpha)
        for cut in _place(pair, module, layout, name_map):
            target = PlannedModule(module, f"{cut.tensor}.weight", factor, cut.rows, cut.columns)
            if other := planned.get(target.base_name):
                raise pair.unsupported(
                    f"modules {other.name} and {module.name} both name {target.base_name} of the "
                    "base; expected one LoRA for each. Save it again."
                )
            _check_tensor(pair, target)
            planned[target.base_name] = target
    everything = [*planned.values(), *_plan_experts(pair, experts, alpha)]
    return alpha, sorted(everything, key=lambda target: _natural_key(target.base_name))


def _natural_key(base_name: str) -> tuple[int, str]:
    words = base_name.split(".")
    return (int(words[1]), words[2]) if words[0] == "blk" else (-1, base_name)


def _common_alpha(modules: Iterable[PeftModule]) -> float:
    """Choose the alpha under which most modules need no change; a float32 value.

    A GGUF holds one alpha, and the runtime's scale is alpha / rank of the tensor.
    """
    counts = Counter(float(np.float32(module.scale * module.rank)) for module in modules)
    return max(counts, key=lambda alpha: (counts[alpha], alpha))


def _scale_factor(scale: float, rank: int, alpha: float) -> float:
    """Give the factor of B with which alpha / rank gives `scale`; exactly 1 if it does."""
    if float(np.float32(scale * rank)) == alpha:
        return 1.0
    return scale * rank / alpha


def _reviewed_layout(pair: _Pair) -> layouts.Layout:
    architecture = pair.header.architecture
    if architecture in layouts.ARCHITECTURES:
        return layouts.ARCHITECTURES[architecture]
    why = layouts.REFUSED.get(architecture, "it is not known here")
    raise pair.unsupported(
        f"its architecture {architecture!r} is refused, for {why}; expected one of "
        f"{', '.join(layouts.ARCHITECTURES)}. Use another base, or try an adapter GGUF made by "
        "llama.cpp's convert_lora_to_gguf.py."
    )


def _tensor_names(pair: _Pair) -> gguf.TensorNameMap:
    """Give gguf's map from HF's names to tensors of block 0. That of all blocks takes megabytes."""
    for arch, name in gguf.MODEL_ARCH_NAMES.items():
        if name == pair.header.architecture:
            return gguf.get_tensor_name_map(arch, 1)
    raise pair.unsupported(
        "the installed gguf package does not know its architecture "
        f"{pair.header.architecture!r}. Install a newer gguf."
    )


def tensor_name(
    name_map: gguf.TensorNameMap, n_layer: int, hf_name: str, unmapped: Mapping[str, str]
) -> str | None:
    """Look HF's name up in the map of block 0; None for an unknown one.

    unmapped  modules that the map lacks, for llama.cpp takes them apart: name in a block -> stem
    """
    block = _BLOCK.search(hf_name)
    name: str | None
    if block is None:
        name = name_map.get_name(hf_name)
        return name
    if int(block[0]) >= n_layer:
        return None
    name = name_map.get_name(f"{hf_name[: block.start()]}0{hf_name[block.end() :]}")
    if name is None and (stem := unmapped.get(hf_name[block.end() + 1 :])):
        name = f"blk.0.{stem}"
    return name and name.replace("blk.0.", f"blk.{block[0]}.", 1)


def _mapped(pair: _Pair, module: PeftModule, name_map: gguf.TensorNameMap) -> str:
    header = pair.header
    unmapped = ARCH_FACTS[header.architecture].unmapped
    prefixes = [prefix for prefix in _PREFIXES if module.name.startswith(prefix)]
    spellings = [_PREFIXES[prefix] + module.name.removeprefix(prefix) for prefix in prefixes]
    for hf_name in (module.name, *spellings):
        # Some of gguf's maps leave out a head that is tied, and adapters of it fit nevertheless.
        name = tensor_name(name_map, header.n_layer, hf_name, unmapped)
        if name := name or {"lm_head": "output"}.get(hf_name):
            return name
    layer = _LAYER.search(f".{module.name}")
    if layer and not re.search(r"(^|[._])(vision|visual|audio)", module.name):
        pair.check_layer(module.name, int(layer[1]))
    raise pair.unsupported(
        f"module {module.name} has no counterpart in a {header.architecture} GGUF; expected "
        "projections of the language model's layers, embed_tokens or lm_head. The adapter may be "
        f"for another base{pair.adapter.trained_on}, or was trained on parts that a GGUF lacks."
    )


def _place(
    pair: _Pair, module: PeftModule, layout: layouts.Layout, name_map: gguf.TensorNameMap
) -> layouts.Parts:
    name = _mapped(pair, module, name_map)
    stem = name.rpartition(".")[2]
    if module.is_embedding != (stem == "token_embd"):
        layer_type = "an embedding" if module.is_embedding else "a linear layer"
        raise pair.unsupported(
            f"module {module.name} has LoRA of {layer_type}, and {stem}.weight of the base is not "
            "one. Train a plain LoRA."
        )
    try:
        return layout(layouts.Module(name, pair.header, module.n_out, module.n_in))
    except layouts.LayoutError as error:
        raise pair.mismatch(f"module {module.name} has {error}.") from error


def _check_tensor(pair: _Pair, target: PlannedModule) -> None:
    """Refuse a tensor that no adapter or no layer's weight enters, or that is not the module's."""
    header = pair.header
    source = target.source
    name = target.base_name
    why = why_not_adapted(header.architecture, name)
    if name in ARCH_FACTS[header.architecture].scaled:
        why = "its converter may have scaled, which the GGUF does not say"
    if why:
        raise pair.unsupported(
            f"module {source.name} goes to {name}, which {why}; expected projections of the "
            "language model's layers, embed_tokens or lm_head. Train without this module, or merge "
            "the adapter into its base."
        )
    is_tied = name == "output.weight" and name not in header.tensors
    expected = "token_embd.weight" if is_tied else name
    info = header.tensors.get(expected)
    fused = re.sub(r"\.attn_[qkv]\.", ".attn_qkv.", name)
    if info is None and fused != name and fused in header.tensors:
        raise pair.unsupported(
            f"module {source.name} needs tensor {name}, and the base holds q, k and v as one, "
            f"{fused}. Use a base that was converted without --fuse-qkv."
        )
    if info is None:
        raise pair.mismatch(f"module {source.name} needs tensor {name}, which the base lacks.")
    shape = (source.n_in, target.n_out) if source.is_embedding else (target.n_out, source.n_in)
    if info.shape != shape:
        raise pair.mismatch(
            f"module {source.name} is for a weight of shape {list(shape)}, and {expected} of "
            f"the base is {list(info.shape)}."
        )


def _plan_experts(pair: _Pair, modules: Sequence[PeftModule], alpha: float) -> list[Planned]:
    architecture = pair.header.architecture
    if modules and architecture not in layouts.MIXTURES:
        raise pair.unsupported(
            f"module {modules[0].name} has LoRA of experts, and how {architecture!r} stacks "
            f"them was not reviewed; expected one of {', '.join(layouts.MIXTURES)}. {_NO_EXPERTS}"
        )
    members: dict[str, dict[int, PeftModule]] = defaultdict(dict)
    planned: dict[str, Planned] = {}

    def put(taken: dict[Any, Any], key: Any, value: Any, module: PeftModule) -> None:
        if key in taken:
            raise pair.unsupported(
                f"modules {taken[key].name} and {module.name} are of the same experts; expected "
                "one LoRA for each. Save it again."
            )
        taken[key] = value

    for module in modules:
        layer, expert, stem = _expert_place(pair, module)
        if expert is not None:
            put(members[f"blk.{layer}.ffn_{stem}_exps.weight"], expert, module, module)
            continue
        tensors = _expert_parts(pair, module)
        is_swapped = _is_swapped(pair, module, [name for name, _ in tensors])
        factor = _scale_factor(module.scale, module.rank, alpha)
        for name, rows in tensors:
            _, n_out, n_in = _expert_shape(pair, module, name)
            shape = module.n_expert, module.rank, n_in, n_out
            experts_of = StackedExperts(module, name, *shape, factor, rows, is_swapped)
            put(planned, name, experts_of, module)
    for name, experts in members.items():
        put(planned, name, _single(pair, name, experts, alpha), experts[min(experts)])
    return list(planned.values())


def _expert_place(pair: _Pair, module: PeftModule) -> tuple[int, int | None, str]:
    """Give the layer, the expert (None: all of them) and the stem of a module's tensor."""
    match = _EXPERTS.fullmatch(module.name)
    stem = _EXPERT_STEMS.get(match["projection"]) if match else None
    is_stack = module.n_expert > 0
    if match is None or stem is None or (match["expert"] is None) != is_stack:
        raise pair.unsupported(
            f"module {module.name} has LoRA of experts in a way that is not known here; expected a "
            "module for each expert, such as mlp.experts.0.gate_proj, or target_parameters such "
            f"as mlp.experts.gate_up_proj. {_NO_EXPERTS}"
        )
    layer = int(match["layer"])
    pair.check_layer(module.name, layer)
    return layer, None if is_stack else int(match["expert"]), stem


def _expert_parts(pair: _Pair, module: PeftModule) -> list[tuple[str, layouts.Index | None]]:
    layer, _, stem = _expert_place(pair, module)
    block = f"blk.{layer}.ffn"
    if stem != "gate_up":
        return [(f"{block}_{stem}_exps.weight", None)]
    n_ff = _expert_shape(pair, module, f"{block}_down_exps.weight")[2]
    rows = np.arange(2 * n_ff)
    gate = rows[:n_ff]
    up = rows[n_ff:]
    if ARCH_FACTS[pair.header.architecture].experts == "by turns":
        gate = rows[::2]
        up = rows[1::2]
    fused = f"{block}_gate_up_exps.weight"
    if fused in pair.header.tensors:
        return [(fused, np.concatenate([gate, up]))]
    return [(f"{block}_gate_exps.weight", gate), (f"{block}_up_exps.weight", up)]


def _expert_shape(pair: _Pair, module: PeftModule, base_name: str) -> tuple[int, int, int]:
    info = pair.header.tensors.get(base_name)
    if info is not None and len(info.shape) == 3:
        n_expert, n_out, n_in = info.shape
        return n_expert, n_out, n_in
    fused = re.sub(r"ffn_(gate|up)_exps", "ffn_gate_up_exps", base_name)
    if fused in pair.header.tensors:
        raise pair.unsupported(
            f"module {module.name} needs tensor {base_name}, and the base holds gate and up as "
            f"one, {fused}. Use a base that was converted without --fuse-gate-up-exps."
        )
    raise pair.mismatch(
        f"module {module.name} needs experts in tensor {base_name}, which the base lacks."
    )


def _single(
    pair: _Pair, base_name: str, experts: Mapping[int, PeftModule], alpha: float
) -> SingleExperts:
    first = experts[min(experts)]
    n_expert, n_out, n_in = _expert_shape(pair, first, base_name)
    for expert, module in experts.items():
        if expert >= n_expert or (module.n_out, module.n_in) != (n_out, n_in):
            raise pair.mismatch(
                f"module {module.name} is for a weight of shape {[module.n_out, module.n_in]} of "
                f"expert {expert}, and {base_name} of the base is {[n_expert, n_out, n_in]}."
            )
    rank = max(module.rank for module in experts.values())
    n_bytes = 4 * n_expert * rank * max(n_in, n_out)
    if n_bytes > MAX_STACKED_BYTES:
        raise pair.unsupported(
            f"{n_expert} experts filled up to rank {rank}, the largest for {base_name}, take "
            f"{n_bytes} bytes; expected at most {MAX_STACKED_BYTES}. Train the experts with one "
            "rank, or a smaller one."
        )
    factors = {
        expert: (module, _scale_factor(module.scale, rank, alpha))
        for expert, module in experts.items()
    }
    return SingleExperts(first, base_name, n_expert, rank, n_in, n_out, factors)


def _is_swapped(pair: _Pair, module: PeftModule, names: Sequence[str]) -> bool:
    """Tell by its shape, else by PEFT's version, whether the file's A writes the output.

    names  of the tensors that it goes to
    """
    shapes = [_expert_shape(pair, module, name) for name in names]
    n_expert, _, n_in = shapes[-1]
    n_out = sum(shape[1] for shape in shapes)
    of_file = (module.n_expert, module.n_out, module.n_in)
    plain = (n_expert, n_out, n_in)
    swapped = (n_expert, n_in, n_out)
    if of_file != plain and (of_file != swapped or module.is_b_by_expert):
        raise pair.mismatch(
            f"{module.name} is for experts of shape {list(of_file)}, and the base's are "
            f"{list(plain)}."
        )
    version = pair.adapter.config.version
    is_known = module.is_b_by_expert or _version(version) >= _PEFT_OF_ONE_ORDER
    if plain == swapped and not is_known:
        raise pair.unsupported(
            f"the experts of {module.name} are square, and peft_version is {version!r} in its "
            "config; expected 0.19.1 or later, for earlier ones may have A and B the other way "
            "round. Load it with what trained it, merge it and train again, or set peft_version if "
            "it is later."
        )
    return of_file != plain


def _version(text: str | None) -> tuple[int, ...]:
    """Give the numbers at the start of a version and whether it was released; () for no version."""
    match = re.match(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?", text or "")
    if match is None or text is None:
        return ()
    is_released = not re.match(r"\.?(dev|a|b|rc)", text[match.end() :])
    return (*(int(part or 0) for part in match.groups()), is_released)
