"""Bases that llama.cpp would abort over are refused before it sees them.

That it does abort over such files is what `make fuzz TARGETS=model` tries, in child processes.
"""

import struct
from pathlib import Path
from typing import Any

import pytest
import tiny
from fuzz.mutate import Gguf
from refusals import refused

from qaflora_edge.backend.model import shared_model
from qaflora_edge.errors import GgufFileError
from qaflora_edge.formats import base
from qaflora_edge.formats.base import read_base

U32, F32, STRING, ARRAY = 4, 6, 8, 9
TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"


def write_base(path: Path, arch: str = "llama", **options: Any) -> Path:
    small = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_head_kv": 1, "n_ff": 32}
    return tiny.write_tiny_base(path, arch, **{**small, **options}).path


def stored(value: Any) -> tuple[int, bytes]:
    """The type of a metadata value, and its bytes."""
    if isinstance(value, float):
        return F32, struct.pack("<f", value)
    if isinstance(value, str):
        return STRING, struct.pack("<Q", len(value.encode())) + value.encode()
    if isinstance(value, int):
        return U32, struct.pack("<I", value)
    kinds = {stored(item)[0] for item in value}
    (kind,) = kinds
    items = b"".join(stored(item)[1] for item in value)
    return ARRAY, struct.pack("<IQ", kind, len(value)) + items


def change(path: Path, **fields: Any) -> Path:
    """Set fields of a base, of its architecture where they begin with `arch.`; None removes one."""
    parts = Gguf(path.read_bytes())
    arch = next(value[8:] for key, _, value in parts.fields if key == b"general.architecture")
    for name, value in fields.items():
        key = name.replace("arch.", arch.decode() + ".").encode()
        parts.fields = [field for field in parts.fields if field[0] != key]
        if value is not None:
            parts.fields.append([key, *stored(value)])
    path.write_bytes(parts.join())
    return path


# architecture, fields, the field that the message names, what it finds and what it expects
REFUSED: dict[str, tuple[str, dict[str, Any], str, str, str]] = {
    "layers": ("llama", {"arch.block_count": 600}, "llama.block_count", "600", "a number from 1"),
    "predicted layers": ("llama", {"arch.nextn_predict_layers": 1},
                         "llama.nextn_predict_layers", "1", "a number from 0 to 0"),
    "experts without use": ("llama", {"arch.expert_count": 4},
                            "llama.expert_used_count", "'missing'", "1 to 4 experts"),
    "more used than there are": ("llama", {"arch.expert_count": 2, "arch.expert_used_count": 3},
                                 "llama.expert_used_count", "3", "a number from 0 to 2"),
    "many experts": ("llama", {"arch.expert_count": 5000},
                     "llama.expert_count", "5000", "a number from 0 to 1024"),
    "gating": ("qwen2", {"arch.expert_gating_func": 56},
               "qwen2.expert_gating_func", "56", "a number from 0 to 4"),
    "groups": ("llama", {"arch.expert_count": 8, "arch.expert_used_count": 2,
                         "arch.expert_group_count": 3},
               "llama.expert_group_count", "3", "a divisor of 8, the number of experts"),
    "scaling": ("llama", {"arch.rope.scaling.type": "x"},
                "llama.rope.scaling.type", "'x'", "one of none, linear, yarn, longrope"),
    "no heads": ("qwen2", {"arch.attention.head_count": None},
                 "qwen2.attention.head_count", "'missing'", "the number of heads"),
    "heads of no width": ("llama", {"arch.attention.head_count": 62,
                                    "arch.attention.key_length": None},
                          "llama.attention.head_count", "62", "a divisor of 32"),
    "heads without rows": ("qwen2", {"arch.attention.head_count": 62},
                           "the number of rows of blk.0.attn_q.weight", "32",
                           "992, for heads of 16 each"),
    "shared keys": ("gemma3", {"arch.attention.head_count_kv": 3},
                    "gemma3.attention.head_count_kv", "3", "a divisor of 2"),
    "values": ("qwen2", {"arch.attention.value_length": 8},
               "qwen2.attention.value_length", "8", "16, as wide as a head's query"),
    "part of rope": ("qwen2", {"arch.rope.dimension_count": 8},
                     "qwen2.rope.dimension_count", "8", "16, the width of a head"),
    "rope of nothing": ("gemma3", {"arch.rope.dimension_count": 0},
                        "gemma3.rope.dimension_count", "0", "an even number from 2 to 16"),
    "odd rope": ("gemma3", {"arch.rope.dimension_count": 7},
                 "gemma3.rope.dimension_count", "7", "an even number from 2 to 16"),
    "sections": ("llama", {"arch.rope.dimension_sections": [8, 8, 8, 0]},
                 "llama.rope.dimension_sections", "[8, 8, 8, 0]", "16 together at most"),
    "epsilon": ("llama", {"arch.attention.layer_norm_rms_epsilon": float("nan")},
                "llama.attention.layer_norm_rms_epsilon", "nan", "a finite number from 0 on"),
    "window": ("gemma3", {"arch.attention.sliding_window": 1 << 31},
               "gemma3.attention.sliding_window", str(1 << 31), "a number from 0 to"),
    "alignment": ("llama", {"general.alignment": 16}, "general.alignment", "16", "at least 32"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_field_that_llama_cpp_asserts_is_refused(tmp_path, case) -> None:
    arch, fields, field, found, expected = REFUSED[case]
    path = tmp_path / "base.gguf"
    write_base(path, arch)
    read_base(path)
    change(path, **fields)
    assert refusal(path).startswith(f"{field} is {found}; expected {expected}")


def refusal(path: Path) -> str:
    """Give the part of the message that differs."""
    end = ", for llama.cpp would end the process over it. Fetch or convert the model again."
    message = refused(GgufFileError, read_base, path)
    assert message.startswith(f"Cannot use {path} as base: ")
    assert message.endswith(end)
    return message.removeprefix(f"Cannot use {path} as base: ").removesuffix(end)


@pytest.mark.parametrize("n_more", [0, 5000])
def test_token_that_is_there_twice_is_refused(tmp_path, n_more) -> None:
    path = write_base(tmp_path / "base.gguf")
    tokens = [*tiny.byte_tokens(), *(f"more{index}" for index in range(n_more)), "", ""]
    change(path, **{TOKENS: tokens})
    read_base(path)  # tokens without a text are no copies of each other
    last = len(tokens)
    change(path, **{TOKENS: [*tokens, "[EMPTY_256]"]})
    if n_more == 0:  # what the loader calls the first one without a text
        expected = f"tokenizer.ggml.tokens[{last}] is '[EMPTY_256]'; expected a text that no other"
        assert refusal(path) == f"{expected} token has"
    change(path, **{TOKENS: [*tokens, tokens[65]]})
    assert refusal(path) == (
        f"tokenizer.ggml.tokens[{last}] is {tokens[65]!r}; expected a text that no other token has"
    )


@pytest.mark.parametrize("n_more", [0, 5000])
def test_tokens_of_bytes_need_their_names(tmp_path, n_more) -> None:
    path = write_base(tmp_path / "base.gguf", spm=True)
    tokens = [*tiny.spm_tokens(), *(f"more{index}" for index in range(n_more))]
    types = [6 if text.startswith("<0x") else 1 for text in tokens]
    place = tokens.index("<0x41>")
    change(path, **{TOKENS: tokens, TYPES: types})
    # The type of a list is that of llama.cpp: int32, and not uint32 as above.
    parts = Gguf(path.read_bytes())
    for field in parts.fields:
        if field[0] == TYPES.encode():
            field[2] = struct.pack("<I", 5) + field[2][4:]
    path.write_bytes(parts.join())
    read_base(path)
    change(path, **{TOKENS: [*tokens[:place], "A1", *tokens[place + 1 :]]})
    assert refusal(path) == (
        f"tokenizer.ggml.tokens[{place}], of type byte, is 'A1'; expected a name such as <0x0A>"
    )


def test_sentencepiece_vocabulary_without_a_byte_is_refused(tmp_path) -> None:
    path = write_base(tmp_path / "base.gguf", spm=True)
    tokens = [text for text in tiny.spm_tokens() if text != "<0xE2>"]
    change(path, **{TOKENS: tokens, TYPES: None})
    told = "tokenizer.ggml.tokens is 'without <0xE2>'; expected a token for every byte"
    assert refusal(path) == told


def test_tensor_of_whole_numbers_is_refused(tmp_path) -> None:
    names = {"output_norm.weight": "F32, as of every vector", "blk.0.attn_q.weight": "a type of w"}
    for name, expected in names.items():
        path = write_base(tmp_path / "base.gguf")
        parts = Gguf(path.read_bytes())
        next(tensor for tensor in parts.tensors if tensor[0] == name.encode())[2] = 26
        path.write_bytes(parts.join())
        assert refusal(path).startswith(f"the type of tensor {name} is 'I32'; expected {expected}")


def test_vocabulary_has_a_limit(tmp_path, monkeypatch) -> None:
    """Of texts without a character a header of 64 MB holds eight million."""
    path = write_base(tmp_path / "base.gguf")
    monkeypatch.setattr(base, "MAX_TOKENS", 200)
    n_token = len(tiny.byte_tokens()) + len(tiny.MERGES) + len(tiny.CONTROLS)
    told = f"the length of tokenizer.ggml.tokens is {n_token}; expected at most 200"
    assert refusal(path) == told


def test_base_that_vanished_is_named(tmp_path) -> None:
    path = write_base(tmp_path / "base.gguf")
    header = read_base(path)
    path.unlink()
    with pytest.raises(GgufFileError, match=r"base\.gguf cannot be loaded: No such file"):
        shared_model(header, {})
