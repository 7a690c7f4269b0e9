"""Make a bundle: convert or copy adapters, measure them, write bundle.json. All or nothing."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qaflora_edge.bundles.source import BaseSource, find_adapter, find_base
from qaflora_edge.bundles.write import (
    adapter_record,
    check_measured,
    check_names,
    check_strategy,
    check_system,
    check_targets,
    measure_typical,
    prompts_record,
    put_adapter,
    recordable,
    write_bundle_json,
)
from qaflora_edge.errors import BundleError, OutputFileError
from qaflora_edge.files import AnyPath, atomic_folder, cache_lock, readable, what_is_at
from qaflora_edge.formats.bundle import BUNDLE_FILE, FORMAT
from qaflora_edge.formats.checksums import hash_file
from qaflora_edge.formats.gguf import GgufHeader, read_gguf_header
from qaflora_edge.formats.registry import model_name
from qaflora_edge.progress import Tell, silent
from qaflora_edge.weighing import numbers as fuse
from qaflora_edge.weighing.weigher import Known, Weigher

MAX_NAME_CHARS = 200  # of what a base's file calls itself

# Right answers of 100 over nine cells, six adapters loaded (docs/evaluation.md): two-place 38.0,
# static 31.9, the base 30.3, qa-flora 28.1; with two of the six trained a second time 36.3, 32.3,
# 28.0, 26.8; and two-place weighs six in a seventh of the time.
BEST, PUBLISHED = "two-place", fuse.DEFAULT_STRATEGY


def create_bundle(
    folder: AnyPath,
    base: AnyPath,
    adapters: Mapping[str, AnyPath] | Iterable[tuple[str, AnyPath]],
    *,
    name: str | None = None,
    description: str = "",
    license: str = "",
    system: str = "",
    outtype: str = "f16",
    strategy: str | None = None,
    lens: str = fuse.DEFAULT_LENS,
    pool: str = fuse.DEFAULT_POOL,
    notes: Mapping[str, Mapping[str, str]] | None = None,
    calibrate: bool = True,
    progress: Tell | None = None,
) -> Path:
    """Make the folder of a new bundle.

    base       a GGUF file, the name of a registry model that was pulled, or a Hub reference; only
               the name is recorded then, so the bundle works wherever that base is pulled
    adapters   name -> a PEFT folder, which is converted, an adapter GGUF, which is copied, or a
               Hub reference to one of them, which is recorded with its commit
    outtype    of converted adapters: f32, f16, bf16 or q8_0
    system     what conversations begin with that have no system message
    strategy, lens, pool  what an Engine takes by default; where no strategy is given, BEST, or
               PUBLISHED where the adapters are not measured or BEST has nothing to go by
    notes      adapter name -> source, license, description
    calibrate  measure typical divergences (needs the native library)
    returns    the folder

    Raises a QafloraError and leaves nothing behind when anything fails.
    """
    folder = Path(folder)
    pairs = list(adapters.items() if isinstance(adapters, Mapping) else adapters)
    names = [adapter_name for adapter_name, _ in pairs]
    check_names(names)
    _check_notes(names, notes or {})
    what = f"Cannot create the bundle {folder}"
    if strategy is not None:
        check_measured(what, strategy, names, calibrate=calibrate)
    fuse.check_choice("lens", lens, fuse.LENSES)
    fuse.check_choice("pool", pool, fuse.POOLS)
    tell = progress or silent
    with _new_folder(folder) as temporary:
        base_source = find_base(base, tell)
        header = read_gguf_header(base_source.path)
        sources = [find_adapter(source, tell) for _, source in pairs]
        base_record = _base_record(base_source, header, tell)
        if system:
            check_system(base_source.path, system)
        (temporary / "adapters").mkdir()
        records = []
        for done, (adapter_name, source) in enumerate(zip(names, sources, strict=True)):
            tell("adapters", done, len(pairs))
            file = f"adapters/{adapter_name}.gguf"
            info = put_adapter(source, temporary / file, header, outtype)
            note = (notes or {}).get(adapter_name, {})
            records.append(adapter_record(adapter_name, file, info, source, note))
        tell("adapters", len(pairs), len(pairs))
        if strategy is not None:
            check_targets(what, strategy, records)
        fusion: dict[str, Any] = {"strategy": PUBLISHED, "lens": lens, "pool": pool}
        if calibrate and pairs:
            paths = {record["name"]: temporary / record["file"] for record in records}
            fusion["typical"] = measure_typical(base_source.path, paths, tell)
            fusion["typical_prompts"] = prompts_record()
            known = Known(typical=fusion["typical"])
            if Weigher(tuple(names), header.n_layer, known).follows(BEST):
                fusion["strategy"] = BEST
        if strategy is not None:
            fusion["strategy"] = strategy
            check_strategy(what, fusion, records, header.n_layer)
        text = {
            "format": FORMAT,
            "name": name or readable(folder.resolve().name),
            "description": description,
            "license": license,
            **({"system": system} if system else {}),
            "base": base_record,
            "adapters": records,
            "fusion": fusion,
        }
        write_bundle_json(temporary, text, str(folder / BUNDLE_FILE))
    return folder


def _check_notes(names: list[str], notes: Mapping[str, Any]) -> None:
    for name in notes:
        if name not in names:
            raise BundleError(
                f"A note is given for the adapter {name!r}, which is not in the bundle; "
                f"expected one of: {', '.join(names) or 'it has no adapters'}."
            )


def _base_record(source: BaseSource, header: GgufHeader, tell: Tell) -> dict[str, Any]:
    path = source.path
    size_bytes = path.stat().st_size
    sha256 = hash_file(path, lambda done: tell("base", done, size_bytes))
    record: dict[str, Any] = {
        "architecture": header.architecture,
        "n_layer": header.n_layer,
        "n_embd": header.n_embd,
        "n_vocab": header.n_vocab,
        "sha256": sha256,
        "size_bytes": size_bytes,
    }
    if header.name is not None:
        record["name"] = header.name[:MAX_NAME_CHARS]
    if source.registry is None and source.hub is None:
        record["file"] = recordable(path.absolute())
    if registry_name := source.registry or model_name(sha256):
        record["registry"] = registry_name
    if source.hub is not None:
        record["hub"] = source.hub
    return record


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder` when the block succeeds."""
    failure = f"Cannot create the bundle {folder}"
    if (what := what_is_at(folder)) not in ("does not exist", "is a folder", "is a file"):
        raise OutputFileError(f"{failure}: it {what}. Choose another name or place.")
    with cache_lock(f"bundle {folder.resolve()}"):
        if os.path.lexists(folder):
            raise OutputFileError(
                f"{failure}: there is something of that name already. "
                "Choose another name, or remove it first."
            )
        with atomic_folder(folder, failure) as temporary:
            yield temporary
