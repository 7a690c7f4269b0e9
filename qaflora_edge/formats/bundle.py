"""bundle.json: read, parsed and checked; and the files that it names, kept inside its folder.

Format "qaflora-bundle/1". The text may come from anywhere. `BundleFields` lists the fields; rules
between them stand in `_check_between_fields`. Unknown keys are kept in `raw`.
"""

import os
import re
import sys
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct, field, structs

from qaflora_edge.config import in_group
from qaflora_edge.errors import BundleError, ChecksumError, os_errors
from qaflora_edge.files import what_is_at
from qaflora_edge.formats.inputs import (
    FileState,
    Object,
    WrongField,
    checksum,
    file_state,
    open_input,
    read_as,
    read_json_object,
    shortened,
    shown,
)

FORMAT = "qaflora-bundle/1"
BUNDLE_FILE = "bundle.json"
TAUGHT_FILE = "examples.jsonl"
MAX_BUNDLE_BYTES = 8 << 20
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_RULE = "1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
MAX_TEXT = 100_000  # characters
_LARGEST = sys.float_info.max
_PER_LAYER = ("norm", "raw", "question_norm", "question_raw")  # lists of fusion.typical
_ADVICE = "Correct the file, or create the bundle again with `qaflora bundle create`."
_ONE_LINE = r"^(?![\s\S]*\n)"
_HUB = r"[A-Za-z0-9][A-Za-z0-9._-]*"

Text = Annotated[str, Meta(title=f"a text of at most {MAX_TEXT} characters", max_length=MAX_TEXT)]
Filled = Annotated[
    str,
    Meta(
        title=f"a text of 1 to {MAX_TEXT} characters that is not blank",
        max_length=MAX_TEXT,
        pattern=r"\S",
    ),
]
Name = Annotated[str, Meta(title=NAME_RULE, pattern=f"{_ONE_LINE}{NAME_PATTERN.pattern}$")]
Count = Annotated[int, Meta(title=f"a whole number from 1 to {2**62}", ge=1, le=2**62)]
Finite = Annotated[float, Meta(title="a finite number", ge=-_LARGEST, le=_LARGEST)]
Positive = Annotated[float, Meta(title="a finite number above 0", gt=0, le=_LARGEST)]
Layers = Annotated[
    list[Positive],
    Meta(title="a list of 1 to 1024 numbers, one per layer", min_length=1, max_length=1024),
]
Sha256 = Annotated[str, Meta(title="64 digits 0-9a-f", pattern=_ONE_LINE + "[0-9a-f]{64}$")]
Hub = Annotated[
    str,
    Meta(
        title="a Hub reference: owner/name or owner/name/file.gguf, with @revision or without",
        max_length=MAX_TEXT,
        pattern=r"^(?!([\s\S]*[/@])?\.{0,2}([/@]|(?![\s\S])))"
        rf"{_HUB}/{_HUB}(/[^@\\]+\.gguf)?(@[A-Za-z0-9._/-]+)?(?![\s\S])",
    ),
]
Inside = Annotated[
    str,
    Meta(
        title="a relative path to a file inside the bundle's folder, without '..', and not "
        "beginning with '~' or 'file:'",
        max_length=MAX_TEXT,
        pattern=r"^(?![/\\~])(?![Ff][Ii][Ll][Ee]:)(?![^/\\]:)"
        r"(?!([\s\S]*[/\\])?\.\.([/\\]|$))(?![\s\S]*\u0000)[\s\S]*\S",
    ),
]
Place = Annotated[
    str,
    Meta(
        title="a text that is not blank and does not begin with '~' or 'file:'",
        max_length=MAX_TEXT,
        pattern=r"^(?!~)(?![Ff][Ii][Ll][Ee]:)[\s\S]*\S",
    ),
]
Registry = Annotated[Name, Meta(title="a name of the registry (see `qaflora models`)")]


class BaseRecord(Struct, frozen=True, kw_only=True):
    """Which base a bundle is for, and where to look for it.

    name  what the base's file calls itself
    file  where it lies: absolute, or relative to the bundle's folder
    """

    architecture: Filled
    n_layer: Annotated[int, Meta(title="a whole number from 1 to 1024", ge=1, le=1024)]
    n_embd: Count
    n_vocab: Count
    sha256: Sha256
    size_bytes: Count
    file: Place | None = None
    registry: Registry | None = None
    hub: Hub | None = None
    name: Text = ""

    title: ClassVar[str] = "The base"
    advice: ClassVar[str] = "Give the file that the bundle was made with; adapters fit no other."


class AdapterRecord(Struct, frozen=True, kw_only=True):
    """One adapter file of a bundle.

    size_bytes  None where it was not recorded
    rank        the largest of its modules
    targets     kinds of modules, as attn_q or ffn_down
    """

    name: Name
    file: Inside
    sha256: Sha256
    rank: Count
    alpha: Finite
    targets: Annotated[list[str], Meta(title="a list of at most 1024 texts", max_length=1024)]
    size_bytes: Count | None = None
    source: Text = ""
    license: Text = ""
    description: Text = ""
    hub: Hub | None = None

    advice: ClassVar[str] = "Copy the bundle again."

    @property
    def title(self) -> str:
        return f"The adapter {self.name}"


class Usual(Struct, frozen=True, kw_only=True):
    """What is usual of a number, and how many spreads each prompt was above its mean."""

    mean: Finite
    spread: Positive
    each: Annotated[
        list[Annotated[float, Meta(title="a number from -1000 to 1000", ge=-1000, le=1000)]],
        Meta(title="a list of up to 1024 numbers, one per prompt", max_length=1024),
    ] = []


class TypicalRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is usual of one adapter: docs/bundle-format.md."""

    raw: Layers | None = None
    norm: Layers | None = None
    question_raw: Layers | None = None
    question_norm: Layers | None = None
    added_last: Usual | None = None
    added_question: Usual | None = None
    added_text: Usual | None = None
    later_last: Usual | None = None
    later_question: Usual | None = None
    opening: Usual | None = None
    sureness: Usual | None = None


class Fusion(Struct, frozen=True, kw_only=True):
    """Defaults of an Engine, and measurements by adapter.

    strategy       of older bundles: norm and arrow, which left the package, are read as their kin
    pool           older bundles may have "mean", which is read as "last"
    when_measured  default strategy once the adapters are measured; None: `strategy` stays
    """

    strategy: Filled | None = None
    when_measured: Filled | None = None
    lens: Literal["norm", "raw"] | None = None
    prefill: Literal["auto", "base", "mix"] = "mix"  # an older bundle answers as before
    pool: Literal["last", "question", "mean"] | None = None
    typical: dict[str, TypicalRecord] = {}

    def __post_init__(self) -> None:
        if self.strategy is not None:
            with_option = re.sub(r"^norm:(?=\d)", "norm:top=", self.strategy)  # of 0.1
            kin = re.sub(r"^(norm|arrow)(?=:|$)", "spectr", with_option)
            structs.force_setattr(self, "strategy", kin)


class Example(Struct, frozen=True, kw_only=True):
    """A message with which every conversation begins."""

    role: Literal["user", "assistant"]
    content: Text


class BundleFields(Struct, frozen=True, kw_only=True):
    """The fields of bundle.json; others are kept.

    system    system message of conversations that have none, or empty
    examples  messages with which every conversation begins, behind the system's
    questions  that the page suggests before the first one; it shows three
    sampling  option -> value, where a command or request says nothing
    """

    format: Annotated[
        Literal["qaflora-bundle/1"],
        Meta(title=f'"{FORMAT}" (another format needs another qaflora-edge)'),
    ]
    name: Text = ""
    description: Text = ""
    license: Text = ""
    system: Text = ""
    questions: Annotated[list[Text], Meta(title="a list of at most 16 texts", max_length=16)] = []
    examples: Annotated[
        list[Annotated[Example, Meta(title="an object with role and content")]],
        Meta(title="a list of at most 256 messages", max_length=256),
    ] = []
    sampling: Annotated[dict[str, Any], Meta(title="an object of sampling options")] = {}
    base: BaseRecord
    adapters: Annotated[
        list[AdapterRecord], Meta(title="a list of at most 256 objects", max_length=256)
    ]
    fusion: Fusion = field(default_factory=Fusion)


class BundleText(BundleFields, frozen=True, kw_only=True):
    """What bundle.json says.

    where  names the file in messages
    raw    the whole object, unknown keys included
    """

    where: str
    raw: Object


def is_base(path: Path) -> bool:
    """Tell a base alone, which is one GGUF file, from a bundle."""
    return path.suffix.lower() == ".gguf" and os.path.isfile(path)


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
        fields = read_as(BundleFields, raw)
        text = BundleText(**structs.asdict(fields), where=where, raw=raw)
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


def _check_between_fields(text: BundleText) -> None:
    names = [adapter.name for adapter in text.adapters]
    for index, name in enumerate(names):
        if name.lower() in map(str.lower, names[:index]):
            field = f"adapters[{index}].name"
            raise WrongField(field, shown(name), "a name that no other adapter has")
    for name in text.fusion.typical.keys() - {*names}:
        expected = f"only adapters of this bundle ({', '.join(names)})"
        value = text.raw["fusion"]["typical"][name]
        raise WrongField(shortened(f"fusion.typical.{name}"), shown(value), expected)
    options = in_group("sampling")
    for name, value in text.sampling.items():
        if name not in options:
            raise WrongField(shortened(f"sampling.{name}"), shown(value), "no such option")
        if not options[name].fits(value):
            raise WrongField(f"sampling.{name}", shown(value), options[name].expected)
    n_layer = text.base.n_layer
    for name, typical in text.fusion.typical.items():
        for key in _PER_LAYER:
            layers = getattr(typical, key)
            if layers is not None and len(layers) != n_layer:
                found = f"a list of {len(layers)}"
                expected = f"{n_layer} numbers, one per layer"
                raise WrongField(f"fusion.typical.{name}.{key}", found, expected)


def check_file(
    path: Path, record: BaseRecord | AdapterRecord, where: str, *, always_hash: bool = False
) -> FileState:
    """Compare a file with its record; give the state that was compared.

    where        names the bundle.json of the record
    always_hash  hash it even when its hash is remembered

    Raises ChecksumError for another size or hash or a changed file, InputFileError for an
    unreadable one. A file of another size is not read.
    """
    state = file_state(path)
    failure = f"{record.title} is not the file that was recorded: {path} has"
    if record.size_bytes not in (None, state[0]):
        raise ChecksumError(
            f"{failure} {state[0]} bytes, expected {record.size_bytes} as {where} says. "
            f"{record.advice}"
        )
    digest = checksum(path, always_hash=always_hash)
    if digest != record.sha256:
        raise ChecksumError(
            f"{failure} the SHA-256 {digest}, expected {record.sha256} as {where} says. "
            f"{record.advice}"
        )
    return state
