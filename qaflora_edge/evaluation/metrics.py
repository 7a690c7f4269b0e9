"""How answers are scored: 1 or 0, or nats a token."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.evaluation.last_number import as_number, is_number

F32 = NDArray[np.float32]


def answer_score(metric: str, answer: str, expected: Any) -> float:
    """1.0 for a right answer, else 0.0.

    metric    number (the last one is it), exact (the same text) or contains (the text is in it)
    expected  a number or text, or several, one of which is enough
    """
    right = _METRICS[metric]
    several = expected if isinstance(expected, list) else [expected]
    return float(any(right(answer, each) for each in several))


def _ends_with_number(answer: str, expected: Any) -> bool:
    number = as_number(expected)
    return number is not None and is_number(answer, number)


def _is_exact(answer: str, expected: Any) -> bool:
    return _spaced(answer) == _spaced(str(expected))


def _contains(answer: str, expected: Any) -> bool:
    return _spaced(str(expected)).casefold() in _spaced(answer).casefold()


_METRICS = {"number": _ends_with_number, "exact": _is_exact, "contains": _contains}


def _spaced(text: str) -> str:
    """A text in Unicode's NFC, with single spaces for all white space and none at its ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def choice_score(log_probs: Sequence[F32], answer: int, score_by: str) -> dict[str, Any]:
    """Which choice is the likeliest, by all its tokens and by their mean.

    log_probs  of each choice's tokens, in nats: float32 [n_token] each
    score_by   "sum" or "mean": which of them is the score

    A tie is no right answer.
    """
    sums = [float(each.sum(dtype=np.float64)) for each in log_probs]
    n_tokens = [len(each) for each in log_probs]
    means = [total / n for total, n in zip(sums, n_tokens, strict=True)]
    scores = {"sum": _is_best(sums, answer), "mean": _is_best(means, answer)}
    return {
        "score": scores[score_by],
        "log_probs": [round(total, 4) for total in sums],
        "n_tokens": n_tokens,
        "score_sum": scores["sum"],
        "score_mean": scores["mean"],
    }


def _is_best(values: Sequence[float], index: int) -> float:
    return float(all(values[index] > value for i, value in enumerate(values) if i != index))


def loss(log_probs: F32) -> float:
    """Nats a token of a continuation whose tokens' log-probabilities are float32 [n_token]."""
    return -float(log_probs.mean(dtype=np.float64))
