"""The automatic context: it grows for requests that need it, and no answer changes."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from bundles import TinyBundle, make_bundle
from click.testing import CliRunner
from patience import wait_until
from serving import client_of

from qaflora_edge import Engine
from qaflora_edge.backend import context, devices
from qaflora_edge.cli import main
from qaflora_edge.errors import BackendError
from qaflora_edge.formats.base import read_base
from qaflora_edge.inference import loop

LONG = "the thing on a ring " * 390  # 4,305 tokens
OPTIONS = {"strategy": "static", "threads": 1}
GREEDY = ["--strategy", "static", "--threads", "1", "--temp", "0", "--max-tokens", "8"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> TinyBundle:
    return make_bundle(tmp_path_factory.mktemp("long"), n_layer=1, n_ctx=8192)


@pytest.fixture(scope="module")
def fixed(made) -> Iterator[Engine]:
    """An Engine with a context that never grows."""
    with Engine(made.folder, n_ctx=8192, **OPTIONS) as engine:
        yield engine


def ask(engine: Engine, text: str) -> str:
    tokens = engine.chat_tokens([{"role": "user", "content": text}])
    return engine.generate(tokens, max_tokens=8).text()


@pytest.mark.parametrize("verb", [["run", "-"], ["chat", "--repeat-penalty", "1"]])
def test_commands_answer_a_long_prompt(made, fixed, verb) -> None:
    words = [verb[0], str(made.folder), *verb[1:], *GREEDY]
    result = CliRunner().invoke(main, words, input=LONG)
    assert (result.exit_code, result.stdout) == (0, ask(fixed, LONG) + "\n")
    result = CliRunner().invoke(main, [*words, "--ctx", "2048"], input=LONG)
    assert "tokens, the context 2048; shorten it, or raise the context" in result.stderr


def test_a_server_answers_a_long_prompt(made, fixed) -> None:
    options = {"engine": {**OPTIONS, "n_parallel": 2}, "sampling": {"temperature": 0}}
    body = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 8}
    with client_of(made.folder, **options) as client:
        (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]
        assert choice["message"]["content"] == ask(fixed, LONG)
        assert client.get("/v1/models").json()["data"][0]["meta"]["n_ctx"] == 8192


def test_the_context_grows_beside_an_answer_and_keeps_its_states(made, fixed) -> None:
    short = "a king in the air " * 50
    ends = [token for token in range(fixed.n_vocab) if fixed._model.is_end(token)]
    endless = {"max_tokens": 100, "logit_bias": dict.fromkeys(ends, -100)}
    with Engine(made.folder, n_parallel=2, **OPTIONS) as engine:
        slots = engine._core.context
        running = engine.generate(short, **endless)
        assert slots.n_ctx == 1024
        long = engine.generate(LONG, wait=False)
        engine._core.loop.drive(lambda: slots.n_ctx == 8192)
        assert not running.is_done
        long.cancel()
        for text in (LONG, short, f"{short} again"):
            assert np.array_equal(engine.logits(text), fixed.logits(text))
            assert slots.n_ctx == 8192
            assert slots.tokens[0][:99] == engine.tokenize(short)[:99]  # not prefilled again
        assert running.text() == fixed.generate(short, **endless).text()
        answer = engine.generate(short, wait=False)
        assert answer._sequence.n_max == 4096 - answer.n_prompt + 1


def test_a_short_request_waits_for_one_chunk_of_a_long_prompt(made) -> None:
    """In steps: at most one of the long prompt before each chunk of the short one."""
    with Engine(made.folder, n_parallel=2, **OPTIONS) as engine:
        long = engine.generate(LONG, max_tokens=1, wait=False)
        short = None
        n_step = 0
        while short is None or not short.is_done:
            engine._core.loop.drive(partial(next, iter([False, True])))
            if long._sequence.n_past > 3000 and short is None:
                short = engine.generate("a king in the air " * 20, max_tokens=1, wait=False)
                n_chunk = len([*engine._core.context.chunks().cut([0] * short.n_prompt)])
                n_step = 0
            n_step += 1
        assert n_step <= 2 * n_chunk + 1
        assert not long.is_done
        long.cancel()


def test_slots_that_nobody_needs_so_large_shrink(made, fixed, monkeypatch) -> None:
    with Engine(made.folder, **OPTIONS) as engine:
        slots = engine._core.context
        thread = threading.Thread(target=engine.run_forever)
        thread.start()
        short = ask(engine, "the king")
        assert ask(engine, LONG) == ask(fixed, LONG)
        assert (slots.n_ctx, max(map(len, slots.tokens)) > 4000) == (8192, True)
        monkeypatch.setattr(loop, "_UNUSED_S", 0.2)
        assert ask(engine, "the king") == short
        wait_until(lambda: slots.n_ctx == 1024)
        assert max(map(len, slots.tokens)) < 1024
        assert ask(engine, "the king") == short == ask(fixed, "the king")
        assert ask(engine, LONG) == ask(fixed, LONG)
    thread.join()


def test_an_interrupt_in_a_growth_leaves_an_engine_that_works(made, fixed, monkeypatch) -> None:
    with Engine(made.folder, **OPTIONS) as engine:
        slots = engine._core.context
        free = slots._free

        def freed(pointer: object) -> None:
            free(pointer)
            raise KeyboardInterrupt

        monkeypatch.setattr(slots, "_free", freed)
        with pytest.raises(KeyboardInterrupt):
            ask(engine, LONG)
        monkeypatch.undo()
        assert ask(engine, "the king") == ask(fixed, "the king")
        assert ask(engine, LONG) == ask(fixed, LONG)


def test_no_memory_for_a_growth_fails_one_request(made, fixed, monkeypatch) -> None:
    with Engine(made.folder, n_parallel=2, **OPTIONS) as engine:
        ask(engine, "the king")  # a state that would be copied
        monkeypatch.setattr(context, "mapped", Mock(side_effect=OSError(12, "no memory")))
        long = engine.generate(LONG, max_tokens=8, wait=False)
        short = engine.generate("the king", max_tokens=8, wait=False)
        with pytest.raises(BackendError, match=r"cannot grow.*no memory"):
            long.text()
        assert short.text() == fixed.generate("the king", max_tokens=8).text()


def test_a_context_that_cannot_grow_says_why(made, fixed, monkeypatch) -> None:
    with Engine(made.folder, **OPTIONS) as engine:
        monkeypatch.setattr(engine._core.context, "_functions", Mock(context_init=lambda *_: None))
        with pytest.raises(BackendError, match=r"2 x 8192 tokens cannot be made.*Ask for fewer"):
            ask(engine, LONG)
        monkeypatch.undo()
        assert ask(engine, "the king") == ask(fixed, "the king")


def test_memory_and_rope_limit_the_context(made, monkeypatch) -> None:
    base = read_base(made.base.path)
    model = SimpleNamespace(n_ctx_train=1 << 17, n_head=28, has_attention=False)
    limit = partial(devices.automatic_ctx, model, kv_type="f32")
    monkeypatch.setattr(devices, "_free_bytes", lambda: 1 << 30)
    # bytes of a token: K and V of 2 heads of 16 numbers, twice; and 319 rows of scores
    assert limit(base, n_seq=1) == (2**30 - base.size_bytes) // 2 // (2 * 256 + 4 * 28 * 319)
    model.has_attention = True  # which keeps no scores
    assert limit(base, n_seq=1) == 1 << 17
    assert limit(base, n_seq=999) == 4096
    base = replace(base, tensors={**base.tensors, "rope_factors_long.weight": None})
    base.metadata[f"{base.architecture}.rope.scaling.original_context_length"] = 2048
    assert limit(base, n_seq=1) == 2048
