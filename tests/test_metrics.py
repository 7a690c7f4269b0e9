"""Scores of answers, the numbers in them, and metrics of a program's own; all by hand."""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from refusals import refused

from qaflora_edge import Metric, register_metric
from qaflora_edge.errors import TaskFileError
from qaflora_edge.evaluation import metrics
from qaflora_edge.evaluation.metrics import BUILT_IN, as_number, choice_score, last_number, loss
from qaflora_edge.evaluation.tasks import read_task


@pytest.mark.parametrize(
    ("metric", "answer", "expected", "score"),
    [
        ("number", "So it is 18.", 18, 1),
        ("number", "So it is 19.", "18", 0),
        ("number", "no idea", 18, 0),
        ("number", "3 or 4", [4, 5], 1),
        ("exact", " Madrid\n", "Madrid", 1),
        ("exact", "the  red\nhouse", "the red house", 1),
        ("exact", "Cafe\u0301", "Café", 1),
        ("exact", "yes", ["sí", "yes"], 1),
        ("contains", "It is MADRID, of course.", "Madrid", 1),
        ("contains", "Straße", "STRASSE", 1),
        ("contains", "It is Paris.", ["Madrid", "paris"], 1),
        ("contains", '{"answer": 807}', 80, 0),
        ("contains", '{"answer": 80}', 80, 1),
        ("contains", "It is 80.5, or 1,080.", 80, 0),
        ("contains", "807 or 80.", 80, 1),
        ("contains", "The Parisian way.", "Paris", 0),
        ("contains", "首都是北京市。", "北京", 1),
        ("json", ' {"b": [2], "a": "é"}\n', {"a": "é", "b": [2]}, 1),
        ("json", '```json\n{"a": 1}\n```', {"a": 1}, 0),
        ("json", '{"a": true}', [{"a": "1"}, {"a": 1}], 0),
    ],
)
def test_scores_by_hand(metric, answer, expected, score) -> None:
    assert BUILT_IN[metric].score(answer, {"answer": expected}) == score


def logs(*rows: list[float]) -> list[np.ndarray]:
    return [np.array(row, np.float32) for row in rows]


def test_choices_by_the_mean() -> None:
    """The first has the larger sum, -3 against -4; the second the larger mean, -1 against -1.5."""
    given = logs([-1, -2], [-1, -1, -1, -1])
    kept = {"answer": "b", "log_probs": [-3, -4], "n_tokens": [2, 4]}
    for answer, score in ((0, 0), (1, 1)):
        found = choice_score(given, {"choices": ["a", "b"], "answer": answer})
        assert found == {"score": score, **kept}


def test_a_tie_of_choices_is_not_right_and_loss_is_nats_a_token() -> None:
    assert choice_score(logs([-1], [-1]), {"choices": ["a", "b"], "answer": 0})["score"] == 0
    assert loss(logs([-1, -2, -6]), {}) == 3


@pytest.fixture(autouse=True)
def _registry(monkeypatch) -> None:
    monkeypatch.setattr(metrics, "_registry", {})


def polite(answer: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"score": float("please" in answer), "words": len(answer.split())}


def test_a_registered_metric_stands_with_the_others(tmp_path) -> None:
    register_metric(Metric("polite", polite, needs="manners"))
    register_metric(Metric("polite", polite, needs="manners", check=lambda fields: None))  # again
    assert [*metrics.metrics()] == [*BUILT_IN, "polite"]
    path = tmp_path / "t.jsonl"
    path.write_text('{"question": "Ask for tea.", "manners": "any"}\n')
    task = read_task(path)
    assert task.metric == "polite"
    assert task.by.score("Tea, please", {}) == {"score": 1.0, "words": 2}


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (Metric("loss", polite), "and is none of number, exact, contains, json, choice, loss."),
        (Metric("Not a name", polite), "expected a qaflora_edge.Metric whose name has small let"),
        (polite, "expected a qaflora_edge.Metric whose name has small letters"),
    ],
)
def test_what_is_no_metric_is_refused(metric, message) -> None:
    assert message in refused(TaskFileError, register_metric, metric)
    assert metrics.metrics() == BUILT_IN


# Answer -> what it may stand for, in any order.
ANSWERS = [
    ("12,5 euros", "12.5"),
    ("1,234", "1234 1.234"),
    ("1.234", "1234 1.234"),
    ("1.234,50 €", "1234.5"),
    ("$1,234.50.", "1234.5"),
    ("1,234,567", "1234567"),
    ("1,23,456 rupees", "123456"),
    ("2,000", "2000"),
    ("1'234", "1234"),
    ("Всего 3 400 рублей", "3400 400"),
    ("一共是18。", "18"),
    ("１，２３４ 个", "1234 1.234"),
    ("٣٬٤٠٠", "3400"),
    ("١٢٫٥", "12.5"),
    ("४२", "42"),
    ("\\boxed{1{,}234} dollars, by 3 steps", "1234 1.234"),
    ("#### 12 eggs\nin 3 days", "12"),
    ("#### 1. Count the eggs\nThere are 16 of them.\n#### 2. Step\nIt is 18", "18"),
    ("#### -7%", "-7"),
    ("#### 5\nno:\n#### 7", "7"),
    (".5", "0.5"),
    ("(3,-5)", "-5"),
    ("−5", "-5"),
    ("$-5", "-5"),
    ("8-3", "3"),
    ("pages 3–5", "5"),
    ("COVID-19", "19"),
    ("", ""),
    ("12 " * 60, "12"),
]


@pytest.mark.parametrize(("answer", "values"), ANSWERS)
def test_the_last_number_by_hand(answer, values) -> None:
    assert last_number(answer) == {Decimal(value) for value in values.split()}


NUMBERS = {18: "18", 2.5: "2.5", "18": "18", " -1,234.5 ": "-1234.5", "1e3": "1000", 0.1: "0.1"}
NO_NUMBERS = [True, None, "", "ten", "1,2", "0,125", "1234,567", "1.2.3", "5 eggs", "١", [5], "nan"]


def test_numbers_of_tasks() -> None:
    assert {value: as_number(value) for value in NUMBERS} == {
        value: Decimal(number) for value, number in NUMBERS.items()
    }
    assert [as_number(value) for value in NO_NUMBERS] == [None] * len(NO_NUMBERS)
