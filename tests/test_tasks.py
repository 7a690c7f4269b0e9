"""Task files: what they may say, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from qaflora_edge.errors import TaskFileError
from qaflora_edge.evaluation.metrics import BUILT_IN
from qaflora_edge.evaluation.tasks import Task, read_task

SUM = {"question": "What is 2 + 3?", "answer": 5}


def write(path: Path, *lines: Any) -> Path:
    texts = (each if isinstance(each, str) else json.dumps(each) for each in lines)
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def read(tmp_path: Path, *lines: Any, name: str = "sums.jsonl") -> Task:
    return read_task(write(tmp_path / name, *lines))


def test_fields_decide_where_the_task_does_not_say(tmp_path) -> None:
    kinds = {
        "number": [SUM, {"prompt": "a", "answer": "1,234.5"}, {"question": "a", "answer": [5, 6]}],
        "contains": [SUM, {"question": "a", "answer": "b"}],
        "choice": [{"question": "a", "choices": ["b", "c"], "answer": 1}],
        "loss": [{"prompt": "a", "continuation": " b"}],
    }
    for metric, lines in kinds.items():
        task = read(tmp_path, *lines, name=f"{metric}.jsonl")
        assert (task.name, task.metric, len(task.items)) == (metric, metric, len(lines))


def test_a_task_says_how_it_is_asked(tmp_path) -> None:
    header = {
        "name": "sums-es",
        "metric": "exact",
        "system": "Be brief.",
        "template": "{question} {{in {language}}}",
        "max_tokens": 9,
        "stop": ["\n"],
        "language": "es",
        "domain": "math",
    }
    item = {"question": "2 + 3?", "answer": "5", "language": "español"}
    task = read(tmp_path, "\ufeff" + json.dumps({"task": header}), "", item, "  ")
    assert task.question(task.items[0]) == "2 + 3? {in español}"
    system, user = task.asked(task.items[0], is_chat=False).messages
    assert system == {"role": "system", "content": "Be brief."}
    assert user == {"role": "user", "content": "2 + 3? {in español}"}
    assert (task.name, task.metric, task.max_tokens, task.stop) == ("sums-es", "exact", 9, ["\n"])
    assert (task.language, task.domain, task.expected(task.items[0])) == ("es", "math", "5")


def test_choices_have_letters(tmp_path) -> None:
    header = {"template": "{question}\n{choices}"}
    item = {"question": "Which?", "choices": ["one", "{two}"], "answer": 1}
    task = read(tmp_path, {"task": header}, item)
    assert task.question(task.items[0]) == "Which?\nA. one\nB. {two}"
    assert task.expected(task.items[0]) == "{two}"


def test_messages_are_asked_as_they_are(tmp_path) -> None:
    messages = [{"role": "system", "content": "Own."}, {"role": "user", "content": "2 + 3?"}]
    header = {"task": {"system": "Other.", "template": "{x}"}}
    task = read(tmp_path, header, {"messages": messages, "answer": 5})
    assert task.asked(task.items[0]).messages == messages
    assert task.question(task.items[0]) == "2 + 3?"


def test_lines_end_in_any_way_and_keep_their_separators(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    lines = '{"question": "a\u2028b", "answer": 1}\r\n{"question": "c", "answer": 2}'
    path.write_bytes(lines.encode())
    assert [item["question"] for item in read_task(path).items] == ["a\u2028b", "c"]


CHOICE = {"question": "a", "choices": ["b", "c"], "answer": 0}
HOSTILE: list[tuple[list[Any], str]] = [
    ([], ": it has no item, expected lines such as"),
    (['{"question": "\\ud800", "answer": 1}'], "line 1: it is no JSON object (it has half of a"),
    ([{"task": {}, "x": 1}, SUM], "field x is 1, expected one of task"),
    ([SUM, {"task": {}}], "line 2: field question is missing, expected a text that is not blank"),
    ([{"task": {"metric": "bleu"}}, SUM], 'field metric is "bleu", expected one of number, exact'),
    ([{"task": {"name": "a b"}}, SUM], 'field task.name is "a b", expected 1 to 64 letters'),
    ([{"task": {"template": "{x}"}}, SUM], "2: field template is a text with {x}, expected only n"),
    ([{"messages": [{"role": "user"}], "answer": 1}], "Message 0 has content = None, expected"),
    ([{"question": "a"}], "answer is missing, expected a text or number, or a list of them"),
    ([{"task": {"metric": "number"}}, {"question": "a", "answer": "b"}], 'answer is "b", expected'),
    ([{**CHOICE, "answer": 2}], "answer is 2, expected the number of a choice, 0 to 1"),
    ([{"task": {"metric": "loss"}}, SUM], "continuation is missing, expected a text"),
]


@pytest.mark.parametrize(("lines", "message"), HOSTILE)
def test_a_wrong_file_is_refused(tmp_path, lines, message) -> None:
    path = write(tmp_path / "t.jsonl", *lines)
    told = refused(TaskFileError, read_task, path)
    assert told.startswith(f"Cannot use the task {path}")
    assert message in told
    assert told.endswith("Correct the file; docs/evaluate.md says what it may have.")
    assert len(told) < 600


def test_a_file_that_is_not_there_is_said(tmp_path) -> None:
    with pytest.raises(TaskFileError, match=r"Cannot read the task .*: No such file"):
        read_task(tmp_path / "none.jsonl")


def test_tasks_of_the_smoke_test_have_every_metric(checkout) -> None:
    """`make eval-smoke` asks them."""
    paths = (checkout / "benchmarks/smoke").glob("*.jsonl")
    found = {path.stem: read_task(path) for path in paths if path.stem != "code"}
    assert {name: task.metric for name, task in found.items()} == {name: name for name in BUILT_IN}
