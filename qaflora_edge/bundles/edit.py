"""Change a bundle: its adapters, their measurements, its strategy, and where its base lies.

New files come first, then bundle.json is replaced in one step, then old files go. So a bundle is
the old or the new one at any moment.
"""

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qaflora_edge.bundles.measure import (
    OpenEngine,
    check_measured,
    check_strategy,
    measure_samples,
    measure_typical,
    unmeasured,
)
from qaflora_edge.bundles.open import known_of, load_bundle
from qaflora_edge.bundles.source import (
    check_names,
    copy_file,
    find_adapter,
    find_base,
    put_adapter,
    recordable,
)
from qaflora_edge.errors import BundleError, OutputFileError, StrategyError, os_errors
from qaflora_edge.files import (
    AnyPath,
    cache_lock,
    check_takes_file,
    safe_join,
    write_text_atomic,
)
from qaflora_edge.formats.bundle import (
    BUNDLE_FILE,
    BundleText,
    link_roots,
    parse_bundle,
    read_bundle_text,
)
from qaflora_edge.formats.checksums import check_file
from qaflora_edge.progress import Tell, silent
from qaflora_edge.weighing.numbers import DEFAULT_STRATEGY
from qaflora_edge.weighing.strategy import parse_strategy

MAX_SAMPLES = 1000
_OF_ADAPTERS = ("typical", "samples")  # of fusion: adapter -> what is measured of it


def add_adapter(folder: AnyPath, name: str, source: AnyPath, **options: Any) -> None:
    """Add one adapter to a bundle, with the options of add_adapters."""
    add_adapters(folder, {name: source}, **options)


def add_adapters(
    folder: AnyPath,
    adapters: Mapping[str, AnyPath] | Sequence[tuple[str, AnyPath]],
    *,
    engine: OpenEngine | None = None,
    outtype: str = "f16",
    note: Mapping[str, str] | None = None,
    strategy: str | None = None,
    progress: Tell | None = None,
) -> None:
    """Add adapters to a bundle.

    adapters   name -> a PEFT folder, an adapter GGUF, or a Hub reference to one of them
    engine     the class Engine, to measure them, and others that were measured on other prompts;
               None: they are not measured
    outtype    of a converted adapter: f32, f16, bf16 or q8_0
    note       source, license, description of each
    strategy   default of an Engine from now on

    Raises a QafloraError and leaves the bundle as it was when anything fails.
    """
    folder = Path(folder)
    tell = progress or silent
    pairs = list(adapters.items() if isinstance(adapters, Mapping) else adapters)
    new = [name for name, _ in pairs]
    what = f"Cannot add the adapter{'s' * (len(new) > 1)} {', '.join(new)} to {folder}"
    with editing(folder) as (_, raw):
        loaded = load_bundle(folder)
        names = [*loaded.adapter_paths, *new]
        check_names(names, new)
        fusion = raw.setdefault("fusion", {})
        if strategy is not None:
            fusion["strategy"] = strategy
        if engine is None:
            check_measured(what, fusion.get("strategy", DEFAULT_STRATEGY), names)
        else:
            parse_strategy(fusion.get("strategy", DEFAULT_STRATEGY), names)
        for name, source in [(name, find_adapter(source)) for name, source in pairs]:
            record = {"name": name, "file": _new_file(folder, name, raw)}
            raw["adapters"].append(record)
            path = folder / record["file"]
            record |= put_adapter(source, path, loaded.header, outtype, note or {})
        check_strategy(what, raw, is_measured=engine is None)
        if engine is not None:
            paths = {record["name"]: folder / record["file"] for record in raw["adapters"]}
            check_takes_file(folder / BUNDLE_FILE)
            measure_typical(fusion, loaded.base_path, paths, engine, tell)
            check_strategy(what, raw)


def remove_adapter(folder: AnyPath, name: str, *, strategy: str | None = None) -> None:
    """Remove an adapter from a bundle; its own files need not be whole.

    strategy  default of an Engine from now on

    Raises BundleError when there is no such adapter, or when the bundle's strategy needs it.
    """
    folder = Path(folder)
    what = f"Cannot remove the adapter {name} from {folder}"
    with editing(folder) as (text, raw):
        del raw["adapters"][_index(folder, text, name)]
        left = [adapter["name"] for adapter in raw["adapters"]]
        fusion = raw.setdefault("fusion", {})
        for key in _OF_ADAPTERS:
            fusion.get(key, {}).pop(name, None)
        if strategy is not None:
            fusion["strategy"] = strategy
            check_strategy(what, raw)
        needed = fusion.get("strategy", DEFAULT_STRATEGY)
        try:
            parse_strategy(needed, left)
        except StrategyError as error:
            raise BundleError(
                f"{what}: the strategy {needed!r} needs it. Choose another with --strategy."
            ) from error


def rename_adapter(folder: AnyPath, old: str, new: str) -> None:
    """Rename an adapter of a bundle, in its strategy and measurements too.

    Its file is renamed when it has the adapter's name. Raises BundleError when there is no such
    adapter, or when the new name cannot be used.
    """
    folder = Path(folder)
    with editing(folder) as (text, raw):
        record = raw["adapters"][_index(folder, text, old)]
        check_names([*(a.name for a in text.adapters if a.name != old), new], [new])
        record["name"] = new
        fusion = raw.get("fusion", {})
        for key in _OF_ADAPTERS:
            if key in fusion:
                fusion[key] = {new if n == old else n: each for n, each in fusion[key].items()}
        if "strategy" in fusion:
            fusion["strategy"] = _renamed_strategy(fusion["strategy"], old, new)
        # On a disk that knows no capitals the two would be one file.
        file = record["file"]
        if file.lower() == f"adapters/{old}.gguf".lower() and old.lower() != new.lower():
            record["file"] = _new_file(folder, new, raw)
            copy_file(safe_join(folder, file), folder / record["file"])


def calibrate(
    folder: AnyPath,
    engine: OpenEngine,
    *,
    strategy: str | None = None,
    progress: Tell | None = None,
) -> bool:
    """Measure the adapters that were not measured on the prompts of now.

    engine    the class Engine
    strategy  default of an Engine from now on
    returns   whether there was anything to measure
    """
    folder = Path(folder)
    what = f"Cannot weigh {folder} by {strategy}"
    with editing(folder) as (_, raw):
        loaded = load_bundle(folder)
        fusion = raw.setdefault("fusion", {})
        is_new = bool(unmeasured(fusion, [*loaded.adapter_paths]))
        if strategy not in (None, fusion.get("strategy")):
            fusion["strategy"] = strategy
            check_strategy(what, raw, is_measured=False)
        check_takes_file(folder / BUNDLE_FILE)
        measure_typical(fusion, loaded.base_path, loaded.adapter_paths, engine, progress or silent)
        if strategy is not None:
            check_strategy(what, raw)
    return is_new


def set_samples(
    folder: AnyPath,
    name: str,
    texts: Sequence[str],
    engine: OpenEngine,
    *,
    progress: Tell | None = None,
) -> None:
    """Embed sample texts of an adapter, for the strategy `centroid`; they replace earlier ones.

    bundle.json gets their mean embedding, their number and their hash, and no text.

    engine  the class Engine

    Raises BundleError for no adapter of the bundle, no text or too many, PromptError for a text of
    more than 2,048 tokens; the bundle is as it was then.
    """
    folder = Path(folder)
    if not 1 <= len(texts) <= MAX_SAMPLES:
        raise BundleError(
            f"{len(texts)} sample texts were given for the adapter {name} of {folder}, expected 1 "
            f"to {MAX_SAMPLES}; a few dozen are enough."
        )
    with editing(folder) as (text, raw):
        _index(folder, text, name)
        base_path = load_bundle(folder).base_path
        check_takes_file(folder / BUNDLE_FILE)
        found = measure_samples(base_path, texts, engine, progress or silent)
        raw.setdefault("fusion", {}).setdefault("samples", {})[name] = found


def check_can_change(folder: AnyPath) -> None:
    """Raise what a change of a bundle would raise, before work that ends with one."""
    with editing(Path(folder)):
        check_takes_file(Path(folder, BUNDLE_FILE))


def set_default(folder: AnyPath, strategy: str, **more: Any) -> None:
    """Make a strategy the default of an Engine.

    more  lens, pool

    Raises StrategyError or BundleError and leaves the bundle as it was when anything fails.
    """
    with editing(Path(folder)) as (_, raw):
        raw["fusion"] = raw.get("fusion", {}) | {"strategy": strategy, **more}
        check_strategy(f"Cannot weigh {folder} by {strategy}", raw)


def set_base(folder: AnyPath, base: AnyPath, *, progress: Tell | None = None) -> None:
    """Note where a bundle's base lies now, which must be the recorded file.

    base  a GGUF file, which is recorded relative to the bundle when it lies inside; the name of a
          registry model that was pulled, or a Hub reference: then no file is recorded

    Raises ChecksumError for another file, and leaves the bundle as it was when anything fails.
    """
    folder = Path(folder)
    tell = progress or silent
    with editing(folder) as (text, raw):
        found = find_base(base)
        check_file(
            found.path,
            what="The base",
            sha256=text.base.sha256,
            size_bytes=text.base.size_bytes,
            recorded_in=text.where,
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
    """Make a path relative to the bundle's folder where it lies inside, else absolute."""
    path = path.absolute()
    with contextlib.suppress(ValueError):
        return path.resolve().relative_to(folder.resolve())
    return path


@contextlib.contextmanager
def editing(folder: Path) -> Iterator[tuple[BundleText, dict[str, Any]]]:
    """Hold a bundle for one edit: give what bundle.json says, and a copy of it to change.

    The copy replaces bundle.json when the block succeeds, and adapter files that it no longer
    names are deleted. When the block fails, the files of new adapters are.
    """
    read_bundle_text(folder)
    if link_roots(folder):
        raise BundleError(
            f"Cannot change the bundle {folder}: it lies in the Hub's cache, which other tools "
            "share. Fetch a copy of your own with `qaflora pull REF --to DIR`."
        )
    with cache_lock(f"bundle {folder.resolve()}"):
        text = read_bundle_text(folder)
        raw: dict[str, Any] = copy.deepcopy(dict(text.raw))
        try:
            yield text, raw
            if raw != text.raw:
                write_bundle_json(folder, raw, text.where)
        except BaseException:
            _delete(folder, raw, text.raw)
            raise
        _delete(folder, text.raw, raw)


def _delete(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Delete the adapter files that `old` names and `new` does not."""
    kept = {record["file"] for record in new["adapters"]}
    for record in old["adapters"]:
        if record["file"] not in kept:
            with contextlib.suppress(OSError, BundleError):  # a file that is left harms nobody
                safe_join(folder, record["file"]).unlink()


def write_bundle_json(folder: Path, raw: Mapping[str, Any], where: str) -> None:
    """Replace a bundle's description, whole or not at all.

    where  names it in messages

    Raises BundleError for a text that could not be read again; nothing is written then.
    """
    content = json.dumps(raw, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        known_of(parse_bundle(content.encode("utf-8"), where))
    except UnicodeEncodeError as error:  # bytes of the command line that were no UTF-8
        found = content[max(0, error.start - 20) : error.end + 20]
        raise BundleError(
            f"Cannot write {where}: a text for it is not UTF-8 (near {found!r}); expected UTF-8. "
            "Type it in a terminal that uses UTF-8."
        ) from error
    write_text_atomic(folder / BUNDLE_FILE, content)


def _index(folder: Path, text: BundleText, name: str) -> int:
    names = [adapter.name for adapter in text.adapters]
    if name not in names:
        raise BundleError(
            f"The bundle {folder} has no adapter {name!r}; expected one of: "
            f"{', '.join(names) or 'it has none'}."
        )
    return names.index(name)


def _new_file(folder: Path, name: str, raw: Mapping[str, Any]) -> str:
    """Choose a place for an adapter's file. Raises BundleError when something is there."""
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
