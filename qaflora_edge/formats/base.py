"""Facts about architectures, and checks of a base before llama.cpp loads it.

`data/architectures.json` was read in llama.cpp 0c1e5709: conversion/*.py, src/models/*.cpp and
src/llama-arch.cpp. Its loader refuses most damaged bases; `check_base` what ends or hangs us.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
from gguf.constants import GGMLQuantizationType

from qaflora_edge.errors import BundleError, GgufFileError, changed_file
from qaflora_edge.files import AnyPath, package_data
from qaflora_edge.formats.bundle import BundleText
from qaflora_edge.formats.gguf import STRING, U64, GgufHeader, RawArray, read_gguf_header
from qaflora_edge.formats.inputs import Json


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


_TEXT = package_data("data/architectures.json").read_text("utf-8")
_DATA: Json = json.loads(_TEXT)
REASONS: Mapping[str, str] = _DATA["reasons"]  # key -> why, in words
# general.architecture -> its facts
ARCH_FACTS: Mapping[str, ArchFacts] = {
    name: ArchFacts(**facts) for name, facts in _DATA["architectures"].items()
}

# Limits of llama.cpp 0c1e5709, and ours where no place is named.
MAX_LAYERS = 512  # llama-hparams.h LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # llama-hparams.h LLAMA_MAX_EXPERTS
MAX_GATING = 4  # llama-hparams.h llama_expert_gating_func_type
MAX_WINDOW = 1 << 30  # tokens; an int32 that padding must not overflow
LEAST_ALIGNMENT = 32  # ggml-impl.h TENSOR_ALIGNMENT, of what is mapped into memory
MAX_TOKENS = 1 << 21  # several times the largest vocabularies, which are read whole
TOKENS = "tokenizer.ggml.tokens"
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
RECORDED = ("architecture", "n_layer", "n_embd", "n_vocab")  # in bundle.json
BYTE_TOKEN = 6  # llama.h LLAMA_TOKEN_TYPE_BYTE
# Types of numbers that are not turned into floats, ggml.c type_traits.
NO_FLOATS = tuple(
    GGMLQuantizationType[name] for name in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")
)
_BYTE = re.compile(rb"<0x[0-9A-Fa-f]{2}>")


def read_base(path: AnyPath) -> GgufHeader:
    """Read the header of a base. Raises as read_gguf_header and check_base do."""
    header = read_gguf_header(path)
    check_base(header)
    return header


def check_base(header: GgufHeader, *, checks_tokens: bool = True) -> None:
    """Check what llama.cpp relies on without looking. Raises GgufFileError naming the field.

    To load the file in a child process first would not do: llama.cpp's assertions name a line of
    its source and no field, some files end the process only when it decodes, and some hang it.
    """
    facts = ARCH_FACTS.get(header.architecture, ArchFacts())
    base = _Base(header, facts)
    base.check_ranges()
    base.check_experts()
    base.check_heads()
    base.check_layers()
    base.check_tensors()
    if checks_tokens:
        base.check_tokens()


def check_record(text: BundleText, header: GgufHeader) -> None:
    """Compare what bundle.json says of the base with the header of its file."""
    for key in RECORDED:
        found = getattr(text.base, key)
        expected = getattr(header, key)
        if found != expected:
            raise BundleError(
                f"Cannot use {text.where}: field base.{key} is {found}, expected {expected} as in "
                f"{header.path}. Create the bundle again with `qaflora bundle create`."
            )


@dataclass(frozen=True)
class _Base:
    """Fields of a base's architecture; the loader refuses those that are no numbers."""

    header: GgufHeader
    facts: ArchFacts

    @property
    def has_plain_rows(self) -> bool:
        """Whether its projections have rows for heads alone."""
        return self.facts.heads in ("whole", "plain")

    def fail(self, field: str, found: object, expected: str) -> NoReturn:
        """Refuse the base for a field of its architecture."""
        self.refuse(f"{self.header.architecture}.{field}", found, expected)

    def refuse(self, key: str, found: object, expected: str) -> NoReturn:
        raise GgufFileError(
            f"Cannot use {self.header.path} as base: {key} is {found!r:.99}; expected {expected}, "
            "for llama.cpp would end the process over it. Fetch or convert the model again."
        )

    def numbers(self, field: str) -> list[int]:
        """Give the numbers of a field, one or one a layer; none where it is missing."""
        value = self.header.metadata.get(f"{self.header.architecture}.{field}")
        values = value if isinstance(value, tuple) else (value,)
        return [value for value in values if isinstance(value, int)]

    def number(self, field: str, default: int) -> int:
        numbers = self.numbers(field)
        if numbers:
            return numbers[0]
        return default

    def check_range(self, field: str, least: int, most: int) -> None:
        for value in self.numbers(field):
            if not least <= value <= most:
                self.fail(field, value, f"a number from {least} to {most}")

    def check_ranges(self) -> None:
        """Check fields with a fixed range, as llama-model.cpp load_hparams asserts."""
        self.check_range("block_count", 1, MAX_LAYERS)
        self.check_range("nextn_predict_layers", 0, self.header.n_layer - 1)
        self.check_range("n_deepstack_layers", 0, self.header.n_layer)
        self.check_range("expert_count", 0, MAX_EXPERTS)
        self.check_range("expert_gating_func", 0, MAX_GATING)
        self.check_range("attention.sliding_window", 0, MAX_WINDOW)
        for key, value in self.header.metadata.items():
            is_right = isinstance(value, int | float) and 0 <= value < math.inf
            if key.endswith("epsilon") and not is_right:
                self.refuse(key, value, "a finite number from 0 on")

    def check_experts(self) -> None:
        """Check numbers of experts, as llama-model.cpp load_hparams asserts."""
        n_expert = self.number("expert_count", 0)
        self.check_range("expert_used_count", 0, n_expert)
        used = self.numbers("expert_used_count")
        if n_expert > 0 and max(used, default=0) < 1:
            found = used[0] if used else "missing"
            self.fail("expert_used_count", found, f"1 to {n_expert} experts")
        self.check_range("expert_group_count", 0, max(0, n_expert - 1))
        n_group = self.number("expert_group_count", 0)
        if n_group > 1:
            if n_expert % n_group:
                expected = f"a divisor of {n_expert}, the number of experts"
                self.fail("expert_group_count", n_group, expected)
            self.check_range("expert_group_used_count", 1, n_group - 1)

    def check_heads(self) -> None:
        """Check the widths of a head's query, value and rotated part, and rope's scaling."""
        n_embd = self.header.n_embd
        heads = "attention.head_count"
        scaling_key = f"{self.header.architecture}.rope.scaling.type"
        scaling = self.header.metadata.get(scaling_key, "none")
        if scaling not in ROPE_SCALINGS:
            self.refuse(scaling_key, scaling, f"one of {', '.join(ROPE_SCALINGS)}")
        counts = self.numbers(heads)
        if self.has_plain_rows and counts in ([], [0]):
            shown: object = "missing"
            if counts:
                shown = counts[0]
            self.fail(heads, shown, "the number of heads")
        n_head = self.number(heads, 0)
        if n_head <= 0:
            return  # no attention in the first layer: the loader takes no widths
        n_key = n_embd // n_head
        n_value = n_key
        if not self.numbers("attention.key_length") and n_embd % n_head:
            self.fail(heads, n_head, f"a divisor of {n_embd}, the width of the model")
        for suffix in ("", "_swa"):
            n_key = self.number(f"attention.key_length{suffix}", n_key)
            n_value = self.number(f"attention.value_length{suffix}", n_value)
            if n_key < 1:
                self.fail(heads, n_head, f"at most {n_embd}, the width of the model")
            if n_value != n_key and self.facts.heads:
                expected = f"{n_key}, as wide as a head's query"
                self.fail(f"attention.value_length{suffix}", n_value, expected)
            self.check_rotated(f"rope.dimension_count{suffix}", n_key)
        self.check_range("rope.dimension_sections", 0, n_key)
        sections = self.numbers("rope.dimension_sections")
        if sum(sections) > n_key:
            expected = f"{n_key} together at most, the width of a head"
            self.fail("rope.dimension_sections", sections, expected)

    def check_rotated(self, field: str, n_key: int) -> None:
        for n_rotary in self.numbers(field):
            if self.facts.heads == "whole" and n_rotary != n_key:
                self.fail(field, n_rotary, f"{n_key}, the width of a head")
            if n_rotary == 0 and not self.facts.has_rope:
                continue
            if not 2 <= n_rotary <= n_key or n_rotary % 2:
                expected = f"an even number from 2 to {n_key}, the width of a head"
                self.fail(field, n_rotary, expected)

    def check_layers(self) -> None:
        """Check that each key belongs to equally many queries, and projections have a head's rows.

        The loader checks only some.
        """
        queries = "attention.head_count"
        keys = f"{queries}_kv" if self.numbers(f"{queries}_kv") else queries
        n_first = self.number(queries, 0)
        n_key = self.number("attention.key_length", self.header.n_embd // max(n_first, 1))
        by_layer = zip(self.by_layer(queries), self.by_layer(keys), strict=False)
        for layer, (n_head, n_head_kv) in enumerate(by_layer):
            if n_head and n_head_kv and n_head % n_head_kv:
                self.fail(keys, n_head_kv, f"a divisor of {n_head}, the number of heads")
            if n_first > 0 and self.has_plain_rows:
                block = f"blk.{layer}.attn"
                self.check_rows(f"{block}_q.weight", n_head, n_key)
                self.check_rows(f"{block}_k.weight", n_head_kv, n_key)
                self.check_rows(f"{block}_v.weight", n_head_kv, n_key)
                self.check_rows(f"{block}_qkv.weight", n_head + 2 * n_head_kv, n_key)

    def by_layer(self, field: str) -> list[int]:
        """Give the number of a field for each layer, as far as the file says it."""
        numbers = self.numbers(field)
        if len(numbers) == 1:
            return numbers * self.header.n_layer
        return numbers

    def check_rows(self, name: str, n_head: int, n_key: int) -> None:
        tensor = self.header.tensors.get(name)
        n_row = n_head * n_key
        if tensor is not None and tensor.shape[0] != n_row:
            field = f"the number of rows of {name}"
            self.refuse(field, tensor.shape[0], f"{n_row}, for heads of {n_key} each")

    def check_tensors(self) -> None:
        """Check the types of tensors, and that they lie as they are mapped into memory."""
        alignment = self.header.metadata.get("general.alignment", LEAST_ALIGNMENT)
        if isinstance(alignment, int) and alignment < LEAST_ALIGNMENT:
            self.refuse("general.alignment", alignment, f"at least {LEAST_ALIGNMENT}")
        for tensor in self.header.tensors.values():
            tensor_type = tensor.ggml_type
            if tensor.name == "d2t" or "tid2eid" in tensor.name:
                continue  # tables of token ids
            if len(tensor.shape) == 1 and tensor_type != GGMLQuantizationType.F32:
                self.refuse(
                    f"the type of tensor {tensor.name}", tensor_type.name, "F32, as of every vector"
                )
            if tensor_type in NO_FLOATS:
                self.refuse(
                    f"the type of tensor {tensor.name}", tensor_type.name, "a type of weights"
                )

    def check_tokens(self) -> None:
        """Check that every token has a text of its own: llama-vocab.cpp asserts it."""
        array = self.header.metadata.get(TOKENS)
        if not isinstance(array, RawArray) or array.item_type != STRING:
            return  # the loader refuses it
        if array.length > MAX_TOKENS:
            self.refuse(f"the length of {TOKENS}", array.length, f"at most {MAX_TOKENS}")
        data = self.header.read_array(array)
        types = self.header.metadata.get("tokenizer.ggml.token_type")  # llama.h llama_token_type
        if isinstance(types, RawArray) and types.n_bytes == 4 * types.length:
            type_data = self.header.read_array(types)
            types = tuple(np.frombuffer(type_data, "<i4").tolist())
        tokens: dict[bytes, int] = {}
        at = 0
        for token in range(array.length):
            if at + U64.size > len(data):
                raise changed_file(self.header.path, GgufFileError)
            (n_bytes,) = U64.unpack_from(data, at)
            at += U64.size + n_bytes
            # The loader names those without a text.
            text = data[at - n_bytes : at] or b"[EMPTY_%d]" % token
            if tokens.setdefault(text, token) != token:
                shown = text.decode("utf-8", "replace")
                self.refuse(f"{TOKENS}[{token}]", shown, "a text that no other token has")
        if not isinstance(types, tuple):
            types = ()
        self.check_bytes(tokens, types)

    def check_bytes(self, tokens: Mapping[bytes, int], types: tuple[object, ...]) -> None:
        """Check the tokens of single bytes: llama-vocab.cpp token_to_byte and byte_to_token."""
        model = self.header.metadata.get("tokenizer.ggml.model")
        for token, (text, token_type) in enumerate(zip(tokens, types, strict=False)):
            if token_type == BYTE_TOKEN and (model == "bert" or not _BYTE.fullmatch(text)):
                shown = text.decode("utf-8", "replace")
                self.refuse(f"{TOKENS}[{token}], of type byte,", shown, "a name such as <0x0A>")
        if model == "llama":  # what it has no token for is spelled in bytes
            for byte in range(256):
                if b"<0x%02X>" % byte not in tokens and bytes([byte]) not in tokens:
                    self.refuse(TOKENS, f"without <0x{byte:02X}>", "a token for every byte")
