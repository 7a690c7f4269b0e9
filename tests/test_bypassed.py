"""The list of matrices that llama.cpp multiplies without an adapter, against its source."""

import re
from pathlib import Path

import pytest

from qaflora_edge.formats.adapter import why_not_adapted
from qaflora_edge.formats.base import ARCH_FACTS

# llama.cpp's names of tensors in its code -> in a GGUF, where they differ.
FIELDS = {
    **{"wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output", "wqkv": "attn_qkv"},
    **{"wq_a": "attn_q_a", "wq_b": "attn_q_b", "wkv_a_mqa": "attn_kv_a_mqa", "wkv_b": "attn_kv_b"},
    **{"wk_b": "attn_k_b", "wv_b": "attn_v_b", "wo_a": "attn_output_a", "wqkv_gate": "attn_gate"},
    **{"indexer_attn_k": "indexer.attn_k", "indexer_attn_q_b": "indexer.attn_q_b"},
    **{"indexer_proj": "indexer.proj", "indexer_kpool_gate": "indexer.kpool_gate"},
    "nextn.eh_proj": "nextn.eh_proj",
}
# src/models/NAME.cpp -> the architectures that use it, where they are not called the same.
FILES = {
    "deepseek2": ("deepseek2", "deepseek2-ocr", "mistral4"),
    "granite-switch": ("graniteswitch",),
    "hy-v4": ("hy_v4",),
    "nemotron-h": ("nemotron_h", "nemotron_h_moe"),
    "nemotron-h-moe": ("nemotron_h_moe",),
    "rwkv6-base": ("rwkv6", "rwkv6qwen2"),
    "rwkv7-base": ("rwkv7", "arwkv7"),
    # Parts beside a language model, which are no base.
    "dflash": (),
    "gemma4-assistant": (),
}
PRODUCT = re.compile(
    r"ggml_mul_mat\(\s*\w+,\s*(?:model\.layers\[[^\]]*\]|layer|model)(?:\.|->)"
    r"((?:nextn\.)?[a-z_0-9]+)"
)


def test_list_is_what_the_source_does(llama_cpp_source: Path) -> None:
    found: dict[str, set[str]] = {}
    for path in (llama_cpp_source / "src" / "models").glob("*.cpp"):
        kinds = {FIELDS.get(name, name) for name in PRODUCT.findall(path.read_text("utf-8"))}
        for architecture in FILES.get(path.stem, (path.stem,)) if kinds else ():
            found.setdefault(architecture, set()).update(kinds)
    assert {
        name: set(facts.bypassed) for name, facts in ARCH_FACTS.items() if facts.bypassed
    } == found


@pytest.mark.parametrize(
    ("architecture", "name", "expected"),
    [
        ("llama", "blk.0.attn_q.weight", False),
        ("plm", "blk.0.attn_q.weight", True),
        ("deepseek2", "output.weight", True),
        ("lfm2", "blk.3.shortconv.conv.weight", True),
        ("lfm2", "blk.3.shortconv.in_proj.weight", False),
    ],
)
def test_tensor_is_looked_up_by_its_kind(architecture: str, name: str, expected: bool) -> None:
    assert bool(why_not_adapted(architecture, name)) is expected
