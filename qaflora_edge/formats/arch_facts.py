"""What is known of each architecture of llama.cpp, out of `data/architectures.json`.

Read in llama.cpp 0c1e5709: conversion/*.py (every `modify_tensors`), src/models/*.cpp and
src/llama-arch.cpp. The tests read it again, and compare the file with docs/convert.md.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qaflora_edge.files import package_data


@dataclass(frozen=True, kw_only=True)
class ArchFacts:
    """One architecture: it has a layout, or adapters of it are refused.

    layout    how its modules lie in a GGUF: a function of convert.layouts, or fused stems and the
              two halves of each; it was read, and is proven by the tests
    refused   why adapters are not converted for it, by the key of a reason
    experts   for adapters of experts, where one parameter of HF holds gate and up: whether all rows
              of gate come first ("in halves") or they take turns ("by turns"); "" if refused
    unmapped  names that gguf's map lacks, for llama.cpp's converter takes these modules apart
              before it looks them up: HF's name within a block -> the stem a layout is asked for
    scaled    tensors that the converter may have scaled, where the GGUF does not say so
    bypassed  kinds of tensors that llama.cpp multiplies without looking for an adapter: every
              ggml_mul_mat of a layer's tensor that does not go through build_lora_mm
    heads     "equal": its graph takes heads for equally wide in queries and values
              (GGML_ASSERT(n_embd_head == n_embd_head_k())); "plain": and its projections have rows
              for heads alone; "whole": and rope turns all of a head (n_embd_head == n_rot)
    has_rope  by llama-model.cpp llama_model_rope_type, or another field that turns rope off
    """

    layout: str | Mapping[str, tuple[str, str]] = ""
    refused: str = ""
    experts: str = ""
    unmapped: Mapping[str, str] = field(default_factory=dict)
    scaled: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()
    heads: str = ""
    has_rope: bool = True


_DATA: dict[str, Any] = json.loads(package_data("data/architectures.json").read_text("utf-8"))
REASONS: Mapping[str, str] = _DATA["reasons"]  # key -> why, in words
# general.architecture -> its facts
ARCH_FACTS: Mapping[str, ArchFacts] = {
    name: ArchFacts(**facts) for name, facts in _DATA["architectures"].items()
}


_NOT_MULTIPLIED = re.compile(r"(conv|conv1d|_norm|rel_b)$|_embd$|^rope_freqs$|^token_types$")


def module_kind(base_name: str) -> str:
    """Give attn_q of blk.3.attn_q.weight, and output of output.weight."""
    return re.sub(r"^blk\.\d+\.", "", base_name).removesuffix(".weight")


def is_bypassed(architecture: str, base_name: str) -> bool:
    """Tell whether llama.cpp would load a LoRA on a tensor of a base without a word and ignore it.

    base_name  such as blk.0.attn_q_a.weight
    """
    kind = module_kind(base_name)
    if architecture in ARCH_FACTS and kind in ARCH_FACTS[architecture].bypassed:
        return True
    return base_name != "token_embd.weight" and _NOT_MULTIPLIED.search(kind) is not None
