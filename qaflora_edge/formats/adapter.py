"""Read adapter GGUFs, and check them against their base before a library sees them.

llama.cpp writes out of bounds where the number of experts differs, and drops norms silently.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.errors import (
    AdapterMismatchError,
    GgufFileError,
    QafloraError,
    UnsupportedAdapterError,
)
from qaflora_edge.files import AnyPath
from qaflora_edge.formats.base import ARCH_FACTS
from qaflora_edge.formats.gguf import GgufHeader, TensorInfo, read_gguf_header, read_values

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
_EXPERTS = re.compile(r"blk\.\d+\.ffn_((gate|up|down|gate_up)_exps|(gate|up|down)_chexps)\.weight")
_NOT_MULTIPLIED = re.compile(r"(conv|conv1d|_norm|rel_b)$|_embd$|^rope_freqs$|^token_types$")
_LORA_NAME = re.compile(r"(?P<base>.+)\.lora_(?P<side>[ab])")


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter GGUF.

    rank     the largest of its modules; `ranks` has each by base tensor name
    targets  kinds of modules, sorted, such as attn_q, ffn_down, output
    tensors  name in the file -> shape in numpy order, type and place
    """

    path: Path
    architecture: str
    alpha: float
    rank: int
    ranks: Mapping[str, int]
    targets: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]


def module_kind(base_name: str) -> str:
    """Give attn_q of blk.3.attn_q.weight, and output of output.weight."""
    return re.sub(r"^blk\.\d+\.", "", base_name).removesuffix(".weight")


def why_not_adapted(architecture: str, base_name: str) -> str:
    """Say why a LoRA on a tensor of a base would not count; "" where it does.

    base_name  such as blk.0.attn_q_a.weight
    """
    kind, facts = module_kind(base_name), ARCH_FACTS.get(architecture)
    is_multiplied = base_name == EMBEDDING or not _NOT_MULTIPLIED.search(kind)
    if not is_multiplied or (facts and kind in facts.bypassed):
        return f"llama.cpp computes without adapters for {architecture}"
    if not base_name.startswith(("blk.", "token_embd.", "output.")):
        return "belongs to no layer, so that no layer's weight applies"
    return ""


def is_experts(base_name: str) -> bool:
    """Tell whether a tensor of a base stacks a layer's experts, which a router chooses from."""
    return _EXPERTS.fullmatch(base_name) is not None


def read_adapter(path: Path, header: GgufHeader, *, checks_values: bool = True) -> AdapterInfo:
    """Read an adapter GGUF and check it against its base, its values too unless told not to."""
    info = read_adapter_gguf(path)
    check_adapter(info, header)
    if checks_values:
        check_values(info)
    return info


def read_adapter_gguf(path: AnyPath) -> AdapterInfo:
    """Read an adapter GGUF and check that it is whole in itself.

    Raises InputFileError or GgufFileError when the file is damaged or no adapter,
    UnsupportedAdapterError when it is more than a plain LoRA.
    """
    header = read_gguf_header(path)
    _check_kind(header)
    pairs = _pair_tensors(header)
    ranks = {base: _rank(header, base, pair) for base, pair in pairs.items()}
    return AdapterInfo(
        path=header.path,
        architecture=header.architecture,
        alpha=_alpha(header),
        rank=max(ranks.values()),
        ranks=ranks,
        targets=tuple(sorted({module_kind(base) for base in pairs})),
        tensors=header.tensors,
    )


def check_adapter(info: AdapterInfo, header: GgufHeader) -> None:
    """Check that every module of an adapter fits the base.

    Raises AdapterMismatchError naming the tensor, UnsupportedAdapterError for what is ignored.
    """
    if info.architecture != header.architecture:
        raise AdapterMismatchError(
            f"Cannot use adapter {info.path} with base {header.path}: the adapter is for "
            f"architecture {info.architecture!r}, the base is {header.architecture!r}. "
            "Use an adapter that was trained on this base."
        )
    for base_name in info.ranks:
        _check_module(info, header, base_name)


def check_values(info: AdapterInfo) -> None:
    """Check that every value of an adapter is a finite number.

    Where one is not, the embedding reaches the base even at weight 0, for 0 times NaN is NaN.

    Raises GgufFileError naming the tensor.
    """
    for tensor in info.tensors.values():
        values = read_values(info.path, tensor)
        if n_bad := np.count_nonzero(~np.isfinite(values)):
            raise GgufFileError(
                f"Cannot use adapter {info.path}: {n_bad} of the {values.size} values of tensor "
                f"{tensor.name} are NaN or infinite; expected finite numbers. The training "
                "diverged or the file is corrupted; use an earlier checkpoint or fetch it again."
            )


def read_pair(info: AdapterInfo, base_name: str) -> tuple[F32, F32, float]:
    """Read a module of an adapter: A [rank, n_in] and B [n_out, rank] as float32, and its scale.

    Of experts, A is [n_expert, rank, n_in] and B [n_expert, n_out, rank].

    base_name  the base's tensor, one of info.ranks

    Raises InputFileError when the file cannot be read any more.
    """
    a, b = (read_values(info.path, info.tensors[f"{base_name}.lora_{side}"]) for side in "ab")
    return a, b, info.alpha / info.ranks[base_name]


def _wrong(
    header: GgufHeader,
    found: str,
    expected: str,
    advice: str = "Convert the adapter again.",
    kind: type[QafloraError] = GgufFileError,
) -> QafloraError:
    return kind(f"Cannot use adapter {header.path}: {found}; expected {expected}. {advice}")


def _check_kind(header: GgufHeader) -> None:
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        value = header.metadata.get(key)
        if value != expected:
            found = f"metadata field {key} is " + ("missing" if value is None else f"{value!r:.99}")
            advice = "Give an adapter GGUF, as `qaflora convert` writes it."
            raise _wrong(header, found, repr(expected), advice)
    if (key := "adapter.alora.invocation_tokens") in header.metadata:
        found, advice = f"metadata field {key} makes it an activated LoRA", "Train a plain LoRA."
        raise _wrong(header, found, "an adapter without it", advice, UnsupportedAdapterError)


def _alpha(header: GgufHeader) -> float:
    value = header.metadata.get("adapter.lora.alpha")
    if isinstance(value, float) and math.isfinite(value) and value != 0.0:
        return value
    # llama.cpp 0c1e5709, llama-adapter.h get_scale: without alpha the scale is 1.
    shown = "missing" if value is None else f"{value!r:.99}"
    raise _wrong(header, f"metadata field adapter.lora.alpha is {shown}", "a float other than 0")


def _pair_tensors(header: GgufHeader) -> dict[str, dict[str, TensorInfo]]:
    """Pair A and B by the base tensor's name."""
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for name, info in header.tensors.items():
        match = _LORA_NAME.fullmatch(name)
        if match is None:
            found = f"it has tensor {name}, which a plain LoRA cannot represent"
            expected, advice = "pairs of lora_a and lora_b only", "Convert a plain LoRA."
            raise _wrong(header, found, expected, advice, UnsupportedAdapterError)
        pairs.setdefault(match["base"], {})[match["side"]] = info
    halves = [base for base, pair in pairs.items() if len(pair) == 1]
    if halves or not pairs:
        found = f"{halves[0]} has one half of a pair" if halves else "it has no tensors"
        raise _wrong(header, found, "pairs of lora_a and lora_b")
    return pairs


def _rank(header: GgufHeader, base: str, pair: Mapping[str, TensorInfo]) -> int:
    """Give the rank of a module; A and B must agree on it."""
    n_axis = 3 if is_experts(base) else 2
    a, b = pair["a"].shape, pair["b"].shape
    rank_axis = -1 if base == EMBEDDING else -2
    if not len(a) == len(b) == n_axis or a[rank_axis] != b[-1] or a[:-2] != b[:-2]:
        found = f"{base}.lora_a is {list(a)} and lora_b {list(b)}"
        raise _wrong(header, found, f"{n_axis} dimensions of each, and one rank in both")
    return b[-1]


def _check_module(info: AdapterInfo, header: GgufHeader, base_name: str) -> None:
    start = f"Cannot use adapter {info.path} with base {header.path}: it adapts {base_name}"
    if why := why_not_adapted(header.architecture, base_name):
        raise UnsupportedAdapterError(
            f"{start}, which {why}; expected projections of the language model's layers, "
            "token_embd or output. Train without this module, or merge the adapter into its base."
        )
    tensor = header.tensors.get(base_name)
    if tensor is None and base_name == HEAD:
        tensor = header.tensors.get(EMBEDDING)  # a tied head
    a, b = (info.tensors[f"{base_name}.lora_{side}"].shape for side in "ab")
    shape = (a[0], b[0]) if base_name == EMBEDDING else (*b[:-1], a[-1])
    if tensor is None or shape != tensor.shape:
        there = "lacks it" if tensor is None else f"has {list(tensor.shape)}"
        raise AdapterMismatchError(
            f"{start} as shape {list(shape)}, and the base {there}; expected equal shapes. "
            "Use an adapter that was trained on this base."
        )
