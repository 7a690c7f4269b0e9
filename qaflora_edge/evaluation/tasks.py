"""A task: questions, how they are asked, and what is a right answer.

    {"task": {"name": "sums", "metric": "number", "template": "{question}\\nAnswer:"}}
    {"question": "What is 2 + 3?", "answer": 5}

One JSON object a line. Without the first line the fields of the items decide. Every line is checked
before anything is asked; `data/task.schema.json` lists what the first may say.
"""

import codecs
import hashlib
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qaflora_edge.ask import Chat
from qaflora_edge.errors import InputFileError, PromptError, TaskFileError, os_errors
from qaflora_edge.evaluation.metrics import BUILT_IN, Fields, Metric, is_text, metrics
from qaflora_edge.formats.inputs import open_input
from qaflora_edge.formats.json_text import (
    WrongField,
    check_schema,
    read_json_object,
    shortened,
    shown,
)
from qaflora_edge.prompt.messages import begin_with, checked_messages

ASKED = ("messages", "question", "prompt")
ADVICE = "Correct the file; docs/evaluate.md says what it may have."


@dataclass(frozen=True)
class Task:
    """Items, and how they are asked and scored.

    items            the fields of each, as its line has them
    template         text with names of an item's fields in braces; None: the question as it is
    raw_prompt       no chat template, whatever the options say
    max_tokens, stop  None: the options say
    language, domain  of the questions; adapters are named like them
    """

    name: str
    metric: str
    sha256: str
    items: Sequence[Fields]
    system: str | None = None
    template: str | None = None
    raw_prompt: bool = False
    max_tokens: int | None = None
    stop: Sequence[str] | None = None
    language: str | None = None
    domain: str | None = None

    @property
    def by(self) -> Metric:
        """The metric itself."""
        return metrics()[self.metric]

    def question(self, item: Fields) -> str:
        """Write what an item asks as one text."""
        if "messages" in item:
            return str(checked_messages(item["messages"])[-1]["content"])
        if self.template is None:
            return str(item.get("question", item.get("prompt")))
        return _filled(self.template, item)

    def asked(self, item: Fields, *, is_chat: bool = True) -> Chat | str:
        """Ask an item: with messages for the chat template, or a text.

        is_chat  whether there is a template to use; messages and system always need one
        """
        if "messages" not in item and self.system is None and (self.raw_prompt or not is_chat):
            return self.question(item)
        messages = item.get("messages") or [{"role": "user", "content": self.question(item)}]
        return Chat(begin_with(self.system, messages))

    def expected(self, item: Fields) -> Any:
        """Give what is right: of a choice its text; None where only the metric knows."""
        if self.metric == "choice":
            return item["choices"][item["answer"]]
        return item.get("continuation" if self.metric == "loss" else "answer")


def read_task(path: str | Path) -> Task:
    """Read a task file.

    Raises TaskFileError naming the line and field, what was found and what was expected.
    """
    with (
        os_errors(TaskFileError, f"Cannot read the task {path}", "Give a file of JSON lines."),
        open_input(path) as file,
    ):
        data = file.read().removeprefix(codecs.BOM_UTF8)
    where = str(path)
    lines = list(json_lines(data, where, _wrong))
    header: dict[str, Any] = {}
    try:
        if lines and "task" in lines[0][1]:
            where, first = lines.pop(0)
            check_schema(first, "task")
            header = dict(first["task"])
        items = [item for _, item in lines]
        if not items:
            expected = 'lines such as {"question": ..., "answer": ...}'
            raise _wrong(str(path), f"it has no item, expected {expected}")
        header.setdefault("name", Path(path).name.removesuffix(".jsonl"))
        header.setdefault("metric", _metric_of(items))
        task = Task(sha256=hashlib.sha256(data).hexdigest(), items=items, **header)
        if task.metric not in metrics():
            raise WrongField("metric", shown(task.metric), f"one of {', '.join(metrics())}")
        for line in lines:
            where, item = line
            _check_item(task, item)
    except (WrongField, PromptError) as error:
        raise _wrong(where, str(error).removesuffix(".")) from error
    return task


def _wrong(where: str, what: str) -> TaskFileError:
    return TaskFileError(f"Cannot use the task {where}: {what}. {ADVICE}")


def json_lines(
    data: bytes, path: str, wrong: Callable[[str, str], InputFileError]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the lines that are not blank, each with its place.

    wrong  place, what is wrong -> the error that is raised
    """
    for number, line in enumerate(data.split(b"\n"), 1):
        where = f"{path}, line {number}"
        try:
            if line.strip():
                yield where, read_json_object(line)
        except ValueError as error:  # errors of JSON and UTF-8 too
            raise wrong(where, f"it is no JSON object ({error}), expected one") from error


def _metric_of(items: Sequence[Fields]) -> str:
    """Find the metric that the fields ask for."""
    for metric in metrics().values():
        if metric.needs != "answer" and metric.needs in items[0]:
            return metric.name
    is_number = all(BUILT_IN["number"].check(item) is None for item in items)
    return "number" if is_number else "contains"


def _check_item(task: Task, item: Fields) -> None:
    """Raise WrongField or PromptError where an item cannot be asked or scored."""
    asked = next((key for key in ASKED if key in item), "question")
    fault = task.by.check(item)
    if asked != "messages" and not is_text(item.get(asked)):
        fault = asked, "a text that is not blank, or the field prompt or messages"
    if fault:
        field, expected = fault
        value = shown(item[field]) if field in item else "missing"
        raise WrongField(field, value, expected)
    try:
        task.question(item)
    except KeyError as error:
        expected = f"only names of the fields {shortened(', '.join(item))}"
        raise WrongField("template", f"a text with {{{error.args[0]:.80}}}", expected) from error


def _filled(template: str, fields: Fields) -> str:
    """Replace names of fields in braces; {{ and }} are braces, {choices} lines with letters.

    Raises KeyError with a name that is none.
    """

    def text(match: re.Match[str]) -> str:
        brace = match[1] or match[2]
        if brace:
            return brace
        value = fields[match[3]]
        if not isinstance(value, list):
            return str(value)
        return "\n".join(map("{}. {}".format, string.ascii_uppercase, value))

    return re.sub(r"(\{)\{|(\})\}|\{([^{}]*)\}", text, template)
