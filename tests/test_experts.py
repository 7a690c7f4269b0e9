"""Adapters of a mixture's experts in the backend, against merged bases and stock llama.cpp."""

from pathlib import Path

import numpy as np
import pytest
import test_backend
import tiny
from refusals import refused
from stock import write_merged
from test_backend import TOKENS, fused_logits, probe_states, single_states, stock_logits

from qaflora_edge import Engine
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.bundles.create import create_bundle
from qaflora_edge.errors import BackendError
from qaflora_edge.formats.base import read_base

N_EXPERT = 5
ALL = (*tiny.STEMS[:4], *tiny.EXPERT_STEMS)
with_kernels, weights = test_backend.with_kernels, test_backend.weights


def write_base(path: Path, **options: object) -> tiny.TinyBase:
    return tiny.write_tiny_base(path, n_expert=N_EXPERT, **options)  # type: ignore[arg-type]


@pytest.fixture
def base(tmp_path) -> tiny.TinyBase:
    return write_base(tmp_path / "base.gguf")


@pytest.fixture
def adapters(tmp_path, base) -> list[tiny.TinyAdapter]:
    """Of different rank, alpha and targets; the last touches no expert."""
    return [
        tiny.write_tiny_adapter(tmp_path / "a.gguf", base, rank=4, alpha=8, seed=1, targets=ALL),
        tiny.write_tiny_adapter(
            tmp_path / "b.gguf", base, rank=7, alpha=3, seed=2, targets=tiny.EXPERT_STEMS[1:]
        ),
        tiny.write_tiny_adapter(
            tmp_path / "c.gguf", base, rank=2, alpha=4, seed=3, targets=tiny.STEMS[:2]
        ),
    ]


@pytest.fixture
def kernels(request, monkeypatch) -> None:
    monkeypatch.setenv("QAFLORA_CPU_KERNELS", request.param)


@with_kernels(["", tiny.PLAIN_KERNELS, "ggml"])
def test_logits_equal_a_merged_base(tmp_path, base, adapters, weights, kernels) -> None:
    merged = write_merged(tmp_path / "merged.gguf", base, adapters, weights, n_expert=N_EXPERT)
    fused = fused_logits(base, adapters, weights)
    assert np.abs(fused - stock_logits(base)).max() > 0.1  # the adapters do something
    np.testing.assert_allclose(fused, stock_logits(merged), atol=1e-4, rtol=0)
    assert np.array_equal(fused_logits(base, adapters, 0 * weights), stock_logits(base))


def test_an_overflow_of_what_weighs_nothing_is_not_seen(tmp_path, base, adapters) -> None:
    """ggml's products would take activations as F16 and make NaN of 0 times infinity."""
    huge = {
        name: np.asarray(1e6 * value, np.float32)
        for name, value in base.tensors.items()
        if ".ffn_up_exps." in name
    }
    loud = write_base(tmp_path / "loud.gguf", replace=huge)
    adapter = tiny.write_tiny_adapter(
        tmp_path / "d.gguf", loud, targets=("ffn_down_exps",), outtype="f16"
    )
    weights = np.zeros((1, base.n_layer), np.float32)
    logits = fused_logits(loud, [adapter], weights)
    assert np.isfinite(logits).all()
    assert np.array_equal(logits, stock_logits(loud))


@with_kernels(["", "ggml"])
@pytest.mark.parametrize("differential", [False, True])
def test_each_sequence_has_its_own_weights(base, adapters, differential, kernels) -> None:
    """The base and each adapter in one batch, as the probe has them, against passes alone."""
    probed = probe_states(base, adapters, TOKENS, differential=differential)
    single = single_states(base, adapters, TOKENS)
    np.testing.assert_allclose(probed, single[-1], atol=2e-5, rtol=1e-5)


UP = "blk.1.ffn_up_exps.weight"


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((5, 4, 64), (4, 96, 4), "has 5 matrices in lora_a and 4 in lora_b, the base has 5"),
        ((5, 4, 64), (5, 95, 4), "is [95, 64], the base has [96, 64]"),
        ((5, 4, 64), (5, 96, 3), "has rank 4 in lora_a and 3 in lora_b"),
    ],
)
def test_pack_names_experts_that_do_not_fit(tmp_path, base, a, b, message) -> None:
    tensors = {f"{UP}.lora_a": np.ones(a, np.float32), f"{UP}.lora_b": np.ones(b, np.float32)}
    path = tiny.write_pairs(tmp_path / "odd.gguf", tensors)
    told = refused(BackendError, Pack, Model(read_base(base.path)), [path])
    assert f"{path}: '{UP}' {message}; " in told


def test_bundle_takes_adapters_of_experts(tmp_path, base, adapters) -> None:
    files = {"a": adapters[0].path, "b": adapters[1].path}
    made = create_bundle(
        tmp_path / "bundle", base.path, files, strategy="calibrated", engine=Engine
    )
    with Engine(made) as engine:
        for strategy in ("qa-flora", "calibrated"):
            weights = engine.weights(TOKENS, strategy=strategy).weights
            np.testing.assert_allclose(weights.sum(axis=0), 1.0, rtol=1e-5)
