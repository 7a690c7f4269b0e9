"""--fast: the ends of a prompt, put on what the base made of all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from bundles import TinyBundle, make_bundle
from decoded import count_decoded

from qaflora_edge import Engine
from qaflora_edge.backend.kv_beginning import MemoryKindError, with_beginning
from qaflora_edge.bundles.open import load_bundle
from qaflora_edge.bundles.write import neutral_prompts
from qaflora_edge.errors import BackendError
from qaflora_edge.weighing.typical import ALWAYS

LONG = "on the ring of a thing, " * 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return make_bundle(tmp_path_factory.mktemp("fast"))


@pytest.fixture
def exact(made: TinyBundle) -> Iterator[Engine]:
    with Engine(made.folder, threads=1) as engine:
        yield engine


@pytest.fixture
def fast(made: TinyBundle) -> Iterator[Engine]:
    with Engine(made.folder, threads=1, fast=True) as engine:
        yield engine


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_decoded(monkeypatch)


def chat(engine: Engine, text: str) -> tuple[list[int], tuple[int, int]]:
    """A question's tokens, and where it stands."""
    tokens = engine.chat_tokens([{"role": "user", "content": text}])
    span = engine._weigher.find_question(tokens)
    assert span is not None
    return tokens, span


def added(engine: Engine, tokens: Sequence[int], span: tuple[int, int]) -> Any:
    core = engine._core
    return core.run(core.prober.base.added(tokens, core.rows(engine.adapters), span))


@pytest.fixture
def ends(made: TinyBundle) -> Iterator[Engine]:
    with Engine(made.folder, threads=1, probe_tail=8) as engine:
        yield engine


def test_fast_is_a_tail_of_most_of_the_question(made: TinyBundle, fast: Engine) -> None:
    tokens, (start, _) = chat(fast, LONG)
    n_last = round(0.65 * (len(tokens) - start))
    assert n_last < len(tokens) - start - 20
    with Engine(made.folder, probe_tail=n_last, threads=1) as tail:
        assert np.array_equal(fast.weights(tokens).weights, tail.weights(tokens).weights)
    with Engine(made.folder, probe_tail=3, fast=True) as own:
        assert own.probe_tail == 3


def test_fast_weighs_short_prompts_exactly(exact: Engine, fast: Engine) -> None:
    tokens = exact.tokenize(LONG)
    for n in (1, 40, 8 + 64):
        assert np.array_equal(fast.weights(tokens[:n]).weights, exact.weights(tokens[:n]).weights)
    longer = tokens[: 8 + 65]
    assert not np.array_equal(fast.weights(longer).weights, exact.weights(longer).weights)


def test_a_prompt_that_is_all_ends_is_weighed_exactly(
    made: TinyBundle, exact: Engine, ends: Engine
) -> None:
    tokens = exact.tokenize(LONG)
    for n in (1, 15, 16):
        assert np.array_equal(ends.weights(tokens[:n]).weights, exact.weights(tokens[:n]).weights)
    assert not np.array_equal(ends.weights(tokens[:17]).weights, exact.weights(tokens[:17]).weights)
    short, (start, _) = chat(exact, "a")
    with Engine(made.folder, threads=1, probe_tail=len(short) - start) as all_ends:
        assert np.array_equal(all_ends.weights(short).weights, exact.weights(short).weights)


def test_what_precedes_questions_is_read_by_the_adapters_once(
    made: TinyBundle, ends: Engine, counts: list[int]
) -> None:
    first, (start, _) = chat(ends, LONG)
    second, _ = chat(ends, "a thing, " * 12)
    middle = len(first) - start - 8
    ends.weights(first)
    assert (counts[0], sum(counts)) == (3 * start, 3 * start + middle + 3 * 8)
    counts.clear()
    found = ends.weights(second).weights
    assert sum(counts) == len(second) - start - 8 + 3 * 8
    with Engine(made.folder, threads=1, probe_tail=8) as other:
        assert np.array_equal(other.weights(second).weights, found)


def test_weights_are_the_same_bits_after_other_strategies(made: TinyBundle, fast: Engine) -> None:
    tokens, _ = chat(fast, LONG)
    expected = fast.weights(tokens).weights
    for strategy in ("qa-flora:pool=question", "qa-flora:pool=mean", "cosine", "norm"):
        fast.weights(tokens, strategy=strategy)
        fast.weights(tokens[:20])  # read whole
        fast.weights(tokens, strategy="qa-flora:pool=question", adapters=["es"])
        assert np.array_equal(fast.weights(tokens).weights, expected)


def test_turns_of_a_chat_are_weighed_as_afresh(made: TinyBundle, fast: Engine) -> None:
    messages: list[dict[str, str]] = []
    for text in (LONG, "a thing, " * 12, "on the ring"):
        messages.append({"role": "user", "content": text})
        tokens = fast.chat_tokens(messages)
        with Engine(made.folder, threads=1, fast=True) as other:
            assert np.array_equal(fast.weights(tokens).weights, other.weights(tokens).weights)
        messages.append({"role": "assistant", "content": "of a thing"})


def test_what_adapters_would_add_is_measured_at_the_ends_of_a_question(
    exact: Engine, fast: Engine, counts: list[int]
) -> None:
    tokens, (start, end) = chat(exact, LONG)
    left = [*tokens[: start + 16], *tokens[end - 32 :]]
    expected = added(exact, left, (start, start + 48))
    counts.clear()
    np.testing.assert_allclose(added(fast, tokens, (start, end)), expected, rtol=1e-3)
    assert counts == [start, len(left) - start]
    counts.clear()
    assert np.array_equal(added(fast, tokens, (start, end)), added(fast, tokens, (start, end)))
    assert counts == [len(left) - start] * 2  # the beginning is kept
    short = [*tokens[: start + 48], *tokens[end:]]
    whole = (start, start + 48)
    assert np.array_equal(added(fast, short, whole), added(exact, short, whole))


def test_states_that_cannot_be_put_together_are_refused() -> None:
    empty = np.zeros(12, np.uint8)
    assert np.array_equal(with_beginning(empty, empty, 4), empty)  # no cache in either
    short = np.zeros(16, np.uint8)
    short[8], short[12] = 1, 3  # one stream of three cells, and nothing behind
    with pytest.raises(BackendError) as caught:
        with_beginning(short, empty, 4)
    assert str(caught.value) == (
        "What this base holds of a prompt cannot be put together out of two: 52 bytes of 16, "
        "expected a key and a value for each token and layer; leave out the options fast and "
        "probe_tail."
    )


# what --fast usually lacks


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return make_bundle(tmp_path_factory.mktemp("fast_calibrated"), calibrate=True)


def part_unread(tokens: Sequence[int], start: int) -> float:
    return (len(tokens) - start - 8) / len(tokens)


def test_what_is_usually_lacking_is_given_back(
    calibrated: TinyBundle, made: TinyBundle, ends: Engine
) -> None:
    typical = load_bundle(calibrated.folder).known.typical
    usual = np.array([typical[name]["fast_norm"] for name in ends.adapters])
    assert np.ptp(usual) > 0.01
    tokens, (start, _) = chat(ends, LONG)
    with Engine(calibrated.folder, threads=1, probe_tail=8) as engine:
        found = engine.weights(tokens)
        text = engine.weights(LONG)
        cosine = engine.weights(tokens, strategy="cosine")
        alone = engine.weights(tokens, adapters=["es"])
    plain = ends.weights(tokens)
    expected = plain.divergence * usual ** (part_unread(tokens, start) / 2)
    np.testing.assert_allclose(found.divergence, expected, rtol=1e-6)
    np.testing.assert_allclose(found.weights, expected / expected.sum(0), rtol=1e-6)
    np.testing.assert_allclose(alone.divergence[0], expected[1], rtol=1e-6)
    # As it was found: what is no chat, and what is no KL.
    assert np.array_equal(text.divergence, ends.weights(LONG).divergence)
    assert np.array_equal(cosine.divergence, ends.weights(tokens, strategy="cosine").divergence)


def test_what_is_usually_lacking_is_measured_on_long_texts(
    calibrated: TinyBundle, exact: Engine, ends: Engine
) -> None:
    """Oracle: both kinds of weights of three texts, one by one."""
    prompts, logs = neutral_prompts(), []
    for first, n in enumerate((6, 7, 8)):
        text = " ".join((prompts * 2)[8 * first : 8 * first + n])
        tokens, (start, _) = chat(exact, text)
        if len(tokens) > 512:
            continue
        lacks = exact.weights(tokens).divergence / ends.weights(tokens).divergence
        logs.append(np.log(lacks) / part_unread(tokens, start))
    assert logs
    typical = load_bundle(calibrated.folder).known.typical
    for ia, name in enumerate(exact.adapters):
        expected = np.exp(np.mean(logs, axis=0)[ia])
        np.testing.assert_allclose(typical[name]["fast_norm"], expected, rtol=1e-4)


def test_a_base_that_refuses_fast_is_calibrated_without_it(
    exact: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise MemoryKindError("recurrent")

    monkeypatch.setattr("qaflora_edge.backend.probe_context.with_beginning", refuse)
    typical = exact.typical_divergence(["on the ring of a thing"])
    assert {key for by_key in typical.values() for key in by_key} == set(ALWAYS)
