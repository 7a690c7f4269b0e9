"""The base prefills a prompt, whoever answers it: what that computes, and what it spares."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from bundles import TinyBundle, make_bundle, rewrite
from decoded import count_decoded
from tiny import write_tiny_adapters, write_tiny_base

from qaflora_edge import Engine
from qaflora_edge.ask import Weighing
from qaflora_edge.bundles.open import load_bundle
from qaflora_edge.errors import BundleError, CancelledError, OptionError
from qaflora_edge.weighing.numbers import N_TAIL
from qaflora_edge.weighing.published.projections import AttentionInputs
from qaflora_edge.weighing.two_place import TwoPlace

EXACT: dict[str, Any] = {"kv_type": "f32", "flash_attn": False, "threads": 1}
STORY = {"role": "user", "content": "the thing on a ring is in the air " * 8}
TURNS = [STORY, {"role": "assistant", "content": "It is."}, {"role": "user", "content": "Why?"}]
MIXED = "two-place:abstain=never"  # a tiny base says nothing, so that no adapter stands out


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> TinyBundle:
    """Quantised: ggml's products in F32 round otherwise when sequences are decoded together."""
    place = tmp_path_factory.mktemp("made")
    return make_bundle(place, calibrate=True, n_ctx=2048, dtype="q8_0")


@pytest.fixture
def engine(made) -> Iterator[Engine]:
    with Engine(made.folder, threads=1, guesses=0) as engine:
        yield engine


def heard(engine: Engine, messages: list[Any], strategy: str, **options: Any) -> Any:
    """The tokens of an answer with their log-probabilities, to the bit."""
    tokens = engine.chat_tokens(messages)
    options = {"strategy": strategy, "max_tokens": 4, "logprobs": 2, **options}
    answer = engine.generate(tokens, **options)
    answer.text()
    return answer.logprobs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_logits_are_those_of_adapters_off_and_then_on(tmp_path) -> None:
    """Oracle: transformers reads the prompt without adapters, and the rest with them merged."""
    from reference import Reference, peft_from_gguf

    base = write_tiny_base(tmp_path / "base.gguf", n_layer=3)
    paths = write_tiny_adapters(base, ("math", "es"))
    heads = base.n_head, base.n_head_kv
    folders = {name: peft_from_gguf(p, tmp_path / name, *heads) for name, p in paths.items()}
    reference = Reference(base.path, folders)
    rng = np.random.default_rng(0)
    weights = rng.random((2, 3), np.float32)
    tokens, answer = (rng.integers(0, 250, n).tolist() for n in (150, 8))
    with Engine(base=base.path, adapters=paths, prefill="base", **EXACT) as engine:
        found = engine.logits(tokens, weights=weights)
        scores = engine.score(tokens, answer, weights=weights)
    ((expected, *rest),) = reference.logits([(tokens, answer)], weights, n_tail=N_TAIL)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    rows = np.stack([expected, *rest])[:-1].astype(np.float64)
    log_p = (rows - np.logaddexp.reduce(rows, axis=1, keepdims=True))[range(8), answer]
    np.testing.assert_allclose(scores, log_p, atol=1e-4, rtol=0)
    (by_mix,) = reference.logits([(tokens, [])], weights)
    assert np.abs(by_mix[0] - expected).max() > 0.01


def test_one_prefill_serves_every_mix(engine, monkeypatch) -> None:
    """The last tokens are read once more, by the base where they are weighed and by the mix."""
    tokens, counts = engine.chat_tokens([STORY]), count_decoded(monkeypatch)
    options: dict[str, Any] = {"prefill": "base", "max_tokens": 1}
    heard(engine, [STORY], MIXED, **options)
    assert (sum(counts), counts[-1]) == (len(tokens) + N_TAIL, N_TAIL)
    for strategy in ("static", "single:es", "base"):
        counts.clear()
        heard(engine, [STORY], strategy, **options)
        assert counts == [N_TAIL]
    counts.clear()
    texts = [a.text() for a in engine.answers(tokens, 3, strategy="static", **options)]
    assert (counts, len(set(texts))) == ([N_TAIL] * 3, 1)


def test_a_turn_prefills_what_is_new_and_answers_as_if_it_came_alone(
    engine, made, monkeypatch
) -> None:
    heard(engine, [STORY], MIXED)
    counts = count_decoded(monkeypatch)
    found = heard(engine, TURNS, "two-place:abstain=never,answer=0.3")
    monkeypatch.undo()
    n_new = len(engine.chat_tokens(TURNS)) - len(engine.chat_tokens([STORY]))
    assert sum(n for n in counts if n > 1) <= n_new + 2 * N_TAIL
    with Engine(made.folder, threads=1) as alone:
        assert heard(alone, TURNS, "two-place:abstain=never,answer=0.3") == found


def test_auto_is_the_base_for_chats_under_two_place_alone(engine) -> None:
    chat, text = engine.chat_tokens([STORY]), engine.tokenize("the thing on a ring")

    engine.use_strategy("two-place")

    def is_by_base(weights: Any, tokens: list[int], prefill: str | None = None) -> bool:
        weighing = Weighing(weights, prefill=prefill)
        return engine.memory.current.weigher.choice(engine.read(tokens), weighing).is_read_by_base

    for weights in (None, "two-place:second=2", "base", {}, engine.weights(chat)):
        assert is_by_base(weights, chat)
    for weights in ("static", "qa-flora", {"es": 1}, np.zeros((2, engine.n_layer))):
        assert not is_by_base(weights, chat)
        assert is_by_base(weights, chat, "base")
    assert not is_by_base(None, text)
    assert not is_by_base(None, chat, "mix")
    with pytest.raises(OptionError, match="prefill is 'all', expected one of auto, base, mix"):
        engine.generate(chat, prefill="all")


def test_an_older_bundle_is_prefilled_by_the_mix(tmp_path) -> None:
    folder = make_bundle(tmp_path).folder
    rewrite(folder, lambda raw: raw["fusion"].update(prefill="all"))
    with pytest.raises(BundleError, match='is "all", expected one of auto'):
        load_bundle(folder)
    rewrite(folder, lambda raw: raw["fusion"].pop("prefill"))
    assert load_bundle(folder).known.prefill == "mix"


def test_where_the_mix_prefills_the_base_keeps_its_own_state(engine, monkeypatch) -> None:
    """There is one slot more than answers, so that neither takes the other's place."""
    heard(engine, [STORY], MIXED, prefill="mix")
    counts = count_decoded(monkeypatch)
    heard(engine, TURNS, MIXED, prefill="mix", max_tokens=1)
    n_new = len(engine.chat_tokens(TURNS)) - len(engine.chat_tokens([STORY]))
    assert counts[0] == n_new


def test_a_failure_between_weighing_and_answer_frees_the_slot(engine, monkeypatch) -> None:
    expected = heard(engine, [STORY], MIXED)

    def fails(_: Any, reading: Any) -> None:
        reading.added()
        reading.listen(AttentionInputs)
        raise RuntimeError("after measuring")

    with monkeypatch.context() as patch:
        patch.setattr(TwoPlace, "plan", fails)
        with pytest.raises(RuntimeError, match="after measuring"):
            heard(engine, [STORY], MIXED)
    assert engine._core.loop._scheduler.running == []

    def refuse(_: Any) -> None:
        raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        heard(engine, [STORY], MIXED, on_weights=refuse)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError):
        heard(engine, TURNS, MIXED, cancel=cancel)
    assert heard(engine, [STORY], MIXED) == expected
