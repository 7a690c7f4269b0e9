"""benchmarks/: every script starts, and those that need a bundle do so on a tiny one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle
from made_results import lines
from serving import ENGINE, listening

from qaflora_edge import Engine

pytestmark = pytest.mark.slow  # a Python for each script, and torch
CHECKOUT = Path(__file__).resolve().parents[1]
BENCHMARKS = CHECKOUT / "benchmarks"
# Files that another script uses.
PARTS = {"sandbox", "sandbox_child", "server_process", "llama_server", "lora_flow", "charts"}
SCRIPTS = [path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in PARTS]
MAX_BYTES = 8_000_000


def script(name: str, *words: object, code: int = 0) -> str:
    """What a script prints."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, words)]
    # Scripts import each other: their folder is on the path, as for a user.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, env=env)
    assert done.returncode == code, done.stderr
    return done.stdout


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_explains_itself(name) -> None:
    assert "usage: " in script(name, "--help").lower()


def test_pages_and_charts_of_results_are_those_of_the_report(tmp_path) -> None:
    script("report", "-o", tmp_path)
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) == 8  # the page, all tables, six charts
    for path in made:
        assert path.read_bytes() == (CHECKOUT / path.relative_to(tmp_path)).read_bytes(), path.name
    assert max(p.stat().st_size for p in (BENCHMARKS / "results").iterdir()) < MAX_BYTES


def test_our_server_keeps_requests_with_other_weights_apart(tmp_path) -> None:
    made = make_bundle(tmp_path, n_ctx=4096)
    with listening(made.folder, engine={**ENGINE, "n_ctx": 1024}) as address:
        said = script("isolation", "--base-url", address, "--tokens", 3, "--tolerance", 0.001)
    assert said.count("PASS") == 8


def test_prompts_of_each_kind_are_answered_with_guesses_and_without(tmp_path) -> None:
    made = make_bundle(tmp_path, n_ctx=4096)
    few = ("--repeat", 1, "--max-tokens", 4, "--draft", 3, "--strategy", "static")
    rows = [json.loads(line) for line in script("guesses", made.folder, *few).splitlines()]
    kinds = ["edit", "extract", "correct", "prose", "prose, 2 callers"]
    assert [row["name"] for row in rows] == kinds
    assert {*rows[0]} == {"name", "runs", "tokens_per_second", "of_plain", "accepted"}


def test_code_is_scored_by_its_tests(made, tmp_path) -> None:
    item = {"prompt": "def f():\n", "entry_point": "f", "test": "assert f() is None"}
    path, out = write(tmp_path / "code.jsonl", item), tmp_path / "r.jsonl"
    script("code_metric", "eval", made.folder, path, "-o", out, "--strategies", "base")
    _, found = lines(out)
    assert (found["score"] == 1) is (found["failure"] == "")
    assert isinstance(found["isolated"], list)


def test_busy_decodes_alone_and_next_to_another(made) -> None:
    assert "next to another" in script("busy", made.folder, "--repeat", 1)


def test_lorahub_gives_a_manual_mix(made, tmp_path) -> None:
    items = [{"question": f"thing {i}", "answer": i, "continuation": " on a ring"} for i in "12"]
    path = write(tmp_path / "t.jsonl", *items)
    words = ("--adapters", "math", "--budget", 3, "--examples", 2)
    *tried, mix = script("lorahub", made.folder, path, *words).splitlines()
    assert [line.partition(" at ")[2] for line in tried] == ["0.000", "-1.500", "1.500"]
    with Engine(made.folder, strategy=mix, n_ctx=256) as engine:
        assert {*engine.weights("thing").weights[0]} <= {-1.5, 0.0, 1.5}


def test_lora_flow_starts_as_the_static_mix(made, tmp_path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    item = {"question": "one and two", "continuation": "three"}
    path, out = write(tmp_path / "t.jsonl", item), tmp_path / "r.jsonl"
    script("lora_flow", made.folder, path, path, "-o", out, "--epochs", 0)
    _, found = lines(out)
    with Engine(made.folder, strategy="static", kv_type="f32", flash_attn=False) as engine:
        tokens = engine.chat_tokens([{"role": "user", "content": item["question"]}])
        expected = -float(engine.score(tokens, item["continuation"]).mean())
    assert found["score"] == pytest.approx(expected, abs=1e-4)


def test_refresh_weighs_every_few_tokens(made, tmp_path) -> None:
    items = ({"question": q, "answer": 1} for q in "abc")
    path = write(tmp_path / "t.jsonl", {"task": {"max_tokens": 12}}, *items)
    out = tmp_path / "r.jsonl"
    script("refresh", made.folder, path, "-o", out, "--every", 5, "--half", "dev")
    _, *found = lines(out)
    assert [record["item"] for record in found] == [0, 2]
    assert max(record["n_token"] for record in found) > 5


def test_tasks_of_the_nine_cells_can_be_read(tmp_path) -> None:
    made = {
        "math": {"question": "2 + 3?", "answer": "5"},
        "code": {
            "task_id": "p/0",
            "prompt": "def add(a, b):\n",
            "entry_point": "add",
            "test": "assert add",
            "canonical_solution": "    return a + b\n\n",
        },
        "medical": {"question": "Which?", "choices": ["one", "two"], "answer": 1},
    }
    for name, item in made.items():
        for language in ("es", "ru", "zh"):
            write(tmp_path / f"{name}_{language}.jsonl", item)
    sentence = {"es": "uno dos tres cuatro", "ru": "раз два три", "zh": "一二三四五"}
    write(tmp_path / "medical_sentences.jsonl", sentence)
    script("nine_cells", tmp_path, tmp_path / "out", "--answers")
    found = {path.stem: path.read_text("utf-8") for path in (tmp_path / "out").iterdir()}
    assert len(found) == 12
    items = {name: json.loads(text.splitlines()[1]) for name, text in found.items()}
    assert items["math_ru"]["continuation"] == "Ответ: 5"
    assert items["code_es"]["continuation"].endswith("    return a + b\n```")
    assert items["medical_text_zh"] == {"prompt": "一二", "continuation": "三四五"}


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    "options",
    [["--outtype", "f16"], ["--outtype", "q8_0", "--verify", "--modules", "mlp.down_proj"]],
)
def test_peak_memory_of_converting_is_little_more_than_header_and_buffer(options) -> None:
    """One layer of the shapes of an 8B model, rank 64, in a process without torch."""
    result = json.loads(script("convert", "--layers", 1, "--runs", 1, *options, "--json"))
    assert result["largest_pair_bytes"] == 2 * 64 * (4096 + 14336)
    n_value = 64 * (18432 if "mlp.down_proj" in options else 81920)
    assert result["adapter_bytes"] > 2 * n_value
    assert result["output_bytes"] > (1 if "q8_0" in options else 2) * n_value
    assert result["peak_bytes"] > result["floor_bytes"] > 1e7
    assert result["pairs_beyond"] <= (4 if "--verify" in options else 2)
