"""A greedy answer is the same alone and next to other clients, on a real quantised base."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from bundles import bundle_json
from tiny import MORE_KERNELS

from qaflora_edge import Engine
from qaflora_edge.errors import BackendError
from qaflora_edge.hub import fetch_model

QUESTION = "How many legs do three dogs have?"


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


def answer(engine: Engine, mix: str) -> Any:
    """The tokens of an answer with their log-probabilities, to the bit."""
    tokens = engine.chat_tokens([{"role": "user", "content": QUESTION}])
    generation = engine.generate(tokens, weights=mix, max_tokens=6, logprobs=2)
    generation.text()
    return generation.logprobs


@pytest.mark.slow
@pytest.mark.parametrize("kernels", MORE_KERNELS)
@pytest.mark.parametrize("folder", ["models/demo", "models/demo-small"])  # Q4_1; Q5_0 to Q6_K
def test_answer_of_any_kernels_is_the_same_next_to_five_others(
    checkout, monkeypatch, kernels, folder
) -> None:
    fetch_model(bundle_json(checkout / folder)["base"]["registry"])
    monkeypatch.setenv("QAFLORA_CPU_KERNELS", kernels)
    try:
        engine = Engine(checkout / folder, n_parallel=6, n_ctx=256, threads=1)
    except BackendError as error:
        if "QAFLORA_CPU_KERNELS is" not in str(error):
            raise
        pytest.skip(str(error))
    with engine:
        mixes = ("base", "static", "two-place", "qa-flora")
        expected = [answer(engine, mix) for mix in mixes]
        with other_clients(engine, 5):
            found = [answer(engine, mix) for mix in mixes]
    assert found == expected
