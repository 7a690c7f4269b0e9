"""models/recipes/problems.py: functions whose examples say whether an answer is right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from made_results import header, record

from qaflora_edge import Metric
from qaflora_edge.evaluation import metrics
from qaflora_edge.evaluation.tasks import read_task

pytestmark = pytest.mark.slow  # Pythons of its own

PACKAGE = '''
import functools

def _one():
    return 1

@functools.cache
def twice(n: int) -> int:
    """Twice a number, however large it is, and whatever its sign.

    >>> twice(2)
    4
    """
    return 2 * n * _one()

def wrong(n):
    """A function whose example is out of date, as some are in every package.

    >>> wrong(2)
    3
    """
    return 2

def silent(n):
    """A function that says nothing of what it gives, and so cannot be checked by anyone."""
    return n
'''


@pytest.fixture(autouse=True)
def _code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tasks have the metric; the scripts register their own."""
    code = Metric("code", lambda answer, fields: 0.0, needs="test", check=lambda fields: None)
    monkeypatch.setattr(metrics, "_registry", {"code": code})


def test_problems_of_a_package_and_what_solves_them(tmp_path: Path, checkout: Path) -> None:
    package = tmp_path / "numbers_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "functions.py").write_text(PACKAGE)
    (package / "broken.py").write_text("import nothing_of_this_name")
    (package / "__main__.py").write_text("raise SystemExit(3)")
    script, out = checkout / "models/recipes/problems.py", tmp_path / "problems.jsonl"
    command = [sys.executable, script, package.name, "-o", out]
    env = {"PYTHONPATH": str(tmp_path)}
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    assert "1 problems" in said.stdout
    task = read_task(out)
    (item,) = task.items
    assert item["task_id"] == "numbers_of_mine.functions.twice"
    asked = task.question(item)
    assert 'def twice(n):\n    """Twice' in asked
    assert "return" not in asked

    def answer(before: str, doc: str, body: str) -> str:
        lines = (f"{before}def twice(n):", f'    """{doc}"""', f"    return {body}", "", "print(1)")
        return "It is:\n```python\n" + "\n".join(lines) + "\n```\n"

    answers = [
        (answer("", "Twice.", "n + n"), 1.0),
        (answer("import math\n", "", "n + n"), 1.0),
        (answer("", "Of n.", "n + n"), 1.0),  # as the first
        (answer("", "", "n"), 0.0),
    ]
    head = header({task.name: "code"}, [])
    head["tasks"][0]["sha256"] = task.sha256
    paths = [tmp_path / f"{i}.jsonl" for i in range(len(answers))]  # each of a run of its own
    for path, (text, score) in zip(paths, answers, strict=True):
        lines = (head, record(task.name, 0, "base", score, answer=text))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    solved, script = tmp_path / "solved.jsonl", checkout / "models/recipes/solved.py"
    command = [sys.executable, script, out, *paths, "-o", solved]
    subprocess.run(command, check=True)
    found = [json.loads(line) for line in solved.read_text().splitlines()]
    code = "def twice(n):\n    return n + n\n```"
    assert [each["answer"] for each in found] == [
        f"```python\n{code}",
        f"```python\nimport math\n\n{code}",
    ]
    assert {each["question"] for each in found} == {task.question(task.items[0])}
