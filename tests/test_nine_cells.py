"""benchmarks/nine_cells.py: task files that `qaflora eval` takes, from a folder of data."""

import json
import subprocess
import sys
from pathlib import Path

from qaflora_edge.evaluation.tasks import read_task

LANGUAGES = ("es", "ru", "zh")


def test_tasks_of_the_nine_cells(tmp_path: Path, checkout: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    head = 'def add(a, b):\n    """Sum {both}."""\n'
    made = {
        "math": {"question": "2 + 3?", "answer": "5", "equation": "x"},
        "code": {
            "prompt": head,
            "entry_point": "add",
            "test": "assert add",
            "task_id": "p/0",
            "canonical_solution": "    return a + b\n\n",
        },
        "medical": {"question": "Which?", "choices": ["one", "two"], "answer": 1},
    }
    for name, item in made.items():
        for language in LANGUAGES:
            (data / f"{name}_{language}.jsonl").write_text(json.dumps(item) + "\n")
    sentence = {"es": "uno dos tres cuatro", "ru": "раз два три", "zh": "一二三四五", "en": "x"}
    (data / "medical_sentences.jsonl").write_text(json.dumps(sentence), encoding="utf-8")
    script = checkout / "benchmarks/nine_cells.py"
    for out in ("first", "second"):
        command = [sys.executable, str(script), str(data), str(tmp_path / out)]
        subprocess.run(command, check=True, capture_output=True)
    files = sorted((tmp_path / "first").iterdir())
    assert [each.read_bytes() for each in files] == [
        (tmp_path / "second" / each.name).read_bytes() for each in files
    ]
    tasks = {task.name: task for task in map(read_task, files)}
    kinds = {"math": "number", "code": "code", "medical": "choice", "medical_text": "loss"}
    assert {name: task.metric for name, task in tasks.items()} == {
        f"{kind}_{language}": metric for kind, metric in kinds.items() for language in LANGUAGES
    }
    assert {(task.language, task.domain) for task in tasks.values()} == {
        (language, domain) for language in LANGUAGES for domain in ("math", "code", "med")
    }
    assert tasks["code_es"].question(tasks["code_es"].items[0]).endswith(f"```python\n{head}```")
    medical = tasks["medical_zh"]
    assert medical.question(medical.items[0]) == "Which?"
    assert medical.choices(medical.items[0]) == ["one", "two"]
    assert [dict(tasks[f"medical_text_{language}"].items[0].fields) for language in LANGUAGES] == [
        {"prompt": "uno dos", "continuation": " tres cuatro"},
        {"prompt": "раз", "continuation": " два три"},
        {"prompt": "一二", "continuation": "三四五"},
    ]
    command = [sys.executable, str(script), str(data), str(tmp_path / "answers"), "--answers"]
    subprocess.run(command, check=True, capture_output=True)
    answered = {path.stem: read_task(path) for path in (tmp_path / "answers").iterdir()}
    for name, task in answered.items():
        item, asked = task.items[0], tasks[name].items[0]
        assert task.question(item) == tasks[name].question(asked)
        assert item.fields.items() >= asked.fields.items()
    assert answered["math_ru"].items[0].fields["continuation"] == "Ответ: 5"
    written = answered["code_es"].items[0].fields["continuation"]
    assert written == f"```python\n{head}    return a + b\n```"
