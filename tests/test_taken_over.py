"""Where the base answers alone, what it has read of a question to weigh it is not read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import TinyBundle, make_bundle
from decoded import count_decoded

from qaflora_edge import Engine
from qaflora_edge.backend.context import Context, as_bytes
from qaflora_edge.backend.kv_beginning import MemoryKindError, for_rooms

BASE_ALONE = "two-place:answer=0,question=0"
QUESTION = "how many legs have three dogs and two birds, and who has counted them?"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return make_bundle(tmp_path_factory.mktemp("taken"), calibrate=True)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_decoded(monkeypatch)


def asked(engine: Engine, text: str = QUESTION) -> list[int]:
    return engine.chat_tokens([{"role": "user", "content": text}])


def answered(engine: Engine, tokens: list[int], weights: Any, **options: Any) -> Any:
    """The tokens of an answer with the logarithms of their probabilities."""
    answer = engine.generate(tokens, weights=weights, max_tokens=6, logprobs=3, **options)
    list(answer)
    return [(each.token, each.logprob) for each in answer.logprobs]


@pytest.mark.parametrize("n_parallel", [1, 3])
@pytest.mark.parametrize("flash_attn", [None, True, False])
@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_answer_is_that_of_the_base(
    made: TinyBundle, counts: list[int], kv_type: str, flash_attn: bool | None, n_parallel: int
) -> None:
    """Flash attention rounds queries to f16, so that a token read alone comes out a little else."""
    options: Any = {"kv_type": kv_type, "flash_attn": flash_attn, "n_parallel": n_parallel}
    with Engine(made.folder, threads=1, **options) as engine:
        tokens = asked(engine)
        expected = answered(engine, tokens, "base")
        engine.generate("something else", max_tokens=1)
        counts.clear()
        found = answered(engine, tokens, BASE_ALONE)
        assert counts[:2] == [len(tokens), 1]
    assert [token for token, _ in found] == [token for token, _ in expected]
    ours, theirs = ([each for _, each in logprobs] for logprobs in (found, expected))
    np.testing.assert_allclose(ours, theirs, atol=3e-3)


def test_only_the_last_token_is_read_again(made: TinyBundle, counts: list[int]) -> None:
    with Engine(made.folder, threads=1) as engine:
        tokens = asked(engine)
        engine.generate(tokens, weights=BASE_ALONE, max_tokens=0)
        assert counts == [len(tokens), 1]
        counts.clear()
        # What was taken over is as good as what was read where a prompt goes on from it ...
        engine.generate([*tokens, *tokens[:9]], weights="base", max_tokens=0)
        assert counts == [9]
        counts.clear()
        # ... but is not had by others, which would be read to other bits.
        engine.generate([*tokens[:-1], 5, 6], weights="base", max_tokens=0)
        assert counts == [len(tokens) + 1]


def test_no_room_is_copied_that_is_taken(made: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    options: Any = {"threads": 1, "n_ctx": 1024, "kv_type": "f32"}
    alike = [{"role": "system", "content": "the thing is in another place and who has " * 6}]
    question = [*alike, {"role": "user", "content": QUESTION}]
    with Engine(made.folder, n_parallel=2, **options) as engine:
        tokens = engine.chat_tokens(question)
        expected = answered(engine, tokens, BASE_ALONE)
        beside = engine.chat_tokens([*alike, {"role": "user", "content": "one"}])
        running = engine.generate(beside, weights="base", max_tokens=40)
        next(running)  # it begins alike
        monkeypatch.delattr(Context, "copy")
        assert_same(answered(engine, tokens, BASE_ALONE), expected)
        assert not running.is_done


def test_a_room_that_is_being_cleaned_is_not_taken_too_soon(made: TinyBundle) -> None:
    options: Any = {"threads": 1, "n_ctx": 1024, "kv_type": "f32"}
    with Engine(made.folder, **options) as engine:
        expected = answered(engine, asked(engine), BASE_ALONE)
    with Engine(made.folder, n_parallel=2, **options) as engine:
        half = engine.generate(
            engine.tokenize("the thing is in " * 80), weights="static", wait=False, max_tokens=1
        )
        engine._core._loop.drive(lambda: half._sequence.n_past > 0)
        half.cancel()
        engine.generate("something else", weights="static", max_tokens=2).text()
        assert_same(answered(engine, asked(engine), BASE_ALONE), expected)


def test_a_room_that_was_left_is_not_taken_too_soon(made: TinyBundle) -> None:
    """Nor does the answer that moved out of it get what comes in."""
    options: Any = {"threads": 1, "n_ctx": 1024, "kv_type": "f32", "n_parallel": 3}

    def answers(has_other: bool) -> list[Any]:
        with Engine(made.folder, **options) as engine:

            def ask(tokens: list[int], weights: str, n: int) -> Any:
                return engine.generate(
                    tokens, weights=weights, wait=False, max_tokens=n, logprobs=0
                )

            def text(n: int, seed: int) -> list[int]:
                return [(7 * seed + i * i) % 200 + 3 for i in range(n)]

            short = [ask(text(20, 120), "static", 1), ask(text(20, 99), "static", 3)]
            long = [ask(text(900, 112), "static", 3), ask(text(900, 110), "static", 3)]
            if has_other:
                short.append(ask(asked(engine, QUESTION[:45] * 10), BASE_ALONE, 3))
            for each in (*long, short[1]):
                each.text()
            return [[(x.token, x.logprob) for x in each.logprobs] for each in (*long, short[1])]

    for found, expected in zip(answers(True), answers(False), strict=True):
        assert_same(found, expected)


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert [token for token, *_ in found] == [token for token, *_ in expected]
    ours, theirs = (np.array([each[1] for each in one]) for one in (found, expected))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_each_of_several_has_its_own(made: TinyBundle) -> None:
    with Engine(made.folder, threads=1, n_parallel=3) as engine:
        prompts = [asked(engine, QUESTION[i:] + " what?") for i in range(5)]
        expected = [answered(engine, prompt, BASE_ALONE)[0] for prompt in prompts]
        options: Any = {"weights": BASE_ALONE, "max_tokens": 6, "logprobs": 3}
        found = {}
        for i, answer in engine.generate_many(prompts, **options):
            list(answer)
            found[i] = (answer.logprobs[0].token, answer.logprobs[0].logprob)
    assert [found[i] for i in range(5)] == expected


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ("two-place:abstain=never", {}),  # a mix
        ("qa-flora", {}),  # the base is read with others
        (BASE_ALONE, {"prefix_cache": 0}),  # nothing is kept
    ],
)
def test_a_prompt_is_read_where_there_is_nothing_to_take(
    made: TinyBundle, counts: list[int], weights: str, options: Any
) -> None:
    with Engine(made.folder, threads=1, **options) as engine:
        tokens = asked(engine, QUESTION * 4)
        engine.generate(tokens, weights=weights, max_tokens=0)
        assert counts[-1] == len(tokens)


def test_history_stays_as_it_was_read(made: TinyBundle, counts: list[int]) -> None:
    with Engine(made.folder, threads=1) as engine:
        tokens = asked(engine)
        first = engine.generate(tokens, weights="static", max_tokens=0)
        counts.clear()
        more = [*tokens, *asked(engine, "and who has not?" * 3)]
        engine.generate(more, weights=BASE_ALONE, max_tokens=0, keep_history=first)
        assert counts[-1] == len(more) - len(tokens)


def test_a_short_prompt_is_read(made: TinyBundle, counts: list[int]) -> None:
    with Engine(made.folder, threads=1) as engine:
        tokens = asked(engine, "a")[-16:]
        engine.generate(tokens, weights=BASE_ALONE, max_tokens=0)
        assert counts == [16, 16]


def test_sliding_window_that_has_moved_on(tmp_path: Path, counts: list[int]) -> None:
    made = make_bundle(tmp_path, calibrate=True, arch="gemma3")
    with Engine(made.folder, threads=1) as engine:
        n_swa = engine._core.model.n_swa
        assert n_swa > 0
        tokens = [3 + i % 50 for i in range(n_swa + 8)]
        expected = answered(engine, tokens, "base")
        engine.generate("something else", max_tokens=0)
        counts.clear()
        assert answered(engine, tokens, BASE_ALONE) == expected
        assert counts[:4] == [256, len(tokens) - 256] * 2
        within = tokens[:n_swa]
        expected = answered(engine, within, "base")
        engine.generate("something else", max_tokens=0)
        counts.clear()
        found = answered(engine, within, BASE_ALONE)
        assert counts[:3] == [256, n_swa - 256, 1]
    np.testing.assert_allclose([x for _, x in found], [x for _, x in expected], atol=1e-3)


@pytest.mark.parametrize("n_parallel", [1, 3])
def test_an_answer_depends_on_its_prompt_alone(made: TinyBundle, n_parallel: int) -> None:
    """Whatever the slot holds, of this prompt or of another."""
    with Engine(made.folder, threads=1, n_parallel=n_parallel) as engine:
        tokens = asked(engine, QUESTION * 3)
        expected = answered(engine, tokens, BASE_ALONE)
        for before, weights in ((tokens[:-5], "base"), (tokens, "base"), (tokens, BASE_ALONE)):
            engine.generate(before, weights=weights, max_tokens=0)
            assert answered(engine, tokens, BASE_ALONE) == expected


@pytest.mark.parametrize("error", [MemoryKindError("no"), MemoryError()])
def test_what_cannot_be_taken_is_read_as_usual(
    made: TinyBundle, monkeypatch: pytest.MonkeyPatch, counts: list[int], error: Exception
) -> None:
    """And what the slot holds is used as usual."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("qaflora_edge.backend.context.for_rooms", refuse)
    with Engine(made.folder, threads=1) as engine:
        tokens = asked(engine)
        engine.generate(tokens, weights=BASE_ALONE, max_tokens=0)
        assert counts == [len(tokens)] * 2
        counts.clear()
        more = [*tokens, *asked(engine, "and who has not?")]
        engine.generate(more, weights=BASE_ALONE, max_tokens=0)
        assert counts[-1] == len(more) - len(tokens)


def test_a_state_that_is_damaged_is_not_taken(
    made: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is held then, and others' answers go on."""
    with Engine(made.folder, threads=1, n_parallel=2) as engine:
        tokens = asked(engine, QUESTION * 3)
        expected = answered(engine, tokens, "base")
        other = answered(engine, "the king", "static")
        engine.generate(tokens[:-9], weights="base", max_tokens=0)
        beside = engine.generate("the king", weights="static", max_tokens=6, logprobs=3)
        next(beside)
        monkeypatch.setattr(
            "qaflora_edge.backend.context.for_rooms", lambda data, *_, **__: data[:-4].copy()
        )
        found = answered(engine, tokens, BASE_ALONE)
        list(beside)
    assert [token for token, _ in found] == [token for token, _ in expected]
    np.testing.assert_allclose([x for _, x in found], [x for _, x in expected], atol=1e-3)
    assert [each.token for each in beside.logprobs] == [token for token, _ in other]


def test_several_answers_share_what_was_taken(made: TinyBundle, counts: list[int]) -> None:
    with Engine(made.folder, threads=1, n_parallel=2) as engine:
        tokens = asked(engine, QUESTION * 3)
        options: Any = {"weights": BASE_ALONE, "temperature": 1.0, "max_tokens": 4}
        answers = list(engine.answers(tokens, 2, seed=1, **options))
        assert [count for count in counts if count > 2] == [len(tokens)]
        texts = ["".join(answer) for answer in answers]
        again = ["".join(answer) for answer in engine.answers(tokens, 2, seed=1, **options)]
    assert texts == again


def test_rooms_of_a_state(made: TinyBundle) -> None:
    """A context without flash attention holds what was turned for it, number for number."""
    with Engine(made.folder, threads=1) as engine:
        core, tokens = engine._core, asked(engine)
        span = (0, len(tokens))
        core.run(core.prober.base.added(tokens, [0, 1], span))
        held = core.prober.base.held(tokens)
        assert held is not None
        data = held.sequences[0]
        assert np.array_equal(for_rooms(data, 1, by_element=False), data)
        context = Context(core.model, core.pack, n_ctx=256, n_seq=3, threads=1, flash_attn=False)
        try:
            assert context.take(data, held.tokens, len(tokens), 2)
            assert context.tokens_of(2) == tokens
            back = np.empty(data.size + 8, np.uint8)  # two rooms more, which hold nothing
            get_data = context._lib.llama_state_seq_get_data
            assert get_data(context._pointer, as_bytes(back), back.size, 2) == back.size
            n_embd = 32  # of the values, which end with the last layer's
            by_token, by_element = (each[-2 * n_embd * len(tokens) :] for each in (data, back))
            assert by_token.any()
            expected = by_token.view(np.float16).reshape(-1, n_embd).T
            assert np.array_equal(by_element.view(np.float16).reshape(n_embd, -1), expected)
        finally:
            context.close()
