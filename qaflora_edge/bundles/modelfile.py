"""Modelfiles of Ollama, and the models that it keeps on this disk, as parts of a bundle.

A Modelfile is read as ollama 0.34 does (parser/parser.go): one command a line, in any case and
order; a text between quotation marks, one or three, may have several lines.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qaflora_edge.config import expanded, in_group
from qaflora_edge.dialects.ollama import OF_OLLAMA
from qaflora_edge.errors import InputFileError, QafloraError
from qaflora_edge.files import AnyPath, what_is_at
from qaflora_edge.formats.bundle import NAME_PATTERN
from qaflora_edge.formats.inputs import read_input, read_json_file, reading
from qaflora_edge.formats.names import CONFIG_FILE, load_registry, parse_hub_ref

MAX_BYTES = 1 << 20  # of a Modelfile, a manifest, or a text in a model
MAX_COMMANDS = 1024  # a bundle has at most 256 adapters, and as many examples
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
SAMPLING = (*OF_OLLAMA, "num_predict")
_SIGNED = ("seed", "top_k", "num_predict")  # a number below 0 leaves them open
_PART = re.compile(r"\w[\w.-]*", re.ASCII)  # of a model's name
_LAYERS = ("model", "adapter", "system", "license", "params", "messages")
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
    adapters  name and path of each
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
    inherited: list[Command] = []
    froms = [command for command in commands if command.name == "FROM"]
    if not froms:
        problems.append(f"{path}: FROM is missing, expected one; name the base, as in FROM a.gguf.")
    else:
        commands.remove(froms[0])
        try:
            modelfile.base, inherited = _base(froms[0], path.parent)
        except QafloraError as problem:
            problems.append(f"{path}:{froms[0].line}: {problem}")
    for group in (inherited, commands):
        if len(group) > MAX_COMMANDS:
            problems.append(
                f"{path}: there are {len(group)} commands beside FROM, expected at most "
                f"{MAX_COMMANDS}. Leave some out."
            )
            break
        of_group = Modelfile()
        for command in group:
            try:
                _take(of_group, command, path, froms)
            except InputFileError as problem:
                problems.append(f"{path}:{command.line}: {problem}")
        _add(modelfile, of_group)
    if problems:
        raise InputFileError(" ".join(problems))
    return modelfile


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
    lines = enumerate(text.split("\n"), start=1)
    for number, line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        word, value = _word(line)
        name = word.upper()
        argument = ""
        if name in ("PARAMETER", "MESSAGE"):
            argument, value = _word(value)
        if name not in (*COMMANDS, *_OF_BASE, *_IDLE) or not value:
            raise InputFileError(
                f"{path}:{number}: {line.strip()[:60]!r} is no command with a value; expected one "
                f"of {', '.join(COMMANDS)}. A text of several lines stands between "
                'three quotation marks, """.'
            )
        mark = next((mark for mark in ('"""', '"') if value.startswith(mark)), "")
        text_lines = [value.removeprefix(mark)]
        while mark and not text_lines[-1].rstrip().endswith(mark):
            _, more = next(lines, (0, None))
            if more is None:
                raise InputFileError(
                    f"{path}:{number}: the text of {name} never ends; expected the quotation "
                    "marks with which it begins at its end too. Add them."
                )
            text_lines.append(more)
        text_lines[-1] = text_lines[-1].rstrip().removesuffix(mark)
        yield Command(number, name, "\n".join(text_lines).strip(), argument.lower())


def _word(text: str) -> tuple[str, str]:
    word, rest, *_ = (*text.split(maxsplit=1), "", "")
    return word, rest.strip()


def _take(modelfile: Modelfile, command: Command, path: Path, froms: Sequence[Command]) -> None:
    name = command.name
    if name == "FROM":
        line = froms[0].line
        raise InputFileError(f"FROM stands in line {line} already, expected one. Leave one out.")
    if name in _OF_BASE:
        raise InputFileError(f"{name} is not taken: the base brings its own. Leave the line out.")
    idle = command.argument if name == "PARAMETER" else name
    if idle in _IDLE:
        modelfile.notes.append(f"{path}:{command.line}: {idle} is left out: it changes no answer.")
    elif name == "ADAPTER":
        adapter_path = _adapter(command.value, path.parent)
        modelfile.adapters.append((adapter_path.name, adapter_path))
    elif name == "LICENSE":
        modelfile.license = "\n\n".join(filter(None, (modelfile.license, command.value)))
    elif name == "PARAMETER":
        _take_parameter(modelfile, command)
    elif name == "SYSTEM" or command.argument == "system":
        modelfile.system = command.value
    elif command.argument in ROLES:
        modelfile.examples.append({"role": command.argument, "content": command.value})
    else:
        expected = ", ".join(ROLES)
        raise InputFileError(f"the role is {command.argument!r:.40}, expected one of {expected}.")


def _take_parameter(modelfile: Modelfile, command: Command) -> None:
    name = command.argument
    value = command.value
    if name == "repeat_last_n" and value == "64":
        return
    if name == "stop":
        modelfile.sampling["stop"] = [*modelfile.sampling.get("stop", []), value]
        return
    if name not in SAMPLING:
        raise InputFileError(
            f"PARAMETER {name:.40} cannot be followed; expected one of {', '.join(SAMPLING)}."
        )
    key = "max_tokens" if name == "num_predict" else name
    option = in_group("sampling")[key]
    number = option.parsed(value)
    if option.fits(number):
        modelfile.sampling[option.name] = number
        return
    is_open = name in _SIGNED and isinstance(number, int) and number < 0
    if not is_open:
        raise InputFileError(f"PARAMETER {name} is {value!r:.40}, expected {option.expected}.")


def _adapter(value: str, folder: Path) -> Path:
    path = folder / expanded(value)
    if not os.path.exists(path):
        raise InputFileError(
            f"the adapter {path} {what_is_at(path)}; expected a PEFT folder, its safetensors "
            "file, or an adapter GGUF. Correct the path."
        )
    if path.suffix != ".safetensors":
        return path
    if not os.path.isfile(path.parent / CONFIG_FILE):
        raise InputFileError(
            f"{CONFIG_FILE} is missing in {path.parent.absolute()}; expected it next to "
            f"{path.name}, for it has the adapter's scale. Give the folder that PEFT wrote."
        )
    return path.parent


def _add(modelfile: Modelfile, later: Modelfile) -> None:
    """Put what another has behind what is there: of two texts or values the later one counts."""
    for title, path in later.adapters:
        name = _adapter_name(title, [name for name, _ in modelfile.adapters])
        modelfile.adapters.append((name, path))
    modelfile.system = later.system or modelfile.system
    modelfile.license = later.license or modelfile.license
    modelfile.examples = later.examples or modelfile.examples
    modelfile.sampling |= later.sampling
    modelfile.notes += later.notes


def _adapter_name(title: str, taken: Sequence[str]) -> str:
    """Make a name that a bundle takes, of a folder's or file's; a blob of Ollama has none."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", title.removesuffix(".gguf"))
    first = plain.lstrip("-._")[:60]
    if title.startswith("sha256-") or not NAME_PATTERN.fullmatch(first):
        first = "adapter"
    taken_lower = {name.lower() for name in taken}
    name = first
    number = 1
    while name.lower() in taken_lower:
        number += 1
        name = f"{first}-{number}"
    return name


def _base(command: Command, folder: Path) -> tuple[AnyPath, list[Command]]:
    path = folder / expanded(command.value)
    if os.path.isdir(path):
        raise InputFileError(
            f"the base {path} is a folder, expected a GGUF file. Convert it with llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    if os.path.isfile(path):
        return path, []
    if command.value in load_registry():
        return command.value, []
    if model := _manifest(command.value):
        return _of_model(command, *model)
    if command.value.endswith(".gguf") and command.value.count("/") >= 2:
        parse_hub_ref(command.value)
        return command.value, []
    folders = " or ".join(map(str, ollama_folders()))
    raise InputFileError(
        f"the base {command.value:.100} is no file in {folder.absolute()}, no name of `qaflora "
        f"models`, and no model of Ollama in {folders}; expected one of them. Correct it, set "
        "OLLAMA_MODELS, or fetch the model with `ollama pull`."
    )


def ollama_folders() -> list[Path]:
    """Name the folders where Ollama keeps models: a user's, and that of Linux's service."""
    if chosen := os.environ.get("OLLAMA_MODELS"):
        return [Path(chosen)]
    return [Path.home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models")]


def _manifest(name: str) -> tuple[Path, Path] | None:
    """Find the folder and manifest of a model, as `llama3.2`, `me/mine:v2` or `hf.co/a/b:Q8_0`."""
    *owners, last = name.split("/")
    model, _, tag = last.partition(":")
    n_missing = max(0, 2 - len(owners))
    folders = [*("registry.ollama.ai", "library")[:n_missing], *owners, model]
    tail = Path(*folders, tag or "latest")
    if len(folders) != 3 or not all(map(_PART.fullmatch, tail.parts)):
        return None
    for folder in ollama_folders():
        path = folder / "manifests" / tail
        if os.path.isfile(path):
            return folder, path
    return None


def _of_model(command: Command, folder: Path, path: Path) -> tuple[Path, list[Command]]:
    advice = f"Fetch it again with `ollama pull {command.value}`."
    manifest = read_json_file(path, MAX_BYTES, InputFileError, advice)
    layers = manifest.get("layers")
    bases = []
    commands = []
    for layer in layers if isinstance(layers, list) else []:
        fields = layer if isinstance(layer, dict) else {}
        layer_type = str(fields.get("mediaType")).rpartition(".")[2]
        digest = _DIGEST.fullmatch(str(fields.get("digest")))
        if digest is None or layer_type not in _LAYERS:
            continue
        blob = (folder / "blobs" / f"sha256-{digest[1]}").absolute()
        if not os.path.isfile(blob):
            raise InputFileError(f"the file {blob} of {command.value} is missing. {advice}")
        if layer_type == "model":
            bases.append(blob)
        elif layer_type == "adapter":
            commands.append(Command(command.line, "ADAPTER", str(blob)))
        else:
            commands += _commands_of(command, layer_type, _text(blob))
    if len(bases) != 1:
        raise InputFileError(
            f"{command.value} has {len(bases)} GGUF files of a base, expected 1: a model in "
            "safetensors, or one in parts, cannot be taken. Give a GGUF file."
        )
    return bases[0], commands


def _commands_of(command: Command, layer_type: str, text: str) -> Iterator[Command]:
    line = command.line
    if layer_type in ("system", "license"):
        yield Command(line, layer_type.upper(), text.strip())
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputFileError(
            f"the {layer_type} of {command.value} are no JSON ({error})."
        ) from error
    if layer_type == "params" and isinstance(content, dict):
        for name, value in content.items():
            for item in value if isinstance(value, list) else [value]:
                yield Command(line, "PARAMETER", str(item), name)
    if layer_type == "messages" and isinstance(content, list):
        for message in content:
            if isinstance(message, dict):
                said = str(message.get("content"))
                yield Command(line, "MESSAGE", said, str(message.get("role")))
