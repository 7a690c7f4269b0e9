"""What may stand in place of a word, where a shell asks.

Nothing here loads a model, and a broken bundle or settings file suggests nothing.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import click
from click.shell_completion import CompletionItem

from qaflora_edge.errors import QafloraError

Items: TypeAlias = "list[CompletionItem[str]]"


def complete_bundle(ctx: click.Context, param: click.Parameter, word: str) -> Items:
    """Names from the setting `bundles`, else folders and files."""
    from qaflora_edge.hub.local import named_bundles

    return _items(named_bundles, word) or [CompletionItem(word, type="file")]


def complete_strategy(ctx: click.Context, param: click.Parameter, word: str) -> Items:
    """Strategies, and single: and manual: with the adapters of the bundle on the line."""
    from qaflora_edge.weighing.strategy import strategies

    names = _adapters(ctx)
    found = [each.name for each in strategies() if not each.needs_argument]
    found += [f"single:{name}" for name in names]
    done, comma, _ = word.rpartition(",")
    found += [f"{done},{name}=" if comma else f"manual:{name}=" for name in names]
    return _items(lambda: found, word)


def complete_adapter(ctx: click.Context, param: click.Parameter, word: str) -> Items:
    """Names of the adapters of the bundle on the line."""
    return _items(lambda: _adapters(ctx), word)


def complete_pulled(ctx: click.Context, param: click.Parameter, word: str) -> Items:
    """Names of what was pulled."""
    from qaflora_edge.hub.local import all_here

    return _items(lambda: (here.name for here in all_here() if here.is_pulled), word)


def complete_model(ctx: click.Context, param: click.Parameter, word: str) -> Items:
    """Names of the registry's models."""
    from qaflora_edge.formats.names import load_registry

    return _items(load_registry, word)


def _adapters(ctx: click.Context) -> list[str]:
    """The adapters of the bundle that stands on the line already; none without one."""
    from qaflora_edge.formats.bundle import read_bundle_text
    from qaflora_edge.hub.local import named_bundles

    given = [ctx.params[key] for key in ("bundle", "folder") if ctx.params.get(key)]
    # Click leaves arguments unnamed when the option before the cursor has no value yet.
    words = [*given, *ctx.args]
    with contextlib.suppress(QafloraError, IndexError):
        folder = named_bundles().get(words[0], Path(words[0]))
        return [adapter.name for adapter in read_bundle_text(folder).adapters]
    return []


def _items(values: Any, word: str) -> Items:
    """Those that begin with what is typed; none where they cannot be found."""
    found: Iterable[str] = ()
    with contextlib.suppress(QafloraError, OSError):
        found = list(values())
    return [CompletionItem(value) for value in found if value.startswith(word)]
