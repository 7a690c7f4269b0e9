"""What `qaflora eval` asks: items of tasks that may be asked, and the header of its results."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qaflora_edge.cli.options import SharedOptions
from qaflora_edge.errors import SandboxError

if TYPE_CHECKING:
    from qaflora_edge.engine import Engine
    from qaflora_edge.evaluation.run import Asking
    from qaflora_edge.evaluation.tasks import Task

HALVES = ("dev", "test")


def span(ctx: click.Context, param: click.Parameter, value: str | None) -> range | None:
    """A:B as a range; either end may be left out."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d{0,9}):(\d{0,9})", value, re.ASCII)
    if found is None or (found[1] and found[2] and int(found[1]) >= int(found[2])):
        raise click.BadParameter(f"{value!r} is no A:B, such as 0:50, with A below B.")
    return range(int(found[1] or 0), int(found[2] or 10**9))


def check_names(tasks: Sequence[Task]) -> None:
    """Raise UsageError where two tasks have one name."""
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise click.UsageError(
                f"Two tasks have the name {name!r}, expected different ones: give one of them "
                'another, as in {"task": {"name": "..."}} in its first line.'
            )


def check_code(tasks: Sequence[Task], allow_code: bool) -> None:
    """Raise SandboxError where code would be run that may not be, or cannot be."""
    tested = [task.name for task in tasks if task.metric == "code"]
    if not tested:
        return
    if not allow_code:
        raise SandboxError(
            f"The task {tested[0]} runs code that the model writes, and nobody allowed it. Give "
            "--allow-code, after a look at what docs/evaluate.md says of it, or leave the task out."
        )
    from qaflora_edge.evaluation.sandbox import check_can_run

    check_can_run()


def choose(
    tasks: Sequence[Task], *, limit: int | None, items: range | None, half: str | None
) -> dict[str, range]:
    """Indexes of the items that are asked, by task. Raises UsageError for a task without any."""
    chosen = {task.name: _chosen(len(task.items), limit, items, half) for task in tasks}
    for task in tasks:
        if not chosen[task.name]:
            raise click.UsageError(
                f"The task {task.name} has {len(task.items)} items, and none of them is chosen; "
                "give other --items or --half, or leave the task out."
            )
    return chosen


def _chosen(n_item: int, limit: int | None, items: range | None, half: str | None) -> range:
    chosen = range(n_item) if items is None else range(n_item)[items.start : items.stop]
    if half is not None:
        first = chosen.start + (chosen.start % 2 != HALVES.index(half))
        chosen = range(first, chosen.stop, 2)
    return chosen[:limit]


def asked_under(engine: Engine, asking: Asking, options: SharedOptions) -> dict[str, Any]:
    """The options that a results file tells."""
    sampling = {**asking.sampling, "stop": list(asking.sampling["stop"])}
    del sampling["max_tokens"]  # that of each task is in its facts
    engine_options = {"lens": engine.lens, "pool": engine.pool}
    engine_options |= {key: options.engine[key] for key in ("n_ctx", "kv_type", "flash_attn")}
    more = {"system": engine.system}
    if (adapter_type := options.engine["adapter_type"]) != "auto":
        more["adapter_type"] = adapter_type
    return {**engine_options, **{key: value for key, value in more.items() if value}, **sampling}


def header(
    folder: Path,
    engine: Engine,
    tasks: Sequence[Task],
    strategies: Sequence[str],
    asking: Asking,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The first line of a results file.

    folder  of the bundle
    """
    from qaflora_edge import __version__
    from qaflora_edge.chat.session_file import bundle_identity
    from qaflora_edge.cli.doctor import cpu_name

    identity, sizes = bundle_identity(folder), engine.adapter_bytes
    return {
        "eval": 1,
        "version": __version__,
        "bundle": identity.name,
        "base": {"name": engine.name, "sha256": identity.base_sha256},
        "adapters": [
            {"name": name, "sha256": identity.adapters[name], "bytes": sizes[name]}
            for name in engine.adapters
        ],
        "n_layer": engine.n_layer,
        "measured": _measured(folder),
        "tasks": [asking.facts(task) for task in tasks],
        "strategies": list(strategies),
        "options": dict(options),
        "machine": cpu_name(),
    }


def _measured(folder: Path) -> dict[str, str]:
    """SHA-256 of each thing that a bundle measured or fitted, and that some strategies go by."""
    from qaflora_edge.bundles.open import is_base, read_bundle_text

    if is_base(folder):
        return {}
    fusion = read_bundle_text(folder).raw.get("fusion", {})
    parts = {key: fusion[key] for key in ("typical", "samples") if key in fusion}
    parts |= {f"fitted.{name}": fit for name, fit in fusion.get("fitted", {}).items()}
    return {
        key: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()
        for key, part in parts.items()
    }
