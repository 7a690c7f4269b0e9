"""The architectures whose conversion was reviewed, and how each lays its modules out. No I/O.

An architecture that is not in ARCHITECTURES is refused.
"""

from collections.abc import Mapping

from qaflora_edge.convert.layouts import (
    Layout,
    as_is,
    glm4_rows,
    granite_rows,
    grouped_qkv,
    grouped_rope_pairs,
    halves,
    packed_rope_pairs,
    qwen3next_rows,
    qwen35_rows,
    rope_pairs,
)

_GATE_UP = ("ffn_gate", "ffn_up")

# Architectures whose experts may be adapted: in HF and in a GGUF alike, each has gate, up and down,
# and where one parameter of HF holds gate and up, all rows of gate come first...
MIXTURES = (
    *("afmoe", "dots1", "ernie4_5-moe", "exaone-moe", "glm4moe", "gpt-oss", "granitemoe"),
    *(
        "hunyuan-moe",
        "lfm2moe",
        "llama",
        "minimax-m2",
        "olmoe",
        "qwen2moe",
        "qwen35moe",
        "qwen3moe",
        "qwen3next",
    ),
)
# ...or they take turns.
INTERLEAVED_EXPERTS = ("gpt-oss",)

# general.architecture -> how its modules lie. Each was read, and is proven by the tests.
ARCHITECTURES: Mapping[str, Layout] = {
    "afmoe": as_is,
    "apertus": as_is,
    "arcee": rope_pairs,
    "bailingmoe": packed_rope_pairs,
    "bloom": grouped_qkv,
    "chatglm": as_is,
    "codeshell": as_is,
    "cohere2": as_is,
    "command-r": as_is,
    "dbrx": as_is,
    "deepseek": rope_pairs,
    "dots1": as_is,
    "ernie4_5": as_is,
    "ernie4_5-moe": as_is,
    "exaone": as_is,
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
    "granite": granite_rows,
    "granitehybrid": granite_rows,
    "granitemoe": granite_rows,
    "hunyuan-dense": as_is,
    "hunyuan-moe": as_is,
    "internlm2": grouped_rope_pairs,
    "jais2": as_is,
    "jamba": as_is,
    "lfm2": as_is,
    "lfm2moe": as_is,
    "llama": rope_pairs,
    "maincoder": as_is,
    "mamba": as_is,
    "mamba2": as_is,
    "minicpm": rope_pairs,
    "minimax-m2": as_is,
    "mistral3": rope_pairs,
    "mpt": as_is,
    "nemotron": as_is,
    "olmo": rope_pairs,
    "olmo2": as_is,
    "olmoe": as_is,
    "openelm": halves(ffn_gate_up=_GATE_UP),
    "orion": as_is,
    "paddleocr": as_is,
    "pangu-embedded": as_is,
    "phi2": as_is,
    "phi3": as_is,
    "plamo3": as_is,
    "qwen": as_is,
    "qwen2": as_is,
    "qwen2moe": as_is,
    "qwen2vl": as_is,
    "qwen3": as_is,
    "qwen35": qwen35_rows,
    "qwen35moe": qwen35_rows,
    "qwen3moe": as_is,
    "qwen3next": qwen3next_rows,
    "qwen3vl": as_is,
    "refact": halves(attn_kv=("attn_k", "attn_v"), ffn_gate_up=_GATE_UP),
    "seed_oss": as_is,
    "smollm3": rope_pairs,
    "stablelm": as_is,
    "starcoder": as_is,
    "starcoder2": as_is,
    "xverse": rope_pairs,
}

# Names that gguf's map lacks, for llama.cpp's converter takes these modules apart before it looks
# them up: general.architecture -> HF's name within a block -> the stem that a layout is asked for.
UNMAPPED: Mapping[str, Mapping[str, str]] = {
    "bailingmoe": {"attention.query_key_value": "attn_qkv"},
    "granite": {
        "shared_mlp.input_linear": "ffn_gate_up",
        "shared_mlp.output_linear": "ffn_down_shexp",
    },
    "granitehybrid": {"shared_mlp.input_linear": "ffn_gate_up"},
    "granitemoe": {"shared_mlp.input_linear": "ffn_gate_up"},
    "internlm2": {"attention.wqkv": "attn_qkv"},
    "openelm": {"ffn.proj_1": "ffn_gate_up"},
    "refact": {"attn.q": "attn_q", "attn.kv": "attn_kv", "mlp.gate_up_proj": "ffn_gate_up"},
}

# Tensors that llama.cpp's converter may have scaled, where the GGUF does not say so:
# general.architecture -> their names.
SCALED: Mapping[str, tuple[str, ...]] = {
    "bailingmoe": ("output.weight",),  # with norm_head
}
