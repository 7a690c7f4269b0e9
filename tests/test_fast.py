"""--fast: the ends of a prompt, put on what the base made of all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from bundles import TinyBundle, make_bundle
from decoded import count_decoded

from qaflora_edge import Engine
from qaflora_edge.backend.kv_beginning import with_beginning
from qaflora_edge.errors import BackendError

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


def test_fast_is_a_tail_of_eight(made: TinyBundle, fast: Engine) -> None:
    with Engine(made.folder, probe_tail=8, threads=1) as tail:
        assert fast.probe_tail == tail.probe_tail == 8
        assert np.array_equal(fast.weights(LONG).weights, tail.weights(LONG).weights)
    with Engine(made.folder, probe_tail=3, fast=True) as own:
        assert own.probe_tail == 3


def test_a_prompt_that_is_all_ends_is_weighed_exactly(
    made: TinyBundle, exact: Engine, fast: Engine
) -> None:
    tokens = exact.tokenize(LONG)
    for n in (1, 15, 16):
        assert np.array_equal(fast.weights(tokens[:n]).weights, exact.weights(tokens[:n]).weights)
    assert not np.array_equal(fast.weights(tokens[:17]).weights, exact.weights(tokens[:17]).weights)
    short, (start, _) = chat(exact, "a")
    with Engine(made.folder, threads=1, probe_tail=len(short) - start) as ends:
        assert np.array_equal(ends.weights(short).weights, exact.weights(short).weights)


def test_what_precedes_questions_is_read_by_the_adapters_once(
    made: TinyBundle, fast: Engine, counts: list[int]
) -> None:
    first, (start, _) = chat(fast, LONG)
    second, _ = chat(fast, "a thing, " * 12)
    middle = len(first) - start - 8
    fast.weights(first)
    assert (counts[0], sum(counts)) == (3 * start, 3 * start + middle + 3 * 8)
    counts.clear()
    found = fast.weights(second).weights
    assert sum(counts) == len(second) - start - 8 + 3 * 8
    with Engine(made.folder, threads=1, fast=True) as other:
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
