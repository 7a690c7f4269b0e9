"""Read adapter GGUFs, and check them against their base before a library sees them.

llama.cpp writes out of bounds where the number of experts differs, and drops norms silently.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

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
from qaflora_edge.formats.gguf import (
    DIVERGED,
    GgufHeader,
    TensorInfo,
    read_gguf_header,
    read_values,
)
from qaflora_edge.formats.inputs import open_input, reading

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
_EXPERTS = re.compile(r"blk\.\d+\.ffn_((gate|up|down|gate_up)_exps|(gate|up|down)_chexps)\.weight")
_NOT_MULTIPLIED = re.compile(r"(conv|conv1d|_norm|rel_b)$|_embd$|^rope_freqs$|^token_types$")
MAX_UNUSED_BYTES = 16 << 20  # of a file: its header, and what fills up between tensors
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


@lru_cache(maxsize=8192)  # the adapters of a bundle name the same modules
def target_of(base_name: str) -> str:
    """Give attn_q of blk.3.attn_q.weight, and output of output.weight."""
    return re.sub(r"^blk\.\d+\.", "", base_name).removesuffix(".weight")


@lru_cache(maxsize=8192)
def why_not_adapted(architecture: str, base_name: str) -> str:
    """Say why a LoRA on a tensor of a base would not count; "" where it does.

    base_name  such as blk.0.attn_q_a.weight
    """
    target = target_of(base_name)
    facts = ARCH_FACTS.get(architecture)
    is_multiplied = base_name == EMBEDDING or not _NOT_MULTIPLIED.search(target)
    if not is_multiplied or (facts and target in facts.bypassed):
        return f"llama.cpp computes without adapters for {architecture}"
    if not base_name.startswith(("blk.", "token_embd.", "output.")):
        return "belongs to no layer, so that no layer's weight applies"
    return ""


def read_adapter(
    header: GgufHeader, base: GgufHeader, *, checks_values: bool = True
) -> AdapterInfo:
    """Check an adapter by its header and its base's, and by its values unless told not to."""
    info = adapter_info(header)
    check_adapter(info, base)
    if checks_values:
        check_values(info)
    return info


def read_adapter_gguf(path: AnyPath) -> AdapterInfo:
    """Read an adapter GGUF. Raises as read_gguf_header and adapter_info do."""
    return adapter_info(read_gguf_header(path))


def adapter_info(header: GgufHeader) -> AdapterInfo:
    """Check that an adapter is whole in itself.

    Raises GgufFileError for no adapter, UnsupportedAdapterError for more than a plain LoRA.
    """
    alpha = _check_metadata(header)
    ranks = _ranks(header)
    n_unused = header.size_bytes - sum(tensor.n_bytes for tensor in header.tensors.values())
    if n_unused > MAX_UNUSED_BYTES:  # a file with holes takes no disk, and minutes to hash
        found = f"{n_unused} of its {header.size_bytes} bytes belong to no tensor"
        raise _wrong(header, found, f"at most {MAX_UNUSED_BYTES}")
    return AdapterInfo(
        path=header.path,
        architecture=header.architecture,
        alpha=alpha,
        rank=max(ranks.values()),
        ranks=ranks,
        targets=tuple(sorted(set(map(target_of, ranks)))),
        tensors=header.tensors,
    )


def check_adapter(info: AdapterInfo, header: GgufHeader) -> None:
    """Check that every module of an adapter fits the base.

    Raises AdapterMismatchError naming the tensor, UnsupportedAdapterError for what is ignored.
    """
    start = f"Cannot use adapter {info.path} with base {header.path}"
    other = "Use an adapter that was trained on this base."
    if info.architecture != header.architecture:
        raise AdapterMismatchError(
            f"{start}: the adapter is for architecture {info.architecture!r}, the base is "
            f"{header.architecture!r}. {other}"
        )
    for name in info.ranks:
        if why := why_not_adapted(header.architecture, name):
            raise UnsupportedAdapterError(
                f"{start}: it adapts {name}, which {why}; expected projections of the language "
                "model's layers, token_embd or output. Train without this module, or merge the "
                "adapter into its base."
            )
        is_tied = name == HEAD and HEAD not in header.tensors
        tensor = header.tensors.get(EMBEDDING if is_tied else name)
        a = info.tensors[f"{name}.lora_a"].shape
        b = info.tensors[f"{name}.lora_b"].shape
        shape = (*b[:-1], a[-1])
        if name == EMBEDDING:
            shape = (a[0], b[0])
        if tensor is None or shape != tensor.shape:
            there = "lacks it" if tensor is None else f"has {list(tensor.shape)}"
            raise AdapterMismatchError(
                f"{start}: it adapts {name} as shape {list(shape)}, and the base {there}; expected "
                f"equal shapes. {other}"
            )


def check_values(info: AdapterInfo) -> None:
    """Check that every value of an adapter is a finite number.

    Where one is not, the embedding reaches the base even at weight 0, for 0 times NaN is NaN.
    """
    with reading(info.path), open_input(info.path) as file:
        for tensor in info.tensors.values():
            values = read_values(info.path, tensor, file)
            if n_bad := np.count_nonzero(~np.isfinite(values)):
                raise GgufFileError(
                    f"Cannot use adapter {info.path}: {n_bad} of the {values.size} values of "
                    f"tensor {tensor.name} are NaN or infinite; expected finite numbers. {DIVERGED}"
                )


def read_pair(
    info: AdapterInfo, base_name: str, file: BinaryIO | None = None
) -> tuple[F32, F32, float]:
    """Read a module of an adapter: A [rank, n_in] and B [n_out, rank] as float32, and its scale.

    Of experts, A is [n_expert, rank, n_in] and B [n_expert, n_out, rank].

    base_name  the base's tensor, one of info.ranks
    file       of info.path, where it is open
    """
    a = read_values(info.path, info.tensors[f"{base_name}.lora_a"], file)
    b = read_values(info.path, info.tensors[f"{base_name}.lora_b"], file)
    return a, b, info.alpha / info.ranks[base_name]


def _wrong(
    header: GgufHeader,
    found: str,
    expected: str,
    advice: str = "Convert the adapter again.",
    error_type: type[QafloraError] = GgufFileError,
) -> QafloraError:
    return error_type(f"Cannot use adapter {header.path}: {found}; expected {expected}. {advice}")


def _check_metadata(header: GgufHeader) -> float:

    def found(key: str) -> str:
        value = header.metadata.get(key)
        return f"metadata field {key} is " + ("missing" if value is None else f"{value!r:.99}")

    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if header.metadata.get(key) != expected:
            advice = "Give an adapter GGUF, as `qaflora convert` writes it."
            raise _wrong(header, found(key), repr(expected), advice)
    if (key := "adapter.alora.invocation_tokens") in header.metadata:
        what = f"metadata field {key} makes it an activated LoRA"
        advice = "Train a plain LoRA."
        raise _wrong(header, what, "an adapter without it", advice, UnsupportedAdapterError)
    alpha = header.metadata.get(key := "adapter.lora.alpha")
    if not isinstance(alpha, float) or not math.isfinite(alpha) or alpha == 0.0:
        # llama.cpp 0c1e5709, llama-adapter.h get_scale: without alpha the scale is 1.
        raise _wrong(header, found(key), "a float other than 0")
    return alpha


def _ranks(header: GgufHeader) -> dict[str, int]:
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, info in header.tensors.items():
        match = _LORA_NAME.fullmatch(name)
        if match is None:
            found = f"it has tensor {name}, which a plain LoRA cannot represent"
            expected = "pairs of lora_a and lora_b only"
            advice = "Convert a plain LoRA."
            raise _wrong(header, found, expected, advice, UnsupportedAdapterError)
        pairs.setdefault(match["base"], {})[match["side"]] = info.shape
    if not pairs:
        raise _wrong(header, "it has no tensors", "pairs of lora_a and lora_b")
    for base, pair in pairs.items():
        if len(pair) == 1:
            raise _wrong(header, f"{base} has one half of a pair", "pairs of lora_a and lora_b")
        n_axis = 3 if _EXPERTS.fullmatch(base) else 2  # of experts, one axis counts them
        a = pair["a"]
        b = pair["b"]
        rank_axis = -1 if base == EMBEDDING else -2
        has_axes = len(a) == len(b) == n_axis
        if not has_axes or a[rank_axis] != b[-1] or a[:-2] != b[:-2]:
            found = f"{base}.lora_a is {list(a)} and lora_b {list(b)}"
            raise _wrong(header, found, f"{n_axis} dimensions of each, and one rank in both")
    return {base: pair["b"][-1] for base, pair in pairs.items()}
