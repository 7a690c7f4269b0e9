"""Results of evaluations that nobody ran: drawn, to see what is made of them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

N_LAYER = 6
PAIRS = [
    ("math_es", "number", "es", "math"),
    ("math_ru", "number", "ru", "math"),
    ("med_text_es", "loss", "es", "medical"),
]


def header(
    tasks: Iterable[tuple[str, str, str | None, str | None]] = PAIRS,
    adapters: Sequence[str] = ("math", "es", "ru", "med"),
    strategies: Sequence[str] = (),
    *,
    n_item: int = 12,
    **changed: Any,
) -> dict[str, Any]:
    """The first line. tasks: name, metric, language, domain of each."""
    return {
        "eval": 1,
        "version": "0.1.0",
        "bundle": "six",
        "base": {"name": "tiny", "sha256": "0" * 64},
        "adapters": [{"name": name, "sha256": "1" * 64, "bytes": 1000} for name in adapters],
        "n_layer": N_LAYER,
        "tasks": [
            {
                "name": name,
                "metric": metric,
                "sha256": "2" * 64,
                "n_item": n_item,
                "language": language,
                "domain": domain,
                "system": None,
                "template": "{question}",
                "max_tokens": 64,
            }
            for name, metric, language, domain in tasks
        ],
        "strategies": list(strategies),
        "options": {"lens": "norm", "pool": "last", "seed": 0, "n_ctx": 2048},
        "machine": "a machine",
    } | changed


def record(task: str, item: int, strategy: str, score: float | None, **more: Any) -> dict[str, Any]:
    """One item under one strategy."""
    return {
        "task": task,
        "item": item,
        "strategy": strategy,
        "score": score,
        "answer": f"{strategy} says {item}",
        "expected": str(item),
        "question": f"How many is {item}?",
        "weights": {},
        "total": 1.0,
        "probe_ms": 30.0,
        "prefill_ms": 10.0,
        "decode_ms": 460.0,
        "n_prompt": 20,
        "n_token": 8,
        "finish_reason": "stop",
        "error": None,
    } | more


def drawn(
    strategies: Mapping[str, float], head: Mapping[str, Any], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Records for each task, item and strategy.

    strategies  name -> how often it is right; a loss is 3 less that
    """
    rng = np.random.default_rng(seed)
    names = [adapter["name"] for adapter in head["adapters"]]
    found = []
    for task in head["tasks"]:
        for item in range(task["n_item"]):
            luck = rng.random()
            for strategy, share in strategies.items():
                layers = _layers(strategy, names, rng)
                is_right = float(luck < share)
                score = 3.0 - share - luck if task["metric"] == "loss" else is_right
                found.append(
                    record(
                        *(task["name"], item, strategy, round(score, 4)),
                        weights=dict(
                            zip(names, layers.mean(axis=1).round(4).tolist(), strict=True)
                        ),
                        layers=layers.tolist(),
                    )
                )
    return found


def _layers(strategy: str, names: Sequence[str], rng: np.random.Generator) -> NDArray[np.float64]:
    """Weights [n_adapter, n_layer]: drawn where the strategy looks at the query."""
    if strategy == "base":
        return np.zeros((len(names), N_LAYER))
    if strategy == "static":
        return np.full((len(names), N_LAYER), 1 / len(names)).round(4)
    if strategy.startswith("single:"):
        return np.outer([strategy == f"single:{name}" for name in names], np.ones(N_LAYER))
    return rng.dirichlet(np.ones(len(names)), N_LAYER).T.round(4)


def write(path: Path, head: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> Path:
    """A file as `qaflora eval -o` writes it."""
    lines = [json.dumps(line, ensure_ascii=False) for line in (head, *records)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
