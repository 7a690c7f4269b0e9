"""The strategy `spectr`, and benchmarks' `arrow`: what adapters' matrices read of the query."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import published  # noqa: F401 (registers arrow)
import pytest
import tiny
from refusals import refused
from tiny import F64

from qaflora_edge import Engine
from qaflora_edge.bundles.create import create_bundle
from qaflora_edge.errors import StrategyError

EXACT = {"kv_type": "f32", "flash_attn": False}
TOKENS = np.random.default_rng(5).integers(0, 256, 300).tolist()  # several micro-batches


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # theirs
def test_weights_are_those_of_a_direct_reimplementation(tmp_path) -> None:
    """In torch, on PEFT's own adapters and what transformers' projections read."""
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("reference")
    base = tiny.write_tiny_base(tmp_path / "base.gguf")
    folders = {
        "math": tiny.write_tiny_peft(tmp_path / "math", base, seed=2, strength=3),
        "es": tiny.write_tiny_peft(tmp_path / "es", base, seed=3, rank=8, alpha=4, strength=3),
        "law": tiny.write_tiny_peft(tmp_path / "law", base, seed=4, use_rslora=True, strength=3),
    }
    create_bundle(tmp_path / "b", base.path, folders, outtype="f32")
    model = reference.Reference(base.path, folders)
    inputs: list[Any] = []
    hooks = [
        layer.self_attn.q_proj.base_layer.register_forward_hook(
            lambda _module, args, _output: inputs.append(args[0][0].double())
        )
        for layer in model.layers
    ]
    with torch.inference_mode(), model.model.disable_adapter():
        model.model(input_ids=torch.tensor([TOKENS]))
    for hook in hooks:
        hook.remove()

    def matrix(layer: Any, kind: str, name: str) -> Any:
        module = getattr(layer.self_attn, kind)
        a, b = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
        return module.scaling[name] * (b.double() @ a.double())

    def expected(size: Any) -> F64:
        """Softmax over adapters for each token and module, then the mean over both."""
        layers = []
        for x, layer in zip(inputs, model.layers, strict=True):
            modules = [
                torch.stack([size(x, matrix(layer, kind, name)) for name in folders]).softmax(dim=0)
                for kind in ("q_proj", "k_proj", "v_proj")
            ]
            layers.append(torch.stack(modules).mean(dim=(0, 2)))
        return torch.stack(layers, dim=1).numpy()

    with Engine(tmp_path / "b", **EXACT) as engine:
        for strategy, size in {
            "arrow": lambda x, delta: (x @ torch.linalg.svd(delta)[2][0]).abs(),
            "spectr": lambda x, delta: (x @ delta.T).norm(dim=1),
        }.items():
            found = engine.weights(TOKENS, strategy=strategy)
            np.testing.assert_allclose(found.weights, expected(size), atol=2e-5)
            np.testing.assert_allclose(found.weights.sum(axis=0), 1, rtol=1e-6)


def write(place: Path, base: tiny.TinyBase, what: str, **given: Sequence[Any]) -> dict[str, Path]:
    return {
        name: tiny.write_tiny_adapter(place / f"{name}.gguf", base, seed=i, **{what: each}).path
        for i, (name, each) in enumerate(given.items())
    }


def test_only_modules_that_all_adapt_are_compared(tmp_path) -> None:
    base = tiny.write_tiny_base(tmp_path / "base.gguf")
    stems = {"a": ("attn_q", "attn_v"), "b": ("attn_v", "ffn_up"), "c": ("ffn_up",)}
    qv = write(tmp_path, base, "targets", **stems)
    with Engine(base=base.path, adapters={"a": qv["a"], "b": qv["b"]}, **EXACT) as engine:
        both = engine.weights(TOKENS[:9], strategy="spectr").weights
        assert "spectr" in engine.strategies
    with Engine(base=base.path, adapters=qv, **EXACT) as engine:
        assert "spectr" not in engine.strategies
        for strategy in ("arrow", "spectr"):
            assert refused(StrategyError, engine.weights, TOKENS[:9], strategy=strategy) == (
                f"Strategy {strategy} compares what adapters read at the attention's projections, "
                "but no block has one (attn_q, attn_k, attn_v, attn_qkv) that all of them adapt; "
                "use another strategy."
            )
        again = engine.weights(TOKENS[:9], strategy="spectr", adapters=["a", "b"]).weights
    np.testing.assert_array_equal(both, again)


def test_a_layer_without_such_a_module_has_the_mean_of_the_others(tmp_path) -> None:
    base = tiny.write_tiny_base(tmp_path / "base.gguf")
    adapters = write(tmp_path, base, "layers", a=(0, 2), b=(0, 1, 2))
    with Engine(base=base.path, adapters=adapters, **EXACT) as engine:
        for strategy in ("arrow", "spectr"):
            weights = engine.weights(TOKENS[:9], strategy=strategy).weights
            np.testing.assert_allclose(weights[:, 1], weights[:, [0, 2]].mean(axis=1), rtol=1e-6)
            assert np.ptp(weights[0]) > 1e-4
