"""qaflora eval"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import TinyBundle, bundle_json, make_bundle, qaflora
from click.testing import Result
from made_results import lines

from qaflora_edge import Engine

# F32 everywhere: what is decoded together changes no token.
F32 = ("--kv-type", "f32", "--no-flash-attn", "--ctx", 256, "--threads", 1)
EXACT: dict[str, Any] = {"kv_type": "f32", "flash_attn": False, "n_ctx": 256}
TIMES = ("probe_ms", "probe_before_ms", "prefill_ms", "decode_ms", "tokens_per_second")


def task(path: Path, *lines: dict[str, Any], **header: Any) -> Path:
    lines = ({"task": header}, *lines) if header else lines
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def sums(path: Path, n: int = 6) -> Path:
    lines = ({"question": f"thing {i} on a ring", "answer": i} for i in range(n))
    return task(path, *lines, max_tokens=8, template="{question}\nA number:")


def run(calibrated: TinyBundle, *args: object) -> Result:
    return qaflora("eval", calibrated.folder, *F32, *args)


def by_key(path: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """The results without their times, by task, item and strategy."""
    return {
        (each["task"], each["item"], each["strategy"]): {
            key: value for key, value in each.items() if key not in TIMES
        }
        for each in lines(path)[1:]
    }


def test_every_item_is_answered_under_every_strategy(calibrated, tmp_path) -> None:
    out = tmp_path / "r.jsonl"
    result = run(calibrated, sums(tmp_path / "sums.jsonl", 3), "-o", out, "--parallel", 5)
    assert result.exit_code == 0, result.output
    found = by_key(out)
    with Engine(calibrated.folder) as engine:
        ways = list(engine.strategies)
    assert ways[:4] == ["base", "static", "single:math", "single:es"]
    assert ways[4:] == ["two-place", "relay", "qa-flora", "spectr"]
    assert result.stderr.startswith(f"[{3 * len(ways)} results in ")
    assert set(found) == {("sums", item, way) for item in range(3) for way in ways}
    header = lines(out)[0]
    assert header["strategies"] == ways
    assert [each["name"] for each in header["adapters"]] == ["math", "es"]
    with Engine(calibrated.folder, **EXACT) as engine:
        for (_, item, way), each in found.items():
            text = f"thing {item} on a ring\nA number:"
            tokens = engine.chat_tokens([{"role": "user", "content": text}])
            fusion = engine.weights(tokens, strategy=way)
            means = dict(zip(("math", "es"), fusion.weights.mean(axis=1), strict=True))
            assert each["weights"] == pytest.approx(means, abs=6e-5)
            answer = engine.generate(tokens, weights=way, max_tokens=8)
            assert each["answer"] == answer.text()
            assert each["n_token"] == answer.n_completion
            assert each["question"] == text
            assert each["expected"] == item


def test_likelihoods_are_those_of_the_engine(calibrated, tmp_path) -> None:
    choices = ["one thing", "another on the ring"]
    pick = task(tmp_path / "pick.jsonl", {"question": "Which?", "choices": choices, "answer": 0})
    text = task(
        tmp_path / "text.jsonl",
        {"prompt": "There was", "continuation": " a thing in the ring"},
        raw_prompt=True,
    )
    out = tmp_path / "r.jsonl"
    assert run(calibrated, pick, text, "-o", out).exit_code == 0
    found = by_key(out)
    with Engine(calibrated.folder, **EXACT) as engine:
        asked = engine.chat_tokens([{"role": "user", "content": "Which?"}])
        for way in engine.strategies:
            sums = [float(engine.score(asked, each, weights=way).sum()) for each in choices]
            each = found["pick", 0, way]
            assert each["log_probs"] == pytest.approx(sums, abs=1e-3)
            scores = [engine.score(asked, choice, weights="base") for choice in choices]
            assert each["n_tokens"] == [*map(len, scores)]
            means = np.divide(sums, each["n_tokens"])
            assert each["score"] == float(means[0] > means[1])
            assert each["answer"] == choices[int(means.argmax())]
            nats = -float(engine.score("There was", " a thing in the ring", weights=way).mean())
            assert found["text", 0, way]["score"] == pytest.approx(nats, abs=1e-5)


def test_a_file_is_resumed(calibrated, tmp_path) -> None:
    path, out, whole = sums(tmp_path / "s.jsonl"), tmp_path / "r.jsonl", tmp_path / "whole.jsonl"
    assert run(calibrated, path, "--strategies", "base", "--limit", 2, "-o", out).exit_code == 0
    assert sorted(item for _, item, _ in by_key(out)) == [0, 1]
    before = out.read_bytes()
    with out.open("ab") as file:
        file.write(b'{"task": "s", "item": 5, "strat')  # as if it died within a line
    result = run(calibrated, path, "--strategies", "base,qa-flora", "-o", out)
    assert result.stderr.startswith("[10 results in ")
    assert result.stderr.endswith("; 2 were there before]\n")
    assert out.read_bytes().startswith(before)
    assert run(calibrated, path, "--strategies", "base,qa-flora", "-o", whole).exit_code == 0
    assert by_key(out) == by_key(whole)
    assert run(calibrated, path, "-o", out, "--temp", 1).exit_code == 1  # other options


def test_an_item_that_cannot_be_asked_is_a_result_without_a_score(calibrated, tmp_path) -> None:
    items = [{"question": "a" * n, "answer": 1} for n in (3, 600, 4)]
    out = tmp_path / "r.jsonl"
    path = task(tmp_path / "sums.jsonl", *items, max_tokens=2)
    result = run(calibrated, path, "--strategies", "base,qa-flora", "-o", out)
    assert result.exit_code == 1
    assert "2 failed, the first: sums, item 1: The prompt has " in result.stderr
    found = by_key(out)
    assert [found["sums", 1, way]["score"] for way in ("base", "qa-flora")] == [None, None]
    assert found["sums", 1, "base"]["error"].startswith("The prompt has ")
    assert found["sums", 2, "base"]["error"] is None
    assert len(found) == 6


def test_table_and_json_show_every_item(calibrated, tmp_path) -> None:
    path, file = sums(tmp_path / "sums.jsonl", 2), tmp_path / "r.json"
    ways = ("--strategies", "static,qa-flora")
    result = run(calibrated, path, *ways, "--json", file)
    assert result.exit_code == 0
    document = json.loads(file.read_text(encoding="utf-8"))
    found = [(each["item"], each["strategy"]) for each in document["results"]]
    assert sorted(found) == [(i, way) for i in (0, 1) for way in ("qa-flora", "static")]
    lines = result.stdout.splitlines()
    assert lines[0] == "sums: number, points"
    assert [line.split()[0] for line in lines[2:4]] == ["static", "qa-flora"]
    assert lines[1].split() == [
        "score,",
        "points",
        "over",
        "static",
        "items",
    ]  # no single was asked


@pytest.mark.parametrize(
    "case",
    [
        (("--json", "/nowhere/r.json"), 1, "the folder /nowhere does not take a new file"),
        (("-o", "r.jsonl", "--json", "./r.jsonl"), 2, "r.jsonl is named twice; give each FILE a"),
        (("sums.jsonl",), 2, "Two tasks have one name: sums, sums, expected different ones"),
    ],
)
def test_wrong_usage(calibrated, tmp_path, monkeypatch, case) -> None:
    args, code, message = case
    monkeypatch.chdir(tmp_path)
    sums(tmp_path / "sums.jsonl")
    result = run(calibrated, "sums.jsonl", *args)
    assert result.exit_code == code
    assert message in result.stderr


def test_save_makes_the_best_strategy_the_default(tmp_path) -> None:
    made = make_bundle(tmp_path)
    text = task(
        tmp_path / "text.jsonl",
        *({"prompt": "There was", "continuation": f" a thing {i} in the ring"} for i in range(5)),
        raw_prompt=True,
    )
    ways = "static,single:es,manual:es=0.1"
    result = run(made, text, "--strategies", ways, "--save", "--lens", "raw", "--json", "-")
    assert result.exit_code == 0, result.output
    means: dict[str, list[float]] = {}
    for each in json.loads(result.stdout)["results"]:
        means.setdefault(each["strategy"], []).append(each["score"])
    best = min(means, key=lambda way: sum(means[way]))
    fusion = bundle_json(made.folder)["fusion"]
    assert (fusion["strategy"], fusion["lens"], fusion["pool"]) == (best, "raw", "last")
    assert f"The strategy of {made.folder} is {best} from now on.\n" in result.stderr
    with Engine(made.folder) as engine:
        assert engine.strategy == best


def test_what_cannot_be_saved_is_said_before_the_work(calibrated, tmp_path) -> None:
    path = sums(tmp_path / "sums.jsonl", 1)
    result = qaflora("eval", calibrated.base.path, path, "--save", *F32)
    assert result.exit_code == 1
    assert "Error: Cannot " in result.stderr
