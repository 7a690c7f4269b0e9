"""The Python interface: weights, logits, adapters in use, failures."""

import gc
import shutil
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patience import PATIENCE_S, wait_until
from refusals import refused
from tiny import write_tiny_adapter, write_tiny_base, write_tiny_peft

from qaflora_edge import Engine, FusionWeights, Plan, QafloraError
from qaflora_edge.answering.typical import measure
from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.bundles import source
from qaflora_edge.bundles.edit import add_adapters, remove_adapter, set_base
from qaflora_edge.errors import (
    AdapterMismatchError,
    BundleError,
    BusyError,
    ContextError,
    OptionError,
    PromptError,
    StrategyError,
)
from qaflora_edge.weighing.calibration import KEYS

PROMPT = "the king is in the air"
NAMES = ("math", "es", "med")
EXACT: dict[str, Any] = {"n_ctx": 128, "kv_type": "f32", "flash_attn": False}


@pytest.fixture
def engine(base, adapters) -> Iterator[Engine]:
    with Engine(base=base.path, adapters=adapters, **EXACT) as engine:
        yield engine


def test_a_text_is_weighed_as_a_user_turn_unless_raw(engine) -> None:
    turn = [{"role": "user", "content": PROMPT}]
    tokens = (engine.chat_tokens(turn), engine.tokenize(PROMPT))
    chat, plain = (engine.weights(each).weights.tolist() for each in tokens)
    found = [*engine.weights([turn, PROMPT]), engine.weights(turn)]
    assert [each.weights.tolist() for each in found] == [chat] * 3 != [plain] * 3
    assert engine.weights(PROMPT, raw=True).weights.tolist() == plain


def test_logits_take_weights_in_every_form(engine) -> None:
    fusion = engine.weights(PROMPT, raw=True)
    logits = engine.logits(PROMPT)
    assert logits.shape == (engine.n_vocab,)
    for weights in (fusion, fusion.weights, fusion.weights.tolist(), "qa-flora", None):
        assert np.array_equal(engine.logits(PROMPT, weights=weights), logits)
    assert not np.array_equal(engine.logits(PROMPT, weights="base"), logits)
    by_base = engine.logits(PROMPT, weights="base")
    assert np.array_equal(engine.logits(PROMPT, strategy="base"), by_base)
    by_name = engine.score(PROMPT, "the", strategy="base")
    assert np.array_equal(by_name, engine.score(PROMPT, "the", weights="base"))
    assert engine.generate(PROMPT, strategy="base", max_tokens=1).fusion.strategy == "base"
    for call in (engine.generate, engine.logits, partial(engine.score, continuation="the")):
        with pytest.raises(OptionError, match=r"Options strategy='base' and weights are given, "):
            call(PROMPT, strategy="base", weights="static")


def test_typical_divergence_is_measured_per_adapter_lens_and_layer(engine, base) -> None:
    done = []
    texts = ["the", "air is"]
    typical = measure(engine.memory.current, texts, tell=lambda i, n: done.append((i, n)))
    assert done == sorted(done)
    assert done[-1] == (6, 6)  # each as a chat for two measures, and as text
    queries = [engine.chat_tokens([{"role": "user", "content": text}]) for text in texts]
    divergences = np.stack([engine.weights(query).divergence for query in queries])
    expected = np.exp(np.log(divergences.astype(np.float64) + 1e-12).mean(axis=0))
    for ia, name in enumerate(NAMES):
        assert set(typical[name]) == set(KEYS)
        np.testing.assert_allclose(typical[name]["norm"], expected[ia], rtol=1e-5)


@pytest.mark.slow
def test_embeddings_are_mean_states_of_the_base_alone(made) -> None:
    """Of a prompt in several micro-batches too, and whatever was asked before."""
    with Engine(made.folder, threads=1, **EXACT | {"n_ctx": 512}) as engine:
        tokens = np.random.default_rng(0).integers(0, 256, 300).tolist()
        middle = 3 * engine.n_layer // 5
        states = [engine.hidden_states(tokens[: n + 1])[middle] for n in range(300)]
        rest = np.mean(states[1:], axis=0, dtype=np.float64)  # the first token does not count
        found = engine.embed(tokens)
        np.testing.assert_allclose(found, rest / np.linalg.norm(rest), rtol=1e-4, atol=1e-5)
        only = engine.embed(tokens[:1])
        expected = states[0] / np.linalg.norm(states[0])
        np.testing.assert_allclose(only, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(engine.embed(tokens), found)


def test_empty_and_long_prompts_are_refused(engine) -> None:
    assert refused(ContextError, engine.generate, "x " * 100) == (
        "The prompt has 200 tokens, the context 128; shorten it, or raise the context "
        "(--ctx, n_ctx; this base was trained for 512)."
    )
    with pytest.raises(PromptError, match="at least one token"):
        engine.logits([])


def test_engine_in_a_cycle_frees_contexts_before_the_model(base, monkeypatch) -> None:
    freed: list[str] = []
    for kind in (Model, Pack, Context):
        original = kind._free

        def note(self: object, pointer: object, original: object = original) -> None:
            freed.append(type(self).__name__)
            original(self, pointer)  # type: ignore[operator]

        monkeypatch.setattr(kind, "_free", note)
    engine = Engine(base=base.path)
    answer = engine.generate(PROMPT, max_tokens=9)
    next(answer)
    del engine, answer
    gc.collect()
    assert freed == ["Context", "Pack", "Model"]


def test_bad_weights_are_refused(engine) -> None:
    with pytest.raises(StrategyError, match="The adapter 'fr' is not loaded"):
        engine.hidden_states(PROMPT, adapter="fr")
    other = FusionWeights(("x",), Plan.mix(np.zeros((1, 3), np.float32)))
    with pytest.raises(StrategyError, match="The weights are for the adapters x, loaded are math"):
        engine.logits(PROMPT, weights=other)


def test_engine_needs_a_bundle_or_a_base(base, tmp_path) -> None:
    with pytest.raises(OptionError, match="needs a bundle folder, or base= and adapters="):
        Engine()
    with pytest.raises(OptionError, match="a bundle and also base or adapters"):
        Engine(tmp_path, base=base.path)


def test_close_ends_the_calls_of_other_threads(base) -> None:
    engine = Engine(base=base.path)
    answer = engine.generate("the king")
    caught: list[QafloraError] = []
    begun = threading.Event()

    def read() -> None:
        try:
            for _ in answer:
                begun.set()
        except QafloraError as err:
            caught.append(err)

    thread = threading.Thread(target=read)
    thread.start()
    begun.wait()
    engine.close()
    thread.join()
    closed = "This Engine is closed; make a new one."  # what a piece finds that is asked for later
    assert len(caught) == 1
    assert str(caught[0]) in ("This Engine was closed in the middle of a call.", closed)
    with pytest.raises(BusyError, match=closed):
        engine.generate("the king")


@pytest.mark.parametrize("strategy", ["qa-flora", "static"])
def test_adapters_out_of_use_are_as_if_they_were_not_there(
    engine, base, adapters, strategy
) -> None:
    engine.weights(PROMPT)  # probed with all before
    engine.use_adapters(["med", "es"])
    assert engine.adapters == ("es", "med")
    assert engine.loaded_adapters == NAMES
    only = {name: adapters[name] for name in ("es", "med")}
    with Engine(base=base.path, adapters=only, **EXACT) as expected:
        ours = engine.weights(PROMPT, strategy=strategy)
        theirs = expected.weights(PROMPT, strategy=strategy)
        assert ours.adapters == theirs.adapters == ("es", "med")
        # Both batches hold the same sequences, and what weighs 0 is not computed: exact.
        np.testing.assert_array_equal(ours.weights, theirs.weights)
        np.testing.assert_array_equal(
            engine.logits(PROMPT, weights=strategy), expected.logits(PROMPT, weights=strategy)
        )
    engine.use_adapters(NAMES)
    assert engine.weights(PROMPT).weights.shape == (3, base.n_layer)


def test_adapters_out_of_use_are_not_probed(engine) -> None:
    def n_probed() -> int:
        engine.weights(PROMPT)
        context = engine._core.prober._contexts.context
        assert context is not None
        return sum(map(bool, context.tokens))

    assert n_probed() == 4
    engine.use_adapters(["es"])
    assert n_probed() == 2
    assert engine.weights(PROMPT, adapters=["math", "med"]).adapters == ("math", "med")


def test_use_refuses_what_is_unknown_and_changes_nothing(engine) -> None:
    assert refused(StrategyError, engine.use_adapters, ["es", "law"]) == (
        "The adapter 'law' is not loaded; expected names out of: math, es, med."
    )
    with pytest.raises(StrategyError, match="Strategy 'best' is not known"):
        engine.use_strategy("best")
    engine.use_strategy("single:math")
    with pytest.raises(StrategyError, match="'single:math' names the adapter 'math', which is not"):
        engine.use_adapters(["es"])
    assert engine.adapters == NAMES
    assert engine.weights(PROMPT).weights[:, 0].tolist() == [1.0, 0.0, 0.0]


def test_what_has_begun_keeps_its_adapters(engine, adapters) -> None:
    mix, begun = {"es": 1.0}, weakref.ref(engine._core)
    expected = [each.text() for each in engine.answers(PROMPT, 2, weights=mix, max_tokens=9)]
    answers = engine.answers(PROMPT, 2, weights=mix, max_tokens=9)
    first = next(answers)
    engine.generate("unread", max_tokens=5, on_weights=lambda _: engine.remove_adapter("es"))
    assert engine.adapters == engine.loaded_adapters == ("math", "med")
    assert [first.text(), *(each.text() for each in answers)] == expected
    assert begun() is None  # and its contexts are freed
    two = engine.weights(PROMPT).weights.tolist()
    with pytest.raises(StrategyError, match="not loaded"):
        engine.generate(PROMPT, weights=mix)
    assert engine.add_adapter("es", adapters["es"]) == "es"
    assert engine.adapters == ("math", "med", "es")
    assert engine.generate(PROMPT, weights=mix, max_tokens=9).text() == expected[0]
    assert engine.weights(PROMPT, adapters=["math", "med"]).weights.tolist() == two


def test_what_cannot_be_added_or_removed_changes_nothing(engine, adapters, tmp_path) -> None:
    other = write_tiny_base(tmp_path / "other.gguf", n_embd=32)
    wrong = write_tiny_adapter(tmp_path / "wrong.gguf", other).path
    engine.use_strategy("single:es")
    for change, error, message in (
        (partial(engine.add_adapter, None, wrong), AdapterMismatchError, "wrong.gguf"),
        (partial(engine.add_adapter, "MATH", adapters["es"]), BundleError, "'MATH' is taken"),
        (partial(engine.add_adapter, "../x", adapters["es"]), BundleError, "'../x' cannot be"),
        (partial(engine.remove_adapter, "fr"), StrategyError, "The adapter 'fr' is not loaded"),
        (partial(engine.remove_adapter, "es"), StrategyError, "'single:es' names the adapter"),
    ):
        core = engine._core
        with pytest.raises(error, match=message):
            change()
        assert engine._core is core
    engine.close()
    with pytest.raises(BusyError, match="closed"):
        engine.add_adapter("more", adapters["es"])


def test_no_change_waits_for_the_hub(engine, adapters, monkeypatch) -> None:
    def fetch(name: str) -> tuple[Path, str]:
        other = threading.Thread(target=engine.remove_adapter, args=["es"])
        other.start()
        other.join(PATIENCE_S)
        return adapters["es"], name

    monkeypatch.setattr(source, "_fetch", fetch)
    assert engine.add_adapter("es", "owner/es") == "es"  # the name was free


def test_added_adapters_are_measured_as_a_bundle_s(calibrated, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(calibrated.folder.parent)
    peft = write_tiny_peft(tmp_path / "new one", calibrated.base, seed=9)
    folder = shutil.copytree(calibrated.folder, tmp_path / "bundle")
    set_base(folder, calibrated.base.path)
    remove_adapter(folder, "es")
    add_adapters(folder, {"es": peft}, engine=Engine, strategy="relay")
    with Engine(folder) as expected, Engine("bundle", strategy="relay") as engine:
        engine.remove_adapter("es")
        engine.add_adapter("es", peft)  # another one of that name
        assert engine.strategies == expected.strategies
        found, wanted = (each.weights(PROMPT).to_dict() for each in (engine, expected))
        assert found | {"probe_ms": 0} == wanted | {"probe_ms": 0}
    with Engine(base=calibrated.base.path) as engine:  # as `--adapter` does
        assert engine.add_adapter(None, peft) == "new-one"
        assert engine.weights(PROMPT).strategy == engine.strategy == "spectr"
        engine.remove_adapter("new-one")
        assert engine.generate(PROMPT, max_tokens=1).fusion.adapters == ()


def test_run_forever_goes_on_after_a_change(engine, adapters) -> None:
    thread = threading.Thread(target=engine.run_forever)
    thread.start()
    expected = engine.generate(PROMPT, weights={"es": 1.0}, max_tokens=5).text()
    begun = engine.generate(PROMPT, weights={"es": 1.0}, max_tokens=5, wait=False)
    engine.remove_adapter("math")
    assert begun.text() == expected
    assert engine.generate(PROMPT, weights={"es": 1.0}, max_tokens=5).text() == expected
    wait_until(lambda: engine._core.loop._driver.name == "SERVER")
    engine.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
