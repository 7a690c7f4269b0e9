"""The architectures whose conversion was reviewed, and how each lays its modules out. No I/O.

An architecture that is not in ARCHITECTURES is refused.
"""

from collections.abc import Mapping

from qaflora_edge.convert.layouts import (
    Layout,
    as_is,
    glm4_rows,
    grouped_qkv,
    qwen3next_rows,
    qwen35_rows,
    rope_pairs,
)

# general.architecture -> how its modules lie. Each was read, and is proven by the tests.
ARCHITECTURES: Mapping[str, Layout] = {
    "apertus": as_is,
    "arcee": rope_pairs,
    "bloom": grouped_qkv,
    "chatglm": as_is,
    "cohere2": as_is,
    "command-r": as_is,
    "dbrx": as_is,
    "dots1": as_is,
    "ernie4_5": as_is,
    "ernie4_5-moe": as_is,
    "exaone-moe": as_is,
    "exaone4": as_is,
    "falcon": grouped_qkv,
    "gemma": as_is,
    "gemma2": as_is,
    "gemma3": as_is,
    "gemma4": as_is,
    "glm4": glm4_rows,
    "glm4moe": as_is,
    "gpt-oss": as_is,
    "gpt2": as_is,  # PEFT stores A and B of a Conv1D as of a linear layer
    "gptneox": grouped_qkv,
    "granite": rope_pairs,
    "granitemoe": rope_pairs,
    "hunyuan-dense": as_is,
    "hunyuan-moe": as_is,
    "jais2": as_is,
    "lfm2": as_is,
    "lfm2moe": as_is,
    "llama": rope_pairs,
    "minimax-m2": as_is,
    "mistral3": rope_pairs,
    "mpt": as_is,
    "nemotron": as_is,
    "olmo": rope_pairs,
    "olmo2": as_is,
    "olmoe": as_is,
    "paddleocr": as_is,
    "phi2": as_is,
    "phi3": as_is,
    "qwen2": as_is,
    "qwen2moe": as_is,
    "qwen2vl": as_is,
    "qwen3": as_is,
    "qwen35": qwen35_rows,
    "qwen35moe": qwen35_rows,
    "qwen3moe": as_is,
    "qwen3next": qwen3next_rows,
    "qwen3vl": as_is,
    "seed_oss": as_is,
    "smollm3": rope_pairs,
    "stablelm": as_is,
    "starcoder": as_is,
    "starcoder2": as_is,
}
