"""Attention, our own and as patched: tiles of any number of rows, heads that share keys; where."""

import ctypes
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from stock import StockContext
from tiny import F32, F64, write_tiny_base

from qaflora_edge.backend.context import Context, context_params
from qaflora_edge.backend.library import library_dir
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.errors import BackendError
from qaflora_edge.formats.base import read_base

TYPE_F32, TYPE_F16 = 0, 1  # of enum ggml_type


class InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


@pytest.fixture(scope="module")
def ggml() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    folder = library_dir()
    base = ctypes.CDLL(str(next(folder.glob("*ggml-base*"))))
    found = sorted(Path(folder).glob("*ggml-cpu*"))
    if len(found) != 1:
        pytest.skip("one of several libraries for the CPU: which of them fits is known to ggml")
    cpu = ctypes.CDLL(str(found[0]))
    pointers = ["init", "new_tensor_4d", "flash_attn_ext", "new_graph", "get_data"]
    for name in pointers:
        getattr(base, f"ggml_{name}").restype = ctypes.c_void_p
    return base, cpu


def computed(
    ggml: tuple[ctypes.CDLL, ctypes.CDLL],
    arrays: list[F32],
    mask: F32,
    sinks: F32 | None,
    options: tuple[float, float, float],
    dtype: int,
    n_thread: int,
) -> F32:
    """ggml_flash_attn_ext of q, k and v [n_seq, n_head, n, n_dim]: [n_seq, n, n_head, n_dim]."""
    base, cpu = ggml
    c_void = ctypes.c_void_p
    context = c_void(base.ggml_init(InitParams(64 << 20, None, False)))

    def tensor(array: F32, kind: int) -> ctypes.c_void_p:
        shape = [ctypes.c_int64(n) for n in reversed(array.shape)]
        made = c_void(base.ggml_new_tensor_4d(context, kind, *shape))
        stored = np.ascontiguousarray(array, np.float16 if kind == TYPE_F16 else np.float32)
        ctypes.memmove(base.ggml_get_data(made), stored.tobytes(), stored.nbytes)
        return made

    q, k, v = (tensor(a, t) for a, t in zip(arrays, (TYPE_F32, dtype, dtype), strict=True))
    numbers = [ctypes.c_float(x) for x in options]
    out = c_void(base.ggml_flash_attn_ext(context, q, k, v, tensor(mask, TYPE_F16), *numbers))
    if sinks is not None:
        base.ggml_flash_attn_ext_add_sinks(out, tensor(sinks[None, None, None], TYPE_F32))
    graph = c_void(base.ggml_new_graph(context))
    base.ggml_build_forward_expand(graph, out)
    assert cpu.ggml_graph_compute_with_ctx(context, graph, n_thread) == 0
    n_seq, n_head, n_row, n_dim = arrays[0].shape
    result = np.empty((n_seq, n_row, n_head, n_dim), np.float32)
    ctypes.memmove(result.ctypes.data, base.ggml_get_data(out), result.nbytes)
    base.ggml_free(context)
    return result


def expected(
    arrays: list[F32], mask: F32, sinks: F32 | None, options: tuple[float, float, float]
) -> F64:
    """Softmax of scaled, capped and biased scores, in float64."""
    scale, max_bias, softcap = options
    q, k, v = (a.astype(np.float64) for a in arrays)
    n_head = q.shape[1]
    k, v = (np.repeat(a, n_head // a.shape[1], axis=1) for a in (k, v))
    scores = scale * q @ k.transpose(0, 1, 3, 2)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    slopes = np.ones(n_head)
    if max_bias:  # ALiBi: a geometric row for a power of two of heads, those between for the rest
        n = 1 << (n_head.bit_length() - 1)
        first, second = 2 ** (-max_bias / n), 2 ** (-max_bias / 2 / n)
        slopes = np.array(
            [first ** (h + 1) if h < n else second ** (2 * (h - n) + 1) for h in range(n_head)]
        )
    with np.errstate(invalid="ignore"):
        scores = scores + slopes[:, None, None] * mask.astype(np.float64)
    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None, None])
    p = np.exp(scores - top)
    total = p.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - top)
    return ((p / total) @ v).transpose(0, 2, 1, 3)


@pytest.mark.parametrize("kind", ["plain", "alibi", "softcap", "sinks"])
@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (14, 2), (6, 1)])
def test_tiles_of_any_number_of_rows(ggml, heads, kind) -> None:
    rng = np.random.default_rng(sum(heads))
    n_head, n_kv_head = heads
    for n_row in (2, 3, 7, 8, 21, 40, 63, 64, 65, 100):
        n_seq, n_dim, n_before = (3, 1)[n_row > 60], (64, 32)[n_row % 2], int(rng.integers(0, 150))
        n_kv = n_before + n_row
        shapes = [(n_seq, n_head, n_row, n_dim), *[(n_seq, n_kv_head, n_kv, n_dim)] * 2]
        arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        at = np.arange(n_kv) - n_before - np.arange(n_row)[:, None]
        distances = np.where(at <= 0, at if kind == "alibi" else 0, -np.inf)
        far = rng.integers(1, n_kv + 1, n_seq)  # each sequence has a window of its own
        mask = np.where(at <= -far[:, None, None, None], -np.inf, distances).astype(np.float32)
        sinks = rng.standard_normal(n_head).astype(np.float32) if kind == "sinks" else None
        options = (n_dim**-0.5, 8.0 * (kind == "alibi"), 3.0 * (kind == "softcap"))
        for dtype in (TYPE_F32, TYPE_F16):
            stored = [arrays[0], *(a.astype(np.float16).astype(np.float32) for a in arrays[1:])]
            given = stored if dtype == TYPE_F16 else arrays
            found = computed(ggml, given, mask, sinks, options, dtype, int(rng.integers(1, 4)))
            worst = np.abs(found - expected(given, mask, sinks, options)).max()
            assert worst < 1e-5, (n_row, dtype)  # sums of F32, in another order


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("heads", [(14, 2), (5, 1)])
def test_a_token_alone_is_read_as_one_of_many(tmp_path, heads, arch) -> None:
    """Alone, heads that share keys and values are rows of one product; among others they are not.

    Oracle: the logits of a prompt that is read at once.
    """
    n_head, n_head_kv = heads
    shape: dict[str, int] = {"n_embd": 16 * n_head, "n_head": n_head, "n_head_kv": n_head_kv}
    base = write_tiny_base(tmp_path / "base.gguf", arch, window=9, **shape)
    model = Model(read_base(base.path))
    tokens = np.random.default_rng(n_head).integers(32, 127, 41).tolist()
    options = {"n_ctx": 64, "n_seq": 3, "threads": 2, "flash_attn": False}
    for kv_type in ("f32", "f16"):
        with Context(model, Pack(model, []), kv_type=kv_type, **options) as context:
            context.decode(tokens)
            whole = [context.logits(41 * (seq + 1) - 1) for seq in range(3)]
            for seq in range(3):
                context.clear(seq)
            context.decode(tokens[:30])
            for at in range(30, 41):
                context.decode(tokens[at : at + 1], start=at)
            alone = [context.logits(row) for row in range(3)]
        # Sums of F32 in another order; numbers that are rounded on the way there may be the next.
        atol = 1e-5 if kv_type == "f32" else 5e-3
        np.testing.assert_allclose(alone, whole, atol=atol, rtol=0)


@pytest.mark.parametrize("kernels", ["avx512", "avx2"])
@pytest.mark.parametrize("arch", ["qwen2", "gemma3"])
def test_attention_of_our_own_is_that_of_llama_cpp(tmp_path, monkeypatch, arch, kernels) -> None:
    """Over tiles of keys that are whole, cut, and left out by a window; rows of one token, or more.

    Oracle: a context of llama.cpp's own, which multiplies with keys and values otherwise.
    """
    monkeypatch.setenv("QAFLORA_CPU_KERNELS", kernels)
    shape = {"n_embd": 576, "n_head": 12, "n_head_kv": 2}  # of 48 numbers
    base = write_tiny_base(tmp_path / "base.gguf", arch, window=90, **shape)
    tokens = np.random.default_rng(5).integers(32, 127, 203).tolist()
    model = Model(read_base(base.path))
    try:
        pack = Pack(model, [])
    except BackendError as error:
        pytest.skip(str(error))
    assert context_params(model, n_token=2**20).flash_attn_type == 0  # no scores are kept
    cuts = list(pairwise((0, *range(70, 204))))
    stock = StockContext(model)
    expected = [stock.decode(tokens[at:end]) for at, end in cuts]
    stock.close()
    for kv_type, atol in {"f32": 1e-3, "f16": 1e-2}.items():  # of logits of 1 to 9
        with Context(model, pack, n_ctx=256, kv_type=kv_type, flash_attn=False) as context:
            for cut, logits in zip(cuts, expected, strict=True):
                context.decode(tokens[slice(*cut)], start=cut[0])
                np.testing.assert_allclose(context.logits(), logits, atol=atol, rtol=0)
            context.clear()
            context.decode(tokens)
            np.testing.assert_allclose(context.logits(), expected[-1], atol=atol, rtol=0)


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
    tmp_path, flash_attn, options, expected
) -> None:
    base = write_tiny_base(tmp_path / "base.gguf")
    with Model(read_base(base.path), gpu_layers=0) as model:
        params = context_params(model, flash_attn=flash_attn, **{"n_token": 512, **options})
        assert params.flash_attn_type == expected
