"""One item of an evaluation as its HTML page shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qaflora_edge.cli.eval_words import number, text
from qaflora_edge.evaluation.cells import NATS, POINTS
from qaflora_edge.weighing.picture_text import crop

if TYPE_CHECKING:
    from qaflora_edge.evaluation.cells import Cell, Row

TITLE_CHARS = 160  # of a question, in the list of items


def item(cell: Cell, index: int, strategies: Sequence[str]) -> dict[str, Any]:
    """What the page's template takes of an item: its question, and who answered what."""
    rows = {name: cell.rows[name].get(index) for name in strategies}
    given = {name: row for name, row in rows.items() if row is not None}
    first = next(iter(given.values()))
    question = str(first.get("question", ""))
    is_marked = cell.unit == POINTS
    return {
        "index": index,
        "title": crop(question, TITLE_CHARS),
        "question": question,
        "expected": text(first.get("expected")),
        "marks": "".join(_mark(row) for row in rows.values()) if is_marked else "",
        "n_right": sum(row["score"] == 1 for row in given.values()),
        "is_same": is_marked and len({row["score"] for row in given.values()}) == 1,
        "answers": _answers(cell, given),
    }


def _mark(row: Row | None) -> str:
    if row is None or row["score"] is None:
        return "·"
    return "●" if row["score"] == 1 else "○"


def _answers(cell: Cell, given: Mapping[str, Row]) -> list[dict[str, Any]]:
    """Equal answers once, with every strategy that gave them."""
    groups: dict[str | None, list[dict[str, Any]]] = {}
    for strategy, row in given.items():
        answer = row.get("error") or row.get("answer")
        groups.setdefault(answer, []).append(
            {
                "strategy": strategy,
                "weights": _weights(row["weights"]),
                "failure": row.get("failure") or "",
                **_score(cell, row),
            }
        )
    return [{"text": answer, "rows": rows} for answer, rows in groups.items()]


def _score(cell: Cell, row: Row) -> dict[str, str]:
    score = row["score"]
    if score is None:
        return {"score": "failed", "kind": "wrong"}
    if cell.unit == NATS:
        return {"score": number(score, NATS), "kind": "loss"}
    if score in (0, 1):
        return {"score": "right" if score else "wrong", "kind": "right" if score else "wrong"}
    return {"score": number(100 * score, POINTS), "kind": "loss"}


def _weights(weights: Mapping[str, float]) -> str:
    if not any(weights.values()):
        return "the base alone"
    return ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
