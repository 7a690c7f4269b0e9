"""Decisions in the shape of POST /v1/systemone: a state and typed questions about it.

Followed as far as it is public (docs.typesafe.ai, docs.litellm.ai/docs/decisions/systemone_format):
`noul` is yes or no, `choice` one of several, `score` a level.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from qaflora_edge.errors import wrong_option
from qaflora_edge.inference.decision import Decision

CRITERIA: dict[str, Any] = {
    "noul": {},
    "choice": {"label": "what it means"},
    "score": ["level 0", "level 1"],
}


def read_question(name: str, state: Any, question: Any) -> tuple[str, dict[str, str]]:
    """Return a question about a state as a text, and its choices with what they mean.

    Raises OptionError, which names the field.
    """
    field = f"questions.{name:.80}"
    if not isinstance(question, Mapping) or question.get("type") not in CRITERIA:
        expected = f"an object whose type is one of {', '.join(CRITERIA)}"
        raise wrong_option(field, question, expected)
    example = CRITERIA[question["type"]]
    criteria = question.get("criteria") or {}
    if type(criteria) is not type(example) or (example and not criteria):
        raise wrong_option(f"{field}.criteria", criteria, f"such as {json.dumps(example)}")
    text = f"{_written(state)}\n\n{_written(question.get('instructions'))}".strip()
    if isinstance(criteria, list):
        return text, {str(level): _written(means) for level, means in enumerate(criteria)}
    if question["type"] == "choice":
        return text, {label: _written(means) for label, means in criteria.items()}
    return text, {"yes": _written(criteria.get("true")), "no": _written(criteria.get("false"))}


def _written(value: Any) -> str:
    """Write a part of a question: a text as it is, anything else as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


def answer(question: Mapping[str, Any], decision: Decision) -> dict[str, Any]:
    """Return the answer to a question."""
    shares = [round(float(share), 6) for share in decision.probabilities]
    kind = question["type"]
    if kind == "noul":
        return {"type": kind, "noul": shares[0]}
    n = len(shares)
    found = {
        "type": kind,
        "probabilities": dict(zip(decision.choices, shares, strict=True)),
        "confidence": round((n * max(shares) - 1) / (n - 1), 6) if n > 1 else 1.0,
    }
    if kind == "choice":
        return {**found, "choice": decision.choice}
    legend = {str(level): _written(means) for level, means in enumerate(question["criteria"])}
    score = float(np.arange(n) @ decision.probabilities)
    return {**found, "score": round(score, 6), "legend": legend}
