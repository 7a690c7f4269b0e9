"""Where modules go: gguf's map of all blocks is the oracle for ours of one block."""

import gguf
import pytest

from qaflora_edge.convert.layouts import ARCHITECTURES
from qaflora_edge.convert.plan import tensor_name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_those_of_the_map_of_all_blocks(architecture: str) -> None:
    (arch,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    one, most = gguf.get_tensor_name_map(arch, 1), gguf.get_tensor_name_map(arch, 13)
    whole = gguf.get_tensor_name_map(arch, 12)
    assert len(most.mapping) > 500
    for hf_name in most.mapping:
        assert tensor_name(one, 12, hf_name) == whole.get_name(hf_name)


@pytest.mark.parametrize("block", ["00", "-1", "0x1", "", "x", "12", "1.0"])
def test_a_block_that_is_none_has_no_name(block: str) -> None:
    one = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    assert tensor_name(one, 12, f"model.layers.{block}.mlp.up_proj") is None
    assert tensor_name(one, 12, "model.layers.11.mlp.up_proj") == "blk.11.ffn_up"
