"""Open a bundle: a folder with bundle.json and the adapters for one base.

    bundle.json
    adapters/NAME.gguf

Opening compares every file with its record and changes nothing.
"""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qaflora_edge.errors import BundleError, QafloraError, changed_file
from qaflora_edge.files import one_line
from qaflora_edge.formats.bundle import (
    BUNDLE_FILE,
    TAUGHT_FILE,
    AdapterRecord,
    BaseRecord,
    BundleText,
    adapter_paths,
    check_file,
    is_base,
    read_bundle_text,
    safe_join,
)
from qaflora_edge.formats.gguf import GgufHeader, read_gguf_header
from qaflora_edge.formats.inputs import (
    FileState,
    file_state,
    is_remembered,
    passed,
    remember_passed,
    shown,
)
from qaflora_edge.progress import Tell, silent
from qaflora_edge.weighing.weigher import WeighingFacts, known_of

if TYPE_CHECKING:
    from qaflora_edge.formats.adapter import AdapterInfo

MAX_EDITS = 5  # of a bundle while it is opened
Begin = Callable[[GgufHeader], None]


@dataclass(frozen=True, kw_only=True)
class BundleFiles:
    """A base and its adapters, each parsed and checked once.

    path      folder of the bundle, or the base's file
    header    of the base
    adapters  name -> facts of its file, in order
    states    file -> its state when it was checked, for check_unchanged after its use
    known     default strategy, lens and pool, and measurements of the adapters
    text      what bundle.json says, of a bundle
    """

    path: Path
    header: GgufHeader = field(repr=False)
    adapters: "Mapping[str, AdapterInfo]" = field(repr=False)
    states: Mapping[Path, FileState] = field(repr=False)
    known: WeighingFacts
    text: BundleText | None = field(repr=False)

    @property
    def base_path(self) -> Path:
        return self.header.path

    @property
    def adapter_paths(self) -> dict[str, Path]:
        return {name: info.path for name, info in self.adapters.items()}


def load_bundle(
    path: Path,
    adapters: Mapping[str, Path] | None = None,
    *,
    always_hash: bool = False,
    progress: Tell = silent,
    begin: Begin = lambda header: None,
    use: Callable[[BundleFiles], None] = lambda opened: None,
) -> BundleFiles:
    """Read a base and adapters; compare the files of a bundle with their records.

    A bundle that is edited meanwhile is read again: files of one state belong together.

    path         a bundle's folder, or the file of a base
    adapters     name -> adapter GGUF, with a base
    always_hash  hash and check also files that are known in this state: see formats.inputs
    begin        called with the base's header once it is checked, before adapters are read
    use          called with what was read; an edit until it returns counts too

    Raises BundleError for a wrong description or folder, ChecksumError for a file that is not the
    recorded one, InputFileError, GgufFileError, AdapterMismatchError or UnsupportedAdapterError
    for a file that cannot be used.
    """
    for _ in range(MAX_EDITS):
        edit = _last_edit(path)
        try:
            opened = _read_files(path, adapters, always_hash, progress, begin)
            use(opened)
            return opened
        except QafloraError:
            if _last_edit(path) == edit:
                raise
    raise changed_file(path / BUNDLE_FILE, BundleError)


def _last_edit(path: Path) -> tuple[int, int]:
    """Give time and number of bundle.json: each edit replaces the file. A base alone has none."""
    with suppress(OSError):
        status = os.stat(path / BUNDLE_FILE)
        return status.st_mtime_ns, status.st_ino
    return 0, 0


def _read_files(
    path: Path,
    adapters: Mapping[str, Path] | None,
    always_hash: bool,
    progress: Tell,
    begin: Begin,
) -> BundleFiles:
    """Read a bundle's text and the files that it names, or the given ones, and check them all.

    What reading values finds is remembered: files that are known good passed it before.
    """
    from qaflora_edge.formats.adapter import read_adapter
    from qaflora_edge.formats.base import check_base, check_record

    text = None
    base = path
    if adapters is None and not is_base(path):
        text = read_bundle_text(path)
        adapters = adapter_paths(path, text)
        recorded = recorded_base(path, text.base)
        if recorded is None:
            raise BundleError(
                f"Cannot open the bundle {path}: its base ({text.base.architecture}, "
                f"{text.base.size_bytes} bytes) is not here; {how_to_get_base(path, text.base)}."
            )
        base = recorded
    adapters = adapters or {}
    states = _check_files(text, [base, *adapters.values()], always_hash, progress)
    known_good = set() if always_hash else passed(states, base)
    header = read_gguf_header(base)
    check_base(header, checks_tokens=base not in known_good)
    if text is not None:
        check_record(text, header)
    begin(header)
    infos: dict[str, AdapterInfo] = {}
    for name, adapter_path in adapters.items():
        adapter = read_gguf_header(adapter_path)
        infos[name] = read_adapter(adapter, header, checks_values=adapter_path not in known_good)
    if states.keys() != known_good:
        remember_passed(states, base)
    return BundleFiles(
        path=path, header=header, adapters=infos, states=states, known=known_of(text), text=text
    )


def _check_files(
    text: BundleText | None, paths: Sequence[Path], always_hash: bool, progress: Tell
) -> dict[Path, FileState]:
    """Compare base and adapters with their records, where they have some, and give their states."""
    if text is None:
        return {path: file_state(path) for path in paths}
    records: list[BaseRecord | AdapterRecord] = [text.base, *text.adapters]
    states: dict[Path, FileState] = {}
    for path, record in zip(paths, records, strict=True):
        progress("Checking", len(states), len(records))
        states[path] = check_file(path, record, text.where, always_hash=always_hash)
    return states


def verify_bundle(folder: Path, progress: Tell = silent) -> BundleFiles:
    """Load a bundle and hash all of its files again, the base included; check its examples."""
    from qaflora_edge.bundles.taught import Header, read_lines

    files = load_bundle(folder, always_hash=True, progress=progress)
    assert files.text is not None
    base = files.text.base
    read_lines(safe_join(folder, TAUGHT_FILE), Header(1, base.sha256, base.n_embd))
    return files


def recorded_base(folder: Path, base: BaseRecord) -> Path | None:
    """Find the base where bundle.json says, else where `qaflora pull` puts it, else None.

    A file outside of the bundle is looked at only where a command hashed it on this machine and
    found the recorded SHA-256, as `create` and `base` do: bundle.json may come from anybody.
    """
    from qaflora_edge.formats.names import pulled_model

    if base.file and may_be_read(folder, base) and os.path.isfile(folder / base.file):
        return folder / base.file  # an absolute file stays absolute
    if base.hub:
        from qaflora_edge.hub import pulled_path

        path = pulled_path(base.hub)
        if path is not None:
            return path
    return pulled_model(base.registry) if base.registry else None


def unmeasured(folder: Path, text: BundleText | None) -> str:
    """Say so where measuring was ended before it was done, and which command does it; else ""."""
    if text is None or text.fusion.when_measured is None:
        return ""
    strategy = text.fusion.when_measured
    command = ["qaflora", "bundle", "calibrate", str(folder), "--strategy", strategy]
    return one_line(
        f"{folder} works, but is not measured: {text.fusion.strategy} weighs it in place of "
        f"{strategy}. `{shlex.join(command)}` finishes it."
    )


def may_be_read(folder: Path, base: BaseRecord) -> bool:
    """Tell whether `base.file` lies in the bundle's folder, or was named on this machine."""
    file = base.file or ""
    with suppress(BundleError):
        safe_join(folder, file)
        return True
    return is_remembered(folder / file, base.sha256)


def how_to_get_base(folder: Path, base: BaseRecord) -> str:
    """Say which command finds a base that is not here."""
    looked = ""
    if base.file and may_be_read(folder, base):
        looked = f"{folder / base.file} does not exist; "
    elif base.file:
        looked = f"{shown(base.file)} lies outside of the bundle and was never named here; "
    name = base.registry or base.hub
    pull = f"fetch it with `qaflora pull {name}`, or " if name else ""
    named = f"name it with `qaflora bundle base {folder} FILE` (its SHA-256 is {base.sha256})"
    return f"{looked}{pull}{named}"
