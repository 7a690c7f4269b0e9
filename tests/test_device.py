"""The backend's claims once more, with layers on a device: `make test-vulkan`.

QAFLORA_TEST_DEVICE is how the device's name begins in `qaflora doctor`: Vulkan, CUDA, MTL. The
limits are known to hold for Vulkan only.

The oracles run on the CPU. Where a token is decoded alone, the device's kernels compute in F32 and
the limits are those of the CPU's tests. In a batch, Vulkan's attention rounds to F16 (llama.cpp
0c1e5709, ggml-vulkan.cpp ggml_vk_mul_mat_q_f16), and by default its matrix products do too.
"""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import test_backend as cpu
from tiny import F32, TinyAdapter, TinyBase, seeded_adapters

from qaflora_edge import Engine
from qaflora_edge.backend import library
from qaflora_edge.backend.context import Context

TOKENS = cpu.TOKENS
STEP = 1e-4  # float32 sums of another order; logits are of size 1 to 5
# of logits and states after a batch, three blocks of F16 rounding later
BATCH = 5e-3 if "GGML_VK_DISABLE_F16" in os.environ else 5e-2
IS_FUSED = "GGML_VK_DISABLE_FUSION" not in os.environ
ALL, SOME = 99, 2  # of three layers: all of them; the last one and the head

DEVICE = os.environ.get("QAFLORA_TEST_DEVICE", "")

pytestmark = pytest.mark.skipif(not DEVICE, reason="needs a build for a device: make test-vulkan")
base, adapters, weights, assert_near = cpu.base, cpu.adapters, cpu.weights, cpu.assert_near


@pytest.fixture(params=[ALL, SOME], ids=["all-layers", "some-layers"])
def gpu_layers(request) -> int:
    return int(request.param)


def stepwise_logits(
    base: TinyBase, adapters: Sequence[TinyAdapter], weights: F32, gpu_layers: int
) -> F32:
    """Logits after TOKENS, decoded one by one."""
    model, pack = cpu.load(base, adapters, gpu_layers)
    with Context(model, pack, n_ctx=64, **cpu.EXACT) as context:
        context.set_weights(weights)
        for i, token in enumerate(TOKENS):
            context.decode([token], start=i)
        return context.logits()


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What the library logs during a test."""
    binding, _ = library.load()
    lines: list[str] = []
    callback = binding.llama_log_callback(lambda _level, text, _data: lines.append(text.decode()))
    binding.llama_log_set(callback, None)
    yield lines
    binding.llama_log_set(library._log_callback, None)


def test_layers_lie_on_the_device(base, adapters, gpu_layers, log) -> None:
    cpu.load(base, adapters, gpu_layers)
    said = "".join(log)
    assert f"using device {DEVICE}" in said, f"no device {DEVICE}; `qaflora doctor` lists them"
    assert f"offloaded {min(gpu_layers, base.n_layer + 1)}/{base.n_layer + 1} layers to GPU" in said


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
def test_fused_logits_equal_a_merged_base(tmp_path, arch, weights, gpu_layers) -> None:
    base, adapters, expected = cpu.with_adapters(tmp_path, arch, weights)
    # the CPU reads gemma3's GELU from a table of F16 (ggml-cpu vec.h ggml_vec_gelu_f32)
    atol = BATCH if arch == "gemma3" else STEP
    assert_near(stepwise_logits(base, adapters, weights, gpu_layers), expected, atol)
    assert_near(cpu.fused_logits(base, adapters, weights, gpu_layers=gpu_layers), expected, BATCH)


def test_zero_weights_equal_the_base(base, adapters, gpu_layers) -> None:
    """Bit for bit, unless the device fuses a sum into the next norm, which orders it anew."""
    weights = np.zeros((3, base.n_layer), np.float32)
    found = cpu.fused_logits(base, adapters, weights, gpu_layers=gpu_layers)
    expected = cpu.stock_logits(base, gpu_layers=gpu_layers)
    if IS_FUSED:
        assert_near(found, expected, BATCH)
    else:
        assert np.array_equal(found, expected)
    nothing = cpu.fused_logits(base, [], weights[:0], gpu_layers=gpu_layers)
    assert np.array_equal(nothing, expected)


def stepwise_states(base: TinyBase, adapters: Sequence[TinyAdapter], gpu_layers: int) -> F32:
    """States after TOKENS, one token of every sequence at a time: [1 + k, n_layer, n_embd]."""
    model, pack = cpu.load(base, adapters, gpu_layers)
    options = {**cpu.EXACT, "is_probe": True, "is_differential": True}
    with Context(model, pack, n_ctx=64, n_seq=1 + len(adapters), **options) as context:
        for ia in range(len(adapters)):
            context.set_weights(cpu.one_hot(len(adapters), base.n_layer, ia), seq=1 + ia)
        for i, token in enumerate(TOKENS):
            context.capture_begin()
            context.decode([token], start=i)
        return np.stack([context.states(seq) for seq in range(context.n_seq)])


def test_probe_states_equal_separate_passes(base, adapters, gpu_layers) -> None:
    single = cpu.single_states(base, adapters, TOKENS)
    assert_near(stepwise_states(base, adapters, gpu_layers), single[-1], STEP)
    for differential in (False, True):
        for pool, expected in (("last", single[-1]), ("mean", single.mean(axis=0))):
            found = cpu.probe_states(
                base, adapters, TOKENS, differential=differential, pool=pool, gpu_layers=gpu_layers
            )
            assert_near(found, expected, BATCH)


@pytest.mark.parametrize("lens", ["raw", "norm"])
@pytest.mark.parametrize("strength", [0.3, 1e-3])
def test_divergence_equals_the_numpy_reference(base, lens, strength, gpu_layers) -> None:
    adapters = seeded_adapters(base, 1, 2, strength=strength)
    states = cpu.probe_states(base, adapters, TOKENS, differential=True, gpu_layers=gpu_layers)
    model, pack = cpu.load(base, adapters, gpu_layers)
    with Context(model, pack, is_probe=True, n_ctx=64, **cpu.EXACT) as context:
        found = context.divergence(states[0], states[1:], lens)
    # the head's products round both factors to F16 by default
    rtol = 2e-4 if "GGML_VK_DISABLE_F16" in os.environ else 1e-2
    np.testing.assert_allclose(found, cpu.reference_divergence(base, states, lens), rtol=rtol)


def test_engine_agrees_with_the_cpu_at_default_settings(base, adapters, gpu_layers) -> None:
    """F16 KV cache and flash attention on both."""
    files = {name: adapter.path for name, adapter in zip("abc", adapters, strict=True)}
    with (
        Engine(base=base.path, adapters=files, gpu_layers=gpu_layers) as device,
        Engine(base=base.path, adapters=files, gpu_layers=0) as host,
    ):
        found, expected = device.weights(TOKENS), host.weights(TOKENS)
        assert_near(found.weights, expected.weights, 0.02)
        logits = host.logits(TOKENS, weights=expected)
        assert_near(device.logits(TOKENS, weights=expected), logits, 5e-2)
