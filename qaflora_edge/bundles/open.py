"""Open a bundle: a folder with bundle.json and the adapters for one base.

    bundle.json
    adapters/NAME.gguf

Opening compares every file with its record and changes nothing.
"""

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qaflora_edge.errors import BundleError, OptionError, QafloraError, os_errors
from qaflora_edge.files import AnyPath, open_input, safe_join, what_is_at
from qaflora_edge.formats import registry
from qaflora_edge.formats.adapter import (
    AdapterInfo,
    check_adapter,
    check_values,
    read_adapter_gguf,
)
from qaflora_edge.formats.bundle import (
    BUNDLE_FILE,
    MAX_BUNDLE_BYTES,
    AdapterRecord,
    BaseRecord,
    BundleText,
    parse_bundle,
    wrong_bundle,
)
from qaflora_edge.formats.checksums import FileState, check_file, file_state
from qaflora_edge.formats.gguf import GgufHeader, read_gguf_header
from qaflora_edge.formats.json_text import WrongField, shown
from qaflora_edge.progress import Tell
from qaflora_edge.weighing.baselines import parse_centroid
from qaflora_edge.weighing.strategy import parse_strategy
from qaflora_edge.weighing.weigher import Known

AGAIN = "Create the bundle again with `qaflora bundle create`."


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A base and its adapters, each parsed and checked once.

    header    of the base
    adapters  name -> facts of its file, in order
    states    file -> its state when it was checked, for check_unchanged after its use
    known     default strategy, lens and pool, and measurements of the adapters
    system    system message of conversations that have none, or empty
    """

    header: GgufHeader = field(repr=False)
    adapters: Mapping[str, AdapterInfo] = field(repr=False)
    states: Mapping[Path, FileState] = field(repr=False)
    known: Known = field(default_factory=Known)
    system: str = field(default="", repr=False)

    @property
    def base_path(self) -> Path:
        return self.header.path

    @property
    def adapter_paths(self) -> dict[str, Path]:
        return {name: info.path for name, info in self.adapters.items()}


@dataclass(frozen=True, kw_only=True)
class Bundle(Opened):
    """A bundle with the recorded files."""

    folder: Path
    text: BundleText = field(repr=False)


def open_any(
    bundle: AnyPath | None, base: AnyPath | None, adapters: Mapping[str, AnyPath] | None
) -> Opened:
    """Open a bundle or a base alone, or a base with adapters.

    adapters  name -> adapter GGUF

    Raises OptionError for both or neither, InputFileError, GgufFileError, AdapterMismatchError or
    UnsupportedAdapterError for a file, and as load_bundle does.
    """
    if bundle is not None and (base is not None or adapters is not None):
        raise OptionError("Engine got a bundle and also base or adapters; give one of them.")
    if bundle is not None and not is_base(Path(bundle)):
        return load_bundle(Path(bundle))
    base_path = base if bundle is None else bundle
    if base_path is None:
        raise OptionError("Engine needs a bundle folder, or base= and adapters=.")
    paths = {name: Path(path) for name, path in (adapters or {}).items()}
    files = (Path(base_path), *paths.values())
    states = {path: state for path in files if (state := file_state(path))}
    header = read_gguf_header(base_path)
    infos = {name: read_adapter(path, header) for name, path in paths.items()}
    return Opened(header=header, adapters=infos, states=states)


def read_adapter(path: Path, header: GgufHeader) -> AdapterInfo:
    """Read an adapter GGUF and check it against its base, values included."""
    info = read_adapter_gguf(path)
    check_adapter(info, header)
    check_values(info)
    return info


def is_base(place: Path) -> bool:
    """Tell a base alone, which is one GGUF file, from a bundle."""
    return place.suffix.lower() == ".gguf" and os.path.isfile(place)


def base_of(place: Path) -> Path | None:
    """Find the file of a base alone, or of a bundle's base; None where it is not here."""
    return place if is_base(place) else recorded_base(place, read_bundle_text(place).base)


def read_bundle_text(folder: Path) -> BundleText:
    """Read bundle.json alone; no other file need be there. Raises BundleError."""
    if not os.path.isdir(folder):
        raise BundleError(
            f"Cannot open the bundle {folder}: it {what_is_at(folder)}, expected a folder with "
            f"{BUNDLE_FILE}. Give the folder of a bundle, or make one with `qaflora bundle create`."
        )
    path = safe_join(folder, BUNDLE_FILE, link_roots(folder))
    if not path.is_file():
        raise BundleError(
            f"Cannot open the bundle {folder}: there is no file {BUNDLE_FILE} in it. "
            "Give the folder of a bundle, or make one with `qaflora bundle create`."
        )
    failure = f"Cannot open the bundle {folder}: reading {BUNDLE_FILE} failed"
    with os_errors(BundleError, failure, "Check that you may read it."), open_input(path) as file:
        data = file.read(MAX_BUNDLE_BYTES + 1)
    return parse_bundle(data, str(path))


def known_of(text: BundleText) -> Known:
    """Collect what a bundle says of weighing.

    Raises BundleError for a strategy that is not for its adapters, or a damaged sample embedding.
    """
    fusion, names = text.fusion, [adapter.name for adapter in text.adapters]
    pool = fusion.get("pool")
    strategy = _manual(fusion) or fusion.get("strategy")
    known = Known().under(
        strategy=strategy, lens=fusion.get("lens"), pool=None if pool == "mean" else pool
    )
    try:
        parse_strategy(known.strategy, names)
    except QafloraError as error:
        expected = f"a strategy for these adapters ({error})"
        wrong = WrongField("fusion.strategy", shown(known.strategy), expected)
        raise wrong_bundle(text.where, wrong) from error
    centroids = {}
    n_embd = text.base.n_embd
    for name, record in fusion.get("samples", {}).items():
        try:
            centroids[name] = parse_centroid(record["embedding"], n_embd)
        except ValueError as error:
            expected = f"base64 of {n_embd} finite float32 numbers, not all 0"
            wrong = WrongField(f"fusion.samples.{name}.embedding", str(error), expected)
            raise wrong_bundle(text.where, wrong) from error
    return replace(known, typical=fusion.get("typical", {}), centroids=centroids)


def _manual(fusion: Mapping[str, Any]) -> str | None:
    """Give `fitted:NAME` of older bundles as the manual weights that it stood for."""
    kind, _, name = fusion.get("strategy", "").partition(":")
    fits = fusion.get("fitted", {})
    if kind != "fitted" or not isinstance(fits, dict):
        return None
    record = fits.get(name) if name else next(iter(fits.values()), None)
    weights = record.get("weights") if isinstance(record, dict) else None
    if not isinstance(weights, dict) or not weights:
        return None
    return "manual:" + ",".join(f"{adapter}={weight}" for adapter, weight in weights.items())


def link_roots(folder: Path) -> tuple[Path, ...]:
    """Name the folders that links in a folder may lead to, besides itself.

    None, unless it is a snapshot in the Hub's cache: its files are links into that cache.
    """
    snapshot = folder.absolute()
    if snapshot.parent.name != "snapshots":
        return ()
    from qaflora_edge.hub.local import hub_cache_dir, is_commit

    repo_dir, cache = snapshot.parents[1], hub_cache_dir()
    with contextlib.suppress(OSError):
        is_in_cache = is_commit(snapshot.name) and repo_dir.parent.samefile(cache)
        if is_in_cache and repo_dir.name.startswith("models--"):
            return repo_dir / "blobs", cache / "blobs"  # the second is shared by repositories
    return ()


def recorded_base(folder: Path, base: BaseRecord) -> Path | None:
    """Find the base where bundle.json says, else where `qaflora pull` puts it, else None."""
    if base.file:
        path = folder / base.file  # an absolute file stays absolute
        with contextlib.suppress(ValueError, OSError):  # a name that no file can have
            if path.is_file():
                return path
    if base.registry and (pulled := registry.pulled_model(base.registry)):
        return pulled
    if base.hub:
        from qaflora_edge.hub.local import pulled_path

        return pulled_path(base.hub)
    return None


def verify_bundle(folder: Path, progress: Tell | None = None) -> Bundle:
    """Load a bundle and hash all of its files again, the base included."""
    return load_bundle(folder, always_hash=True, progress=progress)


def load_bundle(folder: Path, *, always_hash: bool = False, progress: Tell | None = None) -> Bundle:
    """Read a bundle, find its base, and compare every file with its record.

    always_hash  also files of which this state (see formats.checksums) was hashed before

    Raises BundleError for a wrong description or folder, ChecksumError for a file that is not
    the recorded one, AdapterMismatchError for an adapter of another base.
    """
    text = read_bundle_text(folder)
    known = known_of(text)
    base_path = recorded_base(folder, text.base)
    if base_path is None:
        raise BundleError(
            f"Cannot open the bundle {folder}: its base ({text.base.architecture}, "
            f"{text.base.size_bytes} bytes) is not here; {how_to_get_base(folder, text.base)}."
        )
    states: dict[Path, FileState] = {}

    def check(path: Path, what: str, record: BaseRecord | AdapterRecord, advice: str) -> None:
        def tell(done: int) -> None:
            if progress is not None:
                progress(what, done, record.size_bytes or done)

        states[path] = check_file(
            path,
            what=what,
            sha256=record.sha256,
            size_bytes=record.size_bytes,
            recorded_in=text.where,
            advice=advice,
            always_hash=always_hash,
            progress=tell,
        )

    roots = link_roots(folder)
    paths = {adapter.name: _adapter_path(folder, adapter, roots) for adapter in text.adapters}
    check(base_path, "The base", text.base, "Fetch the base again.")
    header = read_gguf_header(base_path)
    _check_base_shape(text, header)
    infos: dict[str, AdapterInfo] = {}
    for adapter in text.adapters:
        path = paths[adapter.name]
        check(path, f"The adapter {adapter.name}", adapter, "Copy the bundle again.")
        infos[adapter.name] = read_adapter(path, header)
        _check_adapter_record(text.where, adapter, infos[adapter.name])
    return Bundle(
        folder=folder,
        header=header,
        adapters=infos,
        known=known,
        system=text.system,
        text=text,
        states=states,
    )


def how_to_get_base(folder: Path, base: BaseRecord) -> str:
    """Say which command finds a base that is not here."""
    looked = f"{folder / base.file} does not exist; " if base.file else ""
    name = base.registry or base.hub
    pull = f"fetch it with `qaflora pull {name}`" if name else ""
    if pull and not looked:
        return pull
    moved = (
        f"if it was moved, name it with `qaflora bundle base {folder} FILE` (its SHA-256 is "
        f"{base.sha256})"
    )
    return f"{looked}{moved}{f', else {pull}' if pull else ''}"


def _adapter_path(folder: Path, adapter: AdapterRecord, roots: tuple[Path, ...]) -> Path:
    path = safe_join(folder, adapter.file, roots)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise BundleError(
            f"Cannot open the bundle {folder}: the file of adapter {adapter.name}, {path}, "
            f"{found}; expected the file that {BUNDLE_FILE} names. Copy the bundle again."
        )
    return path


def _check_base_shape(text: BundleText, header: GgufHeader) -> None:
    for key in ("architecture", "n_layer", "n_embd", "n_vocab"):
        found, expected = getattr(text.base, key), getattr(header, key)
        if found != expected:
            raise BundleError(
                f"Cannot use {text.where}: field base.{key} is {found}, expected {expected} as in "
                f"the base {header.path}. {AGAIN}"
            )


def _check_adapter_record(where: str, adapter: AdapterRecord, info: AdapterInfo) -> None:
    targets, expected_targets = sorted({*adapter.targets}), sorted({*info.targets})
    is_alpha = math.isclose(adapter.alpha, info.alpha, rel_tol=1e-6)
    for key, found, expected, is_same in (
        ("rank", adapter.rank, info.rank, adapter.rank == info.rank),
        ("alpha", adapter.alpha, info.alpha, is_alpha),
        ("targets", targets, expected_targets, targets == expected_targets),
    ):
        if not is_same:
            raise BundleError(
                f"Cannot use {where}: field {key} of adapter {adapter.name} is {found}, expected "
                f"{expected} as in {info.path}. {AGAIN}"
            )
