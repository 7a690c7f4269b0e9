"""The example scripts are short, and run."""

import subprocess
import sys
from pathlib import Path

import pytest
from bundles import make_bundle

from qaflora_edge import Engine

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 40


def test_offline_assistant_fills_a_form_and_answers(tmp_path: Path, checkout: Path) -> None:
    made = make_bundle(tmp_path)
    script = checkout / "examples/offline_assistant.py"
    command = [sys.executable, str(script), str(made.folder), "the thing?"]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert (result.returncode, result.stderr) == (0, "")
    form, mix, *answer = result.stdout.splitlines()
    assert form.startswith("form: {'language': '")
    assert mix.startswith("mix: math 0.")
    with Engine(made.folder, n_ctx=1024) as engine:
        whole = engine.chat([{"role": "user", "content": "the thing?"}], max_tokens=64)
    assert answer == whole["choices"][0]["message"]["content"].splitlines()
    command[2] = str(tmp_path / "gone")
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ")
