"""Make a bundle: convert or copy adapters, write bundle.json, then measure."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from qaflora_edge import __version__
from qaflora_edge.bundles import source
from qaflora_edge.bundles.edit import (
    OpenEngine,
    calibrate,
    check_strategy,
    measure_typical,
    set_default,
    write_bundle_json,
)
from qaflora_edge.bundles.open import BundleFiles, load_bundle
from qaflora_edge.errors import BundleError, OutputFileError
from qaflora_edge.files import AnyPath, atomic_folder, cache_dir, cache_lock, make_folder, readable
from qaflora_edge.formats.bundle import BUNDLE_FILE, FORMAT, read_bundle_text
from qaflora_edge.formats.gguf import read_gguf_header
from qaflora_edge.formats.inputs import Json, Object, checksum, file_state
from qaflora_edge.peft.folder import adapter_files, adapter_folder
from qaflora_edge.progress import Tell, silent
from qaflora_edge.weighing.plan import DEFAULT_LENS, DEFAULT_POOL, DEFAULT_STRATEGY
from qaflora_edge.weighing.strategy import parse_strategy
from qaflora_edge.weighing.weigher import Weigher, known_of

# It finds who knows for who writes (docs/results.md). Without drafts it is two-place: right
# answers of 100 over nine cells, six adapters loaded: two-place 38.0,
# static 31.9, the base 30.3, qa-flora 28.1; with two of the six trained a second time 36.3, 32.3,
# 28.0, 26.8; and two-place weighs six in a seventh of the time.
BEST = "relay"
PUBLISHED = DEFAULT_STRATEGY
LICENSE_FILE = "LICENSE"
UNMEASURED = "spectr"  # level with static and two-place there, and needs nothing measured


def create_bundle(
    folder: AnyPath,
    base: AnyPath,
    adapters: Mapping[str, AnyPath] | Iterable[tuple[str, AnyPath]],
    *,
    engine: OpenEngine | None = None,
    name: str | None = None,
    description: str = "",
    license: str = "",
    system: str = "",
    examples: Sequence[Mapping[str, str]] = (),
    sampling: Object | None = None,
    outtype: str = "f16",
    strategy: str | None = None,
    progress: Tell = silent,
) -> Path:
    """Make the folder of a new bundle.

    base       a GGUF file, the name of a registry model that was pulled, or a Hub reference; only
               the name is recorded then, so the bundle works wherever that base is pulled
    adapters   name -> a PEFT folder, which is converted, an adapter GGUF, which is copied, or a
               Hub reference to one of them, which is recorded with its commit
    engine     the class Engine, to measure what the strategy needs; None: nothing is measured
    outtype    of converted adapters: f32, f16, bf16 or q8_0
    license    its name, or a text of several lines, which becomes the file LICENSE
    system     system message of conversations that have none
    examples   messages with which every conversation begins, behind the system's
    sampling   defaults of commands and the server: see config's group `sampling`
    strategy   default of an Engine; None: BEST, or PUBLISHED where it is not measured or BEST fails
    returns    the folder

    Raises a QafloraError and leaves nothing when anything fails. Measuring comes last: when it
    fails, the bundle is there and works by PUBLISHED, and `calibrate` finishes it.
    """
    folder = Path(folder)
    what = f"Cannot create the bundle {folder}"
    pairs = list(adapters.items() if isinstance(adapters, Mapping) else adapters)
    names = [adapter_name for adapter_name, _ in pairs]
    source.check_names(names)
    best = BEST if engine is not None and names else PUBLISHED
    wanted = best if strategy is None else strategy
    keys = parse_strategy(wanted, names).strategy.needs_typical
    if os.path.lexists(folder):
        raise OutputFileError(
            f"{what}: there is something of that name already. "
            "Choose another name, or remove it first."
        )
    with cache_lock(f"bundle {folder.resolve()}"), atomic_folder(folder, what) as temporary:
        base_path, recorded = source.find_base(base)
        header = read_gguf_header(base_path)
        progress("Hashing the base", 0, 1)
        record = source.base_record(header, recorded)
        progress("Hashing the base", 1, 1)
        raw: Json = {
            "format": FORMAT,
            "name": name or readable(folder.resolve().name),
            "description": description,
            "license": license,
        }
        optional = {"system": system, "examples": list(examples), "sampling": dict(sampling or {})}
        raw |= {key: value for key, value in optional.items() if value}
        raw["base"] = record
        raw["adapters"] = []
        if "\n" in license:
            raw["license"] = f"see {LICENSE_FILE}"
            (temporary / LICENSE_FILE).write_text(f"{license}\n", encoding="utf-8")
        source.put_adapters(temporary, raw, pairs, header, outtype, progress)
        if engine is None:
            check_strategy(what, raw, wanted)
        raw["fusion"] = {
            "strategy": PUBLISHED if keys else wanted,
            "lens": DEFAULT_LENS,
            "pool": DEFAULT_POOL,
            "prefill": "auto",
        }
        if keys and engine is not None:
            raw["fusion"]["when_measured"] = wanted  # until it is: this process may be killed
        write_bundle_json(temporary, raw, str(folder / BUNDLE_FILE))
    if engine is not None and keys:
        try:
            calibrate(folder, engine, strategy=wanted, progress=progress)
        except BundleError:  # BEST cannot weigh an adapter that adds nothing to q, k and v
            if strategy is not None:
                raise
            set_default(folder, PUBLISHED, lens=DEFAULT_LENS, pool=DEFAULT_POOL)
    return folder


def cached_bundle(base: Path, adapters: Sequence[tuple[str, str]], progress: Tell) -> Path:
    """Make a bundle of a base and adapters in the cache, or find the one made before.

    base      a GGUF file
    adapters  as create_bundle takes them; a file of the same size and time of change is the same

    It is weighed by UNMEASURED, or by PUBLISHED where that cannot weigh these adapters.
    """
    source.check_names([name for name, _ in adapters])
    files = [base]
    facts = [__version__]
    for name, reference in adapters:
        path = source.find_adapter(reference).path
        if path.is_dir():
            files += adapter_files(adapter_folder(path))
        else:
            files.append(path)
        facts += [name, str(len(files))]
    for file in files:
        facts.append(f"{file.absolute()} {file_state(file)}")
    identity = os.fsencode("\n".join(facts))
    key = hashlib.sha256(identity).hexdigest()[:16]
    folder = cache_dir() / "mixes" / key / base.stem
    make_folder(folder.parent, "the environment variable QAFLORA_CACHE")
    with cache_lock(f"mix {key}"):
        if folder.exists():
            checksum(base)  # it lies outside of the bundle, and may be forgotten
        else:
            # It may be left by a run that was ended.
            unfinished = folder.with_name(f"{base.stem}.part")
            shutil.rmtree(unfinished, ignore_errors=True)
            create_bundle(unfinished, base, adapters, name=base.stem, progress=progress)
            text = read_bundle_text(unfinished)
            targets = {adapter.name: adapter.targets for adapter in text.adapters}
            known = known_of(text)
            weigher = Weigher(tuple(targets), text.base.n_layer, targets=targets)
            if UNMEASURED in weigher.followed:
                set_default(unfinished, UNMEASURED, lens=known.lens, pool=known.pool)
            unfinished.rename(folder)
    return folder


def with_adapter(
    opened: BundleFiles,
    adapter: source.AdapterSource,
    name: str | None,
    engine: OpenEngine,
    strategies: Iterable[str],
    progress: Tell = silent,
) -> BundleFiles:
    """Add an adapter, as the last one, to what is open; no bundle changes.

    name        as Engine.add_adapter takes it
    strategies  what they need of it is measured
    """
    if not name:
        words = re.findall(r"[A-Za-z0-9][\w.-]*", adapter.name.removesuffix(".gguf"), re.ASCII)
        name = "-".join(words)[:64]
    source.check_names([*opened.adapters, name])
    source.check_new_name(name)
    file = adapter.path.absolute()
    if file.is_dir():
        bundle = cached_bundle(opened.base_path, [(name, str(file))], progress)
        file = load_bundle(bundle).adapter_paths[name]
    alone = load_bundle(opened.base_path, {name: file})
    states = dict(opened.states)  # the base must not have changed
    states[file] = alone.states[file]
    adapters = dict(opened.adapters)
    adapters.update(alone.adapters)
    both = replace(opened, adapters=adapters, states=states)
    fusion: Json = dict(opened.text.raw.get("fusion", {})) if opened.text else {}
    typical = {}
    for known_name, values in opened.known.typical.items():
        if known_name in opened.adapters:  # one that was removed may have had the new one's name
            typical[known_name] = values
    fusion["typical"] = typical
    records = []
    for adapter_name, adapter_path in both.adapter_paths.items():
        records.append({"name": adapter_name, "file": str(adapter_path.absolute())})
    raw = {"base": {"n_layer": both.header.n_layer}, "adapters": records, "fusion": fusion}
    for strategy in strategies:
        with suppress(BundleError):  # this adapter cannot be weighed by it
            measure_typical(both.path, raw, strategy, both.base_path, engine, progress)
    known = replace(both.known, typical=fusion["typical"])
    return replace(both, known=known)
