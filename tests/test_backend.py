"""The native backend against oracles that do not use it: merged bases and stock llama.cpp."""

import re
import struct
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from raw_context import project, stats
from refusals import refused
from stock import StockContext, write_merged
from tiny import (
    F32,
    MORE_KERNELS,
    PLAIN_KERNELS,
    QUANTISED,
    STEMS,
    TinyAdapter,
    TinyBase,
    begin_adapter,
    finish,
    seeded_adapters,
    write_pairs,
    write_tiny_adapter,
    write_tiny_base,
)

from qaflora_edge.backend.batch import Span
from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.errors import BackendError
from qaflora_edge.formats.base import read_base

EXACT = {"kv_type": "f32", "flash_attn": False, "threads": 2}
TOKENS = [72, 101, 261, 32, 113, 117, 101, 115, 116, 262, 111, 102, 97, 266, 32, 107]
LONG = (TOKENS * 2)[:29]
KERNELS = ["ggml", PLAIN_KERNELS, *MORE_KERNELS]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> TinyBase:
    return write_tiny_base(tmp_path_factory.mktemp("base") / "base.gguf")


@pytest.fixture(scope="module")
def adapters(base) -> list[TinyAdapter]:
    """Three adapters of different rank, alpha and targets."""
    folder, some = base.path.parent, ("attn_k", "ffn_down")
    return [
        write_tiny_adapter(folder / "a.gguf", base, rank=4, alpha=8, seed=1),
        write_tiny_adapter(folder / "b.gguf", base, rank=7, alpha=3, seed=2, targets=STEMS[:4]),
        write_tiny_adapter(folder / "c.gguf", base, rank=2, alpha=4, seed=3, targets=some),
    ]


@pytest.fixture
def weights(base) -> F32:
    """Some weights [3, n_layer], one of them 0, one above 1, one negative."""
    array = np.random.default_rng(7).random((3, base.n_layer)).astype(np.float32)
    array[0, 0], array[1, 1], array[2, 2] = 0.0, 1.7, -0.4
    return array


@pytest.fixture(scope="module")
def single(base, adapters) -> F32:
    """States after each token of LONG, each sequence and token alone: [n_token, 1 + k, ...]."""
    return single_states(base, adapters, LONG)


@pytest.fixture
def kernels(request, monkeypatch, base) -> str:
    """Ask for kernels; a processor or build without them skips the test."""
    monkeypatch.setenv("QAFLORA_CPU_KERNELS", request.param)
    try:
        Pack(Model(read_base(base.path)), []).close()
    except BackendError as error:
        pytest.skip(str(error))
    return str(request.param)


def with_kernels(names: Sequence[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kernels", names, indirect=True)


def assert_near(found: F32, expected: F32, atol: float) -> None:
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)


def load(
    base: TinyBase,
    adapters: Sequence[TinyAdapter],
    gpu_layers: int = 0,
    *,
    adapter_type: str = "auto",
) -> tuple[Model, Pack]:
    model = Model(read_base(base.path), gpu_layers=gpu_layers)
    return model, Pack(model, [adapter.path for adapter in adapters], adapter_type=adapter_type)


def fused_logits(
    base: TinyBase,
    adapters: Sequence[TinyAdapter],
    weights: F32,
    tokens: Sequence[int] = TOKENS,
    *,
    gpu_layers: int = 0,
    adapter_type: str = "auto",
) -> F32:
    """Prompt in one batch, then the last token alone: both shapes of a graph."""
    model, pack = load(base, adapters, gpu_layers, adapter_type=adapter_type)
    with Context(model, pack, n_ctx=64, **EXACT) as context:
        context.set_weights(weights)
        context.decode(tokens[:-1])
        context.decode(tokens[-1:], start=len(tokens) - 1)
        return context.logits()


def stock_logits(
    base: TinyBase, paths: Sequence[Path] = (), scales: Sequence[float] = (), *, gpu_layers: int = 0
) -> F32:
    model = Model(read_base(base.path), gpu_layers=gpu_layers)
    stock = StockContext(model)
    if paths:
        stock.set_adapters(paths, scales)
    stock.decode(TOKENS[:-1])
    logits = stock.decode(TOKENS[-1:])
    stock.close()
    return logits


def with_adapters(place: Path, arch: str, weights: F32) -> tuple[TinyBase, list[TinyAdapter], F32]:
    """A base, adapters of different ranks, and the logits of the two merged."""
    base = write_tiny_base(place / "base.gguf", arch)
    adapters = [seeded_adapters(base, rank, rank=rank)[0] for rank in (4, 16, 5)]
    merged = stock_logits(write_merged(place / "merged.gguf", base, adapters, weights))
    assert np.abs(merged - stock_logits(base)).max() > 0.1  # the adapters do something
    return base, adapters, merged


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
def test_fused_logits_equal_a_merged_base(tmp_path, arch, weights) -> None:
    base, adapters, expected = with_adapters(tmp_path, arch, weights)
    # float32 sums of another order over three layers; logits are of size 1 to 5
    assert_near(fused_logits(base, adapters, weights), expected, 1e-4)


def with_adapted_ends(tmp_path: Path, weights: F32) -> tuple[TinyBase, list[TinyAdapter], F32]:
    """A base, adapters on its embedding and head, and the logits of the two merged."""
    base = write_tiny_base(tmp_path / "base.gguf", tied=False)
    targets = ("token_embd", "output", "attn_q")
    adapters = [seeded_adapters(base, rank, rank=rank, targets=targets)[0] for rank in (4, 3, 8)]
    merged = write_merged(tmp_path / "merged.gguf", base, adapters, weights, tied=False)
    return base, adapters, stock_logits(merged)


def test_head_and_embedding_follow_the_last_and_first_layer(tmp_path, weights) -> None:
    base, adapters, expected = with_adapted_ends(tmp_path, weights)
    assert_near(fused_logits(base, adapters, weights), expected, 1e-4)


def one_hot(n_adapter: int, n_layer: int, ia: int) -> F32:
    """Weigh one adapter by 1 and the others by 0; all by 0 where ia is -1."""
    weights = np.zeros((n_adapter, n_layer), np.float32)
    if ia >= 0:
        weights[ia] = 1.0
    return weights


def test_zero_weights_equal_the_base_bit_for_bit(base, adapters) -> None:
    weights = np.zeros((3, base.n_layer), np.float32)
    assert np.array_equal(fused_logits(base, adapters, weights), stock_logits(base))
    assert np.array_equal(fused_logits(base, [], weights[:0]), stock_logits(base))


def test_changed_weights_equal_a_fresh_run_bit_for_bit(base, adapters, weights) -> None:
    model, pack = load(base, adapters)
    with Context(model, pack, n_ctx=64, **EXACT) as context:
        context.set_weights(weights[::-1])
        context.decode(TOKENS)
        context.clear()
        context.set_weights(weights)
        context.decode(TOKENS[:-1])
        context.decode(TOKENS[-1:], start=len(TOKENS) - 1)
        assert np.array_equal(context.logits(), fused_logits(base, adapters, weights))


def test_changing_weights_builds_no_graph(base, adapters) -> None:
    rng = np.random.default_rng(0)
    model, pack = load(base, adapters)
    with Context(model, pack, n_ctx=64, **EXACT) as context:
        context.decode(TOKENS[:1])
        before = stats(context._pointer)
        for i in range(20):
            context.set_weights(rng.random((3, base.n_layer)).astype(np.float32))
            context.decode([TOKENS[i % len(TOKENS)]], start=1 + i)
        after = stats(context._pointer)
        assert after.n_decoded - before.n_decoded == 20
        assert after.n_graph_built == before.n_graph_built


@with_kernels(KERNELS)
@pytest.mark.parametrize(
    ("outtype", "rank"), [("f32", 5), ("f32", 32), ("f16", 5), ("bf16", 32), ("q8_0", 32)]
)
def test_every_kernel_agrees_with_a_merged_base(tmp_path, kernels, outtype, rank) -> None:
    """Widths that no panel, vector or tile divides; prompts that no tile divides."""
    n_ff = 224 if outtype == "q8_0" else 90
    base = write_tiny_base(tmp_path / "base.gguf", n_ff=n_ff)
    adapters = seeded_adapters(base, 1, 2, 3, rank=rank, outtype=outtype)
    weights = np.random.default_rng(1).random((3, base.n_layer)).astype(np.float32)
    weights[1, 0] = weights[0, 1] = 0.0
    merged = write_merged(tmp_path / "merged.gguf", base, adapters, weights, n_ff=n_ff)
    # ggml rounds activations to the type of A and B, down to 8 bits; our kernels do not
    atol = {"f32": 1e-4, "q8_0": 1e-1}.get(outtype, 2e-2) if kernels == "ggml" else 1e-4
    assert_near(fused_logits(base, adapters, weights), stock_logits(merged), atol)


def rounded(values: F32, kind: str) -> F32:
    """Blocks of 32 along the last axis, as 8 or 4 bits with a scale leave them; the rest is 0."""
    n = values.shape[-1]
    padded = np.pad(values, ((0, 0), (0, -n % 32))).reshape(len(values), -1, 32)
    largest = np.take_along_axis(padded, np.abs(padded).argmax(-1, keepdims=True), -1)
    if kind == "q8_0":
        scale = np.abs(largest) / np.float32(127)
        steps = padded * (np.float32(1) / scale)
        steps = np.trunc(steps + np.copysign(np.float32(0.5), steps))
    else:
        scale = largest / np.float32(-8)
        steps = padded * (np.float32(1) / scale) + np.float32(8.5)
        steps = np.clip(np.floor(steps), 0, 15) - 8
    return (steps * scale).astype(np.float32).reshape(len(values), -1)[:, :n]


@with_kernels(KERNELS[1:])
@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize(
    ("outtype", "rank"), [("f32", 5), ("f16", 32), ("q8_0", 5), ("q8_0", 32), ("q4_0", 32)]
)
def test_adapters_are_converted_as_they_are_loaded(tmp_path, kernels, kind, outtype, rank) -> None:
    """Blocks of 32 inputs of A, and of 32 outputs of B; panels that outputs do not fill."""
    base = write_tiny_base(tmp_path / "base.gguf", n_head_dim=12)
    targets = [stem for stem in STEMS if stem != "attn_output"]  # 48 inputs are no whole blocks
    adapters = seeded_adapters(base, 1, 2, rank=rank, targets=targets, outtype=outtype)
    found = []
    for adapter in adapters:  # what a file has in 8 bits stays as it is under q8_0
        is_stored = outtype == kind == "q8_0"
        is_a, is_b = (not is_stored or n % 32 != 0 for n in (64, rank))
        a = {name: rounded(x, kind) if is_a else x for name, x in adapter.a.items()}
        b = {name: rounded(x.T, kind).T if is_b else x for name, x in adapter.b.items()}
        found.append(replace(adapter, a=a, b=b))
    weights = np.random.default_rng(1).random((2, base.n_layer)).astype(np.float32)
    merged = write_merged(tmp_path / "merged.gguf", base, found, weights, n_head_dim=12)
    fused = fused_logits(base, adapters, weights, adapter_type=kind)
    assert_near(fused, stock_logits(merged), 1e-4)


def test_what_cannot_be_converted_is_refused(monkeypatch, tmp_path) -> None:
    base = write_tiny_base(tmp_path / "base.gguf", n_head_dim=12)
    adapter = write_tiny_adapter(tmp_path / "a.gguf", base, targets=["attn_output"])
    assert refused(BackendError, load, base, [adapter], adapter_type="q4_0") == (
        f"Adapters cannot be loaded: {adapter.path}: 'blk.0.attn_output.weight.lora_a' has rows of "
        "48 numbers, expected a multiple of 32 to convert it to q4_0; load the adapter as it is."
    )
    monkeypatch.setenv("QAFLORA_CPU_KERNELS", "ggml")
    assert refused(BackendError, load, base, [adapter], adapter_type="q8_0") == (
        "Adapters cannot be loaded: adapters cannot be converted to q8_0: the products with "
        "'blk.0.attn_output.weight' are not those of the CPU's kernels; load them as they are, "
        "or the base with no layers on a device."
    )


@with_kernels(KERNELS)
@pytest.mark.parametrize("n", [3, 29])
def test_every_kernel_agrees_on_the_probe(monkeypatch, base, adapters, single, kernels, n) -> None:
    for pool, expected in (("mean", single[:n].mean(axis=0)), ("last", single[n - 1])):
        for differential in (False, True):
            probed = probe_states(base, adapters, LONG[:n], differential=differential, pool=pool)
            np.testing.assert_allclose(probed, expected, atol=2e-5, rtol=1e-5)
    model, pack = load(base, adapters)
    found = []
    for name in (PLAIN_KERNELS, kernels):
        monkeypatch.setenv("QAFLORA_CPU_KERNELS", name)
        with Context(model, pack, is_probe=True, n_ctx=64, **EXACT) as context:
            found.append(context.divergence(probed[0], probed[1:], "norm"))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9)


@with_kernels(KERNELS[1:])
@pytest.mark.parametrize(
    ("outtype", "adapter_type", "n_seq"),
    [
        *(("f32", "auto", 2), ("f16", "auto", 66), ("bf16", "auto", 11), ("q8_0", "auto", 11)),
        *(("f32", "q8_0", 11), ("f32", "q4_0", 11)),
    ],
)
def test_every_kernel_decodes_mixes_together_as_alone(
    tmp_path, kernels, outtype, adapter_type, n_seq
) -> None:
    """Tiles take rows of different sequences: none, one or all adapters. Of more than 64 too."""
    has_blocks = "q8_0" in (outtype, adapter_type) or adapter_type == "q4_0"
    base = write_tiny_base(tmp_path / "base.gguf", n_ff=224 if has_blocks else 90)
    adapters = seeded_adapters(base, 1, 2, 3, rank=32 if outtype == "q8_0" else 5, outtype=outtype)
    mix = np.random.default_rng(9).random((n_seq, 3, base.n_layer)).astype(np.float32)
    mix[0] = mix[1, 1:] = mix[2:, 0, 1] = 0.0
    model, pack = load(base, adapters, adapter_type=adapter_type)
    with (
        Context(model, pack, n_ctx=64, n_seq=n_seq, **EXACT) as together,
        Context(model, pack, n_ctx=64, **EXACT) as alone,
    ):
        for seq in range(n_seq):
            together.set_weights(mix[seq], seq=seq)
        for pos, token in enumerate(TOKENS[:3]):
            spans = [Span(seq, [token + seq % 5], pos) for seq in range(n_seq)]
            together.decode_spans(spans)
        for seq in {*range(min(n_seq, 11)), n_seq - 1}:
            alone.clear()
            alone.set_weights(mix[seq])
            for pos, token in enumerate(TOKENS[:3]):
                alone.decode([token + seq % 5], start=pos)
            # ggml multiplies one row in another order than many
            assert_near(together.logits(seq), alone.logits(), 2e-5)


def test_unknown_kernels_are_refused(monkeypatch, base) -> None:
    monkeypatch.setenv("QAFLORA_CPU_KERNELS", "sse9")
    with pytest.raises(BackendError, match="QAFLORA_CPU_KERNELS is 'sse9', expected one of ggml,"):
        Pack(Model(read_base(base.path)), [])


def probe_states(
    base: TinyBase,
    adapters: Sequence[TinyAdapter],
    tokens: Sequence[int],
    *,
    differential: bool,
    pool: str = "last",
    n_ctx: int = 64,
    gpu_layers: int = 0,
) -> F32:
    model, pack = load(base, adapters, gpu_layers)
    options = {**EXACT, "is_probe": True, "is_differential": differential}
    with Context(model, pack, n_ctx=n_ctx, n_seq=1 + len(adapters), **options) as context:
        for ia in range(len(adapters)):
            context.set_weights(one_hot(len(adapters), base.n_layer, ia), seq=1 + ia)
        context.capture_begin(pool)
        context.decode(tokens, outputs="last" if pool == "last" else "all")
        return np.stack([context.states(seq) for seq in range(context.n_seq)])


def single_states(base: TinyBase, adapters: Sequence[TinyAdapter], tokens: Sequence[int]) -> F32:
    """The same states, one sequence at a time, one token at a time: [n_token, 1 + k, ...]."""
    model, pack = load(base, adapters)
    rows = []
    with Context(model, pack, is_probe=True, n_ctx=len(tokens), **EXACT) as context:
        for ia in range(-1, len(adapters)):
            context.clear()
            context.set_weights(one_hot(len(adapters), base.n_layer, ia))
            per_token = []
            for i, token in enumerate(tokens):
                context.capture_begin()
                context.decode([token], start=i)
                per_token.append(context.states(0))
            rows.append(per_token)
    return np.swapaxes(np.array(rows, np.float32), 0, 1)


def test_bias_of_the_head_is_part_of_the_lens(tmp_path) -> None:
    n_vocab = write_tiny_base(tmp_path / "plain.gguf", "qwen2").n_vocab
    bias = np.random.default_rng(2).standard_normal(n_vocab).astype(np.float32)
    base = write_tiny_base(tmp_path / "base.gguf", "qwen2", replace={"output.bias": bias})
    adapters = seeded_adapters(base, 1)
    expected = stock_logits(base)
    adapted = stock_logits(base, [adapters[0].path], [1.0])
    states = probe_states(base, adapters, TOKENS, differential=False)
    model, pack = load(base, adapters)
    with Context(model, pack, is_probe=True, n_ctx=64, **EXACT) as context:
        logits = project(context, states[:, -1])
        found = context.divergence(states[0], states[1:], "norm")[0, -1]
    assert_near(logits, np.stack([expected, adapted]), 5e-5)
    p, q = (np.exp(z - z.max(), dtype=np.float64) for z in (expected, adapted))
    p, q = p / p.sum(), q / q.sum()
    assert found == pytest.approx((p * np.log(p / q)).sum(), rel=1e-3)


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_differential_probe_is_at_least_as_close(tmp_path, dtype) -> None:
    """On a quantised base the difference of states keeps more of its digits."""
    base = write_tiny_base(tmp_path / "base.gguf", dtype=dtype)
    exact = write_tiny_base(tmp_path / "exact.gguf", replace=base.tensors)
    adapters = seeded_adapters(base, 1, 2, strength=0.01)
    truth = probe_states(exact, adapters, TOKENS, differential=False)
    truth = truth[1:] - truth[:1]
    errors = []
    for differential in (False, True):
        states = probe_states(base, adapters, TOKENS, differential=differential)
        errors.append(np.abs(states[1:] - states[:1] - truth).mean() / np.abs(truth).mean())
    if dtype == "f32":
        assert max(errors) < 1e-3
    else:
        assert errors[1] < errors[0] / 3


def test_massive_activations_leave_the_base_as_it_is(monkeypatch, tmp_path) -> None:
    """One unit a hundred times the others before ffn_down: 8 bits would round the others away."""
    plain = write_tiny_base(tmp_path / "plain.gguf")
    replace = {name: tensor.copy() for name, tensor in plain.tensors.items()}
    for il in range(plain.n_layer):
        replace[f"blk.{il}.ffn_up.weight"][5] *= 100.0
        replace[f"blk.{il}.ffn_down.weight"][:, 5] *= 0.01
    base = write_tiny_base(tmp_path / "base.gguf", dtype="q8_0", replace=replace)
    exact = write_tiny_base(tmp_path / "exact.gguf", replace=base.tensors)
    adapters = seeded_adapters(base, 1, strength=0.01)
    truth = probe_states(exact, adapters, TOKENS[:12], differential=False)
    errors = []
    for kernels in ("ggml", ""):  # ggml's operations split no rows
        monkeypatch.setenv("QAFLORA_CPU_KERNELS", kernels)
        states = probe_states(base, adapters, TOKENS[:12], differential=True)
        errors.append(np.abs(states[0] - truth[0]).mean())
    assert errors[1] < errors[0] / 5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what lies in memory")
@with_kernels(MORE_KERNELS[:1])  # llama.cpp has an order of its own there
def test_matrices_that_are_copied_lie_in_memory_once(monkeypatch, tmp_path, kernels) -> None:
    base = write_tiny_base(tmp_path / "base.gguf", n_embd=512, n_ff=4096, dtype="q4_0")

    def resident_bytes() -> int:
        smaps = Path("/proc/self/smaps").read_text()
        sizes = re.findall(rf"{base.path}\n(?:.*\n){{3}}Rss: +(\d+) kB", smaps)
        return 1024 * sum(map(int, sizes))

    monkeypatch.setenv("QAFLORA_CPU_KERNELS", "ggml")
    with Model(read_base(base.path)):
        assert resident_bytes() < 0.2 * base.path.stat().st_size


@pytest.fixture(params=QUANTISED)
def quantised(request, tmp_path) -> tuple[TinyBase, TinyBase]:
    """A quantised base, and one of the same values in float32."""
    size = {"n_embd": 256, "n_ff": 512}
    base = write_tiny_base(tmp_path / "base.gguf", dtype=request.param, **size)
    return base, write_tiny_base(tmp_path / "exact.gguf", replace=base.tensors, **size)


@with_kernels(MORE_KERNELS)
def test_probe_of_a_quantised_base_is_as_near_to_it_as_with_ggml(
    monkeypatch, quantised, kernels
) -> None:
    """Our own product rounds rows to 8 bits as ggml's does, or in smaller blocks."""
    base, exact = quantised
    adapters = seeded_adapters(base, 1, 2, strength=0.1)
    for differential, n_token in ((True, 5), (True, 40), (False, 40)):
        tokens = (TOKENS * 3)[:n_token]
        truth = probe_states(exact, adapters, tokens, differential=False)
        errors = []
        for name in ("ggml", kernels):
            monkeypatch.setenv("QAFLORA_CPU_KERNELS", name)
            states = probe_states(base, adapters, tokens, differential=differential)
            moved = states[1:] - states[0] - (truth[1:] - truth[0])
            errors.append([np.abs(states[0] - truth[0]).mean(), np.abs(moved).mean()])
        assert (np.array(errors[1]) <= 1.2 * np.array(errors[0])).all(), errors


@with_kernels(MORE_KERNELS)
def test_answers_of_a_quantised_base_are_as_near_to_it_as_with_ggml(
    monkeypatch, quantised, kernels
) -> None:
    """A prompt, and then tokens one by one, of one sequence and of several together."""
    base, exact = quantised

    def logits(base: TinyBase, n_seq: int) -> F32:
        model = Model(read_base(base.path))
        with Context(model, Pack(model, []), n_ctx=64, n_seq=n_seq, **EXACT) as context:
            context.decode(TOKENS[:10])
            for at in range(10, len(TOKENS)):
                context.decode(TOKENS[at : at + 1], start=at)
            return np.stack([context.logits(row) for row in range(n_seq)])

    truth, alone = logits(exact, 1)[0], logits(base, 1)[0]
    for n_seq in (2, 7, 13):
        assert np.array_equal(logits(base, n_seq), np.broadcast_to(alone, (n_seq, alone.size)))
    monkeypatch.setenv("QAFLORA_CPU_KERNELS", "ggml")
    theirs = np.abs(logits(base, 1)[0] - truth).mean()
    assert np.abs(alone - truth).mean() <= 1.2 * theirs


def reference_divergence(base: TinyBase, states: F32, lens: str) -> NDArray[np.float64]:
    """Divergences [n_adapter, n_layer] of states [1 + n_adapter, n_layer, n_embd] in float64."""
    head = base.tensors["token_embd.weight"].astype(np.float64)
    gain = base.tensors["output_norm.weight"].astype(np.float64)
    seen = states.astype(np.float64)
    normed = gain * seen / np.sqrt((seen**2).mean(axis=-1, keepdims=True) + 1e-6)
    if lens == "norm":
        seen = normed
    else:
        seen[:, -1] = normed[:, -1]
    logits = seen @ head.T
    p = np.exp(logits[0] - logits[0].max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    d = logits[1:] - logits[0]
    # sum p log(p / q) for q = p exp(d) / sum p exp(d), which keeps the digits of a small d
    return np.log1p((p * np.expm1(d)).sum(axis=-1)) - (p * d).sum(axis=-1)


def divergence(base: TinyBase, states: F32, lens: str) -> NDArray[np.float64]:
    """What the library makes of states [1 + n_adapter, n_layer, n_embd], the base first."""
    model, pack = load(base, [])
    with Context(model, pack, is_probe=True, n_ctx=64, **EXACT) as context:
        return context.divergence(states[0], states[1:], lens)


@pytest.mark.parametrize("lens", ["raw", "norm"])
@pytest.mark.parametrize(
    ("dtype", "strength", "rtol"),
    # 8-bit rounding of activations that does not depend on their size: F16 has few digits for it
    [("f32", 0.3, 2e-4), ("f32", 1e-3, 2e-4), ("q8_0", 1e-6, 1.2e-2)],
)
def test_divergence_equals_the_numpy_reference(tmp_path, lens, dtype, strength, rtol) -> None:
    base = write_tiny_base(tmp_path / "base.gguf", dtype=dtype)
    states = probe_states(
        base, seeded_adapters(base, 1, 2, strength=strength), TOKENS, differential=True
    )
    found = divergence(base, states, lens)
    np.testing.assert_allclose(found, reference_divergence(base, states, lens), rtol=rtol)


@with_kernels(MORE_KERNELS)
@pytest.mark.parametrize(
    ("dtype", "n_embd"),
    [("q8_0", 32), ("q8_0", 160), *((x, 256 if x.endswith("k") else 96) for x in QUANTISED[1:])],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_quantised_head_takes_rows_of_twice_8_bits(
    tmp_path, kernels, dtype, n_embd, threads
) -> None:
    """Numbers of rows and outputs that fill no tile, and rows of zeros and of all sizes."""
    names = [f"<|{i}|>" for i in range(300)]  # more than one thread takes at once
    path = tmp_path / "base.gguf"
    base = write_tiny_base(path, n_embd=n_embd, n_ff=256, dtype=dtype, user_defined=names)
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((29, n_embd)).astype(np.float32)
    rows *= np.float32(10.0) ** rng.integers(-3, 4, (29, n_embd // 32)).repeat(32, axis=1)
    rows[5, :32] = 0.0
    rows[6] = 0.0
    model, pack = load(base, [])
    with Context(model, pack, is_probe=True, n_ctx=64, **EXACT | {"threads": threads}) as context:
        found = [project(context, rows[:n], is_normed=True) for n in (29, 12, 9, *range(8, 0, -1))]
    head = base.tensors["token_embd.weight"].astype(np.float64)
    # of a block's largest number, 127 steps: half a step is left, and of it half of a 127th
    largest = np.abs(rows.reshape(29, -1, 32)).max(axis=-1).repeat(32, axis=1)
    lost = largest / 127 / 2 / 127 / 2 @ np.abs(head).T
    sums = 2e-6 * np.abs(rows) @ np.abs(head).T  # in float32
    assert (np.abs(found[0] - rows @ head.T) <= lost + sums).all()
    for part in found[1:]:
        np.testing.assert_array_equal(part, found[0][: len(part)])


@pytest.mark.parametrize("size", [10.0, 100.0, 1000.0])
def test_divergence_of_states_that_are_far_apart(base, size) -> None:
    """From 30 nats to thousands, where exp() of a difference of logits overflows."""
    rng = np.random.default_rng(5)
    states = rng.standard_normal((3, base.n_layer, base.n_embd)).astype(np.float32)
    states[1:] *= size
    found = divergence(base, states, "raw")[:, :-1]
    logits = states[:, :-1].astype(np.float64) @ base.tensors["token_embd.weight"].T
    log_p = logits - logits.max(axis=-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
    expected = (np.exp(log_p[0]) * (log_p[0] - log_p[1:])).sum(axis=-1)
    assert expected.max() > 5 * size
    np.testing.assert_allclose(found, expected, rtol=2e-4)


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])  # the product with 8 bits is our own
def test_divergence_that_is_not_finite_is_reported(tmp_path, dtype) -> None:
    base = write_tiny_base(tmp_path / "base.gguf", dtype=dtype)
    states = np.ones((3, base.n_layer, base.n_embd), np.float32)
    states[2, 1, 5] = np.nan
    assert refused(BackendError, divergence, base, states, "norm") == (
        "Divergences cannot be computed: adapter 1 moves the state after block 1 by more than can "
        "be measured, or one of the two is not finite; leave it out, or convert it again."
    )


def test_special_tokens_are_those_that_the_library_tells_of_each(tmp_path) -> None:
    """Also one that ends answers only because a field of the file names it."""
    path = write_tiny_base(tmp_path / "base.gguf").path
    data, key = path.read_bytes(), b"tokenizer.ggml.eos_token_id"
    at = data.index(key) + len(key) + 4  # behind the field's type
    path.write_bytes(data[:at] + struct.pack("<I", 20) + data[at + 4 :])
    with Model(read_base(path)) as model:
        lib, tokens = model._lib, range(model.n_vocab)
        kinds = [lib.llama_vocab_get_attr(model.vocab, i) & (1 | 1 << 3 | 1 << 4) for i in tokens]
        ends = [lib.llama_vocab_is_eog(model.vocab, i) for i in tokens]
        assert (bool(ends[20]), kinds[20]) == (True, 0)
        expected = [i for i in tokens if kinds[i] or ends[i]]
        assert sorted(token.id for token in model.special_tokens) == expected


def test_pack_names_what_does_not_fit(tmp_path, base) -> None:
    wide = write_tiny_base(tmp_path / "wide.gguf", n_embd=96, n_head=6, n_head_kv=3)
    fitting = write_tiny_adapter(tmp_path / "a.gguf", base, targets=["attn_k"]).path
    assert refused(BackendError, Pack, Model(read_base(wide.path)), [fitting]) == (
        f"Adapters cannot be loaded: {fitting}: 'blk.0.attn_k.weight' is [32, 64], "
        "the base has [48, 96]; use the base that the adapter was trained on."
    )
    writer = begin_adapter(tmp_path / "activated.gguf")
    writer.add_array("adapter.alora.invocation_tokens", [1])
    finish(writer)
    (tmp_path / "noise.gguf").write_bytes(b"noise")
    (tmp_path / "short.gguf").write_bytes(fitting.read_bytes()[:-100])
    for dtype in (np.float64, np.int32):
        pair = {"lora_a": np.ones((4, 64), dtype), "lora_b": np.ones((64, 4), dtype)}
        tensors = {f"blk.0.attn_q.weight.{name}": array for name, array in pair.items()}
        write_pairs(tmp_path / f"{dtype.__name__}.gguf", tensors)
    model = Model(read_base(base.path))
    for name, found in (
        ("wide", "general.type is '', expected 'adapter'"),
        ("activated", "is an activated LoRA (aLoRA)"),
        ("noise", "not a readable GGUF file"),
        ("short", "but the file has "),
        ("float64", "expected F32, F16, BF16 or a quantised type"),
        ("int32", "expected F32, F16, BF16 or a quantised type"),
    ):
        with pytest.raises(BackendError, match=rf"{name}\.gguf: .*{re.escape(found)}"):
            Pack(model, [tmp_path / f"{name}.gguf"])


def test_weights_of_the_wrong_size_or_value_are_refused(base, adapters, weights) -> None:
    model, pack = load(base, adapters)
    with Context(model, pack, n_ctx=64, **EXACT) as context:
        with pytest.raises(BackendError, match="6 weights given, expected 9"):
            context.set_weights(weights[:2])
        weights[1, 1] = np.nan
        with pytest.raises(BackendError, match="weight 4 is not finite"):
            context.set_weights(weights)
        with pytest.raises(BackendError, match="sequence 1 does not exist, the context has 1"):
            context.set_weights(np.zeros((3, base.n_layer), np.float32), seq=1)
