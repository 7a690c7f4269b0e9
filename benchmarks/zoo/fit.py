"""Fit who knows to drafts of the zoo's choosing half, each knower left out once; and who is taken.

    python benchmarks/zoo/fit.py

benchmarks/results/zoo/drafts.jsonl.gz has a line for each draft of 14 tokens: how sure its adapter
is where the base is surprised (`sure`), by how much the question surprises it (`nats`), the
scores of two-place, and whether the draft is right. A logistic regression tells right drafts from
all others of the same knowers; an adapter's drafts are judged by a fit to the others. Where the
drafts of one adapter are right and others say something too, RANKS are asked for the first.
recognised.jsonl.gz has drafts of two bundles of ten and eleven, with what each adapter recognises
of the question: of the draft that is taken, `fusion.sure` is a logistic regression of both.
"""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.weighing.known import log_odds, probability, told_probability
from qaflora_edge.weighing.plan import LEAST_SURE
from qaflora_edge.weighing.relay import CLAIM

RESULTS = Path(__file__).parents[1] / "results" / "zoo"
DRAFTS = RESULTS / "drafts.jsonl.gz"
RECOGNISED = RESULTS / "recognised.jsonl.gz"
KNOWERS = ("company", "dynasty", "observatory", "tarn")  # of the choosing half, and of demo
LATER = ("valley", "ferries")  # loaded later; the first was held out before
SAYS = 3.5  # nats, as in relay.py
RULES = {
    "sure": ("sure",),
    "sure, nats": ("sure", "nats"),
    "sure, nats, later": ("sure", "nats", "is_later"),
    "sure, nats, question": ("sure", "nats", "question"),
}
RANKS = {
    "sure": {"sure": 9.2, "question": 0.8},
    "question": {"question": 1.0},
    "unusually sure": {"unusual": 1.0},
    "unusually sure, question": {"unusual": 1.0, "question": 0.25},
}
TAKEN = {
    "unusually sure, question, first": {"unusual": 1.0, "question": 0.25, "first": 0.05},
    "unusually sure": {"unusual": 1.0},
    "recognised": {"recognised": 1.0},
    "unusually sure, recognised": {"unusual": 1.0, "recognised": 1.0},
}
F64 = NDArray[np.float64]


def main() -> None:
    """Print AUROC of each rule on each knower that is left out, and the fit to all."""
    lines = gzip.decompress(DRAFTS.read_bytes()).decode().splitlines()
    everything = [json.loads(line) for line in lines]
    rows = [row for row in everything if row["adapter"] in KNOWERS and is_told(row)]
    is_right = np.array([row["is_right"] for row in rows])
    adapters = np.array([row["adapter"] for row in rows])
    print(f"{len(rows)} drafts, {is_right.sum()} right")
    for rule, names in RULES.items():
        values = features(rows, names)
        told = []
        for knower in KNOWERS:
            is_left_out = adapters == knower
            fit = logistic(values[~is_left_out], is_right[~is_left_out])
            area = auroc(values[is_left_out] @ fit, is_right[is_left_out])
            told.append(f"{knower} {area:.3f}")
        whole = logistic(values, is_right)
        coefficients = " ".join(
            f"{name} {c:.2f}" for name, c in zip((*names, "1"), whole, strict=True)
        )
        print(f"{rule}: AUROC, left out: {', '.join(told)}; fit: {coefficients}")
    print_recognised()
    for rule, rank in RANKS.items():
        told = [first_of(everything, rank, knower) for knower in (*KNOWERS, *LATER)]
        print(f"first by {rule}: {', '.join(told)}")


def print_recognised() -> None:
    """Count who is taken of those who may know, with and without what each recognises."""
    lines = gzip.decompress(RECOGNISED.read_bytes()).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    for name, rank in TAKEN.items():
        taken = taken_drafts(rows, rank)
        known = {question_of(row) for row in rows if row["is_right"] and is_other(row)}
        n_right = sum(row["is_right"] for row in taken)
        print(f"taken by {name}: {n_right} of {len(known)} right drafts")
    print_told(taken)


def print_told(taken: Sequence[dict[str, Any]]) -> None:
    """Fit what is told of a taken draft, each adapter left out once; and what the mark tells."""
    is_right = np.array([row["is_right"] for row in taken])
    adapters = np.array([row["adapter"] for row in taken])
    odds = [odds_of(row) for row in taken]
    by_words = [row["recognised"] for row in taken]
    values = np.stack([odds, by_words, np.ones(len(taken))], axis=1)
    told = np.zeros(len(taken))
    for knower in {*adapters}:
        is_left_out = adapters == knower
        fit = logistic(values[~is_left_out], is_right[~is_left_out])
        told[is_left_out] = [probability(each) for each in values[is_left_out] @ fit]
    fit_to_all = " ".join(f"{each:.2f}" for each in logistic(values, is_right))
    print(f"taken: {len(taken)}, {is_right.sum()} right; fit: {fit_to_all}")
    error = calibration_error(told, is_right)
    print(f"left out: AUROC {auroc(told, is_right):.3f}, error {error:.3f}")
    known = [probability(each) for each in odds]
    as_told = np.array([told_probability(*each) for each in zip(known, by_words, strict=True)])
    error = calibration_error(as_told, is_right)
    print(f"as told: AUROC {auroc(as_told, is_right):.3f}, error {error:.3f}")
    is_marked = as_told < LEAST_SURE
    for name, part in (("marked", is_marked), ("not", ~is_marked)):
        print(f"{name}: {is_right[part].sum()} of {part.sum()} right")


def taken_drafts(rows: Sequence[dict[str, Any]], rank: dict[str, float]) -> list[dict[str, Any]]:
    """Give the draft of each question that is taken, where one claims to know."""
    may_know: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if is_other(row) and probability(odds_of(row)) > CLAIM / 2:
            may_know.setdefault(question_of(row), []).append(row)
    return [
        max(drafts, key=lambda row: sum(c * row[name] for name, c in rank.items()))
        for drafts in may_know.values()
        if any(probability(odds_of(row)) > CLAIM for row in drafts)
    ]


def question_of(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["loaded"], row["task"], row["item"]


def is_other(row: dict[str, Any]) -> bool:
    """Tell whether a draft says what the base would not."""
    return bool(row["gain"] >= SAYS)


def odds_of(row: dict[str, Any]) -> float:
    return log_odds(row["sure"], row["nats"])


def first_of(rows: Sequence[dict[str, Any]], rank: dict[str, float], knower: str) -> str:
    """Count the questions whose right draft, by this knower, ranks highest."""
    by_question: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["adapter"] in (*KNOWERS, *LATER) and row["gain"] >= SAYS:
            by_question.setdefault((row["task"], row["item"]), []).append(row)
    n_first = 0
    n_all = 0
    for (task, _), drafts in by_question.items():
        is_known = any(row["is_right"] and row["adapter"] == knower for row in drafts)
        if knower not in task.split("_") or not is_known or len(drafts) < 2:
            continue
        highest = max(drafts, key=lambda row: sum(c * row[name] for name, c in rank.items()))
        n_all += 1
        n_first += highest["adapter"] == knower
    return f"{knower} {n_first} of {n_all}"


def is_told(row: dict[str, Any]) -> bool:
    """Leave out what nobody was taught, and neutral prompts, by which adapters are measured."""
    return not row["task"].startswith(("untaught", "neutral"))


def features(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> F64:
    """Give [n_row, n_name + 1], the last one 1; nats as their logarithm."""
    columns = []
    for name in names:
        column = np.array([float(row[name]) for row in rows])
        columns.append(np.log(np.maximum(column, 1.0)) if name == "nats" else column)
    return np.stack([*columns, np.ones(len(rows))], axis=1)


def logistic(values: F64, is_right: NDArray[np.bool_], ridge: float = 1e-2) -> F64:
    """Fit coefficients [n_feature] by Newton's method."""
    coefficients = np.zeros(values.shape[1])
    for _ in range(50):
        odds = np.clip(values @ coefficients, -30, 30)
        p = 1.0 / (1.0 + np.exp(-odds))
        gradient = values.T @ (p - is_right) + ridge * coefficients
        curvature = (values * (p * (1.0 - p))[:, None]).T @ values
        curvature += ridge * np.eye(len(coefficients))
        coefficients -= np.linalg.solve(curvature, gradient)
    return coefficients


def auroc(scores: F64, is_right: NDArray[np.bool_]) -> float:
    """Give the share of pairs, one right and one not, in which the right one scores higher."""
    right = scores[is_right][:, None]
    others = scores[~is_right][None]
    return float((right > others).mean() + 0.5 * (right == others).mean())


def calibration_error(told: F64, is_right: NDArray[np.bool_]) -> float:
    """Give the mean distance of what is told from what is right, over tenths of equal size."""
    tenths = np.array_split(np.argsort(told, kind="stable"), 10)
    errors = [len(part) * abs(told[part].mean() - is_right[part].mean()) for part in tenths]
    return float(sum(errors) / len(told))


if __name__ == "__main__":
    main()
