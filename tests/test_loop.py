"""Engine.run_forever: one thread that computes for all others."""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from patience import PATIENCE_S, wait_until
from tiny import write_tiny_adapters, write_tiny_base

from qaflora_edge import Engine
from qaflora_edge.backend.context import Context
from qaflora_edge.errors import BackendError, BusyError
from qaflora_edge.inference.runner import Runner


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("loop")
    base = write_tiny_base(place / "base.gguf")
    paths = write_tiny_adapters(base, ("math", "es"))
    return {"base": base.path, "adapters": paths, "kv_type": "f32", "threads": 1, "n_ctx": 400}


@contextlib.contextmanager
def served(parts: dict[str, Any], **more: Any) -> Iterator[tuple[Engine, threading.Thread]]:
    """An Engine and the thread that computes for all others until it is closed."""
    engine = Engine(**{**parts, "n_parallel": 3, **more})
    thread = threading.Thread(target=engine.run_forever)
    thread.start()
    try:
        yield engine, thread
    finally:
        engine.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_it_computes_whether_pieces_are_taken_or_not(parts) -> None:
    with served(parts) as (engine, _):
        answer = engine.generate("the king", max_tokens=50)
        wait_until(lambda: answer.is_done)
        assert answer.usage["completion_tokens"] == len(answer.timings.token_s) > 0
        assert answer.text()


def test_closing_ends_it_and_who_waits_is_told(parts, monkeypatch) -> None:
    decode = Context.decode_spans

    def slow(self: Context, spans: Any) -> list[int]:
        time.sleep(0.02)
        return decode(self, spans)

    monkeypatch.setattr(Context, "decode_spans", slow)
    with served(parts) as (engine, thread):
        answer = engine.generate("the king", max_tokens=300)
        engine.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        with pytest.raises(BusyError, match=r"was closed in the middle of a call"):
            answer.text()
        with pytest.raises(BusyError):
            engine.run_forever()


def test_a_step_that_fails_ends_what_it_was_for_and_no_more(parts, monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a step")

    with Engine(**parts, n_parallel=3) as engine:
        expected = engine.generate("the king", max_tokens=10).text()
        with ThreadPoolExecutor(1) as threads:
            with monkeypatch.context() as patch:
                patch.setattr(Runner, "run", fail)
                running = threads.submit(engine.run_forever)
                with pytest.raises(BackendError, match=r"A step of the Engine failed") as failed:
                    engine.generate("the king", weights="static")
                assert isinstance(failed.value.__cause__, RuntimeError)
                with pytest.raises(RuntimeError, match="a step"):
                    running.result(PATIENCE_S)
            running = threads.submit(engine.run_forever)
            wait_until(lambda: engine._core.loop._driver.name == "SERVER")
            assert engine.generate("the king", max_tokens=10).text() == expected
            engine.close()
            running.result(PATIENCE_S)
