"""Open a bundle: a folder with bundle.json and the adapters for one base.

    bundle.json
    adapters/NAME.gguf

Opening compares every file with its record and changes nothing.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qaflora_edge.errors import BundleError, OptionError, QafloraError
from qaflora_edge.files import AnyPath
from qaflora_edge.formats.bundle import (
    BUNDLE_FILE,
    AdapterRecord,
    BaseRecord,
    BundleText,
    adapter_paths,
    is_base,
    read_bundle_text,
)
from qaflora_edge.formats.gguf import GgufHeader, read_gguf_header
from qaflora_edge.formats.inputs import (
    FileState,
    changed,
    check_file,
    file_state,
    passed,
    remember_passed,
)
from qaflora_edge.progress import Tell, silent
from qaflora_edge.weighing.weigher import Known, known_of

if TYPE_CHECKING:
    from qaflora_edge.formats.adapter import AdapterInfo

MAX_EDITS = 5  # of a bundle while it is opened
Begin = Callable[[GgufHeader], None]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A base and its adapters, each parsed and checked once.

    place     folder of the bundle, or the base's file
    header    of the base
    adapters  name -> facts of its file, in order
    states    file -> its state when it was checked, for check_unchanged after its use
    known     default strategy, lens and pool, and measurements of the adapters
    text      what bundle.json says, of a bundle
    edit      of bundle.json, the last one that is in it
    """

    place: Path
    header: GgufHeader = field(repr=False)
    adapters: "Mapping[str, AdapterInfo]" = field(repr=False)
    states: Mapping[Path, FileState] = field(repr=False)
    known: Known
    text: BundleText | None = field(repr=False)
    edit: tuple[int, int] = (0, 0)

    @property
    def base_path(self) -> Path:
        return self.header.path

    @property
    def adapter_paths(self) -> dict[str, Path]:
        return {name: info.path for name, info in self.adapters.items()}


def open_any(
    bundle: AnyPath | None,
    base: AnyPath | None,
    adapters: Mapping[str, AnyPath] | None,
    begin: Begin = lambda header: None,
) -> Opened:
    """Open a bundle or a base alone, or a base with adapters.

    adapters  name -> adapter GGUF
    begin     called with the base's header once it is checked, before adapters are read

    Raises OptionError for both or neither, and as load_bundle does.
    """
    if bundle is not None and (base is not None or adapters is not None):
        raise OptionError("Engine got a bundle and also base or adapters; give one of them.")
    if bundle is not None:
        return load_bundle(Path(bundle), begin=begin)
    if base is None:
        raise OptionError("Engine needs a bundle folder, or base= and adapters=.")
    paths = {name: Path(path) for name, path in (adapters or {}).items()}
    return load_bundle(Path(base), paths, begin=begin)


def load_bundle(
    place: Path,
    adapters: Mapping[str, Path] | None = None,
    *,
    always_hash: bool = False,
    progress: Tell = silent,
    begin: Begin = lambda header: None,
) -> Opened:
    """Read a base and adapters; compare the files of a bundle with their records.

    A bundle that is edited meanwhile is read again: files of one state belong together.

    place        a bundle's folder, or the file of a base
    adapters     name -> adapter GGUF, with a base
    always_hash  hash and check also files that are known in this state: see formats.inputs

    Raises BundleError for a wrong description or folder, ChecksumError for a file that is not the
    recorded one, InputFileError, GgufFileError, AdapterMismatchError or UnsupportedAdapterError
    for a file that cannot be used.
    """
    if adapters is not None or is_base(place):
        return _load(place, None, adapters or {}, always_hash, progress, begin)
    for _ in range(MAX_EDITS):
        edit = _last_edit(place)
        text = read_bundle_text(place)
        try:
            paths = adapter_paths(place, text)
            opened = _load(place, text, paths, always_hash, progress, begin)
            return replace(opened, edit=edit)
        except QafloraError:
            if _last_edit(place) == edit:
                raise
    raise changed(Path(text.where), BundleError)


def is_edited(opened: Opened) -> bool:
    """Tell whether bundle.json was written since."""
    return opened.text is not None and _last_edit(opened.place) != opened.edit


def _last_edit(place: Path) -> tuple[int, int]:
    """Give time and number of bundle.json: each edit replaces the file."""
    with suppress(OSError):
        status = os.stat(place / BUNDLE_FILE)
        return status.st_mtime_ns, status.st_ino
    return 0, 0


def _load(
    place: Path,
    text: BundleText | None,
    paths: Mapping[str, Path],
    always_hash: bool,
    progress: Tell,
    begin: Begin,
) -> Opened:
    from qaflora_edge.formats.adapter import read_adapter
    from qaflora_edge.formats.base import check_base, check_record

    base_path = place
    states: dict[Path, FileState] = {}
    if text is None:
        states = {path: file_state(path) for path in (place, *paths.values())}
    else:
        recorded = recorded_base(place, text.base)
        if recorded is None:
            raise BundleError(
                f"Cannot open the bundle {place}: its base ({text.base.architecture}, "
                f"{text.base.size_bytes} bytes) is not here; {how_to_get_base(place, text.base)}."
            )
        base_path = recorded
        records: list[BaseRecord | AdapterRecord] = [text.base, *text.adapters]
        for path, record in zip((base_path, *paths.values()), records, strict=True):
            progress("Checking", len(states), len(records))
            states[path] = check_file(path, record, text.where, always_hash=always_hash)
    known_good = set() if always_hash else passed(states, base_path)
    header = read_gguf_header(base_path)
    check_base(header, checks_tokens=base_path not in known_good)
    if text is not None:
        check_record(text, header)
    begin(header)
    infos: dict[str, AdapterInfo] = {}
    for name, path in paths.items():
        adapter = read_gguf_header(path)
        infos[name] = read_adapter(adapter, header, checks_values=path not in known_good)
    if states.keys() != known_good:
        remember_passed(states, base_path)
    known = known_of(text)
    return Opened(place=place, header=header, adapters=infos, states=states, known=known, text=text)


def verify_bundle(folder: Path, progress: Tell = silent) -> Opened:
    """Load a bundle and hash all of its files again, the base included."""
    return load_bundle(folder, always_hash=True, progress=progress)


def recorded_base(folder: Path, base: BaseRecord) -> Path | None:
    """Find the base where bundle.json says, else where `qaflora pull` puts it, else None."""
    from qaflora_edge.formats.names import pulled_model

    with suppress(ValueError, OSError):  # a name that no file can have
        if base.file and (folder / base.file).is_file():  # an absolute file stays absolute
            return folder / base.file
    if base.hub:
        from qaflora_edge.hub import pulled_path

        path = pulled_path(base.hub)
        if path is not None:
            return path
    return pulled_model(base.registry) if base.registry else None


def how_to_get_base(folder: Path, base: BaseRecord) -> str:
    """Say which command finds a base that is not here."""
    looked = f"{folder / base.file} does not exist; " if base.file else ""
    name = base.registry or base.hub
    pull = f"fetch it with `qaflora pull {name}`, or " if name else ""
    named = f"name it with `qaflora bundle base {folder} FILE` (its SHA-256 is {base.sha256})"
    return f"{looked}{pull}{named}"
