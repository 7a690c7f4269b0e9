"""Scores of answers, by hand."""

import numpy as np
import pytest

from qaflora_edge.evaluation.metrics import answer_score, choice_score, loss


@pytest.mark.parametrize(
    ("metric", "answer", "expected", "score"),
    [
        ("number", "So it is 18.", 18, 1),
        ("number", "So it is 18.", "18", 1),
        ("number", "So it is 19.", "18", 0),
        ("number", "no idea", 18, 0),
        ("number", "3 or 4", [4, 5], 1),
        ("exact", " Madrid\n", "Madrid", 1),
        ("exact", "the  red\nhouse", "the red house", 1),
        ("exact", "Cafe\u0301", "Café", 1),
        ("exact", "Madrid.", "Madrid", 0),
        ("exact", "madrid", "Madrid", 0),
        ("exact", "5", 5, 1),
        ("exact", "yes", ["sí", "yes"], 1),
        ("contains", "It is MADRID, of course.", "Madrid", 1),
        ("contains", "Straße", "STRASSE", 1),
        ("contains", "It is Paris.", "Madrid", 0),
        ("contains", "It is Paris.", ["Madrid", "paris"], 1),
    ],
)
def test_scores_by_hand(metric: str, answer: str, expected: object, score: int) -> None:
    assert answer_score(metric, answer, expected) == score


def logs(*rows: list[float]) -> list[np.ndarray]:
    return [np.array(row, np.float32) for row in rows]


def test_choices_by_sum_and_by_mean() -> None:
    """The first has the larger sum, -3 against -4; the second the larger mean, -1 against -1.5."""
    given = logs([-1, -2], [-1, -1, -1, -1])
    expected = {"log_probs": [-3, -4], "n_tokens": [2, 4]}
    for answer, by_sum, by_mean in ((0, 1, 0), (1, 0, 1)):
        both = {**expected, "score_sum": by_sum, "score_mean": by_mean}
        assert choice_score(given, answer, "sum") == {**both, "score": by_sum}
        assert choice_score(given, answer, "mean") == {**both, "score": by_mean}


def test_a_tie_of_choices_is_not_right() -> None:
    assert choice_score(logs([-1], [-1]), 0, "mean")["score"] == 0


def test_loss_is_nats_a_token() -> None:
    assert loss(logs([-1, -2, -6])[0]) == 3
