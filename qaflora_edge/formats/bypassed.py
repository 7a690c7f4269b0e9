"""Matrices that llama.cpp multiplies without looking for an adapter. No I/O.

It loads a LoRA of them without a word and ignores it.
"""

import re

from qaflora_edge.formats.arch_facts import ARCH_FACTS

_NOT_MULTIPLIED = re.compile(r"(conv|conv1d|_norm|rel_b)$|_embd$|^rope_freqs$|^token_types$")


def module_kind(base_name: str) -> str:
    """Give attn_q of blk.3.attn_q.weight, and output of output.weight."""
    return re.sub(r"^blk\.\d+\.", "", base_name).removesuffix(".weight")


def is_bypassed(architecture: str, base_name: str) -> bool:
    """Tell whether a LoRA on a tensor of a base would be ignored.

    base_name  such as blk.0.attn_q_a.weight
    """
    kind = module_kind(base_name)
    if architecture in ARCH_FACTS and kind in ARCH_FACTS[architecture].bypassed:
        return True
    return base_name != "token_embd.weight" and _NOT_MULTIPLIED.search(kind) is not None
