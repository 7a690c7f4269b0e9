"""LoRAHub's search: what is tried, how often, and that it finds what there is to find."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qaflora_edge.errors import OptionError, OutputFileError
from qaflora_edge.fitting import lorahub
from qaflora_edge.fitting.lorahub import Search, Tried, objective, read_tried, writing

TARGET = np.array([0.9, -0.6, 0.3])


def bowl(weights: Sequence[float]) -> float:
    """Least at TARGET, and flatter in one direction."""
    difference = np.array(weights) - TARGET[: len(weights)]
    return float(2 + (np.array([1, 3, 0.5])[: len(weights)] * difference**2).sum())


def run(search: Search, loss: Any = bowl) -> list[Tried]:
    return list(search.run(loss))


def test_the_objective_is_the_loss_and_a_twentieth_of_the_mean_size() -> None:
    assert objective([1.0, -0.5, 0.0], 2.0) == pytest.approx(2 + 0.05 * 1.5 / 3)
    assert Tried((1.0, -0.5, 0.0), 2.0).objective == objective([1.0, -0.5, 0.0], 2.0)


def test_it_begins_at_the_base_and_stays_within_bounds() -> None:
    tried = run(Search(3, budget=60))
    assert len(tried) == 60
    assert tried[0].weights == (0.0, 0.0, 0.0)
    assert np.abs([each.weights for each in tried]).max() <= 1.5
    assert len({each.weights for each in tried}) == 60


def test_it_finds_the_minimum_of_the_whole_objective() -> None:
    """Against the closed form: each coordinate is the target, less the slope of the penalty."""
    search = Search(3, budget=400)
    run(search)
    slope = 0.05 / 3 / (2 * np.array([1, 3, 0.5]))
    np.testing.assert_allclose(search.best.weights, TARGET - np.sign(TARGET) * slope, atol=5e-3)


def test_what_lies_beyond_the_bounds_is_met_at_them() -> None:
    search = Search(2, budget=200)
    run(search, lambda weights: -weights[0] - weights[1])
    np.testing.assert_allclose(search.best.weights, [1.5, 1.5], atol=0.02)


def test_what_only_hurts_weighs_nothing() -> None:
    search = Search(2, budget=100)
    run(search, lambda weights: 1.0)
    assert search.best.weights == (0.0, 0.0)


def test_one_adapter_is_tried_evenly() -> None:
    search = Search(1, budget=32)
    tried = run(search)
    assert [each.weights[0] for each in tried] == [0.0, *np.linspace(-1.5, 1.5, 31)]
    assert search.best.weights[0] == pytest.approx(0.9)


def test_the_same_seed_tries_the_same_and_numpys_own_is_left_alone() -> None:
    np.random.seed(3)
    before = np.random.get_state()[1]
    first, again, other = (run(Search(3, budget=30, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first[1:] != other[1:]
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("n_known", [0, 1, 9, 29, 30])
def test_a_search_goes_on_where_it_was(n_known: int) -> None:
    whole = run(Search(3, budget=40))
    computed = []

    def counted(weights: Sequence[float]) -> float:
        computed.append(tuple(weights))
        return bowl(weights)

    assert run(Search(3, budget=40, known=whole[:n_known]), counted) == whole
    assert computed == [each.weights for each in whole[n_known:]]


def test_what_is_known_of_another_search_is_not_taken() -> None:
    other = [Tried((0.1, 0.2, 0.3), -5.0)]
    assert run(Search(3, budget=10, known=other)) == run(Search(3, budget=10))


def test_without_cma_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cma", None)
    with pytest.raises(OptionError) as caught:
        run(Search(2))
    assert str(caught.value) == (
        "Weights cannot be searched: the package cma is not installed; install it with "
        "`pip install 'qaflora-edge[fit]'`."
    )
    assert Search(1).searcher == "evenly"
    assert lorahub.BUDGET == 40


# what was tried, in a file

HEADER = {"fit": "lorahub", "seed": 1}


def test_the_file_has_what_was_put_there(tmp_path: Path) -> None:
    path, tried = tmp_path / "t.jsonl", run(Search(2, budget=8))
    with writing(path, HEADER, tried[:3]) as put:
        put(tried[3])
        assert read_tried(path, HEADER) == tried[:4]  # before it is closed
        put(tried[4])
    assert read_tried(path, HEADER) == tried[:5]
    assert read_tried(path, {**HEADER, "seed": 2}) == []
    assert read_tried(tmp_path / "none", HEADER) == []
    path.write_bytes(path.read_bytes()[:-5])  # a line that was cut off
    assert read_tried(path, HEADER) == tried[:4]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b'{"weights": [1]}',
        b'{"weights": ["x"], "loss": 1}',
        b"\xff",
        b"[" * 100_000,
        b'{"weights": [1], "loss": NaN}',
    ],
)
def test_a_file_that_is_none_is_no_search(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"fit": "lorahub", "seed": 1}\n' + line + b"\n")
    assert read_tried(path, HEADER) == []
    path.write_bytes(line + b"\n")
    assert read_tried(path, HEADER) == []
    path.write_bytes(b"")
    assert read_tried(path, HEADER) == []


def test_a_folder_that_is_gone_is_reported(tmp_path: Path) -> None:
    with pytest.raises(OutputFileError), writing(tmp_path / "no" / "t.jsonl", HEADER, []):
        pass
