"""Where flash attention is used unless one says so, and that both kinds compute the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TinyBase, write_tiny_adapter, write_tiny_base

from qaflora_edge import Engine
from qaflora_edge.backend.context import context_params
from qaflora_edge.backend.model import Model
from qaflora_edge.formats.base import read_base


@pytest.fixture
def base(tmp_path: Path) -> TinyBase:
    return write_tiny_base(tmp_path / "base.gguf")


@pytest.mark.parametrize(
    ("flash_attn", "options", "expected"),
    [
        (None, {}, 0),  # answers: single rows are slow with it
        (None, {"is_probe": True}, 1),  # prompts alone
        (None, {"kv_type": "f32"}, 0),
        (None, {"kv_type": "q8_0"}, 1),  # llama.cpp quantises values with it only
        (None, {"n_token": 2**20}, 1),  # scores of a piece would take 5 GB
        (None, {"n_token": 2**20, "n_seq": 256}, 0),  # each sequence is read alone
        (None, {"n_token": 2**20, "n_seq": 256, "is_unified": True}, 1),
        (True, {}, 1),
        (False, {"is_probe": True}, 0),
        (False, {"n_token": 2**20}, 0),
    ],
)
def test_flash_attention_is_used_where_it_is_quicker(
    base: TinyBase, flash_attn: bool | None, options: dict[str, Any], expected: int
) -> None:
    with Model(read_base(base.path), gpu_layers=0) as model:
        params = context_params(model, flash_attn=flash_attn, **{"n_token": 512, **options})
        assert params.flash_attn_type == expected


def test_both_kinds_of_attention_compute_the_same(tmp_path: Path, base: TinyBase) -> None:
    paths = {str(i): write_tiny_adapter(tmp_path / f"{i}.gguf", base, seed=i).path for i in (1, 2)}
    tokens = np.random.default_rng(2).integers(0, 256, 90).tolist()
    found = []
    for flash_attn in (None, True):
        made = {"base": base.path, "adapters": paths, "n_ctx": 128, "flash_attn": flash_attn}
        with Engine(**made) as engine:
            found.append((engine.logits(tokens, weights="static"), engine.weights(tokens).weights))
    # Logits have a spread of 3; keys and values are F16. Weights come from the probe of both.
    np.testing.assert_allclose(found[0][0], found[1][0], atol=2e-2)
    assert np.array_equal(found[0][1], found[1][1])
