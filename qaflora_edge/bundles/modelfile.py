"""Modelfiles of Ollama, and the models that it keeps on this disk, as parts of a bundle.

A Modelfile is read as ollama 0.34 does (parser/parser.go): one command a line, in any case and
order; a text between quotation marks, one or three, may have several lines.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qaflora_edge.config import in_group
from qaflora_edge.errors import InputFileError, QafloraError
from qaflora_edge.files import AnyPath, what_is_at
from qaflora_edge.formats.bundle import NAME_PATTERN
from qaflora_edge.formats.inputs import read_input, read_json_file, reading
from qaflora_edge.formats.names import load_registry, parse_hub_ref
from qaflora_edge.peft.config import CONFIG_FILE
from qaflora_edge.settings import expanded

MAX_BYTES = 1 << 20  # of a Modelfile, a manifest, or a text in a model
MAX_MESSAGES = 256
COMMANDS = ("FROM", "ADAPTER", "SYSTEM", "PARAMETER", "LICENSE", "MESSAGE")
ROLES = ("system", "user", "assistant")
_OF_BASE = "{} is not taken: the base brings its own. Leave the line out."
_REFUSED = {name: _OF_BASE.format(name) for name in ("TEMPLATE", "RENDERER", "PARSER")}
_IDLE = {
    "REQUIRES": "it is about Ollama's version",
    "DRAFT": "a draft changes no answer, and drafts here come from the prompt",
}
# Parameter -> the option of sampling that it is.
_SAMPLING = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "seed", "stop")},
    **{name: name for name in ("repeat_penalty", "presence_penalty", "frequency_penalty")},
    "num_predict": "max_tokens",
}
_SIGNED = ("seed", "top_k", "num_predict")  # a number below 0 leaves them open
_OF_MEMORY = (
    "num_ctx num_batch num_gpu main_gpu num_thread num_keep numa use_mmap draft_num_predict"
)
_OF_THE_PAST = (
    "use_mlock low_vram f16_kv logits_all vocab_only penalize_newline mirostat mirostat_tau "
    "mirostat_eta"
)
_IDLE_PARAMETERS = {
    **dict.fromkeys(_OF_MEMORY.split(), "it changes speed or memory, and no answer"),
    **dict.fromkeys(_OF_THE_PAST.split(), "Ollama ignores it too"),
}
_NAME = re.compile(
    r"(?:(?:(?P<host>[\w.-]+(?::\d+)?)/)?(?P<owner>[\w.-]+)/)?(?P<model>[\w.-]+)(?::(?P<tag>[\w.-]+))?",
    re.ASCII,
)
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


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


class _Wrong(Exception):
    """A line that cannot be followed: why, and what to do."""


def read_modelfile(path: Path) -> Modelfile:
    """Read a Modelfile and find what it names.

    Raises InputFileError, which names each line that cannot be followed.
    """
    commands = list(_commands(path, _text(path)))
    modelfile = Modelfile()
    problems = []
    froms = [command for command in commands if command.name == "FROM"]
    if not froms:
        problems.append(f"{path}: FROM is missing, expected one; name the base, as in FROM a.gguf.")
    for command in froms[1:]:
        first = f"FROM stands in line {froms[0].line} already, expected one"
        problems.append(f"{path}:{command.line}: {first}. Leave one out.")
    inherited: list[Command] = []
    for command in froms[:1]:
        try:
            modelfile.base, inherited = _base(command, path.parent)
        except (_Wrong, QafloraError) as problem:
            problems.append(f"{path}:{command.line}: {problem}")
    for group in (inherited, [command for command in commands if command.name != "FROM"]):
        part = Modelfile()
        for command in group:
            try:
                _take(part, command, path)
            except _Wrong as problem:
                problems.append(f"{path}:{command.line}: {problem}")
        _add(modelfile, part)
    if problems:
        raise InputFileError(" ".join(problems))
    return modelfile


# --- the text -----------------------------------------------------------------------------------


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
        name, argument = name.upper(), ""
        if name in ("PARAMETER", "MESSAGE"):
            argument, value = _word(value)
        if name not in (*COMMANDS, *_REFUSED, *_IDLE) or not value:
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
    word, *rest = text.split(maxsplit=1) or [""]
    return word, rest[0].strip() if rest else ""


def _unquoted(value: str) -> str | None:
    """Take quotation marks off a value; None where those at its end are missing."""
    for mark in ('"""', '"'):
        if value.startswith(mark):
            is_whole = len(value) >= 2 * len(mark) and value.endswith(mark)
            return value[len(mark) : -len(mark)] if is_whole else None
    return value


# --- commands -----------------------------------------------------------------------------------


def _take(part: Modelfile, command: Command, path: Path) -> None:
    """Add a command to what is asked for. Raises _Wrong."""
    match command.name:
        case "ADAPTER":
            place = _adapter(command.value, path.parent)
            part.adapters.append((place.name, place))
        case "SYSTEM":
            part.system = command.value
        case "LICENSE":
            part.license = "\n\n".join(filter(None, (part.license, command.value)))
        case "MESSAGE":
            _take_message(part, command)
        case "PARAMETER" if command.argument in _IDLE_PARAMETERS:
            why = _IDLE_PARAMETERS[command.argument]
            part.notes.append(_note(path, command, command.argument, why))
        case "PARAMETER":
            _take_parameter(part, command)
        case name if name in _REFUSED:
            raise _Wrong(_REFUSED[name])
        case name:
            part.notes.append(_note(path, command, name, _IDLE[name]))


def _note(path: Path, command: Command, name: str, why: str) -> str:
    return f"{path}:{command.line}: {name} is left out: {why}."


def _take_message(part: Modelfile, command: Command) -> None:
    if command.argument not in ROLES:
        raise _Wrong(f"the role is {command.argument!r:.40}, expected one of {', '.join(ROLES)}.")
    if command.argument == "system":
        part.system = command.value
        return
    if len(part.examples) == MAX_MESSAGES:
        raise _Wrong(f"there are more than {MAX_MESSAGES} messages, expected no more.")
    part.examples.append({"role": command.argument, "content": command.value})


def _take_parameter(part: Modelfile, command: Command) -> None:
    name, value = command.argument, command.value
    if name == "repeat_last_n" and value == "64":
        return
    if name not in _SAMPLING:
        expected = ", ".join(_SAMPLING)
        raise _Wrong(f"PARAMETER {name:.40} cannot be followed; expected one of {expected}.")
    option = in_group("sampling")[_SAMPLING[name]]
    if name == "stop":
        part.sampling["stop"] = [*part.sampling.get("stop", []), value]
        return
    try:
        number = option.kind(value)
    except ValueError:
        number = None
    if number is not None and name in _SIGNED and number < 0:
        return
    if number is None or not option.fits(number):
        raise _Wrong(f"PARAMETER {name} is {value!r:.40}, expected {option.expected}.")
    part.sampling[option.name] = number


def _adapter(value: str, folder: Path) -> Path:
    """Find an adapter: a PEFT folder, a file in one, or a GGUF. Raises _Wrong."""
    place = folder / expanded(value)
    if not os.path.exists(place):
        raise _Wrong(
            f"the adapter {place} {what_is_at(place)}; expected a PEFT folder, its safetensors "
            "file, or an adapter GGUF. Correct the path."
        )
    if place.suffix != ".safetensors":
        return place
    if not os.path.isfile(place.parent / CONFIG_FILE):
        raise _Wrong(
            f"{CONFIG_FILE} is missing in {place.parent.absolute()}; expected it next to "
            f"{place.name}, for it has the adapter's scale. Give the folder that PEFT wrote."
        )
    return place.parent


def _add(modelfile: Modelfile, part: Modelfile) -> None:
    """Put a part behind what is there: of two texts or values the later one counts."""
    for title, place in part.adapters:
        name = _adapter_name(title, [name for name, _ in modelfile.adapters])
        modelfile.adapters.append((name, place))
    modelfile.system = part.system or modelfile.system
    modelfile.license = part.license or modelfile.license
    modelfile.examples = part.examples or modelfile.examples
    modelfile.sampling |= part.sampling
    modelfile.notes += part.notes


def _adapter_name(title: str, taken: Sequence[str]) -> str:
    """Make a name that a bundle takes, of a folder's or file's; a blob of Ollama has none."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", title.removesuffix(".gguf")).lstrip("-._")[:60]
    if title.startswith("sha256-") or not NAME_PATTERN.fullmatch(name):
        name = "adapter"
    names = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 2))]
    lower = [other.lower() for other in taken]
    return next(each for each in names if each.lower() not in lower)


# --- models of Ollama ---------------------------------------------------------------------------


def _base(command: Command, folder: Path) -> tuple[AnyPath, list[Command]]:
    """Find the base, and the commands of the model that it is. Raises _Wrong."""
    place = folder / expanded(command.value)
    if os.path.isdir(place):
        raise _Wrong(
            f"the base {place} is a folder, expected a GGUF file. Convert it with llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    if os.path.isfile(place):
        return place, []
    if command.value in load_registry():
        return command.value, []
    if model := _manifest(command.value):
        return _of_model(command, *model)
    if command.value.endswith(".gguf") and command.value.count("/") >= 2:
        parse_hub_ref(command.value)
        return command.value, []
    places = " or ".join(map(str, ollama_folders()))
    raise _Wrong(
        f"the base {command.value:.100} is no file in {folder.absolute()}, no name of `qaflora "
        f"models`, and no model of Ollama in {places}; expected one of them. Correct it, set "
        "OLLAMA_MODELS, or fetch the model with `ollama pull`."
    )


def ollama_folders() -> list[Path]:
    """Name the folders where Ollama keeps models: a user's, and that of Linux's service."""
    if chosen := os.environ.get("OLLAMA_MODELS"):
        return [Path(chosen)]
    return [Path.home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models")]


def _manifest(name: str) -> tuple[Path, Path] | None:
    """Find the folder and manifest of a model, as `llama3.2`, `me/mine:v2` or `hf.co/a/b:Q8_0`."""
    match = _NAME.fullmatch(name)
    if match is None or any(part and part.startswith(".") for part in match.groups()):
        return None
    parts = match.groupdict()
    host = parts["host"] or "registry.ollama.ai"
    tail = Path(host, parts["owner"] or "library", parts["model"], parts["tag"] or "latest")
    for folder in ollama_folders():
        path = folder / "manifests" / tail
        if os.path.isfile(path):
            return folder, path
    return None


def _of_model(command: Command, folder: Path, path: Path) -> tuple[Path, list[Command]]:
    """Read a manifest: the base's file, and as commands what else the model has."""
    advice = f"Fetch it again with `ollama pull {command.value}`."
    manifest = read_json_file(path, MAX_BYTES, InputFileError, advice)
    bases = []
    commands = []
    for kind, blob in _layers(manifest, folder):
        if not os.path.isfile(blob):
            raise _Wrong(f"the file {blob} of {command.value} is missing. {advice}")
        if kind == "model":
            bases.append(blob)
        elif kind == "adapter":
            commands.append(Command(command.line, "ADAPTER", str(blob.absolute())))
        elif kind in ("system", "license", "params", "messages"):
            commands += _told(command, kind, _text(blob))
    if len(bases) != 1:
        raise _Wrong(
            f"{command.value} has {len(bases)} GGUF files of a base, expected 1: a model in "
            "safetensors, or one in parts, cannot be taken. Give a GGUF file."
        )
    return bases[0], commands


def _layers(manifest: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, Path]]:
    """Give the kind and the file of each layer; what is malformed is none."""
    layers = manifest.get("layers")
    for layer in layers if isinstance(layers, list) else []:
        if isinstance(layer, dict):
            kind = str(layer.get("mediaType")).rpartition(".")[2]
            digest = _DIGEST.fullmatch(str(layer.get("digest")))
            if digest:
                yield kind, folder / "blobs" / f"sha256-{digest[1]}"


def _told(command: Command, kind: str, text: str) -> Iterator[Command]:
    """Give the commands that a layer of texts stands for."""
    line = command.line
    if kind in ("system", "license"):
        yield Command(line, kind.upper(), text.strip())
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"the {kind} of {command.value} are no JSON ({error}).") from error
    if kind == "params" and isinstance(content, dict):
        for name, value in content.items():
            values: Iterable[Any] = value if isinstance(value, list) else [value]
            yield from (Command(line, "PARAMETER", str(each), name) for each in values)
    if kind == "messages" and isinstance(content, list):
        for message in content:
            if isinstance(message, dict):
                role, said = str(message.get("role")), str(message.get("content"))
                yield Command(line, "MESSAGE", said, role)
