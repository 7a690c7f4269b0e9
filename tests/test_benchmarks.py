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

pytestmark = pytest.mark.slow  # a Python for each script, and torch
CHECKOUT = Path(__file__).resolve().parents[1]
BENCHMARKS = CHECKOUT / "benchmarks"
# Files that another script uses.
PARTS = {
    "as_peft",
    "sandbox",
    "sandbox_child",
    "server_process",
    "llama_server",
    "lora_flow",
    "charts",
}
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


def test_code_is_scored_by_its_tests(made, tmp_path) -> None:
    item = {"prompt": "def f():\n", "entry_point": "f", "test": "assert f() is None"}
    path, out = write(tmp_path / "code.jsonl", item), tmp_path / "r.jsonl"
    script("code_metric", "eval", made.folder, path, "-o", out, "--strategies", "base")
    _, found = lines(out)
    assert (found["score"] == 1) is (found["failure"] == "")
    assert isinstance(found["isolated"], list)


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
