"""Files of `qaflora eval`: tasks, and the results of their items.

    {"task": {"name": "sums", "metric": "number", "template": "{question}\\nAnswer:"}}
    {"question": "What is 2 + 3?", "answer": 5}

A task is one JSON object a line. Without the first line the fields of the items decide. Every line
is checked before anything is asked; `Header` lists what the first may say.

    {"eval": 1, "version": "...", "bundle": "...", "base": {...}, "adapters": [...], ...}
    {"task": "math_es", "item": 0, "strategy": "static", "score": 1.0, "answer": "...", ...}

The first line of a results file says what is asked. Others are added as items end, so that a run
that was killed can resume.
"""

import codecs
import hashlib
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct, structs

from qaflora_edge.ask import Chat
from qaflora_edge.errors import (
    OutputFileError,
    PromptError,
    TaskFileError,
    os_errors,
)
from qaflora_edge.evaluation.metrics import BUILT_IN, Fields, Metric, is_text, metrics
from qaflora_edge.files import cache_lock
from qaflora_edge.formats.bundle import Filled, Name
from qaflora_edge.formats.inputs import (
    Json,
    WrongField,
    open_input,
    read_as,
    read_json_object,
    shortened,
    shown,
)
from qaflora_edge.prompt.messages import begin_with, checked_messages

ASKED = ("messages", "question", "prompt")
ADVICE = "Correct the file; docs/evaluate.md says what it may have."


class Header(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the items of a task are asked and scored.

    name, metric     empty: by the file's name and the items
    template         text with names of an item's fields in braces; None: the question as it is
    raw_prompt       no chat template, whatever the options say
    max_tokens, stop  None: the options say
    language, domain  of the questions; adapters are named like them
    """

    name: Name = ""
    metric: str = ""
    system: Filled | None = None
    template: Filled | None = None
    raw_prompt: bool = False
    max_tokens: (
        Annotated[int, Meta(title="a whole number from 1 to 1000000", ge=1, le=1_000_000)] | None
    ) = None
    stop: (
        Annotated[
            list[
                Annotated[
                    str,
                    Meta(title="a text of 1 to 1000 characters", min_length=1, max_length=1000),
                ]
            ],
            Meta(title="a list of at most 100 texts that are not empty", max_length=100),
        ]
        | None
    ) = None
    language: Filled | None = None
    domain: Filled | None = None


class FirstLine(Struct, frozen=True, forbid_unknown_fields=True):
    """The first line of a task, where it has one."""

    task: Header


class Task(Header, frozen=True, kw_only=True):
    """Items, each with the fields that its line has, and how they are asked and scored."""

    sha256: str
    items: Sequence[Fields]

    @property
    def by(self) -> Metric:
        return metrics()[self.metric]

    def question(self, item: Fields) -> str:
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
    lines = list(_json_lines(data, where))
    header = Header()
    try:
        if lines and "task" in lines[0][1]:
            where, first = lines.pop(0)
            header = read_as(FirstLine, first).task
        items = [item for _, item in lines]
        if not items:
            expected = 'lines such as {"question": ..., "answer": ...}'
            raise _wrong(str(path), f"it has no item, expected {expected}")
        fields = structs.asdict(header)
        fields["name"] = header.name or Path(path).name.removesuffix(".jsonl")
        fields["metric"] = header.metric or _metric_of(items)
        task = Task(sha256=hashlib.sha256(data).hexdigest(), items=items, **fields)
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


def _json_lines(data: bytes, path: str) -> Iterator[tuple[str, Json]]:
    """Read the lines that are not blank, each with its place."""
    for number, line in enumerate(data.split(b"\n"), 1):
        where = f"{path}, line {number}"
        try:
            if line.strip():
                yield where, read_json_object(line)
        except ValueError as error:  # errors of JSON and UTF-8 too
            raise _wrong(where, f"it is no JSON object ({error}), expected one") from error


def _metric_of(items: Sequence[Fields]) -> str:
    for metric in metrics().values():
        if metric.needs != "answer" and metric.needs in items[0]:
            return metric.name
    is_number = all(BUILT_IN["number"].check(item) is None for item in items)
    return "number" if is_number else "contains"


def _check_item(task: Task, item: Fields) -> None:
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


# Has to be equal in a file that is resumed; strategies may be added.
IDENTITY = ("bundle", "base", "adapters", "n_layer", "measured", "tasks", "options")
BEGIN = b'{"eval": '  # of every file
Record = Mapping[str, Any]


@dataclass
class LineFile:
    """A file to which one process adds whole lines; a cut last line is removed first.

    holds   what the lines are, for errors
    begin   of the first line
    n_byte  of its whole lines, set by `read`
    """

    path: Path
    holds: str
    begin: bytes
    n_byte: int = 0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep others from writing into it. Raises OutputFileError when another process does."""
        from filelock import Timeout

        try:
            with cache_lock(str(self.path.resolve())).acquire(timeout=0):
                yield
        except Timeout:
            found = f"another process writes {self.holds} into it, and no other was expected"
            raise self.refused(found, "Wait for it to end") from None

    def read(self) -> list[Json]:
        """Read the objects of the whole lines. Raises OutputFileError for another kind of file."""
        if not self.path.exists():
            return []
        failure = f"Cannot read {self.path}"
        advice = "Choose another -o FILE."
        with os_errors(OutputFileError, failure, advice), open_input(self.path) as file:
            data = file.read()
        if not data.startswith(self.begin[: len(data)]):
            raise self.refused(f"it has no {self.holds}, and such were expected", "Leave it")
        self.n_byte = data.rfind(b"\n") + 1
        records = []
        for number, line in enumerate(data[: self.n_byte].splitlines(), 1):
            try:
                records.append(read_json_object(line))
            except ValueError as error:  # errors of JSON and UTF-8 too
                fault = f"line {number} is no JSON object ({error}), expected one"
                raise self.refused(fault, "Leave it") from error
        return records

    def add(self, record: Record) -> None:
        """Add an object as a line. Raises OutputFileError when it cannot be written."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        failure = f"Cannot write {self.holds} into {self.path}"
        advice = "See to it and run the same again, which resumes, or choose another -o FILE."
        mode: Any = "r+b" if self.n_byte else "wb"
        with os_errors(OutputFileError, failure, advice), open(self.path, mode) as file:
            file.truncate(self.n_byte)
            file.seek(self.n_byte)
            file.write(line)
        self.n_byte += len(line)

    def refused(self, found: str, advice: str) -> OutputFileError:
        return OutputFileError(
            f"Cannot write {self.holds} into {self.path}: {found}. {advice}, or choose another "
            "-o FILE."
        )


class Results:
    """Results by task, item and strategy, in the order that they came.

    header   what is asked, under which options: the first line of a file
    records  one for each item and strategy; `add` writes it into the file, if there is one
    """

    def __init__(
        self, header: Record, records: Iterable[Record] = (), file: LineFile | None = None
    ) -> None:
        self.header = header
        self.records = {_key(record): record for record in records}
        self._file = file

    @property
    def strategies(self) -> list[str]:
        """Every strategy: those of the first run, then those that were added."""
        names = list(self.header["strategies"])
        names += [record["strategy"] for record in self.records.values()]
        return list(dict.fromkeys(names))

    @property
    def failed(self) -> list[Record]:
        """Records of items that could not be asked."""
        return [record for record in self.records.values() if record["score"] is None]

    def add(self, record: Record) -> None:
        if self._file is not None:
            self._file.add(record)
        self.records[_key(record)] = record


@contextmanager
def kept_results(path: Path | None, header: Record) -> Iterator[Results]:
    """Give results that grow by whole lines; what the file has already is read first.

    path  None: nothing is written

    Raises OutputFileError, and leaves a file of another evaluation as it is.
    """
    if path is None:
        yield Results(header)
        return
    file = LineFile(path, "results", BEGIN)
    with file.opened():
        lines: list[Record] = [*file.read()]
        if not lines:  # it is new, or was killed while its first line was written
            lines = [header]
            file.add(header)
        begun = lines[0]
        for key in IDENTITY:
            if begun.get(key) != header[key]:
                fault = f"it was begun with another value of `{key}`, expected the same"
                raise file.refused(fault, "Give what it was begun with")
        yield Results(begun, lines[1:], file)


def _key(record: Record) -> tuple[str, int, str]:
    return record["task"], record["item"], record["strategy"]
