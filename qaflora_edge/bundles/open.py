"""Open a bundle: a folder with bundle.json and the adapters for one base.

    bundle.json
    adapters/NAME.gguf

Opening compares every file with its record and changes nothing.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qaflora_edge.errors import BundleError, OptionError, QafloraError
from qaflora_edge.files import AnyPath
from qaflora_edge.formats.adapter import AdapterInfo, read_with_adapters
from qaflora_edge.formats.bundle import (
    AdapterRecord,
    BaseRecord,
    BundleText,
    adapter_paths,
    is_base,
    read_bundle_text,
    wrong_bundle,
)
from qaflora_edge.formats.checksums import FileState, check_file, file_state
from qaflora_edge.formats.gguf import GgufHeader
from qaflora_edge.formats.json_text import WrongField, shown
from qaflora_edge.formats.names import pulled_model
from qaflora_edge.progress import Tell, silent
from qaflora_edge.weighing.strategy import parse_strategy
from qaflora_edge.weighing.weigher import Known


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
    states = {path: file_state(path) for path in files}
    header, infos = read_with_adapters(Path(base_path), paths)
    return Opened(header=header, adapters=infos, states=states)


def base_of(place: Path) -> Path | None:
    """Find the file of a base alone, or of a bundle's base; None where it is not here."""
    return place if is_base(place) else recorded_base(place, read_bundle_text(place).base)


def known_of(text: BundleText) -> Known:
    """Collect what a bundle says of weighing.

    Raises BundleError for a strategy that is not for its adapters, or a damaged sample embedding.
    """
    fusion, names = text.fusion, [adapter.name for adapter in text.adapters]
    pool = fusion.get("pool")
    strategy = _manual(fusion) or fusion.get("strategy")
    pool = None if pool == "mean" else pool
    known = Known().under(strategy=strategy, lens=fusion.get("lens"), pool=pool)
    try:
        parse_strategy(known.strategy, names)
    except QafloraError as error:
        expected = f"a strategy for these adapters ({error})"
        wrong = WrongField("fusion.strategy", shown(known.strategy), expected)
        raise wrong_bundle(text.where, wrong) from error
    centroids, n_embd = {}, text.base.n_embd
    for name, record in fusion.get("samples", {}).items():
        from qaflora_edge.weighing.baselines import parse_centroid

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


def recorded_base(folder: Path, base: BaseRecord) -> Path | None:
    """Find the base where bundle.json says, else where `qaflora pull` puts it, else None."""
    if base.file:
        path = folder / base.file  # an absolute file stays absolute
        with contextlib.suppress(ValueError, OSError):  # a name that no file can have
            if path.is_file():
                return path
    if base.registry and (pulled := pulled_model(base.registry)):
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
    paths = adapter_paths(folder, text)
    base_path = recorded_base(folder, text.base)
    if base_path is None:
        raise BundleError(
            f"Cannot open the bundle {folder}: its base ({text.base.architecture}, "
            f"{text.base.size_bytes} bytes) is not here; {how_to_get_base(folder, text.base)}."
        )
    files: list[tuple[Path, BaseRecord | AdapterRecord]] = [(base_path, text.base)]
    files += [(paths[record.name], record) for record in text.adapters]
    states: dict[Path, FileState] = {}
    for path, record in files:
        (progress or silent)("Checking", len(states), len(files))
        states[path] = check_file(path, record, text.where, always_hash=always_hash)
    header, infos = read_with_adapters(base_path, paths)
    _check_base_record(text, header)
    return Bundle(
        folder=folder,
        header=header,
        adapters=infos,
        known=known_of(text),
        system=text.system,
        text=text,
        states=states,
    )


def how_to_get_base(folder: Path, base: BaseRecord) -> str:
    """Say which command finds a base that is not here."""
    looked = f"{folder / base.file} does not exist; " if base.file else ""
    name = base.registry or base.hub
    pull = f"fetch it with `qaflora pull {name}`, or " if name else ""
    named = f"name it with `qaflora bundle base {folder} FILE` (its SHA-256 is {base.sha256})"
    return f"{looked}{pull}{named}"


def _check_base_record(text: BundleText, header: GgufHeader) -> None:
    """Compare what bundle.json says of the base with the header of its file."""
    for key in ("architecture", "n_layer", "n_embd", "n_vocab"):
        found, expected = getattr(text.base, key), getattr(header, key)
        if found != expected:
            raise BundleError(
                f"Cannot use {text.where}: field base.{key} is {found}, expected {expected} as in "
                f"{header.path}. Create the bundle again with `qaflora bundle create`."
            )
