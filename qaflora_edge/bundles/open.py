"""Bundles: a folder with bundle.json and the adapters for one base.

    bundle.json
    adapters/NAME.gguf

Loading compares every file with its record and changes nothing.
"""

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qaflora_edge.errors import BundleError, InputFileError, OptionError, os_errors
from qaflora_edge.files import AnyPath, one_line, open_input, safe_join, what_is_at
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
)
from qaflora_edge.formats.checksums import FileState, check_file, file_state
from qaflora_edge.formats.gguf import GgufHeader, read_gguf_header
from qaflora_edge.progress import Tell
from qaflora_edge.weighing.weigher import Known


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A base and its adapters, each parsed and checked once.

    header           of the base
    adapters         name -> what its file says, in order
    states           each file -> its state when it was checked, for check_unchanged after its use
    known            strategy, lens and pool by default, and what was measured
    system           what conversations begin with, or empty
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
    """A bundle whose files are the recorded ones.

    description_dict  bundle.json as it is, unknown keys included
    """

    folder: Path
    description_dict: Mapping[str, Any] = field(repr=False)


def open_files(base: Path, adapters: Mapping[str, Path]) -> Opened:
    """Parse and check a base and adapters that no bundle records.

    adapters  name -> adapter GGUF

    Raises InputFileError, GgufFileError, UnsupportedAdapterError or AdapterMismatchError.
    """
    paths = (base, *adapters.values())
    states = {path: state for path in paths if (state := file_state(path))}
    header = read_gguf_header(base)
    infos = {name: read_adapter(path, header) for name, path in adapters.items()}
    return Opened(header=header, adapters=infos, states=states)


def open_any(
    bundle: AnyPath | None, base: AnyPath | None, adapters: Mapping[str, AnyPath] | None
) -> Opened:
    """What an Engine is asked to open: a bundle or base alone, or a base with adapters.

    Raises OptionError for both or neither, and as load and open_files do.
    """
    if bundle is not None:
        if base is not None or adapters is not None:
            raise OptionError("Engine got a bundle and also base or adapters; give one of them.")
        return load(Path(bundle))
    if base is None:
        raise OptionError("Engine needs a bundle folder, or base= and adapters=.")
    return open_files(Path(base), {name: Path(path) for name, path in (adapters or {}).items()})


def read_adapter(path: Path, header: GgufHeader, *, are_values_known: bool = False) -> AdapterInfo:
    """Check an adapter GGUF; what was converted had its values checked on its way."""
    info = read_adapter_gguf(path)
    check_adapter(info, header)
    if not are_values_known:
        check_values(info)
    return info


def is_base(place: Path) -> bool:
    """Tell a base alone, which is one GGUF file, from a bundle."""
    return place.suffix.lower() == ".gguf" and os.path.isfile(place)


def base_of(place: Path) -> Path | None:
    """The file of a base alone, or of a bundle's base; None where that is not here."""
    return place if is_base(place) else recorded_base(place, read_bundle_text(place).base)


def load(place: Path) -> Opened:
    """Load a bundle, or a base alone. Raises what load_bundle and open_files do."""
    return open_files(place, {}) if is_base(place) else load_bundle(place)


def verify_bundle(folder: Path, progress: Tell | None = None) -> Bundle:
    """Load a bundle and hash all of its files again, the base included."""
    return load_bundle(folder, always_hash=True, progress=progress)


def read_bundle_text(folder: Path) -> BundleText:
    """Read bundle.json alone; no other file need be there.

    Raises BundleError.
    """
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


def link_roots(folder: Path) -> tuple[Path, ...]:
    """Where links in a folder may lead to besides itself.

    Nowhere, unless it is a snapshot in the Hub's cache: its files are links into that cache.
    """
    snapshot = folder.absolute()
    if snapshot.parent.name != "snapshots":
        return ()
    from qaflora_edge.hub.cache import hub_cache_dir, is_commit

    repo_dir, cache = snapshot.parents[1], hub_cache_dir()
    with contextlib.suppress(OSError):
        is_in_cache = is_commit(snapshot.name) and repo_dir.parent.samefile(cache)
        if is_in_cache and repo_dir.name.startswith("models--"):
            return repo_dir / "blobs", cache / "blobs"  # the second is shared by repositories
    return ()


def recorded_base(folder: Path, base: BaseRecord) -> Path | None:
    """The base's file: where bundle.json says, else where `qaflora pull` puts it, else None."""
    if base.file:
        path = folder / base.file  # an absolute file stays absolute
        with contextlib.suppress(ValueError, OSError):  # a name that no file can have
            if path.is_file():
                return path
    if base.registry and (pulled := registry.pulled_model(base.registry)):
        return pulled
    if base.hub:
        from qaflora_edge.hub.cache import pulled_path

        return pulled_path(base.hub)
    return None


def describe(folder: Path) -> str:
    """A bundle's description as lines to read; its files need not be there."""
    text = read_bundle_text(folder)
    base, known = text.base, text.known
    base_path = recorded_base(folder, base)
    where = str(base_path) if base_path else f"not here: {_how_to_get(folder, base)}"
    lines = [
        f"{text.name or folder.name}" + (f": {text.description}" if text.description else ""),
        f"licence    {text.license or 'not stated'}",
        "base       "
        + (f"{base.name}: " if base.name else "")
        + f"{base.architecture}, {base.n_layer} layers, {base.n_embd} wide, "
        f"vocabulary {base.n_vocab}, {base.size_bytes / 1e6:.0f} MB",
        f"           {where}",
        f"fusion     {known.strategy}, lens {known.lens}, pool {known.pool}"
        + (", calibrated" if _is_calibrated(text) else ""),
        *([f"samples    of {', '.join(known.centroids)}"] if known.centroids else []),
        *(f"fitted     {fit_text(name, fit)}" for name, fit in text.fits.items()),
        *([f"chosen     {text.evidence}"] if text.evidence else []),
        *([f"system     {text.system}"] if text.system else []),
        f"adapters   {len(text.adapters)}",
    ]
    for adapter in text.adapters:
        lines.append(
            f"  {adapter.name:<8} rank {adapter.rank}, alpha {adapter.alpha:g}, on "
            f"{', '.join(adapter.targets)}"
        )
        notes = [adapter.description, adapter.source, adapter.license]
        if adapter.trained_on:
            lines.append(f"  {'':<8} trained on {adapter.trained_on}")
        if any(notes):
            lines.append(f"  {'':<8} {'; '.join(note for note in notes if note)}")
    return "\n".join(map(one_line, lines))


def fit_text(name: str, record: Mapping[str, Any]) -> str:
    """Fitted weights and their evidence, as far as it is recorded, in a line."""
    weights = ", ".join(f"{adapter} {weight:.2f}" for adapter, weight in record["weights"].items())
    task, loss = record.get("task", {}), record.get("loss", {})
    on = f"; {len(task['items'])} examples" if "items" in task else ""
    said = ""
    if {"base", "fitted"} <= loss.keys():
        said = f", loss {loss['base']:.3f} -> {loss['fitted']:.3f}"
    return f"{name}: {weights}{on}{said}"


def _is_calibrated(text: BundleText) -> bool:
    from qaflora_edge.weighing.calibration import KEYS

    typical = [text.known.typical.get(adapter.name, {}) for adapter in text.adapters]
    return bool(typical) and all(key in each for each in typical for key in KEYS)


def load_bundle(folder: Path, *, always_hash: bool = False, progress: Tell | None = None) -> Bundle:
    """Read a bundle, find its base, and compare every file with its record.

    always_hash  also files of which this state (see formats.checksums) was hashed before

    Raises BundleError for a wrong description or folder, ChecksumError for a file that is not
    the recorded one, AdapterMismatchError for an adapter of another base.
    """
    text = read_bundle_text(folder)
    where = str(folder / BUNDLE_FILE)
    adapter_paths = {adapter.name: _adapter_path(folder, adapter) for adapter in text.adapters}
    base_path = recorded_base(folder, text.base)
    if base_path is None:
        raise BundleError(
            f"Cannot open the bundle {folder}: its base ({text.base.architecture}, "
            f"{text.base.size_bytes} bytes) is not here; {_how_to_get(folder, text.base)}."
        )

    states: dict[Path, FileState] = {}

    def check(path: Path, what: str, sha256: str, size_bytes: int | None, advice: str) -> None:
        total = _size_of(path)
        states[path] = check_file(
            path,
            what=what,
            sha256=sha256,
            size_bytes=size_bytes,
            recorded_in=where,
            advice=advice,
            always_hash=always_hash,
            progress=None if progress is None else lambda done: progress(what, done, total),
        )

    base = text.base
    check(base_path, "The base", base.sha256, base.size_bytes, "Fetch the base again.")
    header = read_gguf_header(base_path)
    _check_base_shape(where, base, header)
    infos: dict[str, AdapterInfo] = {}
    for adapter in text.adapters:
        path, what = adapter_paths[adapter.name], f"The adapter {adapter.name}"
        check(path, what, adapter.sha256, adapter.size_bytes, "Copy the bundle again.")
        infos[adapter.name] = read_adapter(path, header)
        _check_adapter_record(where, adapter, infos[adapter.name])
    return Bundle(
        folder=folder,
        header=header,
        adapters=infos,
        known=text.known,
        system=text.system,
        description_dict=text.raw,
        states=states,
    )


def _size_of(path: Path) -> int:
    """Give the size of a file in bytes. Raises InputFileError when it is gone meanwhile."""
    failure = f"Cannot read {path}: examining it failed"
    with os_errors(InputFileError, failure, "Check that it exists and that you may read it."):
        return path.stat().st_size


def _how_to_get(folder: Path, base: BaseRecord) -> str:
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


def _adapter_path(folder: Path, adapter: AdapterRecord) -> Path:
    path = safe_join(folder, adapter.file, link_roots(folder))
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise BundleError(
            f"Cannot open the bundle {folder}: the file of adapter {adapter.name}, {path}, "
            f"{found}; expected the file that {BUNDLE_FILE} names. Copy the bundle again."
        )
    return path


def _check_base_shape(where: str, base: BaseRecord, header: GgufHeader) -> None:
    for key in ("architecture", "n_layer", "n_embd", "n_vocab"):
        found, expected = getattr(base, key), getattr(header, key)
        if found != expected:
            raise BundleError(
                f"Cannot use {where}: field base.{key} is {found}, expected {expected} as in "
                f"the base {header.path}. Create the bundle again with `qaflora bundle create`."
            )


def _check_adapter_record(where: str, adapter: AdapterRecord, info: AdapterInfo) -> None:
    facts = (
        ("rank", adapter.rank, info.rank, adapter.rank == info.rank),
        ("alpha", adapter.alpha, info.alpha, math.isclose(adapter.alpha, info.alpha, rel_tol=1e-6)),
        ("targets", *(sorted(set(t)) for t in (adapter.targets, info.targets)), None),
    )
    for key, found, expected, is_same in facts:
        if not (found == expected if is_same is None else is_same):
            raise BundleError(
                f"Cannot use {where}: field {key} of adapter {adapter.name} is {found}, expected "
                f"{expected} as in {info.path}. Create the bundle again with "
                "`qaflora bundle create`."
            )
