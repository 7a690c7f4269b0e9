"""Engine.cancel from another thread, and the callback with the weights."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from refusals import refused
from tiny import write_tiny_adapter, write_tiny_base

from qaflora_edge import Engine, FusionWeights
from qaflora_edge.errors import BusyError, CancelledError

LONG = "the king " * 120


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Engine]:
    place = tmp_path_factory.mktemp("cancel")
    base = write_tiny_base(place / "base.gguf", n_ctx=1024)
    adapters = {"a": write_tiny_adapter(place / "a.gguf", base).path}
    with Engine(base=base.path, adapters=adapters, n_ctx=1024) as engine:
        yield engine


@pytest.mark.parametrize("context", ["probe", "main"])
def test_cancel_ends_the_reading_of_a_prompt(engine, monkeypatch, context) -> None:
    """Cancelled from another thread once the context is at work: between two calls of Python."""
    expected = engine.weights(LONG).divergence
    engine.weights("something else")
    strategy = "qa-flora" if context == "probe" else "static"
    decode = engine._model._functions.decode
    asked = threading.Event()

    def cancelled_meanwhile(*args: object) -> int:
        thread = threading.Thread(target=lambda: (engine.cancel(), asked.set()))
        thread.start()
        asked.wait()
        return int(decode(*args))

    monkeypatch.setattr(engine._model._functions, "decode", cancelled_meanwhile)
    assert refused(CancelledError, engine.generate, LONG, weights=strategy) == (
        "The call was cancelled (Engine.cancel) before there was an answer; ask again."
    )
    monkeypatch.undo()
    assert np.array_equal(engine.weights(LONG).divergence, expected)
    assert engine.generate(LONG, weights=strategy, max_tokens=3).n_prompt > 200


@pytest.mark.parametrize("is_done", [True, False])
def test_cancel_ends_all_answers_that_were_asked_for(engine, is_done) -> None:
    found = []
    for answer in engine.answers("the king", 3, max_tokens=5):
        next(answer)
        if is_done:
            answer.text()
        engine.cancel()
        answer.text()
        found.append(answer.finish_reason)
    assert found == ["length" if is_done else "cancelled"]


@pytest.mark.parametrize("prefill", ["base", "mix"])
def test_weights_are_told_once_and_the_engine_may_be_asked_then(engine, prefill) -> None:
    told: list[FusionWeights] = []

    def on_weights(fusion: FusionWeights) -> None:
        assert engine.weights("another").adapters == ("a",)
        with pytest.raises(BusyError, match=r"in use by the call that close\(\) was called from"):
            engine.close()
        told.append(fusion)

    answer = engine.generate("one more", max_tokens=2, prefill=prefill, on_weights=on_weights)
    assert told == [answer.fusion]
    expected = engine.generate("one more", max_tokens=2, prefill=prefill)
    assert answer.text() == expected.text()


def test_answer_keeps_its_engine_alive(tmp_path) -> None:
    base = write_tiny_base(tmp_path / "base.gguf")
    assert len(list(Engine(base=base.path).generate("the king", max_tokens=5))) > 1
