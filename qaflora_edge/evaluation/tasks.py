"""A task: questions, how they are asked, and what is a right answer.

    {"task": {"name": "sums", "metric": "number", "template": "{question}\\nAnswer:"}}
    {"question": "What is 2 + 3?", "answer": 5}

One JSON object a line; the first line may be left out, and then the fields of the items decide.
Files may come from anywhere: every line is checked before anything is asked.
"""

import codecs
import hashlib
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qaflora_edge.chat.messages import begin_with
from qaflora_edge.errors import TaskFileError, os_errors
from qaflora_edge.evaluation.last_number import as_number
from qaflora_edge.evaluation.task_checks import (
    ADVICE,
    CHECKS,
    check_asked,
    check_template,
    filled,
    listed,
    wrong,
)
from qaflora_edge.files import read_input
from qaflora_edge.formats.json_text import (
    WrongField,
    check_schema,
    read_unicode_object,
    shortened,
    shown,
)

MAX_TASK_BYTES = 64 << 20
MAX_ITEMS = 100_000
ASKED = ("question", "prompt", "messages")
# What an item must have for each metric.
NEEDS = {
    "number": "answer",
    "exact": "answer",
    "contains": "answer",
    "choice": "choices",
    "code": "test",
    "loss": "continuation",
}


@dataclass(frozen=True)
class Item:
    """One question.

    fields  as its line has them
    where   its file and line, for messages
    """

    index: int
    fields: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Task:
    """Items, and how they are asked and scored.

    metric       one of NEEDS
    sha256       of the file
    template     text with the names of an item's fields in braces; None: the question as it is
    choice_template  what is scored of a choice: text with {choice}, {letter}
    score_by     of a choice: "mean" of its tokens' log-probabilities, or "sum"
    raw_prompt   no chat template, whatever the options say
    max_tokens, stop  None: the options say
    """

    name: str
    metric: str
    sha256: str
    items: tuple[Item, ...]
    system: str | None = None
    template: str | None = None
    choice_template: str = "{choice}"
    score_by: str = "mean"
    raw_prompt: bool = False
    max_tokens: int | None = None
    stop: tuple[str, ...] | None = None
    language: str | None = None
    domain: str | None = None

    def question(self, item: Item) -> str:
        """What an item asks, as one text."""
        fields = item.fields
        if "messages" in fields:
            return str(fields["messages"][-1]["content"])
        if self.template is None:
            return str(fields.get("question", fields.get("prompt")))
        return filled(self.template, {**_texts(fields), "choices": _listed(fields)})

    def messages(self, item: Item) -> list[Any]:
        """What an item asks, as a conversation."""
        messages = item.fields.get("messages")
        messages = messages or [{"role": "user", "content": self.question(item)}]
        return list(begin_with(self.system, messages))

    def choices(self, item: Item) -> list[str]:
        """What is scored of each choice."""
        pairs = zip(string.ascii_uppercase, item.fields["choices"], strict=False)
        return [filled(self.choice_template, {"letter": a, "choice": b}) for a, b in pairs]

    def expected(self, item: Item) -> Any:
        """What is right: for a choice its text, for code the name of what is tested."""
        fields = item.fields
        if self.metric == "code":
            return fields.get("entry_point")
        if self.metric == "choice":
            return fields["choices"][fields["answer"]]
        return fields[NEEDS[self.metric]]


def read_task(path: str | Path) -> Task:
    """Read a task file.

    Raises TaskFileError naming the line and field, what was found and what was expected.
    """
    data = _read(path)
    header: dict[str, Any] = {}
    items: list[Item] = []
    for number, found in _objects(data, str(path)):
        where = f"{path}, line {number}"
        if "task" in found:
            if items or header:
                raise wrong(where, "it has a field task", "it in the first line only")
            header = _header(found, where)
            continue
        if len(items) == MAX_ITEMS:
            raise wrong(where, f"it is item {MAX_ITEMS + 1}", f"at most {MAX_ITEMS} items")
        items.append(Item(len(items), found, where))
    if not items:
        raise wrong(str(path), "it has no item", 'lines such as {"question": ..., "answer": ...}')
    metric = header.pop("metric", None) or _metric_of(items)
    name = header.pop("name", None) or _name_of(Path(path))
    stop = header.pop("stop", None)
    task = Task(
        name,
        metric,
        hashlib.sha256(data).hexdigest(),
        tuple(items),
        stop=None if stop is None else tuple(stop),
        **header,
    )
    known = ("letter", "choice")
    check_template(task.choice_template, known, f"{path}, line 1", "choice_template")
    for item in items:
        _check_item(task, item)
    return task


def _read(path: str | Path) -> bytes:
    advice = "Give a file of JSON lines, as docs/evaluate.md says."
    try:
        with os_errors(TaskFileError, f"Cannot read the task {path}", advice):
            return read_input(path, MAX_TASK_BYTES).removeprefix(codecs.BOM_UTF8)
    except ValueError as error:
        raise wrong(str(path), str(error), "no more") from error


def _objects(data: bytes, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines that are not blank, with their numbers."""
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield number, read_unicode_object(line)
        except ValueError as error:  # errors of JSON and UTF-8 too
            raise wrong(where, f"it is no JSON object ({error})", "one") from error


def _header(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    if len(found) > 1 or not isinstance(found["task"], dict):
        raise wrong(where, f"it is {shown(found)}", 'nothing but {"task": {...}}')
    header: dict[str, Any] = dict(found["task"])
    known = {*("name", "metric", "stop"), *Task.__dataclass_fields__} - {"items", "sha256"}
    for key in header:
        if key not in known:
            raise wrong(where, f"it has a field task.{shortened(key)}", ", ".join(sorted(known)))
    try:
        check_schema(header, "task")
    except WrongField as error:
        raise TaskFileError(f"Cannot use the task {where}: {error}. {ADVICE}") from error
    return header


def _metric_of(items: Sequence[Item]) -> str:
    """The metric that the fields ask for."""
    first = items[0].fields
    for metric in ("choice", "code", "loss"):
        if NEEDS[metric] in first:
            return metric
    answers = (listed(item.fields.get("answer")) for item in items)
    is_number = all(each and all(as_number(one) is not None for one in each) for each in answers)
    return "number" if is_number else "contains"


def _name_of(path: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "_", path.name.removesuffix(".jsonl"))[:64]
    return name if name[:1].isalnum() else f"task{name}"[:64]


def _check_item(task: Task, item: Item) -> None:
    """Raise TaskFileError where an item cannot be asked or scored."""
    fields, where = item.fields, item.where
    asked = [key for key in ASKED if key in fields]
    if ("messages" in asked and len(asked) > 1) or not asked:
        what = " and ".join(asked) or "none of question, prompt and messages"
        raise wrong(where, f"it has {what}", "question, prompt or messages")
    for key in asked:
        check_asked(key, fields[key], where, raw_prompt=task.raw_prompt)
    CHECKS[task.metric](fields, where)
    if task.metric == "choice" and len(texts := task.choices(item)) > len(set(texts)):
        twice = next(text for i, text in enumerate(texts) if text in texts[:i])
        raise wrong(where, f"two choices are asked as {shown(twice)}", "each to be another text")
    if task.template is not None and "messages" not in fields:
        known = [*_texts(fields), *(["choices"] if _listed(fields) else [])]
        check_template(task.template, known, where, "the template")
        if not task.question(item).strip():
            raise wrong(where, "the template gives no text", "some")


def _texts(fields: Mapping[str, Any]) -> dict[str, str]:
    """The fields that a template may name."""
    return {
        key: str(value)
        for key, value in fields.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool)
    }


def _listed(fields: Mapping[str, Any]) -> str:
    """The choices as lines with letters, or "" where there is no list of them."""
    choices = fields.get("choices")
    pairs = zip(string.ascii_uppercase, choices if isinstance(choices, list) else (), strict=False)
    return "\n".join(f"{letter}. {choice}" for letter, choice in pairs)
