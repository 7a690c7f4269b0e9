"""An answer from a thread of its own: whole, stopped at any time, and its failures told"""

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from bundles import make_bundle
from patience import PATIENCE_S

from qaflora_edge import Engine
from qaflora_edge.cli.chat.reply import Reply, interrupts_call
from qaflora_edge.errors import PromptError


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(make_bundle(tmp_path_factory.mktemp("reply")).folder, threads=1) as engine:
        yield engine


ENDLESS = "root ::= [a-z ] root"  # no end of the answer is ever allowed


def begin(engine: Engine, **options: Any) -> Callable[[], Any]:
    return lambda: engine.generate("the thing", grammar=ENDLESS, **options)


def tick() -> None:
    """Nothing to do in between."""


def test_the_answer_is_the_engines(engine: Engine) -> None:
    expected = engine.generate("the thing", grammar=ENDLESS, max_tokens=20).text()
    with Reply(begin(engine, max_tokens=20), engine.cancel) as reply:
        assert "".join(reply.pieces(tick)) == reply.text == expected
    assert not reply.is_stopped
    assert reply.generation is not None
    assert reply.generation.finish_reason == "length"
    assert reply.first_ms is not None
    assert 0 < reply.first_ms < 1e3 * reply.elapsed_s


def test_a_stopped_answer_keeps_what_was_given(engine: Engine) -> None:
    whole = engine.generate("the thing", grammar=ENDLESS, max_tokens=60).text()
    with Reply(begin(engine, max_tokens=60), engine.cancel) as reply:
        pieces = reply.pieces(tick)
        given = [next(pieces), next(pieces)]
        reply.stop()
        assert list(pieces) == []
    assert reply.is_stopped
    assert reply.text == "".join(given)
    assert whole.startswith(reply.text)
    assert len(reply.text) < len(whole)
    # The Engine is free again, and answers as before.
    assert engine.generate("the thing", grammar=ENDLESS, max_tokens=60).text() == whole


def test_leaving_the_block_stops_the_answer(engine: Engine) -> None:
    with Reply(begin(engine, max_tokens=60), engine.cancel) as reply:
        next(reply.pieces(tick))
    assert reply.is_stopped
    assert not any(thread.name == "reply" for thread in threading.enumerate())


def test_a_stop_that_comes_before_the_work_is_repeated(engine: Engine) -> None:
    """cancel() does nothing while the Engine is idle; the work begins after it here."""
    may_begin, n_cancel = threading.Event(), 0

    def late() -> Any:
        may_begin.wait(PATIENCE_S)
        return engine.generate("the thing", grammar=ENDLESS, max_tokens=10**6)

    def cancel() -> None:
        nonlocal n_cancel
        n_cancel += 1
        may_begin.set()
        engine.cancel()

    with Reply(late, cancel) as reply:
        reply.stop()
        assert list(reply.pieces(tick)) == []
    assert n_cancel >= 1
    assert reply.text == ""


def test_a_failure_is_raised_where_the_pieces_are_read(engine: Engine) -> None:
    with (
        Reply(lambda: engine.generate(""), engine.cancel) as reply,
        pytest.raises(PromptError, match="The prompt is empty"),
    ):
        list(reply.pieces(tick))


def test_interrupts_call_an_action_and_raise_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)
    calls: list[int] = []
    with interrupts_call(lambda: calls.append(1)):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert calls == [1, 1]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_reading_that_is_stopped_ends_early(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop while the prompt is read ends the reading, not only what would follow."""
    decode = engine._model._lib.llama_decode
    is_reading, is_cancelled = threading.Event(), threading.Event()

    def slow_decode(*args: object) -> int:
        is_reading.set()
        is_cancelled.wait(PATIENCE_S)
        return int(decode(*args))

    def cancel() -> None:
        engine.cancel()
        is_cancelled.set()

    def stop_once_it_reads() -> None:
        if is_reading.is_set():
            reply.stop()

    monkeypatch.setattr(engine._model._lib, "llama_decode", slow_decode)
    with Reply(lambda: engine.generate("a thing", max_tokens=1), cancel) as reply:
        assert list(reply.pieces(stop_once_it_reads)) == []
    monkeypatch.undo()
    assert reply.generation is None  # generate() returns once the prompt is read
    assert begin(engine, max_tokens=1)().text()
