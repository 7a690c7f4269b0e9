"""One LoRA as its folder holds it, whoever wrote the folder."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qaflora_edge.arrays import F32
from qaflora_edge.errors import PeftConfigError, SafetensorsFileError, UnsupportedAdapterError
from qaflora_edge.formats.safetensors import StoredTensor
from qaflora_edge.peft.config import PeftConfig


@dataclass(frozen=True)
class PeftModule:
    """One projection of an adapter; its delta to the base's weight is scale * B A.

    For an embedding n_in is the vocabulary and the delta is transposed, as in PEFT.
    `is_transposed`: the file holds A as [n_in, rank] and B as [rank, n_out].
    `n_expert`: of a parameter that stacks experts, how many; A is then [n_expert * rank, n_in], one
    expert after the other, and B [n_out, rank * n_expert], the experts side by side in each rank.
    `is_b_by_expert`: B is [n_expert * n_out, rank] instead, one expert after the other, as in MLX.
    """

    name: str
    rank: int
    n_in: int
    n_out: int
    scale: float
    a: StoredTensor
    b: StoredTensor
    is_embedding: bool = False
    is_transposed: bool = False
    n_expert: int = 0
    is_b_by_expert: bool = False

    def read_a(self) -> F32:
        """returns  [rank, n_in]  float32, finite"""
        return self.a.read(transposed=self.is_transposed)

    def read_b(self) -> F32:
        """returns  [n_out, rank]  float32, finite"""
        return self.b.read(transposed=self.is_transposed)


@dataclass(frozen=True)
class PeftAdapter:
    """A checked folder; the values are read when asked for."""

    folder: Path
    config: PeftConfig
    modules: Mapping[str, PeftModule]

    @property
    def trained_on(self) -> str:
        """What its config says of its base, to stand at the end of a sentence."""
        name = self.config.base_name
        return f" (adapter_config.json says {name[:200]!r})" if name else ""


def check_pair(module: str, pair: Mapping[str, StoredTensor], parts: Sequence[str]) -> None:
    """Refuse a module that lacks one of the two parts of a LoRA, as they are named."""
    for part, missing in (parts, parts[::-1]):
        if missing not in pair:
            raise SafetensorsFileError(
                f"Cannot use {pair[part].path}: module {module} has lora_{part} but no "
                f"lora_{missing}; expected both. The file is incomplete; save the adapter again."
            )


def check_matrix(tensor: StoredTensor) -> None:
    """Refuse what is no matrix, such as LoRA on a convolution."""
    if tensor.n_bytes == 0:
        raise SafetensorsFileError(
            f"Cannot use {tensor.path}: tensor {tensor.name} is empty, of shape "
            f"{list(tensor.shape)}; expected a matrix. DeepSpeed ZeRO-3 and FSDP leave such files "
            "where the parts of a matrix were not gathered before saving: save the adapter again "
            "with them gathered, for ZeRO-3 with stage3_gather_16bit_weights_on_model_save."
        )
    if len(tensor.shape) != 2:
        raise UnsupportedAdapterError(
            f"Cannot use {tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}; "
            "expected a matrix. Only LoRA on linear layers and embeddings can be represented."
        )


_WRAPPER = ".base_layer"
# Of a layer's experts, in the order in which transformers 5 gives them to a module.
STACKED = ("gate_up_proj", "down_proj")


def parameter_names(config: PeftConfig, modules: Iterable[str]) -> Mapping[str, str]:
    """Name the parameter of each module that has tensors and was adapted by `target_parameters`.

    PEFT wraps a module once for each of its parameters that are adapted, the first one innermost,
    and names the tensors by the wrappers: with two, `experts.base_layer.lora_A` is of the first and
    `experts.lora_A` of the second. Read in PEFT 0.21, tuners_utils.py _inject_parameters.

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
