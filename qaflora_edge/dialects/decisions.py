"""Decisions in the shape of POST /v1/systemone: a state and typed questions about it.

Followed as far as it is public (docs.typesafe.ai, docs.litellm.ai/docs/decisions/systemone_format):
`noul` is yes or no, `choice` one of several, `score` a level.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qaflora_edge.answering.decide import Decision
from qaflora_edge.errors import wrong_option
from qaflora_edge.formats.inputs import Json, Object

CRITERIA: Json = {"noul": {}, "choice": {"label": "what it means"}, "score": ["level 0", "level 1"]}


def read_question(name: str, state: Any, question: Any) -> tuple[str, dict[str, str]]:
    """Return a question about a state as a text, and its choices with what they mean."""
    field = f"questions.{name:.80}"
    if not isinstance(question, Mapping) or question.get("type") not in CRITERIA:
        expected = f"an object whose type is one of {', '.join(CRITERIA)}"
        raise wrong_option(field, question, expected)
    kind = question["type"]
    example = CRITERIA[kind]
    criteria: Any = question.get("criteria") or {}
    is_missing = bool(example) and not criteria
    if type(criteria) is not type(example) or is_missing:
        raise wrong_option(f"{field}.criteria", criteria, f"such as {json.dumps(example)}")
    situation = _written(state)
    instructions = _written(question.get("instructions"))
    text = f"{situation}\n\n{instructions}".strip()
    if kind == "score":
        return text, _levels(criteria)
    if kind == "choice":
        choices = {label: _written(means) for label, means in criteria.items()}
        return text, choices
    yes = _written(criteria.get("true"))
    no = _written(criteria.get("false"))
    return text, {"yes": yes, "no": no}


def _levels(criteria: Sequence[Any]) -> dict[str, str]:
    levels = {}
    for level, means in enumerate(criteria):
        levels[str(level)] = _written(means)
    return levels


def _written(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def answer(question: Object, decision: Decision) -> Json:
    """Return the answer to a question."""
    shares = [round(float(share), 6) for share in decision.probabilities]
    kind = question["type"]
    if kind == "noul":
        return {"type": kind, "noul": shares[0]}
    n_choice = len(shares)
    confidence = 1.0  # of one choice; of equal shares it is 0
    if n_choice > 1:
        confidence = round((n_choice * max(shares) - 1) / (n_choice - 1), 6)
    shown: Json = {
        "type": kind,
        "probabilities": dict(zip(decision.choices, shares, strict=True)),
        "confidence": confidence,
    }
    if kind == "choice":
        shown["choice"] = decision.choice
    else:
        score = float(np.arange(n_choice) @ decision.probabilities)
        shown["score"] = round(score, 6)
        shown["legend"] = _levels(question["criteria"])
    return shown
