"""examples.jsonl: what was taught of a bundle's adapters, next to bundle.json.

    {"format": 1, "base": SHA-256, "n_embd": N}
    {"adapter": NAME, "question" or "messages": ..., "answer": ..., "state": base64}
    {"adapter": NAME, "kind": "about", "question": "NAME: sentence", "state": base64}
    {"kind": "generic", "of": number of a generic question, "state": base64}

A state is float16 [2, n_embd], and [n_embd] of a description: see weighing.added.Heard. Where the
bundle cannot be written to, the file is in the user's data folder.
"""

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
import numpy as np

from qaflora_edge.answering.reading import PromptReading
from qaflora_edge.arrays import F32
from qaflora_edge.ask import Chat, Question
from qaflora_edge.errors import (
    BundleError,
    ChatTemplateError,
    ContextError,
    OptionError,
    PromptError,
    os_errors,
)
from qaflora_edge.files import atomic_path, cache_lock, data_dir, make_folder, package_data
from qaflora_edge.formats.bundle import TAUGHT_FILE, link_roots, safe_join
from qaflora_edge.formats.inputs import Json, open_input
from qaflora_edge.prompt.messages import are_many, as_turn, is_conversation, whole
from qaflora_edge.weighing.plan import BASE
from qaflora_edge.weighing.strategy import Query
from qaflora_edge.weighing.weigher import not_loaded

if TYPE_CHECKING:
    from qaflora_edge.bundles.memory import AdapterSet
    from qaflora_edge.weighing.examples import Examples

T = TypeVar("T")
GENERIC_FILE = "data/generic_questions.json"
MAX_BYTES = 256 << 20  # of the file
MAX_LINES = 16_384
MAX_SHORT = 256  # tokens of a question that is read together with others
_ADVICE = "Teach again: remove the file, or take it from a backup."


class Header(msgspec.Struct, frozen=True):
    """Say which base read the questions.

    base    its SHA-256
    """

    format: Literal[1]
    base: str
    n_embd: int


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """Hold an example, a description or a generic question, as the file has it.

    adapter  whose example it is, BASE included; "" for a generic question
    kind     "" for an example
    of       number of the generic question, which occurs in several dresses
    """

    state: str
    adapter: str = ""
    question: str | None = None
    messages: list[dict[str, Any]] | None = None
    answer: str | None = None
    kind: Literal["", "about", "generic"] = ""
    of: int = 0

    def states(self, n_embd: int) -> F32:
        """Decode its states: [2, n_embd], as weighing.examples.Example has them."""
        states = np.zeros((2, n_embd), np.float32)
        values = np.frombuffer(base64.b64decode(self.state, validate=True), "<f2")
        n_state = 1 if self.kind == "about" else 2
        if values.size != n_state * n_embd or not np.isfinite(values).all():
            raise ValueError(f"state has {values.size} numbers, expected {n_state * n_embd}")
        states[-n_state:] = values.reshape(n_state, n_embd)
        return states

    @property
    def text(self) -> Any:
        """Its question or messages; None where they were left out."""
        return self.messages if self.question is None else self.question


@dataclass(frozen=True)
class Change:
    """Hold what one call taught, to undo it."""

    adapter: str
    new: tuple[Line, ...]
    replaced: tuple[Line, ...]


class Taught:
    """Keep what was taught of one bundle: the file is read again when it has changed.

    bundle  its folder, or the base's file
    base    gives the base's SHA-256
    """

    def __init__(self, bundle: Path, base: Callable[[], str], n_embd: int) -> None:
        self._bundle = bundle
        self._base = base
        self._n_embd = n_embd
        self._lock = RLock()
        self._state: object = None  # of the file that was read last
        self._examples: Examples | None = None
        self._undo: list[Change] = []

    def examples(self) -> "Examples | None":
        """Give the examples by now; None where there are none. Raises BundleError."""
        path = read_path(self._bundle)
        with self._lock:
            state = _file_state(path)
            if state != self._state:
                self._examples = (
                    None if state is None else self._fitted(read_lines(path, self._header()))
                )
                self._state = state
            return self._examples

    def _fitted(self, lines: Sequence[Line]) -> "Examples | None":
        from qaflora_edge.weighing.examples import Example, fit

        generic: dict[int, list[F32]] = {}
        examples = []
        for line in lines:
            states = line.states(self._n_embd)
            if line.kind == "generic":
                generic.setdefault(line.of, []).append(states)
            else:
                examples.append(Example(line.adapter, states, line.kind == "about"))
        if not examples:
            return None
        return fit(examples, [np.array(states) for states in generic.values()])

    def _header(self) -> Header:
        return Header(1, self._base(), self._n_embd)

    def counts(self) -> dict[str, int]:
        """Count example questions by adapter."""
        examples = self.examples()
        counted = {} if examples is None else examples.n_example
        return {name: n_example for name, n_example in counted.items() if n_example}

    def teach(
        self,
        current: "AdapterSet",
        prompts: Any,
        adapter: str,
        answers: Sequence[str | None] | None,
        keep_text: bool,
    ) -> int:
        """Teach questions of an adapter, as Engine.teach does."""
        _check_name(current, adapter)
        prompts = whole(prompts)
        if not are_many(prompts):
            prompts = [] if prompts == [] else [prompts]
        answers = [None] * len(prompts) if answers is None else list(answers)
        if len(answers) != len(prompts):
            raise OptionError(
                f"teach got {len(answers)} answers to {len(prompts)} questions, expected one each, "
                "or None.",
                "answers",
            )
        for prompt in prompts:
            is_text = isinstance(prompt, str) and prompt.strip()
            if not is_text and not is_conversation(prompt):
                raise PromptError(
                    f"teach got the question {prompt!r:.100}, expected a text or messages."
                )
        queries = [_query(current, as_turn(prompt)) for prompt in prompts]
        lines = []
        for states in _read(current, queries, not keep_text):
            lines.append(Line(_encoded(states), adapter))
        if keep_text:
            for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
                is_chat = is_conversation(prompt)
                text = {"messages": list(prompt)} if is_chat else {"question": prompt}
                lines[index] = msgspec.structs.replace(lines[index], **text, answer=answer)
        if lines:
            self._undo.append(self._put(current, adapter, lines))
        return self.counts().get(adapter, 0)

    def describe(self, current: "AdapterSet", adapter: str, text: str) -> None:
        """Keep a description of an adapter, in place of the one before."""
        _check_name(current, adapter)
        described = f"{adapter}: {text}"
        (states,) = _read(current, [_query(current, as_turn(described))])
        self._put(current, adapter, [Line(_encoded(states[1]), adapter, described, kind="about")])

    def _put(self, current: "AdapterSet", adapter: str, lines: Sequence[Line]) -> Change:
        """Add lines; those of the same questions go, whoever's they were."""
        before = read_lines(read_path(self._bundle), self._header())
        has_generic = any(line.kind == "generic" for line in before)
        generic = [] if has_generic else _generic_lines(current)
        with changing(self._bundle, self._header()) as kept:
            if not any(line.kind == "generic" for line in kept):
                kept[:0] = generic
            new: list[Line] = []
            for line in lines:
                new = [*_others(new, line), line]
            replaced = []
            for line in new:
                left = _others(kept, line)
                remaining = {id(other) for other in left}
                replaced += [other for other in kept if id(other) not in remaining]
                kept[:] = left
            kept += new
        return Change(adapter, tuple(new), tuple(replaced))

    def forget(self, adapter: str) -> int:
        """Forget an adapter's examples and description; count them."""
        return forget(self._bundle, adapter)

    def undo(self) -> str | None:
        """Take back the last call of teach; name its adapter, or None."""
        if not self._undo:
            return None
        change = self._undo.pop()
        with changing(self._bundle, self._header()) as kept:
            kept[:] = [line for line in kept if line not in change.new]
            kept += change.replaced
        return change.adapter


def counts_of(bundle: Path) -> dict[str, int]:
    """Count example questions by adapter, and of BASE, without its base. Raises BundleError."""
    lines = read_lines(read_path(bundle))
    return dict(Counter(line.adapter for line in lines if not line.kind))


def forget(bundle: Path, adapter: str) -> int:
    """Forget the examples and the description of an adapter; count them."""
    if not read_path(bundle).exists():
        return 0
    with changing(bundle) as lines:
        n_before = len(lines)
        lines[:] = [line for line in lines if line.adapter != adapter]
        return n_before - len(lines)


@contextmanager
def changing(bundle: Path, header: Header | None = None) -> Iterator[list[Line]]:
    """Hold the file for one change: give its lines, which are written when the block succeeds.

    header  of the base that is open; None: as the file has it
    """
    with cache_lock(f"taught {os.path.realpath(bundle)}"):
        path = read_path(bundle)
        header = header or read_header(path)
        before = read_lines(path, header)
        lines = list(before)
        yield lines
        if lines == before:
            return
        if len(lines) > MAX_LINES:
            raise OptionError(
                f"{path} would have {len(lines)} lines, expected at most {MAX_LINES}. Teach fewer "
                "questions: a spread of 32 an adapter says as much."
            )
        target = write_path(bundle)
        make_folder(target.parent, "the environment variable XDG_DATA_HOME")
        encode = msgspec.json.encode
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"".join(encode(line) + b"\n" for line in (header, *lines)))


def read_header(path: Path) -> Header:
    """Read the first line. Raises BundleError."""
    data = _read_bytes(path)
    return _parsed(path, 1, data.partition(b"\n")[0], Header)


def read_lines(path: Path, expected: Header | None = None) -> list[Line]:
    """Read a file; one that does not exist has no lines.

    expected  the header that it has to have

    Raises BundleError naming the line.
    """
    if not os.path.lexists(path):
        return []
    first, *rest = _read_bytes(path).split(b"\n")
    header = _parsed(path, 1, first, Header)
    if expected is not None and header != expected:
        raise BundleError(
            f"Cannot use the examples in {path}: the base {header.base:.12} read them "
            f"({header.n_embd} wide), expected this one, {expected.base:.12} ({expected.n_embd} "
            "wide); states of one base tell nothing of another. Remove the file and teach again."
        )
    if len(rest) > MAX_LINES + 1:
        raise BundleError(
            f"Cannot use {path}: it has {len(rest)} lines, expected at most {MAX_LINES}. {_ADVICE}"
        )
    lines = []
    for number, data in enumerate(rest, 2):
        if data:
            line = _parsed(path, number, data, Line)
            try:
                line.states(header.n_embd)
            except ValueError as error:
                raise _damaged(path, number, error) from error
            lines.append(line)
    return lines


def _read_bytes(path: Path) -> bytes:
    advice = "Check that you may read it."
    with os_errors(BundleError, f"Cannot read {path}", advice), open_input(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise BundleError(
            f"Cannot use {path}: it has more than {MAX_BYTES} bytes, expected fewer. {_ADVICE}"
        )
    return data


def _parsed(path: Path, number: int, data: bytes, line_type: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=line_type)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(path, number, error) from error


def _damaged(path: Path, number: int, error: Exception) -> BundleError:
    return BundleError(
        f"Cannot use {path}: line {number} is damaged ({error}), expected what `qaflora bundle "
        f"teach` writes. {_ADVICE}"
    )


def read_path(bundle: Path) -> Path:
    """Give where examples are read: the user's own come before a bundle's that is read only."""
    written = write_path(bundle)
    if written.exists() or not bundle.is_dir():
        return written
    return safe_join(bundle, TAUGHT_FILE)


def write_path(bundle: Path) -> Path:
    """Give where examples are written."""
    if bundle.is_dir() and os.access(bundle, os.W_OK) and not link_roots(bundle):
        return safe_join(bundle, TAUGHT_FILE)
    key = hashlib.sha256(os.fsencode(os.path.realpath(bundle))).hexdigest()
    return data_dir() / "taught" / f"{key[:16]}.jsonl"


def _file_state(path: Path) -> object:
    with suppress(OSError):
        status = os.stat(path)
        return path, status.st_mtime_ns, status.st_ino, status.st_size
    return None


def _check_name(current: "AdapterSet", name: str) -> None:
    if name not in (BASE, *current.core.adapters):
        raise not_loaded(name, (BASE, *current.core.adapters))


def _others(lines: Sequence[Line], line: Line) -> list[Line]:
    """Give the lines that are of other questions than one."""
    if line.kind == "about":
        return [o for o in lines if (o.kind, o.adapter) != ("about", line.adapter)]
    return [other for other in lines if other.kind or not _is_same(other, line)]


def _is_same(one: Line, other: Line) -> bool:
    """Tell whether two examples are of one question; its state is the same bits each time."""
    if one.text is None or other.text is None:
        return one.state == other.state
    return bool(one.text == other.text)


def _encoded(states: F32) -> str:
    return base64.b64encode(states.astype("<f2").tobytes()).decode()


def _read(current: "AdapterSet", queries: Sequence[Query], is_alone: bool = False) -> list[F32]:
    """Let the base read questions: states [2, n_embd] of each, as weighing.added.Heard has them.

    is_alone  one by one, so that a question has the same bits each time
    """
    core = current.core
    states: dict[int, F32] = {}
    short = {}
    for index, query in enumerate(queries):
        if len(query.tokens) <= MAX_SHORT and not is_alone:
            short[index] = query
            continue
        with PromptReading(core, query, core.cancellation()) as reading:
            states[index] = reading.base_states()
    if short:
        together = core.run(core.added.states([*short.values()]), contexts="branch")
        states |= zip(short, together, strict=True)
    return [states[index] for index in range(len(queries))]


def _query(current: "AdapterSet", question: Question) -> Query:
    """Ask the base alone."""
    query = current.weigher.query(current.reader.read(question))
    return replace(query, adapters=())


def _generic_lines(current: "AdapterSet") -> list[Line]:
    """Let the base read each generic question in each dress that its chat template takes."""
    by_dress: list[list[tuple[int, Query]]] = []  # of one dress prompts begin alike
    for of, dressed in enumerate(generic_questions()):
        by_dress += [[] for _ in dressed[len(by_dress) :]]
        for asked, messages in zip(by_dress, dressed, strict=True):
            plain = "\n".join(message["content"] for message in messages)
            with suppress(ChatTemplateError, ContextError):
                asked.append((of, _query(current, Chat(messages, untemplated=plain))))
    lines = []
    for asked in filter(None, by_dress):
        heard = _read(current, [query for _, query in asked])
        for (of, _), states in zip(asked, heard, strict=True):
            lines.append(Line(_encoded(states), kind="generic", of=of))
    return lines


def generic_questions() -> list[list[list[Json]]]:
    """Give questions that belong to nobody, each in its dresses: conversations."""
    questions = []
    for language in json.loads(package_data(GENERIC_FILE).read_text(encoding="utf-8")):
        greeting, reply = language["earlier"]
        system = {"role": "system", "content": language["system"]}
        earlier = [
            {"role": "user", "content": greeting},
            {"role": "assistant", "content": reply},
        ]
        for question in language["questions"]:
            turn = {"role": "user", "content": question}
            dressed = [[turn], [system, turn], [*earlier, turn]]
            for dress in language["dresses"]:
                dressed.append([{"role": "user", "content": dress.format(question)}])
            questions.append(dressed)
    return questions
