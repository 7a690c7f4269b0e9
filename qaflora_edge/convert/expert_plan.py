"""Plan where the LoRA of a mixture's experts goes. No I/O.

Adapters hold it in one of two ways: a module for each expert (`experts.3.gate_proj`, as in
transformers 4), or one pair for a parameter that stacks them (`experts.gate_up_proj`, PEFT's
`target_parameters`), in which gate and up share A. MLX has a pair for each of gate, up and down
(`switch_mlp.gate_proj`).
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qaflora_edge.convert.experts import PlannedExperts, SingleExperts, StackedExperts, scale_factor
from qaflora_edge.convert.layouts import MIXTURES, Index
from qaflora_edge.errors import AdapterMismatchError, UnsupportedAdapterError
from qaflora_edge.formats.base import ARCH_FACTS
from qaflora_edge.formats.gguf import GgufHeader
from qaflora_edge.peft.folder import PeftAdapter
from qaflora_edge.peft.modules import PeftModule

_ANY = re.compile(r"\.experts?(\.|$)")
_NAME = re.compile(
    r"((model|language_model|text_model)\.)*layers\.(?P<layer>\d{1,9})\."
    r"(mlp|block_sparse_moe|feed_forward)\.(experts|switch_mlp)"
    r"(\.(?P<expert>0|[1-9]\d{0,6}))?\.(?P<projection>[^.]+)"
)
_STEMS = {
    **{"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up"},
    **{"w1": "gate", "w3": "up", "w2": "down"},  # Mixtral and MiniMax
}
# Since this PEFT, A always reads the layer's input. Before, it depended on the shape of the
# parameter and on transformers, which turned it around again (PEFT's pull request 3165).
_PEFT_OF_ONE_ORDER = (0, 19, 1, True)
MAX_STACKED_BYTES = 1 << 32  # of lora_a or lora_b as F32: 512 experts of rank 256 and 8192 inputs
_ADVICE = "Train without experts, or merge the adapter into its base."


def is_of_experts(module: PeftModule) -> bool:
    """Tell whether a module is of experts that a router chooses from, by its name."""
    return module.n_expert > 0 or _ANY.search(module.name) is not None


def plan_experts(
    adapter: PeftAdapter, modules: Sequence[PeftModule], header: GgufHeader, alpha: float
) -> list[PlannedExperts]:
    """Say what each stacked tensor of the base takes from the modules of experts.

    Raises UnsupportedAdapterError for what cannot be represented, AdapterMismatchError for what
    does not fit the base.
    """
    if modules and header.architecture not in MIXTURES:
        raise UnsupportedAdapterError(
            f"module {modules[0].name} has LoRA of experts, and how {header.architecture!r} stacks "
            f"them was not reviewed; expected one of {', '.join(MIXTURES)}. {_ADVICE}"
        )
    members: dict[str, dict[int, PeftModule]] = defaultdict(dict)
    planned: dict[str, PlannedExperts] = {}
    stacks = _Stacks(adapter, header, [module for module in modules if module.n_expert > 0])
    for module in modules:
        layer, expert, stem = _place(module, header)
        if expert is None:
            for tensor in stacks.tensors(module, layer, stem, alpha):
                _put(planned, tensor.base_name, tensor, module)
        else:
            _put(members[f"blk.{layer}.ffn_{stem}_exps.weight"], expert, module, module)
    for base_name, experts in members.items():
        own = _single(header, base_name, experts, alpha)
        _put(planned, base_name, own, experts[min(experts)])
    return list(planned.values())


def _put(places: dict[Any, Any], place: Any, value: Any, module: PeftModule) -> None:
    if place in places:
        raise UnsupportedAdapterError(
            f"modules {places[place].name} and {module.name} are of the same experts; expected one "
            "LoRA for each. Save it again."
        )
    places[place] = value


def _place(module: PeftModule, header: GgufHeader) -> tuple[int, int | None, str]:
    """Give the layer, the expert (None: all of them) and the stem of a module's tensor."""
    match = _NAME.fullmatch(module.name)
    stem = _STEMS.get(match["projection"]) if match else None
    is_stack = module.n_expert > 0
    if match is None or stem is None or (match["expert"] is None) != is_stack:
        raise UnsupportedAdapterError(
            f"module {module.name} has LoRA of experts in a way that is not known here; expected a "
            "module for each expert, such as mlp.experts.0.gate_proj, or target_parameters such "
            f"as mlp.experts.gate_up_proj. {_ADVICE}"
        )
    layer = int(match["layer"])
    if layer >= header.n_layer:
        raise AdapterMismatchError(
            f"module {module.name} is in layer {layer}, and the base has layers 0 to "
            f"{header.n_layer - 1}."
        )
    return layer, None if is_stack else int(match["expert"]), stem


def _base_shape(module: PeftModule, header: GgufHeader, base_name: str) -> tuple[int, int, int]:
    """Give n_expert, n_out and n_in of a stacked tensor of the base."""
    info = header.tensors.get(base_name)
    if info is not None and len(info.shape) == 3:
        n_expert, n_out, n_in = info.shape
        return n_expert, n_out, n_in
    fused = base_name.replace("ffn_gate_exps", "ffn_gate_up_exps")
    fused = fused.replace("ffn_up_exps", "ffn_gate_up_exps")
    if fused in header.tensors:
        raise UnsupportedAdapterError(
            f"module {module.name} needs tensor {base_name}, and the base holds gate and up as "
            f"one, {fused}. Use a base that was converted without --fuse-gate-up-exps."
        )
    raise AdapterMismatchError(
        f"module {module.name} needs experts in tensor {base_name}, which the base lacks."
    )


def _single(
    header: GgufHeader, base_name: str, experts: Mapping[int, PeftModule], alpha: float
) -> SingleExperts:
    first = experts[min(experts)]
    n_expert, n_out, n_in = _base_shape(first, header, base_name)
    for expert, module in experts.items():
        if expert >= n_expert or (module.n_out, module.n_in) != (n_out, n_in):
            raise AdapterMismatchError(
                f"module {module.name} is for a weight of shape {[module.n_out, module.n_in]} of "
                f"expert {expert}, and {base_name} of the base is {[n_expert, n_out, n_in]}."
            )
    rank = max(module.rank for module in experts.values())
    n_bytes = 4 * n_expert * rank * max(n_in, n_out)
    if n_bytes > MAX_STACKED_BYTES:
        raise UnsupportedAdapterError(
            f"{n_expert} experts filled up to rank {rank}, the largest for {base_name}, take "
            f"{n_bytes} bytes; expected at most {MAX_STACKED_BYTES}. Train the experts with one "
            "rank, or a smaller one."
        )
    factors = {
        expert: (module, scale_factor(module.scale, rank, alpha))
        for expert, module in experts.items()
    }
    return SingleExperts(first, base_name, n_expert, rank, n_in, n_out, factors)


class _Stacks:
    """The parameters of an adapter that stack experts, and which way round their A and B are."""

    def __init__(
        self, adapter: PeftAdapter, header: GgufHeader, modules: Sequence[PeftModule]
    ) -> None:
        self._adapter, self._header = adapter, header
        self._orders: dict[str, bool | None] = {}  # None: square, it may be either
        for module in modules:
            layer, _, stem = _place(module, header)
            self._orders[module.name] = self._order(module, layer, stem)

    def tensors(
        self, module: PeftModule, layer: int, stem: str, alpha: float
    ) -> list[StackedExperts]:
        """Give the tensors of the base that a parameter goes to: of gate_up_proj, two or one."""
        is_swapped = self._is_swapped(module)
        factor = scale_factor(module.scale, module.rank, alpha)
        found = []
        for base_name, rows in self._parts(module, layer, stem):
            _, n_out, n_in = _base_shape(module, self._header, base_name)
            found.append(StackedExperts(module, base_name, n_in, n_out, factor, rows, is_swapped))
        return found

    def _parts(self, module: PeftModule, layer: int, stem: str) -> list[tuple[str, Index | None]]:
        """Name the tensors of a parameter, and say which of its rows each takes."""
        if stem != "gate_up":
            return [(f"blk.{layer}.ffn_{stem}_exps.weight", None)]
        down = f"blk.{layer}.ffn_down_exps.weight"
        n_ff = _base_shape(module, self._header, down)[2]
        rows = np.arange(2 * n_ff)
        gate, up = rows[:n_ff], rows[n_ff:]
        if ARCH_FACTS[self._header.architecture].experts == "by turns":
            gate, up = rows[::2], rows[1::2]
        fused = f"blk.{layer}.ffn_gate_up_exps.weight"
        if fused in self._header.tensors:
            return [(fused, np.concatenate([gate, up]))]
        return [
            (f"blk.{layer}.ffn_gate_exps.weight", gate),
            (f"blk.{layer}.ffn_up_exps.weight", up),
        ]

    def _order(self, module: PeftModule, layer: int, stem: str) -> bool | None:
        """Tell by its shape whether the file's A writes the output; None if it may be either."""
        n_out, n_expert, n_in = 0, 0, 0
        for base_name, _ in self._parts(module, layer, stem):
            n_expert, n_part, n_in = _base_shape(module, self._header, base_name)
            n_out += n_part
        found = (module.n_expert, module.n_out, module.n_in)
        plain, swapped = (n_expert, n_out, n_in), (n_expert, n_in, n_out)
        if found != plain and (found != swapped or module.is_b_by_expert):
            raise AdapterMismatchError(
                f"{module.name} is for experts of shape {list(found)}, and the base's are "
                f"{list(plain)}."
            )
        return None if plain == swapped else found == swapped

    def _is_swapped(self, module: PeftModule) -> bool:
        own = False if module.is_b_by_expert else self._orders[module.name]
        if own is not None:
            return own
        if _version(self._adapter.config.version) >= _PEFT_OF_ONE_ORDER:
            return False
        # One PEFT wrote them all.
        others = {order for order in self._orders.values() if order is not None}
        if len(others) == 1:
            return others.pop()
        raise UnsupportedAdapterError(
            f"the experts of {module.name} are square, and peft_version is "
            f"{self._adapter.config.version!r} in its config; expected 0.19.1 or later, for "
            "earlier ones may have A and B the other way round. Load it with what trained it, "
            "merge it and train again, or set peft_version if it is later."
        )


def _version(text: str | None) -> tuple[int, ...]:
    """Give the numbers at the start of a version and whether it was released; () for no version."""
    match = re.match(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?", text or "")
    if match is None or text is None:
        return ()
    is_released = not re.match(r"\.?(dev|a|b|rc)", text[match.end() :])
    return (*(int(part or 0) for part in match.groups()), is_released)
