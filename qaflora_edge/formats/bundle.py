"""bundle.json: read, parsed and checked; and the files that it names, kept inside its folder.

Format "qaflora-bundle/1". The text may come from anywhere. `data/bundle.schema.json` lists the
fields; rules between fields stand here. Unknown keys are kept in `raw`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PureWindowsPath
from typing import TypeVar

from qaflora_edge.config import in_group
from qaflora_edge.errors import BundleError, os_errors
from qaflora_edge.files import what_is_at
from qaflora_edge.formats.inputs import (
    Object,
    WrongField,
    check_schema,
    open_input,
    read_json_object,
    shortened,
    shown,
)

FORMAT = "qaflora-bundle/1"
BUNDLE_FILE = "bundle.json"
MAX_BUNDLE_BYTES = 8 << 20
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_RULE = "1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"

_PER_LAYER = ("norm", "raw", "question_norm", "question_raw")  # lists of fusion.typical
_ADVICE = "Correct the file, or create the bundle again with `qaflora bundle create`."

Record = TypeVar("Record")


@dataclass(frozen=True)
class BaseRecord:
    """Which base a bundle is for, and where to look for it."""

    architecture: str
    n_layer: int
    n_embd: int
    n_vocab: int
    sha256: str
    size_bytes: int
    file: str | None = None
    registry: str | None = None
    hub: str | None = None
    name: str = ""

    title = "The base"
    advice = "Give the file that the bundle was made with; adapters fit no other."


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter file of a bundle; size_bytes is None where it was not recorded."""

    name: str
    file: str
    sha256: str
    rank: int
    alpha: float
    targets: Sequence[str]
    size_bytes: int | None = None
    source: str = ""
    license: str = ""
    description: str = ""
    hub: str | None = None

    advice = "Copy the bundle again."

    @property
    def title(self) -> str:
        return f"The adapter {self.name}"


@dataclass(frozen=True, kw_only=True)
class BundleText:
    """What bundle.json says.

    fusion   defaults of an Engine and measurements, as they stand in the file
    system   system message of conversations that have none, or empty
    examples  messages with which every conversation begins, behind the system's
    questions  that the page suggests
    sampling  option -> value, where a command or request says nothing
    where    names the file in messages
    raw      the whole object, unknown keys included
    """

    name: str = ""
    description: str = ""
    license: str = ""
    base: BaseRecord
    adapters: tuple[AdapterRecord, ...]
    fusion: Object = field(default_factory=dict)
    system: str = ""
    examples: Sequence[Mapping[str, str]] = ()
    questions: Sequence[str] = ()
    sampling: Object = field(default_factory=dict)
    where: str
    raw: Object


def is_base(place: Path) -> bool:
    """Tell a base alone, which is one GGUF file, from a bundle."""
    return place.suffix.lower() == ".gguf" and os.path.isfile(place)


def read_bundle_text(folder: Path) -> BundleText:
    """Read bundle.json alone; no other file need be there. Raises BundleError."""
    path = safe_join(folder, BUNDLE_FILE)
    failure = f"Cannot open the bundle {folder}"
    if not os.path.isfile(path):
        there = folder if not os.path.isdir(folder) else path
        raise BundleError(
            f"{failure}: {there.name} {what_is_at(there)}; expected a folder with {BUNDLE_FILE}. "
            "Give the folder of a bundle, or make one with `qaflora bundle create`."
        )
    failure = f"{failure}: reading {BUNDLE_FILE} failed"
    with os_errors(BundleError, failure, "Check that you may read it."), open_input(path) as file:
        return parse_bundle(file.read(MAX_BUNDLE_BYTES + 1), str(path))


def link_roots(folder: Path) -> tuple[Path, ...]:
    """Name the folders that links in a folder may lead to, besides itself.

    None, unless it is a snapshot in the Hub's cache: its files are links into that cache.
    """
    # Unlike Path.resolve, realpath raises nothing for a loop of links.
    snapshot = Path(os.path.realpath(folder))
    if snapshot.parent.name != "snapshots":
        return ()
    from huggingface_hub import constants

    repo_dir = snapshot.parents[1]
    cache = Path(os.path.realpath(constants.HF_HUB_CACHE))
    if repo_dir.parent == cache and repo_dir.name.startswith("models--"):
        return repo_dir / "blobs", cache / "blobs"  # the second is shared by repositories
    return ()


def safe_join(folder: Path, relative: str) -> Path:
    """Join a path written in a bundle to the bundle's folder.

    The file need not exist. Raises BundleError for a path or link that leads out.
    """
    reason = "it is absolute, climbs with '..', or is no file name"
    if is_inside(relative):
        real = Path(os.path.realpath(folder / relative))
        roots = map(os.path.realpath, (folder, *link_roots(folder)))
        if any(real.is_relative_to(root) for root in roots):
            return folder / relative
        reason = "a link in it leads out of the bundle"
    raise BundleError(
        f"Refused the path {relative!r} in bundle {folder}: {reason}; expected a relative path to "
        "a file inside the bundle. Copy the file into the bundle's folder and correct the path in "
        "bundle.json."
    )


def is_inside(relative: str) -> bool:
    """Tell whether a path written in a bundle leads into it on any system, links apart."""
    windows = PureWindowsPath(relative)  # a bundle made here may be opened there
    return not (
        not relative.strip()
        or any(sign == "\0" or "\ud800" <= sign <= "\udfff" for sign in relative)
        or relative.startswith(("/", "\\", "~"))
        or relative.lower().startswith("file:")
        or windows.drive
        or ".." in windows.parts
    )


def adapter_paths(folder: Path, text: BundleText) -> dict[str, Path]:
    """Give adapter -> its file, which lies in the bundle's folder. Raises BundleError."""
    paths = {adapter.name: safe_join(folder, adapter.file) for adapter in text.adapters}
    for name, path in paths.items():
        if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
            raise BundleError(
                f"Cannot open the bundle {folder}: the file of adapter {name}, {path}, "
                f"{what_is_at(path)}; expected the file that {BUNDLE_FILE} names. Copy the bundle "
                "again."
            )
    return paths


def parse_bundle(data: bytes, where: str) -> BundleText:
    """Parse bundle.json.

    where  names the file in messages

    Raises BundleError naming the field, what was found and what was expected.
    """
    try:
        if len(data) > MAX_BUNDLE_BYTES:
            raise ValueError(f"it has more than {MAX_BUNDLE_BYTES} bytes")
        raw = read_json_object(data)
    except ValueError as error:  # errors of JSON and UTF-8 too
        raise BundleError(
            f"Cannot read {where}: it is not a JSON object in UTF-8 ({error}). {_ADVICE}"
        ) from error
    try:
        check_schema(raw, "bundle")
        adapters = tuple(_record(AdapterRecord, adapter) for adapter in raw["adapters"])
        read = {"base": _record(BaseRecord, raw["base"]), "adapters": adapters}
        text = _record(BundleText, raw | read | {"where": where, "raw": raw})
        _check_between_fields(text)
    except WrongField as problem:
        raise wrong_bundle(where, problem) from problem
    return text


def wrong_bundle(where: str, problem: WrongField) -> BundleError:
    return BundleError(f"Cannot use {where}: {problem}. {_ADVICE}")


def packed_files(text: BundleText) -> tuple[str, ...]:
    """List the files that belong into a bundle's folder, as bundle.json names them."""
    files = dict.fromkeys(adapter.file for adapter in text.adapters)
    if text.base.file is not None and is_inside(text.base.file):
        files[text.base.file] = None
    return tuple(files)


def _record(kind: type[Record], raw: Object) -> Record:
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: raw[name] for name in names if name in raw})


def _check_between_fields(text: BundleText) -> None:
    names = [adapter.name for adapter in text.adapters]
    for index, name in enumerate(names):
        if name.lower() in map(str.lower, names[:index]):
            place = f"adapters[{index}].name"
            raise WrongField(place, shown(name), "a name that no other adapter has")
    for key in ("typical", "samples"):
        for name, value in text.fusion.get(key, {}).items():
            if name not in names:
                expected = f"only adapters of this bundle ({', '.join(names)})"
                raise WrongField(shortened(f"fusion.{key}.{name}"), shown(value), expected)
    options = in_group("sampling")
    for name, value in text.sampling.items():
        if name not in options:
            raise WrongField(shortened(f"sampling.{name}"), shown(value), "no such option")
        if not options[name].fits(value):
            raise WrongField(f"sampling.{name}", shown(value), options[name].expected)
    n_layer = text.base.n_layer
    for name, typical in text.fusion.get("typical", {}).items():
        for key in _PER_LAYER:
            if key in typical and len(typical[key]) != n_layer:
                found = f"a list of {len(typical[key])}"
                expected = f"{n_layer} numbers, one per layer"
                raise WrongField(f"fusion.typical.{name}.{key}", found, expected)
