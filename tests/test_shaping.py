"""Options of strategies, against sums written out in plain Python."""

import re
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from refusals import refused

from qaflora_edge import Engine
from qaflora_edge.config import PROBING, SHAPING
from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.published import DISTANCE
from qaflora_edge.weighing.strategy import parse_strategy, written
from qaflora_edge.weighing.two_place import TwoPlace
from qaflora_edge.weighing.weigher import shaped

PROMPT = "the thing on a ring"
SHARES = np.array([[0.5, 0.2, 0.0], [0.3, 0.7, 0.0], [0.2, 0.1, 1.0]], np.float32)
PAGE = Path(__file__).resolve().parents[1] / "docs/strategies.md"


def plain(shares: list[list[float]], *, power: float, top: int, total: float) -> list[list[float]]:
    """power, layers=mean, top and total one after the other, a number at a time."""
    n_adapter, n_layer = len(shares), len(shares[0])
    columns = [[shares[i][il] ** power for i in range(n_adapter)] for il in range(n_layer)]
    means = [sum(column[i] / sum(column) for column in columns) / n_layer for i in range(n_adapter)]
    kept = sorted(range(n_adapter), key=lambda i: -means[i])[:top]
    left = [means[i] / sum(means[j] for j in kept) if i in kept else 0.0 for i in range(n_adapter)]
    return [[total * left[i]] * n_layer for i in range(n_adapter)]


def test_options_are_done_one_after_the_other() -> None:
    options = {"power": 3.0, "layers": "mean", "top": 2, "total": 1.5}
    expected = plain(SHARES.tolist(), power=3, top=2, total=1.5)
    np.testing.assert_allclose(shaped(SHARES, options, ""), expected, rtol=1e-6)


def test_power_sharpens_each_layer_for_itself() -> None:
    squares = [[25 / 38, 4 / 54, 0], [9 / 38, 49 / 54, 0], [4 / 38, 1 / 54, 1]]
    np.testing.assert_allclose(shaped(SHARES, {"power": 2.0}, ""), squares, rtol=1e-6)
    tiny = np.array([[1e-30], [2e-30]], np.float32)  # its powers are below every float
    np.testing.assert_allclose(shaped(tiny, {"power": 16.0}, "")[0, 0], 1 / (1 + 2**16), rtol=1e-5)


def test_total_is_a_sum_or_the_length_of_a_layers_weights() -> None:
    np.testing.assert_allclose(shaped(SHARES, {"total": 1.5}, ""), 1.5 * SHARES, rtol=1e-6)
    first = np.array([5, 3, 2]) / sqrt(25 + 9 + 4)
    np.testing.assert_allclose(shaped(SHARES, {"total": "l2"}, "")[:, 0], first, rtol=1e-6)


def test_shaping_of_negative_weights_is_refused() -> None:
    weights = np.array([[-1.0, 2.0]], np.float32)
    assert refused(StrategyError, shaped, weights, {"power": 2.0}, "Strategy 'x:power=2': ") == (
        "Strategy 'x:power=2': its weights go down to -1, expected none below 0 where power, "
        "layers, top or total shape them; leave these options out."
    )


def test_every_probed_strategy_takes_them(calibrated) -> None:
    with Engine(calibrated.folder) as engine:
        plain_weights = engine.weights(PROMPT, strategy="spectr:top=1")
        fusion = engine.weights(PROMPT, strategy="spectr:top=1,power=2,total=1.5")
    powers = plain_weights.weights.astype(np.float64) ** 2
    np.testing.assert_allclose(fusion.weights, 1.5 * powers / powers.sum(axis=0), rtol=1e-4)
    np.testing.assert_array_equal(fusion.divergence, plain_weights.divergence)
    assert fusion.strategy == "spectr:top=1,power=2,total=1.5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "qa-flora:pwer=2",
            "Strategy 'qa-flora:pwer=2': 'pwer=2' is no option of it; did you mean power=? "
            "Expected some of power=P, layers=each or mean, top=N, total=T or l2, pool=last or "
            "question, distance=kl or cosine or euclidean, with commas between them.",
        ),
        ("qa-flora:2", "'2' is no option of it; expected some of power=P"),
        ("qa-flora:power=0", "the option power is '0', expected a number above 0 to 16."),
        ("qa-flora:top=1.5", "the option top is '1.5', expected a number of adapters from 1 up."),
        ("qa-flora:total=l3", "the option total is 'l3', expected a number above 0 to 16 or l2."),
        ("qa-flora:pool=mean", "the option pool is 'mean', expected one of last, question."),
        ("qa-flora:top=1,top=2", "has the option top twice, expected it once."),
        ("spectr:2", "Strategy 'spectr:2': '2' is no option of it; expected some of power=P"),
        ("static:power=2", "Strategy 'static:power=2' is not known; expected one of two"),
    ],
)
def test_what_is_no_option_is_refused(text, message) -> None:
    assert message in refused(StrategyError, parse_strategy, text, ("math", "es"))


def test_the_page_has_every_option() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+=[^`]*)` \| ([^|]*) \|$", text, re.M)
    assert rows == [(written(option), option.help) for option in (*SHAPING, *PROBING, DISTANCE)]
    rows = re.findall(r"^\| `(\w+=[^`]*)` \| ([^|]*) \| ([^|]*) \|$", text, re.M)
    own = TwoPlace.options
    assert rows == [(written(option), str(option.default), option.help) for option in own]
