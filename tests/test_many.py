"""Many at once: generate_many, score and weights of lists, and what ends one call of several."""

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refused
from stock import StockContext, write_merged
from tiny import F32, F64, TinyAdapter, TinyBase, write_tiny_adapter, write_tiny_base

from qaflora_edge import Engine, QafloraError
from qaflora_edge.backend.batch import chunks_of
from qaflora_edge.backend.branches import N_BRANCH, N_OUTPUT
from qaflora_edge.backend.model import Model
from qaflora_edge.errors import BackendError, ContextError, OptionError, PromptError, WeightsError
from qaflora_edge.formats.base import read_base

Parts = tuple[TinyBase, dict[str, TinyAdapter]]
# F32 everywhere: log-probabilities of sums in another order, and of adapters that are merged.
ATOL = 1e-4
N_PIECE = chunks_of().n_most
OPTIONS: dict[str, Any] = {"kv_type": "f32", "flash_attn": False, "n_ctx": 400, "threads": 1}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    place = tmp_path_factory.mktemp("many")
    base = write_tiny_base(place / "base.gguf")
    return base, {
        name: write_tiny_adapter(place / f"{name}.gguf", base, rank=2 + i, seed=i)
        for i, name in enumerate(("math", "es"))
    }


def opened(parts: Parts, **more: Any) -> Engine:
    base, adapters = parts
    paths = {name: adapter.path for name, adapter in adapters.items()}
    return Engine(base=base.path, adapters=paths, **{**OPTIONS, **more})


@pytest.fixture(scope="module")
def engine(parts) -> Iterator[Engine]:
    with opened(parts, n_parallel=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(parts) -> Iterator[Engine]:
    with opened(parts) as engine:
        yield engine


def drawn(n: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(1, 250, n)]


def stock_score(
    place: Path, parts: Parts, weights: F32, prompt: list[int], continuation: list[int]
) -> F64:
    """By upstream's code alone: the weighed adapters merged into the base, a token at a time."""
    base, adapters = parts
    path = write_merged(place / "merged.gguf", base, list(adapters.values()), weights).path
    scores = []
    with Model(read_base(path)) as model:
        context = StockContext(model, n_ctx=512)
        logits = context.decode(prompt)
        for token in continuation:
            z = logits.astype(np.float64)
            scores.append(z[token] - np.logaddexp.reduce(z))
            logits = context.decode([token])
        context.close()
    return np.array(scores)


@pytest.mark.parametrize("weights", ["qa-flora", "given"])
@pytest.mark.parametrize(
    "sizes", [(1, 1), (7, 3), (N_PIECE + 5, N_OUTPUT), (20, N_OUTPUT + 1), (3, 3 * N_OUTPUT + 7)]
)
def test_scores_are_those_of_a_merged_base(tmp_path, parts, engine, weights, sizes) -> None:
    prompt, continuation = drawn(sizes[0]), drawn(sizes[1], seed=1)
    given: Any = weights
    if weights == "given":
        given = np.random.default_rng(2).normal(size=(2, engine.n_layer)).astype(np.float32)
        array = given
    else:
        array = engine.weights(prompt, strategy=weights).weights
    found = engine.score(prompt, continuation, weights=given)
    assert (found.dtype, found.shape) == (np.float32, (sizes[1],))
    expected = stock_score(tmp_path, parts, array, prompt, continuation)
    np.testing.assert_allclose(found, expected, atol=ATOL, rtol=0)


def test_scores_of_lists_are_those_one_by_one(alone) -> None:
    """More continuations of a prompt than a batch has sequences, and other prompts between."""
    prompts = [drawn(5)] * ((1 + N_BRANCH) + 6)
    prompts[3:3] = [drawn(8, seed=1), drawn(N_PIECE + 1, seed=2)]
    prompts.append(drawn(8, seed=1))
    continuations = [drawn(1 + i % 9 + 70 * (i == 4), seed=i) for i in range(len(prompts))]
    together = alone.score(prompts, continuations)
    for prompt, continuation, found in zip(prompts, continuations, together, strict=True):
        expected = alone.score(prompt, continuation)
        np.testing.assert_allclose(found, expected, atol=ATOL, rtol=0)


def test_text_is_scored_without_bos(tmp_path) -> None:
    base = write_tiny_base(tmp_path / "base.gguf", add_bos=True)
    with Engine(base=base.path, **OPTIONS) as engine:
        prompt = engine.tokenize("the thing")
        assert prompt[0] == base.tokens.index("<|endoftext|>")
        following = engine.tokenize(" on")[1:]
        found = engine.score("the thing", " on")
        assert found.shape == (len(following),)
        np.testing.assert_array_equal(found, engine.score(prompt, following))


WRONG_SCORES: list[tuple[Any, Any, dict[str, Any], type[QafloraError], str]] = [
    ("a", "", {}, PromptError, "The continuation is empty; give at least one token."),
    ("", "a", {}, PromptError, "The prompt is empty; give at least one character."),
    ("a", 5, {}, PromptError, "The continuation is 5, expected a text or a sequence of token ids."),
    (b"c", "a", {}, PromptError, "The prompt is b'c', expected a text or a sequence of token ids."),
    ("a", [9999], {}, PromptError, "Token 1 of the prompt with its continuation is 9999, expected"),
    ([1] * 300, [1] * 101, {}, ContextError, "The prompt with its continuation has 401 tokens"),
    (["a"], ["b", "c"], {}, OptionError, "score got ['a'] and ['b', 'c'], expected one of both"),
    (["a"], "b", {}, OptionError, "score got ['a'] and 'b', expected one of both, or lists of the"),
    ("a", "b", {"weights": [[1]]}, WeightsError, "Weights have the shape [1, 1], expected [2, 3]"),
]


@pytest.mark.parametrize("case", WRONG_SCORES)
def test_what_cannot_be_scored(engine, case) -> None:
    prompt, continuation, more, kind, message = case
    assert refused(kind, engine.score, prompt, continuation, **more).startswith(message)


@pytest.mark.parametrize("strategy", ["qa-flora", "spectr"])
def test_weights_of_a_list_are_those_one_by_one(alone, strategy) -> None:
    prompts = ["a thing", drawn(30), "a thing on a ring", np.array(drawn(3, seed=4))]
    together = alone.weights(prompts, strategy=strategy)  # type: ignore[call-overload]
    assert isinstance(together, list)
    for prompt, fusion in zip(prompts, together, strict=True):
        expected = alone.weights(prompt, strategy=strategy)  # type: ignore[call-overload]
        np.testing.assert_allclose(fusion.weights, expected.weights, atol=1e-5)
        assert fusion.prompt_tokens == expected.prompt_tokens
    drawn_once = alone.weights(iter(prompts), strategy=strategy)  # type: ignore[call-overload]
    assert len(drawn_once) == len(prompts)
    (fusion,) = alone.weights(["a thing"], strategy="static", adapters=["es"])
    assert fusion.adapters == ("es",)
    assert fusion.weights.shape == (1, 3)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("adapters", "math", "Option adapters is 'math', expected a list of their names."),
        ("cancel", 5, "Option cancel is 5, expected a threading.Event."),
    ],
)
def test_options_of_wrong_types_are_refused_and_harm_nobody(engine, option, value, message) -> None:
    assert refused(OptionError, engine.generate, "a", **{option: value}) == message
    assert engine.generate("a", max_tokens=2).n_prompt > 0


def test_each_request_has_its_own_options(engine, alone) -> None:
    messages = [{"role": "user", "content": "a thing"}]
    requests: list[Any] = [
        "the thing",
        {"messages": messages},
        {"prompt": "the thing", "weights": "single:es"},
        {"prompt": "the thing", "weights": {"math": 0.5}},
        {"prompt": "the thing", "adapters": ["es"]},
        {"prompt": "the thing", "temperature": 1.2, "seed": 3},
        {"prompt": "the thing", "temperature": 1.2, "seed": 4, "max_tokens": 30},
        {"prompt": "the thing", "stop": "e"},
        {"prompt": drawn(5), "json_schema": {"enum": ["dog", "cat"]}},
    ]
    found = dict(engine.generate_many(requests, max_tokens=12))
    assert sorted(found) == list(range(len(requests)))
    for i, request in enumerate(requests):
        own = {"max_tokens": 12, **(request if isinstance(request, dict) else {"prompt": request})}
        told = own.pop("messages", None)
        prompt = own.pop("prompt", None) if told is None else alone.chat_tokens(told)
        expected = alone.generate(prompt, **own)
        assert (found[i].text(), found[i].error) == (expected.text(), None), request
        assert found[i].finish_reason == expected.finish_reason
        assert found[i].fusion.strategy == expected.fusion.strategy
        np.testing.assert_allclose(found[i].fusion.weights, expected.fusion.weights, atol=1e-5)
    assert found[4].fusion.adapters == ("es",)
    assert found[6].n_completion > 12


def test_a_request_that_fails_stops_no_other(engine) -> None:
    requests: list[Any] = [
        "fine",
        "",
        {"prompt": "a", "weights": "best"},
        {"promt": "a"},
        {"prompt": "a", "messages": []},
        {"prompt": [10**9]},
        {"prompt": "a", "foo": 1},
        {"messages": 5},
        None,
        {"prompt": "a", "wait": True},
    ]
    found = dict(engine.generate_many(requests, max_tokens=3))
    for index in (0, 9):
        assert found[index].error is None
        assert found[index].n_completion == 3
    for index in range(1, 9):
        answer = found[index]
        assert (answer.finish_reason, answer.is_done) == ("error", True)
        assert (answer.n_prompt, answer.n_completion) == (0, 0)
        with pytest.raises(QafloraError) as caught:
            answer.text()
        assert caught.value is answer.error
    assert str(found[3].error).startswith("A request has promt, expected either prompt or messages")


@pytest.fixture
def huge(alone) -> Any:
    """Weights under which states are no numbers."""
    return np.full((len(alone.adapters), alone.n_layer), 1e30, np.float32)


@pytest.mark.parametrize("n_parallel", [1, 3])
def test_states_that_are_no_numbers_are_nobody_elses(parts, alone, huge, n_parallel) -> None:
    """NaN times 0 is NaN: left in memory, it would reach who comes there next."""
    expected = alone.generate("the king", max_tokens=6).text()
    with opened(parts, n_parallel=n_parallel) as other:
        for _ in range(2 * n_parallel):
            with pytest.raises(BackendError, match=r"NaN, expected numbers: .*math, es"):
                other.generate("the thing of the king", weights=huge, max_tokens=6)
            requests = ["the king"] * (n_parallel + 1)
            answers = other.generate_many(requests, max_tokens=6)
            assert [answer.text() for _, answer in answers] == [expected] * len(requests)


def test_states_that_are_no_numbers_beside_a_prompt_that_is_read(parts, huge) -> None:
    """No other room is known to be without such numbers, and what it holds stays."""
    with opened(parts, n_ctx=1024) as other:
        expected = [other.generate(each, max_tokens=6).text() for each in ("the", drawn(900))]
    with opened(parts, n_parallel=2, n_ctx=1024) as other:
        beside = other.generate(drawn(900), max_tokens=6, wait=False)
        with pytest.raises(BackendError, match="NaN, expected numbers"):
            other.generate("the thing of the king", weights=huge, max_tokens=6)
        assert 0 < beside._sequence.n_past < 900
        found = other.generate("the", max_tokens=6, wait=False)
        assert [found.text(), beside.text()] == expected


def test_scores_that_are_no_numbers_are_refused(parts, alone, huge) -> None:
    expected = alone.score("the king", " of the thing")
    with opened(parts) as other:
        with pytest.raises(
            BackendError,
            match=r"^The log-probabilities of a continuation are NaN, expected numbers: an adapter "
            r"that weighs more than 0 here, or the base, is damaged\. Convert or fetch it again",
        ):
            other.score("the king", " of the thing", weights=huge)
        np.testing.assert_array_equal(other.score("the king", " of the thing"), expected)


@pytest.mark.parametrize("n_parallel", [1, 3])
def test_a_prompt_that_is_not_read_to_its_end_spoils_nobodys_answer(
    parts, alone, huge, n_parallel
) -> None:
    """Nobody has seen whether its states were numbers."""
    expected = alone.generate("the king", max_tokens=6).text()
    with opened(parts, n_parallel=n_parallel, n_ctx=1024) as other:
        for _ in range(2 * n_parallel):
            lost = other.generate(drawn(900), weights=huge, max_tokens=6, wait=False)
            while not lost.timings.prefill_ms:  # what others ask is computed in between
                other.weights("the king", strategy="qa-flora")
            lost.cancel()
            assert not lost.is_done
            requests = ["the king"] * (n_parallel + 1)
            answers = other.generate_many(requests, max_tokens=6)
            assert [answer.text() for _, answer in answers] == [expected] * len(requests)


def test_one_request_is_not_many(engine) -> None:
    with pytest.raises(OptionError, match=r"^generate_many got the one request .*; give a list of"):
        next(engine.generate_many({"prompt": "abc"}))


def test_requests_are_taken_as_there_is_room(engine) -> None:
    taken: list[int] = []

    def source() -> Iterator[Any]:
        for i in range(12):
            taken.append(i)
            yield {"prompt": "a", "weights": "static", "max_tokens": 2}

    for n_done, _ in enumerate(engine.generate_many(source())):
        assert len(taken) <= n_done + engine.n_parallel + 1
    assert len(taken) == 12


def test_leaving_early_cancels_the_rest(engine) -> None:
    requests = [{"prompt": drawn(4, seed=i), "max_tokens": 5 if i == 2 else 300} for i in range(9)]
    for index, _ in engine.generate_many(requests, weights="static"):
        assert index == 2
        break
    gc.collect()
    assert engine.generate("a", max_tokens=1).text() is not None
    assert not engine._core.loop._scheduler.has_work


def test_an_event_ends_one_call_of_several(engine, alone) -> None:
    event = threading.Event()
    mine = engine.generate("the thing", max_tokens=300, cancel=event)
    others = engine.generate("a ring", max_tokens=30, wait=False)
    pieces = [next(mine), next(mine)]
    event.set()
    text = "".join([*pieces, *mine])
    assert mine.finish_reason == "cancelled"
    assert 2 <= mine.n_completion < 300
    assert alone.generate("the thing", max_tokens=mine.n_completion).text().startswith(text)
    assert others.text() == alone.generate("a ring", max_tokens=30).text()
    assert others.finish_reason == "length"
