"""Strategies of a program's own, by register_strategy."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from bundles import qaflora
from patience import python
from refusals import refused

from qaflora_edge import (
    DraftStep,
    Engine,
    Measured,
    Plan,
    Strategy,
    WriteStep,
    register_strategy,
)
from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing import strategy as registry

SCRIPT = Path(__file__).resolve().parents[1] / "examples/own_strategy.py"
PROMPT = "the thing on a ring"


@pytest.fixture(autouse=True)
def own_registry(monkeypatch) -> None:
    """What a test registers, others do not see."""
    registry.strategies()
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


def script(*words: object) -> str:
    done = python(SCRIPT, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sharpened(folder: Path) -> Any:
    """float64 [n_adapter, n_layer], of the divergences that the plain command shows."""
    shown = json.loads(qaflora("weights", folder, PROMPT, "--json").stdout)
    squares = np.array(shown["divergence"]) ** 2
    return squares / squares.sum(axis=0)


def test_baselines_are_found_by_name_and_stand_in_no_help() -> None:
    for name in ("calibrated", "static"):
        strategy = registry.find_strategy(name)
        assert strategy is not None
        assert strategy.name == name
        assert strategy not in registry.offered()


@pytest.mark.slow
def test_the_example_weighs_and_answers(made) -> None:
    own = ("--strategy", "sharper")
    weighed = json.loads(script("weights", made.folder, PROMPT, "--json", *own))
    expected = sharpened(made.folder)
    np.testing.assert_allclose(weighed["weights"], expected, rtol=1e-5)
    assert weighed["strategy"] == "sharper"
    answer = json.loads(script("run", made.folder, PROMPT, "--json", "--max-tokens", 12, *own))
    assert answer["fusion"]["weights"] == weighed["weights"]
    assert answer["timings"]["probe_ms"] > 0
    with Engine(made.folder) as engine:
        tokens = engine.chat_tokens([{"role": "user", "content": PROMPT}])
        given = engine.generate(tokens, weights=np.array(weighed["weights"]), max_tokens=12)
        assert answer["text"] == given.text()
    for verb in ("run", "chat", "weights", "bench"):
        assert "base or sharper" in " ".join(script(verb, "--help").split())


class Moved(Strategy):
    """How far each adapter moves the states, worked out where they are."""

    name = "moved"

    def plan(self, reading: Any) -> Any:
        states = reading.states()
        states -= states[0].copy()
        return np.linalg.norm(states[1:], axis=-1)


def test_states_are_the_strategys_own(made) -> None:
    register_strategy(Moved())
    with Engine(made.folder) as engine:
        moved = engine.weights(PROMPT, strategy="moved").weights
        after = engine.weights(PROMPT).divergence
        np.testing.assert_array_equal(engine.weights(PROMPT, strategy="moved").weights, moved)
    with Engine(made.folder) as engine:
        np.testing.assert_array_equal(engine.weights(PROMPT).divergence, after)


class Sizes(Strategy):
    name = "sizes"
    measured = Measured("size of states", " units")

    def plan(self, reading: Any) -> Any:
        sizes = np.linalg.norm(reading.states()[1:], axis=-1)
        return Plan.mix(sizes / sizes.sum(axis=0), sizes)


def test_a_strategy_names_what_it_measures(made) -> None:
    register_strategy(Sizes())
    shown = qaflora("weights", made.folder, PROMPT, "--strategy", "sizes").stdout
    assert "size of states" in shown
    assert "lens" not in shown


class Thirds(Strategy):
    """A number behind its name for all, and nothing is read."""

    name = "thirds"
    argument = "N"
    is_probed = False

    def parse(self, argument: str, adapters: Any, text: str) -> float:
        return float(argument or 1) / 3

    def plan(self, reading: Any) -> list[list[float]]:
        query = reading.query
        return [[query.argument] * query.n_layer for _ in query.adapters]


EVEN = [[0.5] * 3] * 2
WRITING = WriteStep(EVEN)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([[0, 0, np.nan]] * 2, "The weight of 'math' at layer 2 is nan, expected a finite number."),
        (Plan.mix(EVEN, [[1.0] * 2] * 2), "Weights have the shape [2, 2], expected [2, 3]"),
        (Plan((WriteStep([[1]]),)), "Weights have the shape [1, 1], expected [2, 3]"),
        (Plan((DraftStep("es", [1]), WRITING)), "Weights have the shape [1], expected [2, 3]"),
        (Plan(()), "its steps are (), expected a tuple of them."),
        (Plan((DraftStep("es"),)), "step 1 of 1 is a DraftStep, expected a WriteStep."),
        (Plan((WRITING, WRITING)), "step 1 of 2 is a WriteStep, expected a DraftStep."),
        (
            Plan((DraftStep("nobody"), WRITING)),
            "step 1 of 2 has the knower 'nobody', expected one of base, math, es.",
        ),
        (
            Plan((DraftStep("es"), WriteStep(EVEN, cast("Any", "after")))),
            "step 2 of 2 has the view 'after', expected '' or 'before'.",
        ),
    ],
)
def test_a_wrong_plan_is_refused_by_the_name_of_its_strategy(made, plan, message) -> None:
    class Wrong(Strategy):
        name = "wrong"

        def plan(self, reading: Any) -> Any:
            return plan

    register_strategy(Wrong())
    with Engine(made.folder) as engine:
        told = refused(StrategyError, engine.weights, "a", strategy="wrong")
        assert told.startswith(f"Strategy 'wrong': {message}")
        failed, fine = dict(
            engine.generate_many([{"prompt": "a", "weights": "wrong"}, "a"], max_tokens=1)
        ).values()
        assert str(failed.error) == told
        assert fine.error is None


class Nothing(Strategy):
    name = "nothing"


class Taken(Thirds):
    name = "base"


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Thirds, f"The strategy 'thirds' is <class '{__name__}.Thirds'>, expected an object of"),
        (Nothing(), f"The strategy 'nothing' is <{__name__}.Nothing object at "),
        (Taken(), f"The strategy 'base' of {__name__}.Taken is there already, by qaflora_edge."),
        (3, "The strategy 'None' is 3, expected an object of a subclass"),
    ],
)
def test_what_is_no_strategy_is_refused(strategy, message) -> None:
    assert message in refused(StrategyError, register_strategy, strategy)
