"""A program of a user, for mypy: it is never run."""

from collections.abc import Iterator
from typing import Any, assert_type

from qaflora_edge import Engine, FusionWeights, Plan, Reading, Strategy, register_strategy


class Sharper(Strategy):
    name = "sharper"

    def plan(self, reading: Reading) -> Plan:
        power = reading.divergence() ** 2
        return Plan.mix(power / power.sum(axis=0), power)


def program(is_stream: bool) -> None:
    register_strategy(Sharper())
    messages = [{"role": "user", "content": "a"}]
    with Engine("bundle", n_ctx=64) as engine:
        fusion: FusionWeights = engine.weights("a")
        assert_type(fusion.adapters, tuple[str, ...])
        assert_type("".join(engine.generate("a", max_tokens=3, top_k=4)), str)
        whole: dict[str, Any] = engine.chat(messages, max_tokens=3)
        chunks: Iterator[dict[str, Any]] = engine.chat(messages, stream=True)
        either: dict[str, Any] | Iterator[dict[str, Any]]
        either = engine.chat(messages, stream=is_stream)
        print(whole, chunks, either)
