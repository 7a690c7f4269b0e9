"""Files of example questions: a question a line, or JSON lines, of which some have an answer."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import click
from msgspec import Meta, Struct

from qaflora_edge.cli.output import progress_bars, say
from qaflora_edge.cli.prompts import Line, filled_lines, open_prompts, stream_name
from qaflora_edge.errors import InputFileError, PromptError
from qaflora_edge.files import AnyPath, one_line
from qaflora_edge.formats.bundle import Filled
from qaflora_edge.formats.inputs import Json, WrongField, read_as, reading
from qaflora_edge.prompt.messages import checked_messages

MAX_EXAMPLES = 32  # that are taken of a file: more teach nothing more
MAX_BYTES = 64 << 20
Example = tuple[str | list[Json], str | None]  # a question, and what a right answer contains


class ExampleLine(Struct, kw_only=True):
    """The fields that are read of a JSON line; answer is what a right one contains."""

    question: Annotated[Filled | None, Meta(title="a text that is not blank, or messages")] = None
    messages: Annotated[list[Json] | None, Meta(title="a list of messages")] = None
    answer: Annotated[
        Filled | int | float | None, Meta(title="a text or number that a right answer contains")
    ] = None


@dataclass(frozen=True)
class Lesson:
    """What one adapter is taught, and where it is from.

    about  what the adapter is for, or ""
    """

    name: str
    questions: Sequence[Any] = ()
    answers: Sequence[str | None] | None = None
    about: str = ""
    source: str = ""
    about_source: str = ""


def read_lesson(name: str, path: str) -> Lesson:
    """Read example questions; `-` is stdin. Of a long file an even spread is taken and checked.

    A file in which the first line begins with { has JSON lines. Raises InputFileError.
    """
    source = stream_name(path)
    with open_prompts(path) as stream, reading(source):
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InputFileError(
            f"Cannot read {source}: it has more than {MAX_BYTES >> 20} MiB, expected some "
            f"questions. {MAX_EXAMPLES} lines are taken at most: give a part of it."
        )
    lines = list(filled_lines(io.BytesIO(data), source))
    if not lines:
        raise InputFileError(
            f"Cannot use the examples in {source}: it has no line that is not blank, expected a "
            "question a line. Write one into it."
        )
    is_json = lines[0].data.lstrip().startswith(b"{")
    taken = [_json_example(line) if is_json else (line.text(), None) for line in spread(lines)]
    if len(taken) < len(lines):
        source += f", {len(taken)} of its {len(lines)} lines, evenly"
    questions = [question for question, _ in taken]
    answers = [answer for _, answer in taken]
    return Lesson(name, questions, answers, source=source)


def spread(lines: Sequence[Line]) -> list[Line]:
    """Take MAX_EXAMPLES lines at most, evenly, with the first and the last one."""
    if len(lines) <= MAX_EXAMPLES:
        return list(lines)
    step = (len(lines) - 1) / (MAX_EXAMPLES - 1)
    return [lines[round(step * index)] for index in range(MAX_EXAMPLES)]


def _json_example(line: Line) -> Example:
    try:
        example = read_as(ExampleLine, line.parse())
        answer = None if example.answer is None else str(example.answer)
        if example.messages is None:
            if example.question is None:
                raise WrongField("question", "missing", "a text, or the field messages")
            return example.question, answer
        messages = checked_messages(example.messages)
        while messages and messages[-1]["role"] != "user":
            messages.pop()  # a training file has the answer too
        if not messages:
            raise WrongField("messages", "without a question", "one with the role user")
    except (WrongField, PromptError) as error:
        reason = str(error).removesuffix(".")
        raise InputFileError(f"Cannot read {line.where}: {reason}. Correct the line.") from error
    return messages, answer


def named(option: str, values: Iterable[str], expected: str) -> dict[str, str]:
    """Read NAME=... of a repeatable option. Raises UsageError."""
    pairs: dict[str, str] = {}
    for value in values:
        name, _, rest = value.partition("=")
        if not rest or name in pairs:
            fault = f"{option} is {value[:80]!r}, expected NAME={expected}, once for a NAME."
            raise click.UsageError(fault)
        pairs[name] = rest
    return pairs


def lessons_of(
    names: Sequence[str], files: Mapping[str, str], texts: Mapping[str, str]
) -> list[Lesson]:
    """Collect what --examples and --about give of each adapter."""
    for name in (*files, *texts):
        if name not in names:
            raise click.UsageError(f"There is no --adapter {name}; expected {', '.join(names)}.")
    lessons = []
    for name in names:
        lesson = read_lesson(name, files[name]) if name in files else Lesson(name)
        lessons.append(replace(lesson, about=texts.get(name, ""), about_source="--about"))
    return lessons


def with_card(lesson: Lesson, path: AnyPath) -> Lesson:
    """Take what is not given from the model card of a PEFT folder."""
    from qaflora_edge.bundles.source import find_adapter
    from qaflora_edge.peft.folder import CARD_FILE, read_card

    folder = find_adapter(path).path
    if not folder.is_dir():
        return lesson
    card = read_card(folder)
    source = f"its {CARD_FILE}"
    if not lesson.questions:
        lesson = replace(lesson, questions=card.questions, source=source)
    if not lesson.about:
        lesson = replace(lesson, about=card.sentence, about_source=source)
    return lesson


def teach_all(folder: Path, lessons: Sequence[Lesson]) -> None:
    """Teach a new bundle, and say what is taken from where."""
    from qaflora_edge.engine import Engine

    lessons = [lesson for lesson in lessons if lesson.questions or lesson.about]
    if not lessons:
        return
    with progress_bars() as tell, Engine(folder) as engine:
        for done, lesson in enumerate(lessons):
            tell("Reading examples", done, len(lessons))
            if lesson.about:
                engine.describe(lesson.name, lesson.about)
                text = one_line(lesson.about)
                say(f"{lesson.name} is described by {lesson.about_source}: {text}")
            if lesson.questions:
                engine.teach(lesson.questions, lesson.name, answers=lesson.answers)
                n_question = len(lesson.questions)
                say(f"{lesson.name} has {counted(n_question)} from {lesson.source}.")
        tell("Reading examples", len(lessons), len(lessons))


def counted(n_example: int) -> str:
    return f"{n_example} example question{'' if n_example == 1 else 's'}"
