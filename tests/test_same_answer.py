"""A greedy answer is the same alone and next to other clients, on a real quantised base."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qaflora_edge import Engine

ABSTAINING = "two-place:abstain=50"
QUESTIONS = (
    "How many legs do three dogs have?",
    "Explain in two sentences why the sky is blue, to a child of six who has never seen the sea.",
)


@pytest.fixture(scope="module")
def engine(smollm2: Path, checkout: Path) -> Iterator[Engine]:
    assert smollm2.is_file()
    with Engine(checkout / "models" / "demo", n_parallel=3, n_ctx=256, threads=1) as engine:
        yield engine


@contextmanager
def other_clients(engine: Engine, n: int) -> Iterator[None]:
    """Let n threads ask prompts of all lengths, under mixes that change."""
    is_over = threading.Event()

    def ask(client: int) -> None:
        for i in range(1000):
            if is_over.is_set():
                return
            tokens = [100 + client + j for j in range(1 + (37 * i + 11 * client) % 90)]
            weights = ("static", "base", {"math": 0.3})[(i + client) % 3]
            engine.generate(tokens, weights=weights, max_tokens=5).text()

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(n)]
    for thread in threads:
        thread.start()
    yield
    is_over.set()
    for thread in threads:
        thread.join()


def answers(engine: Engine, question: str, weights: str, n: int = 1) -> list[Any]:
    """The tokens of n answers with their log-probabilities, to the bit."""
    tokens = engine.chat_tokens([{"role": "user", "content": question}])
    found = []
    for answer in engine.answers(tokens, n, weights=weights, max_tokens=6, logprobs=2):
        answer.text()
        found.append(answer.logprobs)
    return found


@pytest.mark.slow
def test_abstaining_equals_base_and_two_answers_are_one_next_to_others(engine: Engine) -> None:
    expected = {question: answers(engine, question, "base") for question in QUESTIONS}
    with other_clients(engine, 3):
        for question in QUESTIONS:
            assert answers(engine, question, ABSTAINING, n=2) == 2 * expected[question]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["qa-flora", "two-place"])
def test_mixed_answer_is_the_same_next_to_others(engine: Engine, strategy: str) -> None:
    expected = answers(engine, QUESTIONS[0], strategy)
    with other_clients(engine, 3):
        assert answers(engine, QUESTIONS[0], strategy) == expected
