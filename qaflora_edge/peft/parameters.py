"""LoRA on bare parameters (`target_parameters`): which parameter a pair of tensors belongs to.

PEFT wraps a module once for each of its parameters that are adapted, the first one innermost, and
names the tensors by the wrappers: with two, `experts.base_layer.lora_A` is of the first and
`experts.lora_A` of the second. Read in PEFT 0.21, tuners_utils.py _inject_parameters.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

from qaflora_edge.errors import PeftConfigError, UnsupportedAdapterError
from qaflora_edge.peft.config import PeftConfig

_WRAPPER = ".base_layer"
# Of a layer's experts, in the order in which transformers 5 gives them to a module.
STACKED = ("gate_up_proj", "down_proj")


def parameter_names(config: PeftConfig, modules: Iterable[str]) -> Mapping[str, str]:
    """Name the parameter of each module that has tensors and was adapted by `target_parameters`.

    modules  names as the file has them

    returns  module -> full name of the parameter, such as model.layers.0.mlp.experts.down_proj
    """
    if not config.parameters:
        return {}
    targets = frozenset(config.parameters)
    last_parts = sorted({target.rpartition(".")[2] for target in targets})
    wrapped: dict[str, list[str]] = {}
    for module in modules:
        wrapped.setdefault(_unwrapped(module), []).append(module)
    names = {}
    for owner, found in wrapped.items():
        named = [name for name in last_parts if _is_named(targets, f"{owner}.{name}")]
        parameters = _in_order(config, owner, named)
        if not parameters:
            continue
        if len(parameters) != len(found):
            raise PeftConfigError(
                f"Cannot use {config.path}: target_parameters names {len(parameters)} parameters "
                f"of module {owner} ({', '.join(parameters)}), and {len(found)} have tensors; "
                "expected as many. The two files do not belong together; save the adapter again."
            )
        innermost_first = sorted(found, key=len, reverse=True)
        for module, parameter in zip(innermost_first, parameters, strict=True):
            names[module] = f"{owner}.{parameter}"
    return names


def _unwrapped(module: str) -> str:
    while module.endswith(_WRAPPER):
        module = module.removesuffix(_WRAPPER)
    return module


def _in_order(config: PeftConfig, owner: str, named: Sequence[str]) -> list[str]:
    """Give the adapted parameters of a module in its own order."""
    if owner.rpartition(".")[2] != "experts":  # of a plain module, only its weight can be low-rank
        return [name for name in named if name == "weight"]
    for name in named:
        if name not in STACKED:
            raise UnsupportedAdapterError(
                f"Cannot use {config.path}: target_parameters names {name} of module {owner}; "
                f"expected {' or '.join(STACKED)} of experts, for others cannot be represented. "
                "Train without it, or merge the adapter into its base."
            )
    return sorted(named, key=STACKED.index)


def _is_named(targets: Collection[str], key: str) -> bool:
    """Tell whether one of the targets is the key, or the end of it at a dot."""
    parts = key.split(".")
    return any(".".join(parts[begin:]) in targets for begin in range(len(parts)))
