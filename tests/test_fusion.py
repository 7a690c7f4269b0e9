"""Strategies and the arithmetic of weights, against textbook formulas in high precision."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from refusals import refused

from qaflora_edge.ask import Prompt, Weighing
from qaflora_edge.errors import StrategyError, WeightsError
from qaflora_edge.weighing import numbers as fusion
from qaflora_edge.weighing.plan import FusionWeights, Plan
from qaflora_edge.weighing.strategy import parse_strategy
from qaflora_edge.weighing.weigher import Weigher, WeighingFacts

NAMES = ("math", "es")


def test_weights_are_shares_of_the_divergence_and_alike_where_there_is_none() -> None:
    weights = fusion.normalise([[3.0, 0.0, 1e-20, 0.0, 1e-35], [1.0, 2.0, 3e-20, 0.0, 0.0]])
    expected = [[0.75, 0.0, 0.25, 0.5, 0.5], [0.25, 1.0, 0.75, 0.5, 0.5]]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_distances_equal_their_definitions() -> None:
    rng = np.random.default_rng(2)
    base, adapted = rng.standard_normal((3, 8)), rng.standard_normal((2, 3, 8))
    norms = np.linalg.norm(base, axis=-1) * np.linalg.norm(adapted, axis=-1)
    cosine = 1 - (base * adapted).sum(axis=-1) / norms
    np.testing.assert_allclose(fusion.cosine_distance(base, adapted), cosine, rtol=1e-5)
    euclidean = np.sqrt(((base - adapted) ** 2).sum(axis=-1))
    np.testing.assert_allclose(fusion.euclidean_distance(base, adapted), euclidean, rtol=1e-6)
    assert not fusion.cosine_distance(base, base[None]).any()


def test_typical_is_a_geometric_mean_and_calibrating_by_it_levels_strength() -> None:
    divergences = np.array([[[1.0], [100.0]], [[4.0], [400.0]]])  # two prompts, two adapters
    typical = fusion.typical_divergence(divergences)
    np.testing.assert_allclose(typical, [[2.0], [200.0]], rtol=1e-9)
    relative = fusion.calibrate([[2.0], [200.0]], typical)
    np.testing.assert_allclose(fusion.normalise(relative), [[0.5], [0.5]], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("static", [[0.5, 0.5], [0.5, 0.5]]),
        ("base", [[0.0, 0.0], [0.0, 0.0]]),
        ("single:es", [[0.0, 0.0], [1.0, 1.0]]),
        ("manual:es=1.5,math=-0.25", [[-0.25, -0.25], [1.5, 1.5]]),
        ("manual:math=2", [[2.0, 2.0], [0.0, 0.0]]),
    ],
)
def test_fixed_strategies(text, expected) -> None:
    assert not parse_strategy(text, NAMES).strategy.is_probed
    reading: Any = SimpleNamespace()  # anything that they ask of it fails
    weigher = Weigher(NAMES, 2, WeighingFacts("static"))
    choice = weigher.choice(Prompt((1, 2)), Weighing(text))
    reading.query = choice.query
    mix = choice.weigh(reading)
    assert mix.weights.tolist() == expected


@pytest.mark.parametrize("text", ["", "single", "base:math"])
def test_unknown_strategy_is_refused(text) -> None:
    assert refused(StrategyError, parse_strategy, text, NAMES) == (
        f"Strategy {text!r} is not known; expected one of two-place, relay, qa-flora, spectr, "
        "single:NAME, manual:NAME=W,NAME=W, base."
    )


def test_similar_strategy_is_offered() -> None:
    told = refused(StrategyError, parse_strategy, "Spectrs:2", NAMES)
    assert "'Spectrs:2' is not known; did you mean spectr? Expected one of two-place, " in told


def test_unknown_adapter_is_refused() -> None:
    assert refused(StrategyError, parse_strategy, "single:med", NAMES) == (
        "Strategy 'single:med' names the adapter 'med', which is not loaded; "
        "expected one of: math, es."
    )
    with pytest.raises(StrategyError, match="names the adapter 'math' twice"):
        parse_strategy("manual:math=1,math=2", NAMES)


@pytest.mark.parametrize("number", ["much", "inf"])
def test_manual_weight_that_is_no_number_is_refused(number) -> None:
    with pytest.raises(WeightsError, match="the weight of 'es' is"):
        parse_strategy(f"manual:es={number}", NAMES)


def test_weights_of_another_shape_or_not_finite_are_refused() -> None:
    assert refused(WeightsError, fusion.check_weights, np.zeros((2, 3)), NAMES, 4) == (
        "Weights have the shape [2, 3], expected [2, 4]: one row for each of math, es, "
        "one column per layer."
    )
    with pytest.raises(WeightsError, match="not an array of numbers"):
        fusion.check_weights([["a", "b"]], NAMES, 2)
    weights = np.zeros((2, 4))
    weights[1, 2] = np.inf
    assert (
        refused(WeightsError, fusion.check_weights, weights, NAMES, 4)
        == "The weight of 'es' at layer 2 is inf, expected a finite number."
    )


def test_fusion_weights_are_short_in_a_console() -> None:
    weights = np.array([[0.25, 0.75, 0.5], [0.75, 0.25, 0.5]], np.float32)
    mixed = FusionWeights(("math", "a<b>\u202e"), Plan.mix(weights, weights * 2), "qa-flora")
    assert repr(mixed) == "<FusionWeights qa-flora, 3 layers: math ×0.5 · a<b>\\u202e ×0.5>"
