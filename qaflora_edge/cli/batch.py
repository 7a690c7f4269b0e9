"""`qaflora run --prompts`: the requests of a file, answered in parallel."""

import codecs
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import click
from click.core import ParameterSource

from qaflora_edge.chat.messages import begin_with
from qaflora_edge.cli.answers import answer_dict, print_json
from qaflora_edge.cli.options import (
    SharedOptions,
    bundle_folder,
    check_outputs,
    open_engine,
)
from qaflora_edge.cli.progress import progress_bars
from qaflora_edge.cli.prompts import Line, open_prompts, read_lines
from qaflora_edge.config import OWN, SHARED, Option, in_group
from qaflora_edge.errors import (
    IncompleteAnswerError,
    InputFileError,
    OptionError,
    OutputFileError,
    QafloraError,
)
from qaflora_edge.files import one_line
from qaflora_edge.formats.bundle import BUNDLE_FILE, is_base, read_bundle_text
from qaflora_edge.formats.checksums import checksum
from qaflora_edge.formats.inputs import open_input
from qaflora_edge.formats.json_text import LineFile, shown
from qaflora_edge.inference.generation import Generation
from qaflora_edge.progress import Tell, silent

_KEYS = ("prompt", "messages", "id", "json_schema")
_UNKNOWN_MAX = 20  # keys that a remark names


def _by_spelling() -> dict[str, Option]:
    """The options of a line, by their names in Python, as flags, and in OpenAI's calls."""
    options = (
        *in_group("sampling").values(),
        SHARED["strategy"],
        SHARED["raw_prompt"],
        OWN["run"]["system"],
    )
    spellings = ((option, (option.name, option.key, *option.aliases)) for option in options)
    return {name: option for option, names in spellings for name in names if name}


_OPTIONS = _by_spelling()


def read_requests(stream: BinaryIO, name: str) -> Iterator[Line]:
    """Read lines one at a time; blank ones are counted, and left out.

    name  of the stream, for messages
    """
    for index, data in enumerate(read_lines(stream, name)):
        if index == 0 and data is not None:
            data = data.removeprefix(codecs.BOM_UTF8)
        if data is None or data.strip():
            yield Line(index, data, f"{name}, line {index + 1}")


def to_request(found: Mapping[str, Any], *, system: str | None, raw_prompt: bool) -> dict[str, Any]:
    """A request of Engine.generate_many; keys that are no options are left out.

    system, raw_prompt  of requests that do not say

    Raises OptionError for a wrong value, or what does not go together.
    """
    own = _own_options(found)
    own_system, is_raw = own.pop("system", None), own.pop("raw_prompt", raw_prompt)
    system = system if own_system is None else own_system
    if (strategy := own.pop("strategy", None)) is not None:
        own["weights"] = strategy
    if (schema := found.get("json_schema")) is not None:
        if not isinstance(schema, dict | bool):
            raise _wrong("json_schema", schema, "an object or true")
        own = {"stop": (), "grammar": None, **own, "json_schema": schema}
    prompt, messages = found.get("prompt"), found.get("messages")
    if (prompt is None) == (messages is None):
        raise OptionError(
            f"The request has {'neither' if prompt is None else 'both'} prompt and messages, "
            "expected one of them; correct the line."
        )
    if messages is None and not (isinstance(prompt, str) and prompt.strip()):
        raise _wrong("prompt", prompt, "a text that is not empty")
    if prompt is None and not (isinstance(messages, list) and messages):
        raise _wrong("messages", messages, "a list of messages")
    if not is_raw:
        asked = messages or [{"role": "user", "content": prompt}]
        return {**own, "messages": begin_with(system, asked)}
    if prompt is None or own_system is not None:
        raise OptionError(
            "The request has messages or system, which need the chat template, and raw_prompt, "
            "which leaves it out; expected one or the other."
        )
    return {**own, "prompt": prompt}


def _own_options(found: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a request has, by their names; null stands for the default."""
    own: dict[str, Any] = {}
    for key, value in found.items():
        option = _OPTIONS.get(key)
        if option is None or value is None:
            continue
        if option.name == "stop" and isinstance(value, str):
            value = [value]
        if not option.fits(value):
            raise _wrong(key, value, option.expected)
        if option.name in own:
            raise OptionError(f"Option {option.name} is given twice, as {key} too; expected once.")
        own[option.name] = value
    return own


def _wrong(name: str, value: Any, expected: str) -> OptionError:
    return OptionError(f"Option {name} is {shown(value)}, expected {expected}; correct the line.")


PARALLEL = 8  # requests that are decoded together, unless --parallel says
# Options that change only the last digits of an answer.
_NO_MATTER = ("n_parallel", "threads", "gpu_layers", "rpc", "tensor_split", "prefix_cache")
_BEGIN = b'{"index": '  # of every line that is written


class Answers:
    """One JSON object a line, written whole when an answer ends.

    Each says in `request` what it answers: options, and a line. So a file that was interrupted is
    gone on with, and no other file is taken for one.

    path  None: stdout
    key   equal where the options are
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._lines = None if path is None else LineFile(path, "answers")
        self._key = key
        self.digests: dict[int, str] = {}  # of the lines that the file answers, by their index
        self.n_failed = 0
        self.first_failure = ""

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Read what the file has, and keep others from writing into it.

        Raises OutputFileError when it cannot be written to, or has anything else in it.
        """
        if self._lines is None:
            yield
            return
        with self._lines.opened():
            self._read(self._lines)
            yield

    def has(self, line: Line) -> bool:
        """Tell whether the file answers a line. Raises OutputFileError if it answers another."""
        digest = self.digests.get(line.index)
        if digest not in (None, line.digest):
            assert self._lines is not None
            raise self._lines.refused(
                f"it answers another text than {line.where}", "Give the same lines"
            )
        return digest is not None

    def write(self, line: Line, answer: dict[str, Any]) -> None:
        """Add the answer to a line."""
        request = f"{self._key}-{line.digest}"
        record = {"index": line.index, **answer, "request": request}
        self._note(line.index, answer.get("error", {}).get("message", ""))
        if self._lines is None:
            print_json(record)
        else:
            self._lines.add(json.dumps(record, ensure_ascii=False))

    def _read(self, lines: LineFile) -> None:
        try:
            file = open_input(lines.path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise lines.refused(error.strerror or str(error), "Leave -o out for stdout") from error
        with file:
            for number, data in enumerate(read_lines(file, str(lines.path)), 1):
                if data is not None and not data.endswith(b"\n"):
                    if not data.startswith(_BEGIN[: len(data)]):
                        raise _not_ours(lines, number)
                    return
                self._take(lines, number, data)
                lines.n_byte += len(data or b"")

    def _take(self, lines: LineFile, number: int, data: bytes | None) -> None:
        """Note a line of the file."""
        try:
            record = json.loads(data or b"")
            index, (key, digest) = int(record["index"]), record["request"].split("-")
            error = record.get("error", {}).get("message", "")
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise _not_ours(lines, number) from None
        if key != self._key:
            raise lines.refused(
                f"line {number} was answered by another bundle or under other options than these",
                "Give those that it was begun with",
            )
        self.digests[index] = digest
        self._note(index, error)

    def _note(self, index: int, error: str) -> None:
        self.n_failed += bool(error)
        if error and not self.first_failure:
            self.first_failure = f"line {index + 1}: {error}"


def _not_ours(lines: LineFile, number: int) -> OutputFileError:
    return lines.refused(
        f"line {number} is no answer of this command, and a file was expected that it began",
        "Leave the file",
    )


@dataclass
class _Job:
    """The requests of one file, and what became of them."""

    shown: str
    answers: Answers
    options: SharedOptions
    sampling: dict[str, Any]
    system: str | None
    as_json: bool
    unknown: dict[str, None] = field(default_factory=dict)  # keys, in the order they came
    n_done: int = 0
    n_token: int = 0

    def count(self, stream: BinaryIO) -> int:
        """Count the lines that are to be answered. Raises as Answers.has does."""
        has_answer = [self.answers.has(line) for line in read_requests(stream, self.shown)]
        self._check_any(len(has_answer))
        return has_answer.count(False)

    def _check_any(self, n_line: int) -> None:
        if not n_line:
            raise InputFileError(
                f"Cannot use the prompts in {self.shown}: it has no line that is not blank, "
                'expected one JSON object a line. Write {"prompt": "..."} into it.'
            )

    def answer(self, engine: Any, stream: BinaryIO, total: int | None, tell: Tell) -> None:
        """Answer what is not answered; each answer is written when it ends."""
        running: dict[int, tuple[Line, dict[str, Any]]] = {}
        n_line = 0

        def write(line: Line, answer: dict[str, Any]) -> None:
            self.answers.write(line, answer)
            self.n_done += 1
            tell("Answering", self.n_done, total or self.n_done)

        def requests() -> Iterator[dict[str, Any]]:
            nonlocal n_line
            numbers = itertools.count()
            for line in read_requests(stream, self.shown):
                n_line += 1
                if self.answers.has(line):
                    continue
                mark: dict[str, Any] = {}
                try:
                    found = line.parse()
                    others = (key for key in found if key not in _KEYS and key not in _OPTIONS)
                    self.unknown |= dict.fromkeys(others)
                    mark = {"id": found["id"]} if "id" in found else {}
                    request = to_request(
                        found, system=self.system, raw_prompt=self.options.raw_prompt
                    )
                except QafloraError as error:
                    write(line, {**mark, **_failure(error)})
                    continue
                running[next(numbers)] = line, mark
                yield request

        common = {**self.sampling, "weights": self.options.strategy}
        for number, answer in engine.generate_many(requests(), **common):
            line, mark = running.pop(number)
            self.n_token += answer.n_completion
            write(line, {**mark, **self._result(answer)})
        self._check_any(n_line)

    def _result(self, answer: Generation) -> dict[str, Any]:
        if answer.error is not None:
            return _failure(answer.error)
        result = answer_dict(answer, with_fusion=self.as_json)
        if not self.as_json:
            means = {name: round(mean, 4) for name, mean in answer.fusion.means().items()}
            result["fusion"] = {"strategy": answer.fusion.strategy, "weights": means}
        if answer.is_whole:
            return result
        cut = IncompleteAnswerError(
            f"The answer is not whole: cut after {answer.n_completion} tokens, where its schema or "
            "grammar expects more. Raise max_tokens, and --ctx where the context is full."
        )
        return {**result, **_failure(cut)}

    def tell_sum(self, seconds: float) -> None:
        if self.unknown:
            more = " and others" if len(self.unknown) > _UNKNOWN_MAX else ""
            names = ", ".join(map(repr, itertools.islice(self.unknown, _UNKNOWN_MAX)))
            click.echo(f"Not options of a request, and ignored: {names}{more}", err=True)
        answers, rate = self.answers, self.n_token / seconds if seconds > 0 else 0.0
        parts = [f"{self.n_done} lines done, {self.n_token} tokens at {rate:.1f} tok/s"]
        if n_before := len(answers.digests):
            parts.append(f"{n_before} were done before")
        if answers.n_failed:
            parts.append(f"{answers.n_failed} failed, the first: {answers.first_failure}")
        click.echo(f"[{one_line('; '.join(parts))}]", err=True)


def answer_file(
    bundle: str,
    path: str,
    out: Path | None,
    options: SharedOptions,
    sampling: dict[str, Any],
    system: str | None,
    as_json: bool,
) -> NoReturn:
    """Answer the requests of a file (`-` is stdin), and leave; with 1 where some failed.

    out  the file that gets the answers and is gone on with; None: stdout
    """
    check_outputs([out], [Path(path)], added_to=out)
    ctx = click.get_current_context()
    if ctx.get_parameter_source("parallel") is ParameterSource.DEFAULT:
        options.parallel = PARALLEL
    answers = Answers(out, _key(bundle, options, sampling, system, as_json))
    job = _Job("stdin" if path == "-" else path, answers, options, sampling, system, as_json)
    with open_prompts(path) as stream, answers.opened():
        total = None
        if stream.seekable():
            start = stream.tell()
            total = job.count(stream)
            stream.seek(start)
            options.parallel = min(options.parallel, max(1, total))
        start_s = time.perf_counter()
        try:
            if total != 0:
                with open_engine(bundle, options) as engine:
                    start_s = time.perf_counter()
                    is_mixed = out is None and sys.stdout.isatty()  # with the answers
                    with nullcontext(silent) if is_mixed else progress_bars() as tell:
                        job.answer(engine, stream, total, tell)
        except (KeyboardInterrupt, SystemExit):  # SIGTERM
            job.tell_sum(time.perf_counter() - start_s)
            raise
        job.tell_sum(time.perf_counter() - start_s)
    ctx.exit(1 if answers.n_failed else 0)


def _key(
    bundle: str, options: SharedOptions, sampling: dict[str, Any], system: str | None, as_json: bool
) -> str:
    """Equal where the bundle and all options are that decide an answer."""
    place = bundle_folder(bundle)
    if not is_base(place):
        read_bundle_text(place)  # says what is wrong with it
        place /= BUNDLE_FILE
    engine = {name: value for name, value in options.engine.items() if name not in _NO_MATTER}
    facts = [
        *(checksum(place), engine, options.strategy, options.raw_prompt),
        *(sampling, system, as_json),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _failure(error: QafloraError) -> dict[str, Any]:
    return {"error": {"type": type(error).__name__, "message": str(error)}}
