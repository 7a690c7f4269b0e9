"""Modelfiles of Ollama as parts of a bundle.

A Modelfile is read as ollama 0.34 does (parser/parser.go): one command a line, in any case and
order; a text between quotation marks, one or three, may have several lines.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qaflora_edge.config import in_group
from qaflora_edge.errors import InputFileError, QafloraError
from qaflora_edge.files import AnyPath, what_is_at
from qaflora_edge.formats.inputs import read_input, reading
from qaflora_edge.formats.names import load_registry, parse_hub_ref
from qaflora_edge.settings import expanded

MAX_BYTES = 1 << 20
COMMANDS = ("FROM", "ADAPTER", "SYSTEM", "PARAMETER", "LICENSE", "MESSAGE")
ROLES = ("system", "user", "assistant")
_OF_BASE = ("TEMPLATE", "RENDERER", "PARSER")
# Commands and parameters that change memory or speed, or nothing in Ollama 0.34 either.
_IDLE = frozenset(
    """REQUIRES DRAFT num_ctx num_batch num_gpu main_gpu num_thread num_keep numa use_mmap
    draft_num_predict use_mlock low_vram f16_kv logits_all vocab_only penalize_newline mirostat
    mirostat_tau mirostat_eta""".split()  # noqa: SIM905
)
# Parameters that are options of sampling; num_predict is called max_tokens there.
_SAMPLING = tuple(
    """temperature top_k top_p min_p seed stop repeat_penalty presence_penalty frequency_penalty
    num_predict""".split()  # noqa: SIM905
)
_SIGNED = ("seed", "top_k", "num_predict")  # a number below 0 leaves them open


@dataclass(frozen=True)
class Command:
    """One command of a Modelfile.

    line      its number, from 1
    argument  the parameter's name, or the message's role
    """

    line: int
    name: str
    value: str
    argument: str = ""


@dataclass
class Modelfile:
    """What a Modelfile asks for, as create_bundle takes it.

    base      of FROM: a file, or a name that create_bundle knows
    adapters  name and place of each
    sampling  option -> value, of PARAMETER
    examples  messages, of MESSAGE
    notes     a sentence for each line that is left out because it changes no answer
    """

    base: AnyPath = ""
    adapters: list[tuple[str, AnyPath]] = field(default_factory=list)
    system: str = ""
    license: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_modelfile(path: Path) -> Modelfile:
    """Read a Modelfile and find what it names.

    Raises InputFileError, which names each line that cannot be followed.
    """
    commands = list(_commands(path, _text(path)))
    modelfile = Modelfile()
    problems = []
    if not any(command.name == "FROM" for command in commands):
        problems.append(f"{path}: FROM is missing, expected one; name the base, as in FROM a.gguf.")
    for command in commands:
        try:
            _take(modelfile, command, path)
        except QafloraError as problem:
            problems.append(f"{path}:{command.line}: {problem}")
    if problems:
        raise InputFileError(" ".join(problems))
    return modelfile


# the text


def _text(path: Path) -> str:
    """Read the text, in UTF-8, or in UTF-16 where a byte order mark says so."""
    try:
        with reading(path):
            data = read_input(path, MAX_BYTES)
        is_wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = data.decode("utf-16" if is_wide else "utf-8-sig")
    except ValueError as error:
        raise InputFileError(
            f"Cannot read {path}: {error}; expected a Modelfile, in UTF-8, or in UTF-16 with a "
            "byte order mark. Save it again as UTF-8."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _commands(path: Path, text: str) -> Iterator[Command]:
    """Split a text into commands. Raises InputFileError where a line is none."""
    lines = enumerate(text.split("\n"), start=1)
    for number, line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, value = _word(line)
        name = name.upper()
        argument = ""
        if name in ("PARAMETER", "MESSAGE"):
            argument, value = _word(value)
        if name not in (*COMMANDS, *_OF_BASE, *_IDLE) or not value:
            raise InputFileError(
                f"{path}:{number}: {line.strip()[:60]!r} is no command with a value; expected one "
                f"of {', '.join(COMMANDS)}. A text of several lines stands between "
                'three quotation marks, """.'
            )
        while (whole := _unquoted(value)) is None:
            _, more = next(lines, (0, None))
            if more is None:
                raise InputFileError(
                    f"{path}:{number}: the text of {name} never ends; expected the quotation "
                    "marks with which it begins at its end too. Add them."
                )
            value = f"{value}\n{more}".strip()
        yield Command(number, name, whole.strip(), argument.lower())


def _word(text: str) -> tuple[str, str]:
    """Split a text behind its first word."""
    words = text.split(maxsplit=1)
    word, rest = [*words, "", ""][:2]
    return word, rest.strip()


def _unquoted(value: str) -> str | None:
    """Take quotation marks off a value; None where those at its end are missing."""
    for mark in ('"""', '"'):
        if value.startswith(mark):
            is_whole = len(value) >= 2 * len(mark) and value.endswith(mark)
            return value[len(mark) : -len(mark)] if is_whole else None
    return value


# commands


def _take(modelfile: Modelfile, command: Command, path: Path) -> None:
    """Add a command to what is asked for. Raises QafloraError."""
    name = command.name
    value = command.value
    if name == "FROM":
        if modelfile.base:
            raise InputFileError("FROM stands above already, expected one. Leave one out.")
        modelfile.base = _base(value, path.parent)
        return
    if name in _OF_BASE:
        raise InputFileError(f"{name} is not taken: the base brings its own. Leave the line out.")
    idle = command.argument if name == "PARAMETER" else name
    if idle in _IDLE:
        modelfile.notes.append(f"{path}:{command.line}: {idle} is left out: it changes no answer.")
    elif name == "ADAPTER":
        place = _adapter(value, path.parent)
        others = [other for other, _ in modelfile.adapters]
        modelfile.adapters.append((_adapter_name(place.name, others), place))
    elif name == "LICENSE":
        modelfile.license = f"{modelfile.license}\n\n{value}".strip()
    elif name == "PARAMETER":
        _take_parameter(modelfile.sampling, command)
    elif name == "SYSTEM" or command.argument == "system":
        modelfile.system = value
    elif command.argument in ROLES:
        modelfile.examples.append({"role": command.argument, "content": value})
    else:
        expected = ", ".join(ROLES)
        raise InputFileError(f"the role is {command.argument!r:.40}, expected one of {expected}.")


def _take_parameter(sampling: dict[str, Any], command: Command) -> None:
    name = command.argument
    value = command.value
    if name == "stop":
        sampling.setdefault("stop", []).append(value)
        return
    if name not in _SAMPLING:
        raise InputFileError(
            f"PARAMETER {name:.40} cannot be followed; expected one of {', '.join(_SAMPLING)}."
        )
    option = in_group("sampling")["max_tokens" if name == "num_predict" else name]
    with contextlib.suppress(ValueError):
        number = option.kind(value)
        if option.fits(number):
            sampling[option.name] = number
            return
        if name in _SIGNED and number < 0:
            return
    raise InputFileError(f"PARAMETER {name} is {value!r:.40}, expected {option.expected}.")


def _adapter(value: str, folder: Path) -> Path:
    """Find an adapter: a PEFT folder, a file in one, or a GGUF. Raises InputFileError."""
    place = folder / expanded(value)
    if not os.path.exists(place):
        raise InputFileError(
            f"the adapter {place} {what_is_at(place)}; expected a PEFT folder, its safetensors "
            "file, or an adapter GGUF. Correct the path."
        )
    return place.parent if place.suffix == ".safetensors" else place


def _adapter_name(title: str, taken: Sequence[str]) -> str:
    """Make a name that a bundle takes, of a folder's or file's; a blob of Ollama has none."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", title.removesuffix(".gguf")).lstrip("-._")[:60]
    first = "adapter" if title.startswith("sha256-") or not plain else plain
    lower = [name.lower() for name in taken]
    name = first
    for number in range(2, len(taken) + 2):
        if name.lower() in lower:
            name = f"{first}-{number}"
    return name


def _base(value: str, folder: Path) -> AnyPath:
    """Find the base: a file, or a name that create_bundle knows. Raises QafloraError."""
    place = folder / expanded(value)
    if os.path.isdir(place):
        raise InputFileError(
            f"the base {place} is a folder, expected a GGUF file. Convert it with llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    if os.path.isfile(place):
        return place
    if value in load_registry():
        return value
    if value.endswith(".gguf") and value.count("/") >= 2:
        parse_hub_ref(value)
        return value
    raise InputFileError(
        f"the base {value:.100} is no file in {folder.absolute()} and no name of `qaflora models`; "
        "expected one of them. For a model of Ollama give the Modelfile that `ollama show "
        f"--modelfile {value:.100}` prints, which names its files."
    )
