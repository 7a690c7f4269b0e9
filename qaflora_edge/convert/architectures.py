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
_MIXTURES = """
    afmoe dots1 ernie4_5-moe exaone-moe glm4moe gpt-oss granitemoe hunyuan-moe lfm2moe llama
    minimax-m2 olmoe qwen2moe qwen35moe qwen3moe qwen3next
"""
MIXTURES = tuple(_MIXTURES.split())
# ...or they take turns.
INTERLEAVED_EXPERTS = ("gpt-oss",)

# PEFT stores A and B of gpt2's Conv1D as of a linear layer.
_AS_IS = """
    afmoe apertus chatglm codeshell cohere2 command-r dbrx dots1 ernie4_5 ernie4_5-moe exaone
    exaone-moe exaone4 gemma gemma2 gemma3 gemma4 glm4moe gpt-oss gpt2 hunyuan-dense hunyuan-moe
    jais2 jamba lfm2 lfm2moe maincoder mamba mamba2 minimax-m2 mpt nemotron olmo2 olmoe orion
    paddleocr pangu-embedded phi2 phi3 plamo3 qwen qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3vl
    seed_oss stablelm starcoder starcoder2
"""
_ROPE_PAIRS = "arcee deepseek llama minicpm mistral3 olmo smollm3 xverse"
_LAYOUTS: Mapping[str, Layout] = {
    **dict.fromkeys(_AS_IS.split(), as_is),
    **dict.fromkeys(_ROPE_PAIRS.split(), rope_pairs),
    **dict.fromkeys(("bloom", "falcon", "gptneox"), grouped_qkv),
    **dict.fromkeys(("granite", "granitehybrid", "granitemoe"), granite_rows),
    **dict.fromkeys(("qwen35", "qwen35moe"), qwen35_rows),
    "bailingmoe": packed_rope_pairs,
    "glm4": glm4_rows,
    "internlm2": grouped_rope_pairs,
    "openelm": halves(ffn_gate_up=_GATE_UP),
    "qwen3next": qwen3next_rows,
    "refact": halves(attn_kv=("attn_k", "attn_v"), ffn_gate_up=_GATE_UP),
}
# general.architecture -> how its modules lie. Each was read, and is proven by the tests.
ARCHITECTURES: Mapping[str, Layout] = dict(sorted(_LAYOUTS.items()))

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
