"""Make a bundle: convert or copy adapters, write bundle.json, then measure."""

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qaflora_edge.bundles.edit import calibrate, set_default, write_bundle_json
from qaflora_edge.bundles.measure import (
    OpenEngine,
    check_measured,
    check_strategy,
    needs_typical,
)
from qaflora_edge.bundles.source import (
    base_record,
    check_names,
    find_adapter,
    find_base,
    put_adapter,
)
from qaflora_edge.errors import BundleError, OutputFileError
from qaflora_edge.files import AnyPath, atomic_folder, cache_lock, readable, what_is_at
from qaflora_edge.formats.bundle import BUNDLE_FILE, FORMAT
from qaflora_edge.formats.gguf import read_gguf_header
from qaflora_edge.progress import Tell, silent
from qaflora_edge.weighing import numbers

# Right answers of 100 over nine cells, six adapters loaded (docs/evaluation.md): two-place 38.0,
# static 31.9, the base 30.3, qa-flora 28.1; with two of the six trained a second time 36.3, 32.3,
# 28.0, 26.8; and two-place weighs six in a seventh of the time.
BEST, PUBLISHED = "two-place", numbers.DEFAULT_STRATEGY


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
    outtype: str = "f16",
    strategy: str | None = None,
    lens: str = numbers.DEFAULT_LENS,
    pool: str = numbers.DEFAULT_POOL,
    notes: Mapping[str, Mapping[str, str]] | None = None,
    progress: Tell | None = None,
) -> Path:
    """Make the folder of a new bundle.

    base       a GGUF file, the name of a registry model that was pulled, or a Hub reference; only
               the name is recorded then, so the bundle works wherever that base is pulled
    adapters   name -> a PEFT folder, which is converted, an adapter GGUF, which is copied, or a
               Hub reference to one of them, which is recorded with its commit
    engine     the class Engine, to measure typical divergences; None: they are not measured
    outtype    of converted adapters: f32, f16, bf16 or q8_0
    system     system message of conversations that have none
    strategy, lens, pool  defaults of an Engine; without a strategy BEST, or PUBLISHED where the
               adapters are not measured or BEST has nothing to go by
    notes      adapter name -> source, license, description
    returns    the folder

    Raises a QafloraError and leaves nothing when anything fails. Measuring comes last: when it
    fails, the bundle is there and works by PUBLISHED, and `calibrate` finishes it.
    """
    folder = Path(folder)
    tell = progress or silent
    pairs = list(adapters.items() if isinstance(adapters, Mapping) else adapters)
    names = [adapter_name for adapter_name, _ in pairs]
    what = f"Cannot create the bundle {folder}"
    check_names(names)
    _check_notes(names, notes or {})
    numbers.check_choice("lens", lens, numbers.LENSES)
    numbers.check_choice("pool", pool, numbers.POOLS)
    if strategy is not None and engine is None:
        check_measured(what, strategy, names)
    is_later = engine is not None and strategy is not None and needs_typical(strategy, names)
    _check_is_new(folder, what)
    with cache_lock(f"bundle {folder.resolve()}"), atomic_folder(folder, what) as temporary:
        source = find_base(base)
        header = read_gguf_header(source.path)
        if system:
            _check_system(source.path, system)
        sources = [find_adapter(path) for _, path in pairs]
        records: list[dict[str, Any]] = []
        raw: dict[str, Any] = {
            "format": FORMAT,
            "name": name or readable(folder.resolve().name),
            "description": description,
            "license": license,
            **({"system": system} if system else {}),
            "base": base_record(source, header, tell),
            "adapters": records,
            "fusion": {"strategy": strategy or PUBLISHED, "lens": lens, "pool": pool},
        }
        (temporary / "adapters").mkdir()
        for done, (adapter_name, found) in enumerate(zip(names, sources, strict=True)):
            tell("adapters", done, len(pairs))
            file, note = f"adapters/{adapter_name}.gguf", (notes or {}).get(adapter_name, {})
            facts = put_adapter(found, temporary / file, header, outtype, note)
            records.append({"name": adapter_name, "file": file, **facts})
        tell("adapters", len(pairs), len(pairs))
        if strategy is not None:
            check_strategy(what, raw, is_measured=not is_later)
        if is_later:
            raw["fusion"] |= {"strategy": PUBLISHED}
        write_bundle_json(temporary, raw, str(folder / BUNDLE_FILE))
    if engine is not None and pairs:
        calibrate(folder, engine, strategy=strategy, progress=tell)
        if strategy is None:
            with contextlib.suppress(BundleError):  # adapters that BEST cannot weigh
                set_default(folder, BEST)
    return folder


def _check_system(base_path: Path, system: str) -> None:
    """Raise ChatTemplateError or PromptError where a text cannot begin a conversation."""
    from qaflora_edge.backend.model import Model
    from qaflora_edge.chat.messages import begin_with
    from qaflora_edge.chat.tokens import chat_tokens

    with Model(base_path) as model:
        chat_tokens(model, begin_with(system, [{"role": "user", "content": "?"}]))


def _check_notes(names: list[str], notes: Mapping[str, Any]) -> None:
    for name in notes:
        if name not in names:
            raise BundleError(
                f"A note is given for the adapter {name!r}, which is not in the bundle; "
                f"expected one of: {', '.join(names) or 'it has no adapters'}."
            )


def _check_is_new(folder: Path, what: str) -> None:
    if os.path.lexists(folder):
        raise OutputFileError(
            f"{what}: there is something of that name already. "
            "Choose another name, or remove it first."
        )
    if (found := what_is_at(folder)) != "does not exist":
        raise OutputFileError(f"{what}: it {found}. Choose another name or place.")
