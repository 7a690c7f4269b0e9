"""Text from tokens: stop texts, whole characters, sampling."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tiny import write_tiny_adapters, write_tiny_base

from qaflora_edge import Engine
from qaflora_edge.errors import BusyError
from qaflora_edge.inference.sequence import TextDecoder


def feed(stops: tuple[str, ...], pieces: list[str]) -> tuple[list[str], bool]:
    text, shown = TextDecoder(stops), []
    for piece in pieces:
        shown.append(text.feed(piece.encode()))
        if text.stop is not None:
            return shown, True
    return [*shown, text.flush()], False


def test_the_first_stop_text_is_cut_off_and_what_only_begins_like_one_is_shown() -> None:
    assert feed(("END",), ["one E", "N", "D two"]) == (["one ", "", ""], True)
    assert feed(("END",), ["one E", "NTER", " E"]) == (["one ", "ENTER", " ", "E"], False)
    assert feed(("two", "on"), ["zero one two"]) == (["zero "], True)


def test_characters_of_several_bytes_are_never_cut() -> None:
    text, decoder = "ñandú 你好 🎉", TextDecoder(())
    assert [x for b in text.encode() if (x := decoder.feed(bytes([b])))] == list(text)


@pytest.fixture
def engine(tmp_path) -> Iterator[Engine]:
    base = write_tiny_base(tmp_path / "tiny.gguf")
    adapters = write_tiny_adapters(base, "ab")
    with Engine(base=base.path, adapters=adapters, n_ctx=64) as engine:
        yield engine


def test_sampling_repeats_with_a_seed_and_varies_without(engine) -> None:
    def sample(seed: int | None) -> str:
        options = {"temperature": 1.5, "top_p": 0.95, "seed": seed, "max_tokens": 24}
        return engine.generate("the king", **options).text()

    assert sample(11) == sample(11)
    assert len({sample(seed) for seed in range(6)}) > 1
    assert len({sample(None) for _ in range(6)}) > 1


def test_max_tokens_ends_by_length(engine) -> None:
    generation = engine.generate("the king", max_tokens=5)
    text = generation.text()
    assert generation.finish_reason == "length"
    assert generation.usage["completion_tokens"] == 5
    times = generation.timings.token_s
    assert len(times) == 5
    assert times == sorted(times)
    assert engine.generate("the king", max_tokens=0).text() == ""
    # a shorter answer is a prefix of a longer one
    assert engine.generate("the king", max_tokens=9).text().startswith(text)


def test_progress_is_told_piece_by_piece(tmp_path) -> None:
    base = write_tiny_base(tmp_path / "base.gguf", n_ctx=1024)
    paths = write_tiny_adapters(base, "abc")
    told: list[tuple[str, int, int]] = []
    tokens = np.random.default_rng(1).integers(0, 256, 300).tolist()
    made = {"base": base.path, "adapters": paths, "n_ctx": 512}
    with Engine(**made) as engine:
        engine.generate(tokens, max_tokens=1, on_progress=lambda *facts: told.append(facts))
        told_by_chat: list[str] = []
        engine.chat(
            [{"role": "user", "content": "How far? " * 40}],
            max_tokens=1,
            on_progress=lambda what, done, total: told_by_chat.append(what),
        )
    weighing = [fact[1:] for fact in told if fact[0] == "weighing"]
    assert weighing == [(64, 300), (128, 300), (192, 300)]
    reading = [done for what, done, total in told if what == "reading"]
    assert reading == sorted(reading)
    assert (reading[0], reading[-1]) == (0, 300)
    assert set(told_by_chat) == {"weighing", "reading"}


@pytest.mark.parametrize("is_served", [False, True])
def test_on_progress_that_asks_the_engine_never_hangs(tmp_path, is_served) -> None:
    base = write_tiny_base(tmp_path / "base.gguf")
    paths = write_tiny_adapters(base, "a")
    asked: list[Any] = []

    def ask(what: str, done: int, total: int) -> None:
        asked.append((what, engine.logits("x")))
        with pytest.raises(BusyError, match="in use by the call"):
            engine.close()

    with (
        ThreadPoolExecutor(1) as threads,
        Engine(base=base.path, adapters=paths, n_parallel=2) as engine,
    ):
        if is_served:
            threads.submit(engine.run_forever)
        expected = engine.generate(range(200), max_tokens=3).text()
        engine.generate(range(1, 200), on_progress=ask, max_tokens=3).text()
        assert {what for what, _ in asked} == {"weighing", "reading"}
        assert engine.generate(range(200), max_tokens=3).text() == expected


def test_what_on_progress_raises_ends_the_weighing_at_once(tmp_path) -> None:
    base = write_tiny_base(tmp_path / "base.gguf")
    paths = write_tiny_adapters(base, "ab")

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with Engine(base=base.path, adapters=paths, n_ctx=512) as engine:
        with pytest.raises(ZeroDivisionError):
            engine.generate(range(200), on_progress=fail)
        assert not engine._core.loop._scheduler.has_work
        found = engine.weights(range(200, 0, -1))
    with Engine(base=base.path, adapters=paths, n_ctx=512) as engine:
        expected = engine.weights(range(200, 0, -1))
    assert np.array_equal(found.divergence, expected.divergence)
