"""Change a bundle: its adapters, what is measured of them, its strategy, where its base lies.

New files come first, then bundle.json is replaced in one step, then old files go. So a bundle is
the old or the new one at any moment. The class Engine is handed in, for it opens bundles itself.
"""

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from qaflora_edge.answering.typical import measure
from qaflora_edge.bundles.open import load_bundle
from qaflora_edge.bundles.source import check_names, find_base, put_adapters
from qaflora_edge.bundles.taught import forget
from qaflora_edge.errors import BundleError, StrategyError
from qaflora_edge.files import AnyPath, cache_lock, check_takes_file, write_text_atomic
from qaflora_edge.formats.bundle import (
    BUNDLE_FILE,
    BundleText,
    check_file,
    link_roots,
    parse_bundle,
    read_bundle_text,
    safe_join,
)
from qaflora_edge.formats.inputs import Json, Object
from qaflora_edge.progress import Tell, silent
from qaflora_edge.prompt.neutral import neutral
from qaflora_edge.weighing.calibration import DRAFTED, KEYS
from qaflora_edge.weighing.strategy import parse_strategy
from qaflora_edge.weighing.weigher import Weigher, WeighingFacts, known_of

CALIBRATION_CTX = 512  # tokens; the neutral prompts are short
OPENING = "Opening the base"
ONCE = "Measuring what is typical of each adapter, once"
ANSWERING = "Letting each adapter answer typical prompts, once"

OpenEngine = Callable[..., AbstractContextManager[Any]]  # the class Engine


def add_adapters(
    folder: AnyPath,
    adapters: Mapping[str, AnyPath] | Sequence[tuple[str, AnyPath]],
    *,
    engine: OpenEngine | None = None,
    outtype: str = "f16",
    note: Mapping[str, str] | None = None,
    strategy: str | None = None,
    progress: Tell = silent,
) -> None:
    """Add adapters to a bundle.

    adapters, engine, outtype  as create_bundle takes them
    note                       source, license, description of each
    strategy                   default of an Engine from now on

    Raises a QafloraError and leaves the bundle as it was when anything fails.
    """
    folder = Path(folder)
    pairs = list(adapters.items() if isinstance(adapters, Mapping) else adapters)
    with editing(folder) as (_, raw):
        loaded = load_bundle(folder)
        names = [*loaded.adapter_paths, *(name for name, _ in pairs)]
        check_names(names)
        wanted = loaded.known.strategy
        if strategy is not None:
            wanted = strategy
            _set_strategy(raw, strategy)
        parse_strategy(wanted, names)  # raises before the work
        put_adapters(folder, raw, pairs, loaded.header, outtype, progress)
        for record in raw["adapters"][len(loaded.adapters) :]:
            record |= note or {}
        if engine is None:
            check_strategy(f"Cannot weigh the bundle {folder}", raw, wanted)
        else:
            measure_typical(folder, raw, wanted, loaded.base_path, engine, progress)


def remove_adapter(folder: AnyPath, name: str, *, strategy: str | None = None) -> None:
    """Remove an adapter from a bundle, with its examples; its own files need not be whole.

    strategy  default of an Engine from now on

    Raises BundleError when there is no such adapter, or when the bundle's strategy needs it.
    """
    folder = Path(folder)
    with editing(folder) as (text, raw):
        names = [adapter.name for adapter in text.adapters]
        if name not in names:
            raise BundleError(
                f"The bundle {folder} has no adapter {name!r}; expected one of: "
                f"{', '.join(names) or 'it has none'}."
            )
        del raw["adapters"][names.index(name)]
        raw.setdefault("fusion", {}).get("typical", {}).pop(name, None)
        if strategy is not None:
            _set_strategy(raw, strategy)
            check_strategy(f"Cannot weigh the bundle {folder}", raw, strategy)
        else:
            names.remove(name)
            needed = known_of(text).strategy
            try:
                parse_strategy(needed, names)
            except StrategyError as error:
                raise BundleError(
                    f"Cannot remove the adapter {name} from {folder}: the strategy {needed!r} "
                    "needs it. Choose another with --strategy."
                ) from error
    forget(folder, name)


def calibrate(
    folder: AnyPath, engine: OpenEngine, *, strategy: str | None = None, progress: Tell = silent
) -> bool:
    """Measure what the adapters lack of typical values.

    engine    the class Engine
    strategy  default of an Engine from now on: only what it needs is measured; None: all, or
              what was ended before it was done
    returns   whether there was anything to measure
    """
    folder = Path(folder)
    with editing(folder) as (text, raw):
        base_path = load_bundle(folder).base_path
        strategy = strategy or text.fusion.when_measured
        if strategy is not None:
            _set_strategy(raw, strategy)
        return measure_typical(folder, raw, strategy, base_path, engine, progress)


def set_default(folder: AnyPath, strategy: str, *, lens: str, pool: str) -> None:
    """Make a strategy, a lens and a pool the defaults of an Engine.

    Raises StrategyError or BundleError and leaves the bundle as it was when anything fails.
    """
    with editing(Path(folder)) as (_, raw):
        _set_strategy(raw, strategy)
        raw["fusion"].update(lens=lens, pool=pool)
        check_strategy(f"Cannot weigh the bundle {folder}", raw, strategy)


def set_base(folder: AnyPath, base: AnyPath) -> None:
    """Note where a bundle's base lies now, which must be the recorded file.

    base  a GGUF file, which is recorded relative to the bundle when it lies inside; the name of a
          registry model that was pulled, or a Hub reference: then no file is recorded

    Raises ChecksumError for another file, and leaves the bundle as it was when anything fails.
    """
    folder = Path(folder)
    with editing(folder) as (text, raw):
        path, recorded = find_base(base)
        check_file(path, text.base, text.where)
        raw["base"].pop("file", None)
        raw["base"] |= recorded
        path = path.resolve()
        inside = folder.resolve()
        if "file" in recorded and path.is_relative_to(inside):
            raw["base"]["file"] = path.relative_to(inside).as_posix()


@contextlib.contextmanager
def editing(folder: Path) -> Iterator[tuple[BundleText, Json]]:
    """Hold a bundle for one edit: give what bundle.json says, and a copy of it to change.

    The copy replaces bundle.json when the block succeeds, and adapter files that it no longer
    names are deleted. When the block fails, the files of new adapters are.
    """
    if link_roots(folder):
        raise BundleError(
            f"Cannot change the bundle {folder}: it lies in the Hub's cache, which other tools "
            "share. Change a copy: `cp -rL` the folder that `qaflora pull REF` prints."
        )
    with cache_lock(f"bundle {folder.resolve()}"):
        text = read_bundle_text(folder)
        check_takes_file(folder / BUNDLE_FILE)
        raw: Json = copy.deepcopy(dict(text.raw))
        try:
            yield text, raw
            if raw != text.raw:
                write_bundle_json(folder, raw, text.where)
        except BaseException:
            _delete(folder, raw, text.raw)
            raise
        _delete(folder, text.raw, raw)


def _delete(folder: Path, old: Object, new: Object) -> None:
    kept = {record["file"] for record in new["adapters"]}
    for record in old["adapters"]:
        if record["file"] not in kept:
            with contextlib.suppress(OSError, BundleError):  # a file that is left harms nobody
                safe_join(folder, record["file"]).unlink()


def write_bundle_json(folder: Path, raw: Object, where: str) -> None:
    """Replace a bundle's description, whole or not at all.

    where  names it in messages

    Raises BundleError for a text that could not be read again; nothing is written then.
    """
    content = json.dumps(raw, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # What is no UTF-8, as bytes of a command line, is refused by the reader.
    known_of(parse_bundle(content.encode("utf-8", "surrogatepass"), where))
    write_text_atomic(folder / BUNDLE_FILE, content)


def _set_strategy(raw: Json, strategy: str) -> None:
    """Make a strategy the default of an Engine, whatever was to be it once it is measured."""
    fusion = raw.setdefault("fusion", {})
    fusion["strategy"] = strategy
    fusion.pop("when_measured", None)


def measure_typical(
    folder: Path, raw: Json, strategy: str | None, base_path: Path, engine: OpenEngine, tell: Tell
) -> bool:
    """Measure what adapters lack of typical values (method.md section 7).

    raw       bundle.json; its fusion is changed
    strategy  measure what it needs; None: all
    returns   whether there was anything to measure
    """
    paths = {record["name"]: folder / record["file"] for record in raw["adapters"]}
    keys: Sequence[str] = KEYS
    if strategy is not None:
        keys = parse_strategy(strategy, list(paths)).strategy.needs_typical
    prompts = neutral("prompts")
    turns = neutral("turns")
    exchanges = neutral("exchanges")
    read = [*prompts, *turns]
    for exchange in exchanges:
        read += [message["content"] for message in exchange]
    lines = "".join(f"{prompt}\n" for prompt in read)
    sha256 = hashlib.sha256(lines.encode("utf-8")).hexdigest()
    recorded = {"sha256": sha256, "n_prompt": len(read)}
    fusion = raw.setdefault("fusion", {})
    typical: dict[str, Json] = fusion.get("typical", {})
    measured_on = fusion.get("typical_prompts", {}).get("sha256")
    if measured_on != recorded["sha256"]:
        typical = {}  # measured on other prompts
    lacking_keys = []
    lacking_names = set()
    for key in keys:
        lacking = [name for name in paths if key not in typical.get(name, {})]
        if lacking:
            lacking_keys.append(key)
        lacking_names.update(lacking)
    if lacking_keys:
        adapters = {name: path for name, path in paths.items() if name in lacking_names}
        tell(OPENING, 0, 1)
        with engine(base=base_path, adapters=adapters, n_ctx=CALIBRATION_CTX) as opened:
            tell(OPENING, 1, 1)
            current = opened.memory.current
            for what, group in ((ONCE, {*KEYS} - {*DRAFTED}), (ANSWERING, {*DRAFTED})):
                wanted_keys = [key for key in lacking_keys if key in group]
                if not wanted_keys:
                    continue
                tell(what, 0, 1)
                tell_count = partial(tell, what)
                with current.core.call():
                    measured = measure(current, prompts, turns, exchanges, wanted_keys, tell_count)
                tell(what, 1, 1)
                for name, values in measured.items():
                    typical[name] = typical.get(name, {}) | values
        fusion["typical"] = typical
        fusion["typical_prompts"] = recorded
    if strategy is not None:
        check_strategy(f"Cannot weigh the bundle {folder}", raw, strategy)
    return bool(lacking_keys)


def check_strategy(what: str, raw: Object, strategy: str) -> None:
    """Check that a strategy finds what it needs to know of a bundle's adapters.

    what  fails otherwise, as in "Cannot create the bundle b"
    raw   bundle.json

    Raises StrategyError for an unknown strategy, else BundleError.
    """
    names = tuple(record["name"] for record in raw["adapters"])
    if not parse_strategy(strategy, names).strategy.needs_typical:
        return
    typical = raw.get("fusion", {}).get("typical", {})
    known = WeighingFacts(strategy=strategy, typical=typical)
    try:
        Weigher(names, raw["base"]["n_layer"], known)
    except StrategyError as error:
        raise BundleError(f"{what}: {error}") from error
