"""What is known of each architecture, and what is checked of a base before llama.cpp loads it.

`data/architectures.json` was read in llama.cpp 0c1e5709: conversion/*.py (every `modify_tensors`),
src/models/*.cpp and src/llama-arch.cpp. The tests read it again, and compare the file with
docs/convert.md.

llama.cpp's loader refuses most of what is wrong in a base. `check_base` refuses what would end the
process or never finish. Where a limit is llama.cpp's own, the place is named (all of 0c1e5709).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from qaflora_edge.errors import GgufFileError
from qaflora_edge.files import package_data
from qaflora_edge.formats.gguf import (
    NO_FLOATS,
    GgufHeader,
    SkippedArray,
    brief,
    read_array,
    read_texts,
)


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


MAX_LAYERS = 512  # llama-hparams.h LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # llama-hparams.h LLAMA_MAX_EXPERTS
MAX_GATING = 4  # llama-hparams.h llama_expert_gating_func_type
MAX_WINDOW = 1 << 30  # tokens; an int32 that padding must not overflow
LEAST_ALIGNMENT = 32  # ggml-impl.h TENSOR_ALIGNMENT, of what is mapped into memory
MAX_TOKENS = 1 << 21  # several times the largest vocabularies, which are read whole
TOKENS = "tokenizer.ggml.tokens"
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
BYTE_TOKEN = 6  # llama.h LLAMA_TOKEN_TYPE_BYTE
_BYTE = re.compile(rb"<0x[0-9A-Fa-f]{2}>")
_ATTENTION = re.compile(r"blk\.(?P<layer>\d+)\.attn_(?P<part>q|k|v|qkv)\.weight")


def _with_heads(*kinds: str) -> frozenset[str]:
    return frozenset(name for name, facts in ARCH_FACTS.items() if facts.heads in kinds)


WHOLE_ROPE, PLAIN_HEADS = _with_heads("whole"), _with_heads("whole", "plain")
EQUAL_HEADS = _with_heads("whole", "plain", "equal")
NO_ROPE = frozenset(name for name, facts in ARCH_FACTS.items() if not facts.has_rope)


def check_base(header: GgufHeader) -> None:
    """Check what llama.cpp relies on without looking. Raises GgufFileError naming the field."""
    _check_layers(header)
    _check_experts(header)
    _check_heads(header)
    for key, value in header.metadata.items():
        is_right = isinstance(value, int | float) and 0 <= value < math.inf
        if key.endswith("epsilon") and not is_right:
            _fail(header, key, value, "a finite number from 0 on")
    _check_range(header, "attention.sliding_window", 0, MAX_WINDOW)
    _check_tensors(header)
    _check_tokens(header)


def _fail(header: GgufHeader, key: str, found: object, expected: str) -> NoReturn:
    raise GgufFileError(
        f"Cannot use {header.path} as base: {key} is {brief(found)}; expected {expected}, for "
        "llama.cpp would end the process over it. Fetch or convert the model again."
    )


def _numbers(header: GgufHeader, field: str) -> tuple[object, ...]:
    """Give the values of a field, one or one a layer; none where it is missing."""
    value = header.metadata.get(f"{header.architecture}.{field}")
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _number(header: GgufHeader, field: str, default: int) -> int:
    """Give the first value of a field; the loader refuses what is no whole number."""
    (value, *_) = (*_numbers(header, field), default)
    return value if isinstance(value, int) else default


def _check_range(header: GgufHeader, field: str, least: int, most: int) -> None:
    for value in _numbers(header, field):
        if isinstance(value, int) and not least <= value <= most:
            key = f"{header.architecture}.{field}"
            _fail(header, key, value, f"a number from {least} to {most}")


def _check_layers(header: GgufHeader) -> None:
    _check_range(header, "block_count", 1, MAX_LAYERS)
    _check_range(header, "nextn_predict_layers", 0, header.n_layer - 1)
    _check_range(header, "n_deepstack_layers", 0, header.n_layer)


def _check_experts(header: GgufHeader) -> None:
    """Check numbers of experts, as llama-model.cpp load_hparams asserts."""
    _check_range(header, "expert_count", 0, MAX_EXPERTS)
    n_expert = _number(header, "expert_count", 0)
    _check_range(header, "expert_used_count", 0, n_expert)
    used = [value for value in _numbers(header, "expert_used_count") if isinstance(value, int)]
    if n_expert > 0 and max(used, default=0) < 1:
        key = f"{header.architecture}.expert_used_count"
        _fail(header, key, used[0] if used else "missing", f"1 to {n_expert} experts")
    _check_range(header, "expert_gating_func", 0, MAX_GATING)
    _check_range(header, "expert_group_count", 0, max(0, n_expert - 1))
    n_group = _number(header, "expert_group_count", 0)
    if n_group > 1:
        if n_expert % n_group:
            key = f"{header.architecture}.expert_group_count"
            _fail(header, key, n_group, f"a divisor of {n_expert}, the number of experts")
        _check_range(header, "expert_group_used_count", 1, n_group - 1)


def _check_heads(header: GgufHeader) -> None:
    """Check the widths of a head's query, value and rotated part, and rope's scaling."""
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "linear")
    if scaling not in ROPE_SCALINGS:
        key = f"{header.architecture}.rope.scaling.type"
        _fail(header, key, scaling, f"one of {', '.join(ROPE_SCALINGS)}")
    key = f"{header.architecture}.attention.head_count"
    if header.architecture in PLAIN_HEADS and header.metadata.get(key) in (None, 0):
        _fail(header, key, header.metadata.get(key, "missing"), "the number of heads")
    n_head = _number(header, "attention.head_count", 0)
    if n_head <= 0:
        return  # no attention in the first layer: the loader takes no widths
    n_key = n_value = header.n_embd // n_head
    if not _numbers(header, "attention.key_length") and header.n_embd % n_head:
        _fail(header, key, n_head, f"a divisor of {header.n_embd}, the width of the model")
    for suffix in ("", "_swa"):
        n_key = _number(header, f"attention.key_length{suffix}", n_key)
        n_value = _number(header, f"attention.value_length{suffix}", n_value)
        if n_key < 1:
            _fail(header, key, n_head, f"at most {header.n_embd}, the width of the model")
        if n_value != n_key and header.architecture in EQUAL_HEADS:
            key = f"{header.architecture}.attention.value_length{suffix}"
            _fail(header, key, n_value, f"{n_key}, as wide as a head's query")
        _check_rotated(header, f"rope.dimension_count{suffix}", n_key)
    sections = _numbers(header, "rope.dimension_sections")
    _check_range(header, "rope.dimension_sections", 0, n_key)
    if sum(section for section in sections if isinstance(section, int)) > n_key:
        key = f"{header.architecture}.rope.dimension_sections"
        _fail(header, key, sections, f"{n_key} together at most, the width of a head")
    _check_shared(header)
    if header.architecture in PLAIN_HEADS:
        _check_projections(header, _number(header, "attention.key_length", header.n_embd // n_head))


def _at(values: tuple[object, ...], layer: int) -> int | None:
    """Give the value for a layer, of a field with one value or one a layer."""
    value = values[0] if len(values) == 1 else values[layer] if layer < len(values) else None
    return value if isinstance(value, int) else None


def _check_shared(header: GgufHeader) -> None:
    """Check that every key belongs to equally many queries."""
    queries = _numbers(header, "attention.head_count")
    keys = _numbers(header, "attention.head_count_kv")
    for layer in range(max(len(queries), len(keys))):
        n_head, n_head_kv = _at(queries, layer), _at(keys, layer)
        if n_head and n_head_kv is not None and n_head_kv != 0 and n_head % n_head_kv:
            key = f"{header.architecture}.attention.head_count_kv"
            _fail(header, key, n_head_kv, f"a divisor of {n_head}, the number of heads")


def _check_projections(header: GgufHeader, n_key: int) -> None:
    """Check that projections have rows for every head; the loader checks only some."""
    queries = _numbers(header, "attention.head_count")
    keys = _numbers(header, "attention.head_count_kv") or queries
    for tensor in header.tensors.values():
        match = _ATTENTION.fullmatch(tensor.name)
        if match is None:
            continue
        n_head, n_head_kv = (_at(values, int(match["layer"])) for values in (queries, keys))
        if n_head is None or n_head_kv is None:
            continue  # the loader refuses what is no number for each layer
        n = {"q": n_head, "k": n_head_kv, "v": n_head_kv, "qkv": n_head + 2 * n_head_kv}
        expected = n[match["part"]] * n_key
        if tensor.shape[0] != expected:
            what = f"{expected}, for heads of {n_key} each"
            _fail(header, f"the number of rows of {tensor.name}", tensor.shape[0], what)


def _check_rotated(header: GgufHeader, field: str, n_key: int) -> None:
    key = f"{header.architecture}.{field}"
    for n_rotary in _numbers(header, field):
        if not isinstance(n_rotary, int):
            continue
        if header.architecture in WHOLE_ROPE and n_rotary != n_key:
            _fail(header, key, n_rotary, f"{n_key}, the width of a head")
        if n_rotary == 0 and header.architecture in NO_ROPE:
            continue
        if not 2 <= n_rotary <= n_key or n_rotary % 2:
            _fail(header, key, n_rotary, f"an even number from 2 to {n_key}, the width of a head")


def _check_tensors(header: GgufHeader) -> None:
    alignment = header.metadata.get("general.alignment", LEAST_ALIGNMENT)
    if isinstance(alignment, int) and alignment < LEAST_ALIGNMENT:
        _fail(header, "general.alignment", alignment, f"at least {LEAST_ALIGNMENT}")
    for tensor in header.tensors.values():
        kind = tensor.ggml_type
        if tensor.name == "d2t" or "tid2eid" in tensor.name:
            continue  # tables of token ids
        if len(tensor.shape) == 1 and kind != GGMLQuantizationType.F32:
            _fail(header, f"the type of tensor {tensor.name}", kind.name, "F32, as of every vector")
        if kind in NO_FLOATS:
            _fail(header, f"the type of tensor {tensor.name}", kind.name, "a type of weights")


def _check_tokens(header: GgufHeader) -> None:
    """Check that every token has a text of its own: llama-vocab.cpp asserts it."""
    array = header.metadata.get(TOKENS)
    if not isinstance(array, SkippedArray):
        return  # the loader refuses a vocabulary that is none
    if array.length > MAX_TOKENS:
        _fail(header, f"the length of {TOKENS}", array.length, f"at most {MAX_TOKENS}")
    # The loader gives those without a text a name, by their number.
    texts = [
        text or b"[EMPTY_%d]" % index for index, text in enumerate(read_texts(header.path, array))
    ]
    _check_bytes(header, texts)
    if len(set(texts)) == len(texts):
        return
    seen: set[bytes] = set()
    for index, text in enumerate(texts):
        if text in seen:
            shown = text.decode("utf-8", "replace")
            _fail(header, f"{TOKENS}[{index}]", shown, "a text that no other token has")
        seen.add(text)


def _check_bytes(header: GgufHeader, texts: list[bytes]) -> None:
    """Check the tokens of single bytes: llama-vocab.cpp token_to_byte and byte_to_token."""
    model = header.metadata.get("tokenizer.ggml.model")
    for index in np.flatnonzero(_token_types(header)[: len(texts)] == BYTE_TOKEN):
        if model == "bert" or not _BYTE.fullmatch(texts[index]):
            shown = texts[index].decode("utf-8", "replace")
            _fail(header, f"{TOKENS}[{index}], of type byte,", shown, "a name such as <0x0A>")
    if model == "llama":  # what it has no token for is spelled in bytes
        known = set(texts)
        for byte in range(256):
            if b"<0x%02X>" % byte not in known and bytes([byte]) not in known:
                _fail(header, TOKENS, f"without <0x{byte:02X}>", "a token for every byte")


def _token_types(header: GgufHeader) -> NDArray[np.int64]:
    """returns  [n]  llama.h llama_token_type; empty where the loader refuses them, or has none"""
    types = header.metadata.get("tokenizer.ggml.token_type", ())
    if isinstance(types, SkippedArray) and types.n_bytes == 4 * types.length:
        return np.frombuffer(read_array(header.path, types), "<i4").astype(np.int64)
    is_numbers = isinstance(types, tuple) and all(isinstance(each, int) for each in types)
    return np.array(types if is_numbers else (), np.int64)
