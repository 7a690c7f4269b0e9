"""`qaflora run --prompts`: the requests of a file, answered in parallel."""

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import click
from click.core import ParameterSource

from qaflora_edge.cli.answers import Answers, answer_dict
from qaflora_edge.cli.options import (
    SharedOptions,
    bundle_folder,
    check_outputs,
    open_engine,
)
from qaflora_edge.cli.progress import is_shown
from qaflora_edge.cli.prompts import UNKNOWN_MAX, open_prompts, unknown_note
from qaflora_edge.cli.requests import Line, read_requests, to_request, unknown_keys
from qaflora_edge.errors import IncompleteAnswerError, InputFileError, OutputFileError, QafloraError
from qaflora_edge.files import one_line
from qaflora_edge.formats.bundle import BUNDLE_FILE, is_base, read_bundle_text
from qaflora_edge.formats.checksums import checksum
from qaflora_edge.inference.generation import Generation
from qaflora_edge.show.text import mean_weights

PARALLEL = 8  # requests that are decoded together, unless --parallel says
# What changes nothing of an answer but its last digits.
_NO_MATTER = ("n_parallel", "threads", "gpu_layers", "rpc", "tensor_split", "prefix_cache")


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

    def survey(self, stream: BinaryIO) -> int:
        """Read all lines once before the work: how many are to be answered.

        Raises OutputFileError when the file of answers is not one of these lines.
        """
        left, n_line, n_left = self.answers.indexes, 0, 0
        for line in read_requests(stream, self.shown):
            n_line += 1
            if self.answers.has(line):
                left.discard(line.index)
                continue
            n_left += 1
            try:
                self._note_unknown(line.parse())
            except InputFileError:
                continue  # told when it is answered
        if left:
            raise OutputFileError(
                f"Cannot go on with these answers: they answer line {min(left) + 1} of "
                f"{self.shown}, which has no such line. Give the same lines, or choose another "
                "-o FILE."
            )
        self._check_any(n_line)
        return n_left

    def answer(self, engine: Any, stream: BinaryIO, tell: Callable[[float], None]) -> None:
        """Answer what is not answered; each answer is written when it ends."""
        running: dict[int, tuple[Line, dict[str, Any]]] = {}
        n_line, start = 0, time.perf_counter()

        def write(line: Line, answer: dict[str, Any]) -> None:
            self.answers.write(line, answer)
            self.n_done += 1
            tell(self.n_token / (time.perf_counter() - start))

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
                    self._note_unknown(found)
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
            means = {name: round(mean, 4) for name, mean in mean_weights(answer.fusion).items()}
            result["fusion"] = {"strategy": answer.fusion.strategy, "weights": means}
        if answer.is_whole:
            return result
        cut = IncompleteAnswerError(
            f"The answer is not whole: cut after {answer.n_completion} tokens, where its schema or "
            "grammar expects more. Raise max_tokens, and --ctx where the context is full."
        )
        return {**result, **_failure(cut)}

    def _note_unknown(self, found: dict[str, Any]) -> None:
        for key in unknown_keys(found):
            if len(self.unknown) <= UNKNOWN_MAX:
                self.unknown[key] = None

    def _check_any(self, n_line: int) -> None:
        if not n_line:
            raise InputFileError(
                f"Cannot use the prompts in {self.shown}: it has no line that is not blank, "
                'expected one JSON object a line. Write {"prompt": "..."} into it.'
            )

    def tell_unknown(self) -> None:
        """Say once which keys were left aside."""
        if note := unknown_note(self.unknown):
            click.echo(note, err=True)

    def tell_sum(self, seconds: float) -> None:
        answers, rate = self.answers, self.n_token / seconds if seconds > 0 else 0.0
        parts = [f"{self.n_done} lines done, {self.n_token} tokens at {rate:.1f} tok/s"]
        if n_before := len(answers.indexes):
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
            total = job.survey(stream)
            stream.seek(start)
            job.tell_unknown()
            options.parallel = min(options.parallel, max(1, total))
        start_s = time.perf_counter()
        try:
            if total != 0:
                with open_engine(bundle, options) as engine, _bar(total, out) as tell:
                    start_s = time.perf_counter()
                    job.answer(engine, stream, tell)
        except (KeyboardInterrupt, SystemExit):  # SIGTERM
            job.tell_sum(time.perf_counter() - start_s)
            raise
        if total is None:
            job.tell_unknown()
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


@contextmanager
def _bar(total: int | None, out: Path | None) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, unless the answers are shown there; its function is given tokens/s."""
    if not is_shown() or (out is None and sys.stdout.isatty()):
        yield lambda rate: None
        return
    counted: Any = {"length": total} if total is not None else {"iterable": itertools.count()}
    with click.progressbar(
        **counted,
        label="Answering",
        file=sys.stderr,
        show_pos=True,
        item_show_func=lambda rate: "" if rate is None else f"{rate:.0f} tok/s",
    ) as bar:
        yield lambda rate: bar.update(1, rate)
