"""Exactness under company: over random schedules each answer is the one that it is alone.

On a tiny base with F32 everywhere: tokens are equal, and the logits that they are chosen from
within a tolerance, for products of other batch sizes sum in another order.
"""

import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from tiny import F32, write_tiny_adapters, write_tiny_base

from qaflora_edge import Engine, Generation, QafloraError
from qaflora_edge.backend.context import Context
from qaflora_edge.errors import BackendError, PromptError
from qaflora_edge.inference.runner import Runner

N_SCHEDULE = int(os.environ.get("QAFLORA_TEST_SCHEDULES", "200"))
N_THREAD, N_CALL = 6, 60
NAMES = ("math", "es", "med")
STRATEGIES = (
    "qa-flora",
    "qa-flora:distance=cosine",
    "spectr",
    "static",
    "base",
    "single:es",
    "manual:math=1.5,med=-1",
)
# Of logits. The stock library itself changes this tiny gemma3's by up to 1.1e-3 with the batch size
# alone (and llama's by 7e-6): norms behind its blocks amplify rounding.
TOLERANCE = {"llama": 1e-4, "gemma3": 5e-3}
POISON = 251  # a token that no batch may have: a decode that fails for one


@dataclass
class Call:
    """What one caller asks for, and what it is told."""

    prompt: list[int]
    options: dict[str, Any]
    answer: Generation | None = None
    error: QafloraError | None = None
    logits: list[F32] = field(default_factory=list)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def arch(request) -> str:
    """gemma3 attends over a sliding window."""
    return str(request.param)


@pytest.fixture(scope="module")
def parts(arch, tmp_path_factory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("schedules")
    base = write_tiny_base(place / "base.gguf", arch, n_layer=2, window=16)
    adapters = write_tiny_adapters(base, NAMES)
    options = {"kv_type": "f32", "flash_attn": False, "n_ctx": 240, "threads": 1}
    return {"base": base.path, "adapters": adapters, **options}


@pytest.fixture(scope="module")
def alone(parts) -> Iterator[Engine]:
    with Engine(**parts) as engine:
        yield engine


@pytest.fixture
def noted(monkeypatch) -> dict[int, list[F32]]:
    """Number of a sequence -> the logits [n_vocab] that each of its tokens was chosen from."""
    found: dict[int, list[F32]] = {}
    sample, decode = Runner._sample, Context.decode_spans

    def noting(self: Runner, sequence: Any, row: int) -> None:
        found.setdefault(sequence.number, []).append(self.context.logits(row))
        sample(self, sequence, row)

    monkeypatch.setattr(Runner, "_sample", noting)

    def failing(self: Context, spans: Any) -> list[int]:
        if any(POISON in span.tokens for span in spans):
            raise BackendError("poisoned")
        return decode(self, spans)

    monkeypatch.setattr(Context, "decode_spans", failing)
    return found


def drawn_call(rng: random.Random, done: list[Call]) -> Call:
    prompt = [rng.randrange(1, 250) for _ in range(rng.choice([1, 3, 10, 40, 90, 170]))]
    if done and rng.random() < 0.3:  # a next turn of somebody's
        last = rng.choice(done)
        prompt = (last.prompt + prompt)[:225]
    if rng.random() < 0.05:
        prompt = prompt * 241  # too long
    if rng.random() < 0.05:
        prompt.insert(rng.randrange(len(prompt)), POISON)
    options: dict[str, Any] = {
        "weights": rng.choice(STRATEGIES),
        "prefill": rng.choice(["auto", "base", "mix"]),
        "max_tokens": rng.randrange(12),
        "temperature": rng.choice([0.0, 0.0, 0.0, 0.8]),
        "seed": rng.randrange(1000),
        "stop": rng.choice([(), ("e",)]),
    }
    if "es" not in options["weights"] and "manual" not in options["weights"]:
        options["adapters"] = rng.choice([NAMES, NAMES[:2], NAMES[2:]])
    return Call(prompt, options)


def begin(engine: Engine, call: Call) -> None:
    try:
        call.answer = engine.generate(call.prompt, wait=False, **call.options)
    except QafloraError as error:
        call.error = error


def read(call: Call, n_piece: int) -> None:
    """Ask for some more pieces of an answer, which computes others' too."""
    try:
        for _ in range(n_piece):
            if next(call.answer, None) is None:
                return
    except QafloraError as error:
        call.error = error


@pytest.mark.slow
def test_answers_in_company_are_those_alone(parts, alone, arch, noted, monkeypatch) -> None:
    monkeypatch.setattr("qaflora_edge.inference.guesses._ORDERS", (1,))  # many wrong guesses
    draft = 0 if arch == "gemma3" else 3
    n_compared = n_logits = 0
    with Engine(**parts | {"n_parallel": 4, "guesses": draft}) as together:
        for seed in range(N_SCHEDULE // 2):  # of each architecture
            rng = random.Random(seed)
            done: list[Call] = []
            open_calls: list[Call] = []
            for _ in range(rng.randint(2, 7)):
                call = drawn_call(rng, done)
                begin(together, call)
                if call.answer is not None and call.error is None:
                    open_calls.append(call)
                done.append(call)
                for _ in range(rng.randrange(4)):
                    if open_calls:
                        read(rng.choice(open_calls), rng.randrange(4))
                if open_calls and rng.random() < 0.15:
                    rng.choice(open_calls).answer.cancel()
            for call in rng.sample(open_calls, len(open_calls)):
                read(call, 1000)
            n_compared += len(done)
            n_logits += sum(compare(alone, call, noted, TOLERANCE[arch]) for call in done)
    assert n_compared > 3 * N_SCHEDULE // 2
    assert n_logits > 5 * N_SCHEDULE // 2


@pytest.mark.slow
@pytest.mark.parametrize("is_served", [False, True])
def test_answers_of_many_threads_are_those_alone(
    parts, alone, arch, noted, monkeypatch, is_served
) -> None:
    """Callers compute in turn, or wait for one thread; each weighs and cancels too."""
    expected = {each: alone.weights("the thing", strategy=each).weights for each in STRATEGIES}
    computing: set[threading.Thread] = set()
    decode = Context.decode_spans

    def told(self: Context, spans: Any) -> list[int]:
        computing.add(threading.current_thread())
        return decode(self, spans)

    monkeypatch.setattr(Context, "decode_spans", told)
    engine = Engine(**parts | {"n_parallel": 4})
    n_asked = iter(range(N_CALL))

    def ask(seed: int) -> list[Call]:
        rng = random.Random(seed)
        done: list[Call] = []
        while next(n_asked, None) is not None:
            call = drawn_call(rng, done)
            begin(engine, call)
            done.append(call)
            if rng.random() < 0.3:
                strategy = rng.choice(STRATEGIES)
                found = engine.weights("the thing", strategy=strategy).weights
                np.testing.assert_allclose(found, expected[strategy], atol=1e-5)
            if call.answer is not None:
                read(call, rng.choice([0, 2, 1000]))
                if rng.random() < 0.2:
                    call.answer.cancel()
                read(call, 1000)
        return done

    serving = threading.Thread(target=engine.run_forever)
    with ThreadPoolExecutor(N_THREAD) as threads, engine:
        if is_served:
            serving.start()
        done = [call for calls in threads.map(ask, range(N_THREAD)) for call in calls]
    if is_served:
        serving.join()
        assert computing == {serving}
    assert len(done) == N_CALL
    assert sum(compare(alone, call, noted, TOLERANCE[arch]) for call in done) > N_CALL


def compare(alone: Engine, call: Call, noted: dict[int, list[F32]], atol: float) -> int:
    """Ask for the same alone. How many rows of logits were compared."""
    again = Call(call.prompt, call.options)
    begin(alone, again)
    if again.answer is None:  # it could not even begin
        assert isinstance(again.error, PromptError | BackendError)
        assert str(call.error) == str(again.error)
        return 0
    read(again, 1000)
    ours, theirs = call.answer._sequence, again.answer._sequence
    rows = noted.get(ours.number, [])
    for mine, other in zip(rows, noted.get(theirs.number, []), strict=False):
        np.testing.assert_allclose(mine, other, atol=atol, rtol=0)
    if ours.is_cancelled:
        assert ours.finish_reason in ("cancelled", "error", "stop", "length")
        assert theirs.answer[: len(ours.answer)] == ours.answer
    else:
        assert (ours.answer, ours.finish_reason) == (theirs.answer, theirs.finish_reason)
        assert str(call.error) == str(again.error)
    return len(rows)
