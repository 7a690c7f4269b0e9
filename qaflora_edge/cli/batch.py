"""`qaflora run --prompts`: the requests of a file, answered in parallel."""

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

import click
from click.core import ParameterSource

from qaflora_edge.answering.generation import Generation
from qaflora_edge.ask import Ask, Chat, Question, Sampling, Weighing
from qaflora_edge.cli import prompts
from qaflora_edge.cli.options import SharedOptions, check_outputs, open_engine
from qaflora_edge.cli.output import answer_dict, incomplete, print_json, progress_bars, say
from qaflora_edge.cli.places import bundle_folder
from qaflora_edge.cli.settings import OWN
from qaflora_edge.config import SHARED, Option, in_group
from qaflora_edge.errors import OptionError, QafloraError, wrong_option
from qaflora_edge.evaluation.tasks import LineFile
from qaflora_edge.files import one_line
from qaflora_edge.formats.bundle import BUNDLE_FILE, is_base, read_bundle_text
from qaflora_edge.formats.inputs import Json, Object, checksum
from qaflora_edge.progress import TellCount, silent
from qaflora_edge.prompt.messages import begin_with
from qaflora_edge.show import crop

if TYPE_CHECKING:
    from qaflora_edge.engine import Engine

PARALLEL = 8  # requests that are decoded together, unless --parallel says
# The options of a line, by their names in Python, as flags, and in OpenAI's calls.
_OPTIONS: dict[str, Option] = {}
for _option in (
    *in_group("sampling").values(),
    SHARED["strategy"],
    SHARED["raw_prompt"],
    OWN["run"]["system"],
):
    for _name in filter(None, (_option.name, _option.key, *_option.aliases)):
        _OPTIONS[_name] = _option
_KEYS = _OPTIONS.keys() | {"prompt", "messages", "id", "json_schema"}
# Options that change only the last digits of an answer.
_NO_MATTER = ("n_parallel", "threads", "gpu_layers", "rpc", "tensor_split")
_BEGIN = b'{"index": '  # of every line that is written


@dataclass(frozen=True)
class Defaults:
    """Say what holds for a line that does not say."""

    ask: Ask
    system: str | None = None
    raw_prompt: bool = False


def to_ask(line: Object, defaults: Defaults) -> Ask:
    """Read what a line asks; keys that are no options are left out.

    A line with messages or a system prompt is a chat. Raises OptionError for a wrong value.
    """
    options = _options(line)
    system = options.pop("system", None)
    is_raw = options.pop("raw_prompt", defaults.raw_prompt) and system is None
    ask = defaults.ask
    if (strategy := options.pop("strategy", None)) is not None:
        ask = replace(ask, weighing=replace(ask.weighing, by=strategy))
    schema = line.get("json_schema")
    if schema is not None:  # the defaults of the command are meant for prose
        options.setdefault("stop", ())
        options.setdefault("grammar", None)
    sampling = ask.sampling.updated(options)
    question = _question(line, defaults.system if system is None else system, is_raw)
    return replace(ask, prompt=question, sampling=sampling, json_schema=schema)


def _question(line: Object, system: str | None, is_raw: bool) -> Question:
    prompt = line.get("prompt")
    messages = line.get("messages")
    if (prompt is None) == (messages is None):
        raise OptionError(
            f"A request has {'neither' if prompt is None else 'both'}, expected either prompt or "
            "messages."
        )
    if prompt is not None and is_raw:
        text: str = prompt
        return text
    said = [{"role": "user", "content": prompt}] if messages is None else messages
    return Chat(begin_with(system, said))


def _options(line: Object) -> Json:
    """Collect the options that a request has, by their names; null stands for the default."""
    options = {}
    for key, value in line.items():
        option = _OPTIONS.get(key)
        if option is None or value is None:
            continue
        if option.name == "stop" and isinstance(value, str):
            value = [value]
        if not option.fits(value):
            raise wrong_option(key, value, f"{option.expected}; correct the line")
        if option.name in options:
            raise OptionError(f"Option {option.name} is given twice, as {key} too; expected once.")
        options[option.name] = value
    return options


@dataclass
class _Job:
    """The requests of one file, and their answers: one JSON object a line, written whole.

    Each answer says in `request` what it answers: options, and a line. So a file that was
    interrupted is gone on with, and no other file is taken for one.

    path      of the requests
    file      gets the answers; None: stdout
    key       equal where the options are
    defaults  of lines that do not say
    is_full   whether answers have the weights of every layer
    digests   of the lines that the file answered before, by their index
    unknown   keys, in the order they came
    """

    path: str
    file: LineFile | None
    key: str
    defaults: Defaults
    is_full: bool
    digests: dict[int, str] = field(default_factory=dict)
    unknown: dict[str, None] = field(default_factory=dict)
    n_line: int = 0
    n_done: int = 0
    n_token: int = 0
    n_failed: int = 0
    first_failure: str = ""

    def read(self, file: LineFile) -> None:
        """Note what the file of answers has. Raises OutputFileError when it has anything else."""
        for number, record in enumerate(file.read(), 1):
            try:
                index = int(record["index"])
                key, digest = record["request"].split("-")
                failure = record.get("error", {}).get("message", "")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise file.refused(
                    f"line {number} is no answer of this command, and a file was expected that it "
                    "began",
                    "Leave the file",
                ) from None
            if key != self.key:
                raise file.refused(
                    f"line {number} was answered by another bundle or under other options than "
                    "these",
                    "Give those that it was begun with",
                )
            self.digests[index] = digest
            self._note(index, failure)

    def _note(self, index: int, error: str) -> None:
        self.n_failed += bool(error)
        if error and not self.first_failure:
            self.first_failure = f"line {index + 1}: {error}"

    def lines(self, stream: BinaryIO) -> Iterator[prompts.Line]:
        """Read the lines that are to be answered.

        Raises OutputFileError where the file answers another text than a line.
        """
        for line in prompts.filled_lines(stream, prompts.stream_name(self.path)):
            self.n_line += 1
            digest = self.digests.get(line.index)
            if digest is None:
                yield line
            elif self.file is not None and digest != line.digest:
                fault = f"it answers another text than {line.where}"
                raise self.file.refused(fault, "Give the same lines")

    def answer(self, engine: "Engine", lines: Iterable[prompts.Line], tell: TellCount) -> None:
        running: list[tuple[prompts.Line, Json]] = []

        def asks() -> Iterator[Ask]:
            for line in lines:
                mark = {}
                try:
                    fields = line.parse()
                    if "id" in fields:
                        mark["id"] = fields["id"]
                    self.unknown |= dict.fromkeys(key for key in fields if key not in _KEYS)
                    ask = to_ask(fields, self.defaults)
                except QafloraError as error:
                    self._write(line, mark | _failure(error), tell)
                    continue
                running.append((line, mark))
                yield ask

        for number, answer in engine.submit_many(asks()):
            line, mark = running[number]
            self.n_token += answer.n_completion
            self._write(line, mark | self._result(answer), tell)

    def _write(self, line: prompts.Line, answer: Json, tell: TellCount) -> None:
        record: Json = {"index": line.index}
        record |= answer
        record["request"] = f"{self.key}-{line.digest}"
        self._note(line.index, answer.get("error", {}).get("message", ""))
        if self.file is None:
            print_json(record)
        else:
            self.file.add(record)
        self.n_done += 1
        tell(self.n_done, max(self.n_done, self.n_line - len(self.digests)))

    def _result(self, answer: Generation) -> Json:
        if answer.error is not None:
            return _failure(answer.error)
        result = answer_dict(answer, with_fusion=self.is_full)
        if not self.is_full:
            means = {name: round(mean, 4) for name, mean in answer.fusion.means.items()}
            result["fusion"] = {"strategy": answer.fusion.strategy, "weights": means}
        return result if answer.is_whole else result | _failure(incomplete(answer))

    def tell_sum(self, seconds: float) -> None:
        """Say what was done, and which keys are none."""
        if self.unknown:
            names = crop(", ".join(map(repr, self.unknown)), 400)
            say(f"Not options of a request, and ignored: {names}")
        rate = self.n_token / seconds if seconds > 0 else 0.0
        phrases = [f"{self.n_done} lines done, {self.n_token} tokens at {rate:.1f} tok/s"]
        if n_before := len(self.digests):
            phrases.append(f"{n_before} were done before")
        if self.n_failed:
            phrases.append(f"{self.n_failed} failed, the first: {self.first_failure}")
        say(f"[{one_line('; '.join(phrases))}]")


def answer_file(
    bundle: str,
    path: str,
    out: Path | None,
    options: SharedOptions,
    sampling: Sampling,
    system: str | None,
    as_json: bool,
    no_draft: bool,
) -> NoReturn:
    """Answer the requests of a file (`-` is stdin), and leave; with 1 where some failed.

    out  the file that gets the answers and is gone on with; None: stdout
    """
    check_outputs([out], [Path(path)], added_to=out)
    ctx = click.get_current_context()
    if ctx.get_parameter_source("parallel") is ParameterSource.DEFAULT:
        options.parallel = PARALLEL
    file = None if out is None else LineFile(out, "answers", _BEGIN)
    key = _key(bundle, options, sampling, system, as_json, no_draft)
    weighing = Weighing(options.strategy, drafts=False if no_draft else None)
    ask = Ask((), weighing, sampling)
    defaults = Defaults(ask, system, options.raw_prompt)
    job = _Job(path, file, key, defaults, as_json)
    start_s = time.perf_counter()
    kept_open = nullcontext() if file is None else file.opened()
    with prompts.open_prompts(path) as stream, kept_open:
        if file is not None:
            job.read(file)
        lines: Iterable[prompts.Line] = job.lines(stream)
        if stream.seekable():  # a pipe is read as slots are free
            lines = list(lines)
            options.parallel = min(options.parallel, max(1, len(lines)))
        try:
            if lines:
                with open_engine(bundle, options) as engine:
                    start_s = time.perf_counter()
                    is_mixed = out is None and sys.stdout.isatty()  # with the answers
                    with nullcontext(silent) if is_mixed else progress_bars() as tell:
                        job.answer(engine, lines, partial(tell, "Answering"))
            if not job.n_line:
                raise prompts.no_lines(path, 'JSON object such as {"prompt": "..."}')
        finally:  # also of Ctrl-C and SIGTERM
            if job.n_line:
                job.tell_sum(time.perf_counter() - start_s)
    ctx.exit(1 if job.n_failed else 0)


def _key(
    bundle: str, options: SharedOptions, sampling: Sampling, system: str | None, *flags: bool
) -> str:
    """Equal where the bundle and all options are that decide an answer."""
    path = bundle_folder(bundle)
    if not is_base(path):
        read_bundle_text(path)  # says what is wrong with it
        path /= BUNDLE_FILE
    engine = {name: value for name, value in options.engine.items() if name not in _NO_MATTER}
    chosen = {name: getattr(sampling, name) for name in options.keywords("sampling")}
    chosen["grammar"] = sampling.grammar
    facts = [checksum(path), engine, options.raw_prompt, chosen, system, *flags]
    facts_json = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(facts_json.encode()).hexdigest()[:12]


def _failure(error: QafloraError) -> Json:
    return {"error": {"type": type(error).__name__, "message": str(error)}}
