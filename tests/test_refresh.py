"""benchmarks/refresh.py: an answer goes on under weights that are measured again."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle

from qaflora_edge import Engine, FusionWeights, Generation
from qaflora_edge.evaluation.results import read_results


def test_an_answer_is_weighed_in_turns(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("refresh", checkout / "benchmarks/refresh.py")
    assert spec is not None
    assert spec.loader is not None
    refresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(refresh)
    folder = make_bundle(tmp_path).folder
    lines = [{"task": {"max_tokens": 12}}, *({"question": q, "answer": 1} for q in ("a", "b", "c"))]
    task, out = tmp_path / "t.jsonl", tmp_path / "r.jsonl"
    task.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["refresh", folder, task, "-o", out, "--every", 5, "--half", "dev"]
    monkeypatch.setattr("sys.argv", [*map(str, words)])
    taken: list[tuple[list[int], FusionWeights]] = []
    take = refresh.Answer.take

    def taking(answer: Any, piece: Generation) -> None:
        taken.append((list(answer.tokens), piece.fusion))
        take(answer, piece)

    monkeypatch.setattr(refresh.Answer, "take", taking)
    refresh.main()
    found = read_results(out).records
    assert [record["item"] for record in found] == [0, 2]
    assert {record["finish_reason"] for record in found} <= {"stop", "length"}
    assert max(record["n_token"] for record in found) > 5
    assert len(taken) > len(found)
    with Engine(folder, strategy="qa-flora", n_ctx=2048) as engine:
        for tokens, fusion in taken:
            np.testing.assert_allclose(fusion.weights, engine.weights(tokens).weights, atol=2e-3)
