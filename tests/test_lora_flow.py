"""benchmarks/lora_flow.py: untrained gates are the static mix; training makes losses smaller."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from qaflora_edge import Engine
from qaflora_edge.bundles.create import create_bundle
from qaflora_edge.evaluation.results import Results, read_results

WORDS = [
    ("one and two", "three"),
    ("a ring", "on the thing"),
    ("in the rain", "an hour"),
    ("no more", "there"),
]


def write(path: Path, items: list[Any], **task: Any) -> Path:
    lines = [{"task": task}, *items]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def lora_flow(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(checkout / "benchmarks")  # it uses lorahub
    spec = importlib.util.spec_from_file_location("lora_flow", checkout / "benchmarks/lora_flow.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lora_flow", module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of transformers
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_gates_are_trained_and_scored(tmp_path: Path, lora_flow: Any, architecture: str) -> None:
    base = tiny.write_tiny_base(tmp_path / "base.gguf", architecture, tied=architecture == "llama")
    adapters = {
        name: tiny.write_tiny_adapter(
            tmp_path / f"{name}.gguf", base, rank=3 + seed, seed=seed, strength=0.6
        ).path
        for seed, name in enumerate(("math", "es"))
    }
    bundle = create_bundle(tmp_path / "bundle", base.path, adapters)
    losses = write(
        tmp_path / "loss.jsonl",
        [{"question": q, "continuation": a} for q, a in WORDS],
        name="words",
        metric="loss",
    )
    texts = write(
        tmp_path / "text.jsonl", [{"question": q, "answer": a} for q, a in WORDS], metric="exact"
    )

    def run(task: Path, out: str, *more: object) -> Results:
        lora_flow.main([str(word) for word in (bundle, losses, task, "-o", tmp_path / out, *more)])
        return read_results(tmp_path / out)

    static = run(losses, "static.jsonl", "--epochs", 0)
    answers = run(texts, "answers.jsonl", "--epochs", 0, "--limit", 2)
    with Engine(bundle, strategy="static", kv_type="f32", flash_attn=False) as engine:
        for record, (question, answer) in zip(static.records, WORDS, strict=True):
            tokens = engine.chat_tokens([{"role": "user", "content": question}])
            expected = -float(engine.score(tokens, answer).mean())
            assert record["score"] == pytest.approx(expected, abs=1e-4)
            assert record["weights"] == {"math": 0.5, "es": 0.5}
            assert (record["n_prompt"], record["total"]) == (len(tokens), 1)
        for record in answers.records:
            tokens = engine.chat_tokens([{"role": "user", "content": record["question"]}])
            logits = engine.logits([*tokens]).argmax()
            first = engine._model.piece(int(logits)).decode("utf-8", "replace")
            assert record["answer"].startswith(first)
            assert record["score"] == 0
    options = ("--epochs", 12, "--lr", 0.05, "--batch", 2)
    before = run(losses, "trained.jsonl", *options, "--half", "dev")
    trained = run(losses, "trained.jsonl", *options)  # goes on
    assert trained.records[:2] == before.records
    assert [record["item"] for record in trained.records] == [0, 2, 1, 3]

    def mean(results: Results) -> float:
        return sum(record["score"] for record in results.records) / len(results.records)

    assert mean(trained) < mean(static) - 0.05
    assert trained.records[0]["weights"] != static.records[0]["weights"]
