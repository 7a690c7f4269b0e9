"""Change a bundle: its adapters, and where its base lies.

bundle.json is replaced last, in one step.

Files that a step may leave unused are first named in a note beside bundle.json. Whoever edits the
bundle next, after a crash too, removes those that bundle.json does not name.
"""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qaflora_edge.bundles.open import link_roots, load_bundle, read_bundle_text
from qaflora_edge.bundles.source import find_adapter, find_base
from qaflora_edge.bundles.write import (
    adapter_record,
    check_measured,
    check_names,
    check_strategy,
    check_targets,
    measure_typical,
    prompts_record,
    put_adapter,
    recordable,
    write_bundle_json,
)
from qaflora_edge.errors import BundleError, OutputFileError, StrategyError, os_errors
from qaflora_edge.files import (
    AnyPath,
    atomic_path,
    cache_lock,
    check_takes_file,
    read_input,
    remove_left_overs,
    safe_join,
    write_text_atomic,
)
from qaflora_edge.formats.bundle import BUNDLE_FILE, BundleText
from qaflora_edge.formats.checksums import check_file
from qaflora_edge.formats.json_text import read_json_object
from qaflora_edge.progress import Tell, silent
from qaflora_edge.weighing import numbers as fuse
from qaflora_edge.weighing.calibration import KEYS
from qaflora_edge.weighing.strategy import parse_strategy

_OF_ADAPTERS = ("typical", "samples")  # of fusion: what is measured of each adapter, by its name

UNFINISHED_FILE = ".unfinished.json"
MAX_UNFINISHED_BYTES = 1 << 16


def add_adapter(folder: AnyPath, name: str, source: AnyPath, **options: Any) -> None:
    """Add one adapter to a bundle, with the options of add_adapters."""
    add_adapters(folder, {name: source}, **options)


def add_adapters(
    folder: AnyPath,
    adapters: Mapping[str, AnyPath] | Sequence[tuple[str, AnyPath]],
    *,
    outtype: str = "f16",
    note: Mapping[str, str] | None = None,
    calibrate: bool = True,
    strategy: str | None = None,
    progress: Tell | None = None,
) -> None:
    """Add adapters to a bundle.

    adapters   name -> a PEFT folder, an adapter GGUF, or a Hub reference to one of them
    outtype    of a converted adapter: f32, f16, bf16 or q8_0
    note       source, license, description of each
    calibrate  measure them, and the others where they were not measured on the same prompts
    strategy   what an Engine takes by default from now on

    Raises a QafloraError and leaves the bundle as it was when anything fails.
    """
    folder = Path(folder)
    tell = progress or silent
    with editing(folder) as (_, raw):
        loaded = load_bundle(folder)
        pairs = list(adapters.items() if isinstance(adapters, Mapping) else adapters)
        new = [name for name, _ in pairs]
        names = [*loaded.adapter_paths, *new]
        check_names(names, new)
        fusion = raw.setdefault("fusion", {})
        what = f"Cannot add the adapter{'s' * (len(new) > 1)} {', '.join(new)} to {folder}"
        if strategy is not None:
            fusion["strategy"] = strategy
        needed = fusion.get("strategy", fuse.DEFAULT_STRATEGY)
        check_measured(what, needed, names, calibrate=calibrate)
        found = {name: find_adapter(source, tell) for name, source in pairs}
        files = {name: _new_file(folder, name, raw) for name in found}
        _note_unfinished(folder, [*files.values()])
        for name, source in found.items():
            info = put_adapter(source, folder / files[name], loaded.header, outtype)
            raw["adapters"].append(adapter_record(name, files[name], info, source, note or {}))
        check_targets(what, needed, raw["adapters"])
        if calibrate:
            added = {name: folder / file for name, file in files.items()}
            _calibrate(folder, raw, loaded.base_path, {**loaded.adapter_paths, **added}, tell)
        check_strategy(what, fusion, raw["adapters"], loaded.header.n_layer)


def remove_adapter(folder: AnyPath, name: str, *, strategy: str | None = None) -> None:
    """Remove an adapter from a bundle; its own files need not be whole.

    strategy  what an Engine takes by default from now on

    Raises BundleError when there is no such adapter, or when the bundle's strategy needs it.
    """
    folder = Path(folder)
    with editing(folder) as (text, raw):
        what = f"Cannot remove the adapter {name} from {folder}"
        index = adapter_index(folder, text, name)
        del raw["adapters"][index]
        left = [adapter.name for adapter in text.adapters if adapter.name != name]
        if strategy is not None:
            parse_strategy(strategy, left)
            raw.setdefault("fusion", {})["strategy"] = strategy
        fusion = raw.get("fusion", {})
        for key in _OF_ADAPTERS:
            fusion.get(key, {}).pop(name, None)
        if "fitted" in fusion:  # what was fitted with it is no more
            fits = fusion["fitted"].items()
            fusion["fitted"] = {key: fit for key, fit in fits if not fit["weights"].pop(name, 0)}
        needed = fusion.get("strategy", fuse.DEFAULT_STRATEGY)
        try:
            parse_strategy(needed, left)
        except StrategyError as error:
            raise BundleError(
                f"{what}: the strategy {needed!r} needs it. Choose another with --strategy."
            ) from error
        if strategy is not None:
            check_strategy(what, fusion, raw["adapters"], text.base.n_layer)
        _note_unfinished(folder, [text.adapters[index].file])


def rename_adapter(folder: AnyPath, old: str, new: str) -> None:
    """Rename an adapter of a bundle, in its strategy and measurements too.

    Its file is renamed when it has the adapter's name. Raises BundleError when there is no such
    adapter, or when the new name cannot be used.
    """
    folder = Path(folder)
    with editing(folder) as (text, raw):
        index = adapter_index(folder, text, old)
        check_names([*(a.name for a in text.adapters if a.name != old), new], [new])
        record = raw["adapters"][index]
        record["name"] = new
        fusion = raw.get("fusion", {})
        for kind in _OF_ADAPTERS:
            if kind in fusion:
                fusion[kind] = _renamed_key(fusion[kind], old, new)
        for fit in fusion.get("fitted", {}).values():
            fit["weights"] = _renamed_key(fit["weights"], old, new)
        if "strategy" in fusion:
            fusion["strategy"] = _renamed_strategy(fusion["strategy"], old, new)
        # On a disk that knows no capitals the two would be one file.
        if record["file"].lower() == f"adapters/{old}.gguf".lower() and old.lower() != new.lower():
            record["file"] = _new_file(folder, new, raw)
            _note_unfinished(folder, [text.adapters[index].file, record["file"]])
            _link(safe_join(folder, text.adapters[index].file), folder / record["file"])


def calibrate(
    folder: AnyPath, *, strategy: str | None = None, progress: Tell | None = None
) -> bool:
    """Measure the adapters that were not measured on the prompts of now.

    strategy  what an Engine takes by default from now on
    returns   whether there was anything to measure
    """
    folder = Path(folder)
    with editing(folder) as (text, raw):
        loaded = load_bundle(folder)
        what = f"Cannot weigh {folder} by {strategy}"
        if strategy is not None:
            check_targets(what, strategy, raw["adapters"])
        _calibrate(folder, raw, loaded.base_path, loaded.adapter_paths, progress or silent)
        is_new = raw != text.raw
        fusion = raw["fusion"]
        if strategy not in (None, fusion.get("strategy")):
            fusion["strategy"] = strategy
            fusion.pop("evidence", None)  # it was for another
            check_strategy(what, fusion, raw["adapters"], text.base.n_layer)
    return is_new


def check_can_change(folder: AnyPath) -> None:
    """Raise what a change of a bundle would raise, before work that ends with one."""
    with editing(Path(folder)):
        check_takes_file(Path(folder, BUNDLE_FILE))


def set_default(
    folder: AnyPath, strategy: str, *, lens: str, pool: str, evidence: Mapping[str, Any]
) -> None:
    """Make a strategy the one that an Engine takes by default, and say why.

    evidence  `fusion.evidence` of bundle.json; it goes when the adapters change

    Raises StrategyError or BundleError and leaves the bundle as it was when anything fails.
    """
    with editing(Path(folder)) as (text, raw):
        parse_strategy(strategy, [adapter.name for adapter in text.adapters])
        chosen = {"strategy": strategy, "lens": lens, "pool": pool, "evidence": dict(evidence)}
        fusion = raw.setdefault("fusion", {})
        fusion.update(chosen)
        what = f"Cannot weigh {folder} by {strategy}"
        check_strategy(what, fusion, raw["adapters"], text.base.n_layer)


def set_base(folder: AnyPath, base: AnyPath, *, progress: Tell | None = None) -> None:
    """Note where a bundle's base lies now, which must be the recorded file.

    base  a GGUF file, which is recorded relative to the bundle when it lies inside; the name of a
          registry model that was pulled, or a Hub reference: then no file is recorded

    Raises ChecksumError for another file, and leaves the bundle as it was when anything fails.
    """
    folder = Path(folder)
    tell = progress or silent
    with editing(folder) as (text, raw):
        found = find_base(base, tell)
        check_file(
            found.path,
            what="The base",
            sha256=text.base.sha256,
            size_bytes=text.base.size_bytes,
            recorded_in=str(folder / BUNDLE_FILE),
            advice="Give the file that the bundle was made with; adapters fit no other.",
            progress=lambda done: tell("base", done, text.base.size_bytes),
        )
        record = raw["base"]
        record.pop("file", None)
        if found.registry is None and found.hub is None:
            record["file"] = recordable(_inside(folder, found.path))
        record |= {} if found.registry is None else {"registry": found.registry}
        record |= {} if found.hub is None else {"hub": found.hub}


def _inside(folder: Path, path: Path) -> Path:
    """A path relative to the bundle's folder where it lies inside, else absolute."""
    path = path.absolute()
    with contextlib.suppress(ValueError):
        return path.resolve().relative_to(folder.resolve())
    return path


@contextlib.contextmanager
def editing(folder: Path) -> Iterator[tuple[BundleText, dict[str, Any]]]:
    """Hold a bundle for one edit: what bundle.json says, and a copy of it that is to be changed.

    The copy replaces it when the block succeeds and has changed it; then what bundle.json does not
    need is removed.
    """
    text = read_bundle_text(folder)
    if link_roots(folder):
        raise BundleError(
            f"Cannot change the bundle {folder}: it lies in the Hub's cache, which other tools "
            "share. Fetch a copy of your own with `qaflora pull REF --to DIR`."
        )
    with cache_lock(f"bundle {folder.resolve()}"):
        text = read_bundle_text(folder)
        _tidy(folder)
        raw: dict[str, Any] = copy.deepcopy(dict(text.raw))
        try:
            yield text, raw
            if raw["adapters"] != text.raw["adapters"]:  # it was of others
                raw.get("fusion", {}).pop("evidence", None)
            if raw != text.raw:
                # Programs whose caches are apart do not see each other's locks.
                if read_bundle_text(folder).raw != text.raw:
                    raise BundleError(
                        f"Cannot change the bundle {folder}: another program has changed it "
                        "meanwhile, and this change was not made. Run the command again."
                    )
                write_bundle_json(folder, raw, str(folder / BUNDLE_FILE))
        finally:
            _tidy(folder)


def adapter_index(folder: Path, text: BundleText, name: str) -> int:
    names = [adapter.name for adapter in text.adapters]
    if name not in names:
        raise BundleError(
            f"The bundle {folder} has no adapter {name!r}; expected one of: "
            f"{', '.join(names) or 'it has none'}."
        )
    return names.index(name)


def _new_file(folder: Path, name: str, raw: Mapping[str, Any]) -> str:
    """A place for an adapter's file. Raises BundleError when something is there."""
    file = f"adapters/{name}.gguf"
    path = safe_join(folder, file)
    if path.exists():
        named = (each["name"] for each in raw["adapters"] if each["file"].lower() == file.lower())
        owner = next(named, None)
        whose = f"{owner}'s. Choose" if owner else "not this adapter's. Remove it, or choose"
        raise BundleError(
            f"Cannot put an adapter {name} into {folder}: the file {path} is there already, and "
            f"it is {whose} another name."
        )
    failure, advice = f"Cannot make the folder {path.parent}", "Check that you may write there."
    with os_errors(OutputFileError, failure, advice):
        path.parent.mkdir(exist_ok=True)
    return file


def _link(old_path: Path, new_path: Path) -> None:
    """Give a file a second name; where the disk knows no such thing, a copy."""
    try:
        os.link(old_path, new_path)
    except OSError:
        with atomic_path(new_path) as temporary:
            shutil.copyfile(old_path, temporary)


def _renamed_key(items: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if key == old else key: value for key, value in items.items()}


def _renamed_strategy(strategy: str, old: str, new: str) -> str:
    kind, _, argument = strategy.partition(":")
    if kind == "single":
        return f"single:{new if argument == old else argument}"
    if kind != "manual":
        return strategy
    pairs = [item.partition("=") for item in argument.split(",")]
    return "manual:" + ",".join(
        f"{new if name == old else name}={weight}" for name, _, weight in pairs
    )


def _calibrate(
    folder: Path, raw: dict[str, Any], base_path: Path, paths: Mapping[str, Path], tell: Tell
) -> None:
    """Measure the adapters that were not measured on the prompts of now."""
    fusion, prompts = raw.setdefault("fusion", {}), prompts_record()
    if fusion.get("typical_prompts", {}).get("sha256") != prompts["sha256"]:
        fusion["typical"] = {}
    typical = fusion.setdefault("typical", {})
    missing = {
        name: path
        for name, path in paths.items()
        if not all(key in typical.get(name, {}) for key in KEYS)
    }
    if missing:
        check_takes_file(folder / BUNDLE_FILE)
        typical |= measure_typical(base_path, missing, tell)
    fusion["typical_prompts"] = prompts


def _note_unfinished(folder: Path, files: Sequence[str]) -> None:
    write_text_atomic(folder / UNFINISHED_FILE, json.dumps({"files": list(files)}) + "\n")


def _tidy(folder: Path) -> None:
    """Remove left-overs, and the noted files that bundle.json does not name."""
    named = {folder / adapter.file for adapter in read_bundle_text(folder).adapters}
    for file in _unfinished(folder):
        with contextlib.suppress(BundleError):  # the note of a bundle from elsewhere
            path = safe_join(folder, file)
            if path not in named and path.parent == folder / "adapters" and path.suffix == ".gguf":
                path.unlink(missing_ok=True)
    (folder / UNFINISHED_FILE).unlink(missing_ok=True)
    remove_left_overs(folder)
    if not (folder / "adapters").is_symlink():
        remove_left_overs(folder / "adapters")


def _unfinished(folder: Path) -> list[str]:
    try:
        note = read_json_object(read_input(folder / UNFINISHED_FILE, MAX_UNFINISHED_BYTES))
        files = note.get("files")
    except (OSError, ValueError):
        return []
    return [file for file in files if isinstance(file, str)] if isinstance(files, list) else []
