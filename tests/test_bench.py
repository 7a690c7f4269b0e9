"""The parts that `qaflora bench` is made of."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny

from qaflora_edge.bench.measure import Plan, _methods, ratios, spread
from qaflora_edge.bench.memory import measure_memory
from qaflora_edge.bench.rig import Prompts, Rig
from qaflora_edge.errors import BackendError, OptionError

OPTIONS = {"threads": 1, "kv_type": "f32", "flash_attn": False}
FACTS = ("llama_n_ctx", "llama_n_batch", "llama_n_seq_max", "llama_n_threads")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tiny.TinyBase:
    return tiny.write_tiny_base(tmp_path_factory.mktemp("rig") / "base.gguf")


@pytest.fixture(scope="module")
def rig(base: tiny.TinyBase) -> Iterator[Rig]:
    paths = {}
    for seed, name in enumerate(("math", "es")):
        path = base.path.with_name(f"{name}.gguf")
        paths[name] = tiny.write_tiny_adapter(path, base, seed=seed).path
    with Rig(base.path, paths, n_ctx=300, placing={}, options=OPTIONS) as rig:
        yield rig


def test_spread() -> None:
    shown = spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert shown == {"median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "max": 5.0}


def test_ratios_pair_the_rounds() -> None:
    assert ratios([{"x": 4.0}, {"x": 9.0}], [{"x": 2.0}, {"x": 3.0}], "x") == [2.0, 3.0]


def test_adapters_beyond_the_bundle_are_copies(rig: Rig) -> None:
    assert rig.names(5) == ("math", "es", "math#2", "es#2", "math#3")
    assert [path.stem for path in rig.paths(3)] == ["math", "es", "math"]
    # A copy is packed for itself: twice the adapters, twice the bytes.
    assert rig._pack(4).size_bytes == 2 * rig._pack(2).size_bytes


@pytest.mark.parametrize("k", [1, 5])
def test_stock_context_has_the_parameters_of_ours(rig: Rig, k: int) -> None:
    lib = rig.model._lib
    for name in FACTS:
        found = {
            int(getattr(lib, name)(c._pointer)) for c in (rig.base(), rig.stock(k), rig.ours(k))
        }
        assert len(found) == 1, name


def test_stock_scales_do_what_our_weights_do(rig: Rig) -> None:
    tokens = [5, 6, 7, 8]
    base, stock, ours = rig.base(), rig.stock(3), rig.ours(3)
    for context in (base, stock, ours):
        context.clear()
        context.decode(tokens)
    # Logits have a spread of 3; sums in another order.
    np.testing.assert_allclose(stock.logits(), ours.logits(), atol=1e-4)
    assert np.abs(base.logits() - ours.logits()).max() > 1e-2
    stock.set_scales(np.zeros(3, np.float32))
    stock.clear()
    stock.decode(tokens)
    np.testing.assert_array_equal(stock.logits(), base.logits())


def test_no_prompt_begins_with_another(rig: Rig) -> None:
    prompts = Prompts(rig.model, seed=0)
    drawn = [prompts.draw(n) for n in (3, 40, 700, 3, 40, 3)]
    assert [len(tokens) for tokens in drawn] == [3, 40, 700, 3, 40, 3]
    for a, b in itertools.combinations(drawn, 2):
        n = min(len(a), len(b))
        assert a[:n] != b[:n]


def test_prompts_follow_from_the_seed(rig: Rig) -> None:
    first, again, other = (Prompts(rig.model, seed=seed).draw(20) for seed in (1, 1, 2))
    assert first == again != other


def test_prompts_that_run_out_are_told(rig: Rig) -> None:
    prompts = Prompts(rig.model, seed=0)
    prompts._drawn = [[token] for token in range(rig.model.n_vocab)]
    with pytest.raises(OptionError) as caught:
        prompts.draw(1)
    assert str(caught.value) == (
        "No more different prompts of 1 tokens were found; raise --prompt-tokens or lower --repeat."
    )


def test_norm_is_left_out_without_query_projections(base: tiny.TinyBase, tmp_path: Path) -> None:
    adapter = tiny.write_tiny_adapter(tmp_path / "ffn.gguf", base, targets=("ffn_up",))
    plan = Plan(
        repeat=1,
        prompt_tokens=(8,),
        max_tokens=1,
        k=(1,),
        probe_k=1,
        turn_tokens=(8, 4),
        system_tokens=(8, 4),
        lens="norm",
        pool="last",
        callers=(1,),
        question_tokens=8,
        probe_tokens=(8,),
    )
    with Rig(base.path, {"a": adapter.path}, n_ctx=64, placing={}, options=OPTIONS) as rig:
        assert list(_methods(rig, plan)) == ["qa-flora", "cosine"]


def test_failed_run_of_memory_is_told(tmp_path: Path) -> None:
    with pytest.raises(BackendError) as caught:
        measure_memory(tmp_path / "no", [1, 2], max_tokens=1, strategy=None, engine={"n_ctx": 64})
    assert str(caught.value) == (
        "The run whose memory is measured ended with code 1, expected 0; it said: Cannot open the "
        f"bundle {tmp_path / 'no'}: it does not exist, expected a folder with bundle.json. Give "
        "the folder of a bundle, or make one with `qaflora bundle create`. Try the same options "
        "with `qaflora run`."
    )


def test_context_that_llama_cpp_refuses_is_told(base: tiny.TinyBase) -> None:
    options = {**OPTIONS, "kv_type": "q8_0"}
    rig = Rig(base.path, {}, n_ctx=64, placing={}, options=options)
    with rig, pytest.raises(BackendError) as caught:
        rig.base()
    assert str(caught.value).startswith(
        "A context of 1 x 64 tokens without our adapters cannot be made. llama.cpp says: "
    )
