"""Tiny bundles as real folders, and a look at a folder that shows any change."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import tiny
from click.testing import CliRunner, Result

from qaflora_edge import Engine
from qaflora_edge.bundles import edit as measure
from qaflora_edge.bundles.create import create_bundle
from qaflora_edge.bundles.edit import add_adapters, calibrate
from qaflora_edge.cli import main
from qaflora_edge.cli.options import SharedOptions, shared_options
from qaflora_edge.cli.settings import attach_variables, file_defaults
from qaflora_edge.formats.inputs import checksum

# Measuring with all of them takes seconds.
NEUTRAL = {
    "prompts": measure.neutral("prompts")[::5],
    "turns": measure.neutral("turns")[::16],
    "exchanges": measure.neutral("exchanges")[::3],
}
measure.neutral = lambda kind: list(NEUTRAL[kind])


@dataclass(frozen=True)
class TinyBundle:
    """A bundle of the adapters `math` (converted from PEFT) and `es` (copied), and its sources."""

    folder: Path
    base: tiny.TinyBase
    peft: Path
    adapter: tiny.TinyAdapter


def make_sources(place: Path, **base_options: Any) -> TinyBundle:
    """Write a base, a PEFT folder and an adapter GGUF; the bundle's folder is not made."""
    base = tiny.write_tiny_base(place / "base.gguf", **base_options)
    peft = tiny.write_tiny_peft(place / "peft", base)
    adapter = tiny.write_tiny_adapter(place / "es.gguf", base, rank=8)
    return TinyBundle(place / "bundle", base, peft, adapter)


def make_bundle(place: Path, *, calibrate: bool = False, **base_options: Any) -> TinyBundle:
    """Write the sources and make the bundle; without calibration that loads no library.

    calibrate  measure all that can be

    What was made once with the same options is copied.
    """
    if "replace" in base_options:  # arrays
        return _made(place, calibrate, base_options)
    key = (calibrate, *sorted(base_options.items()))
    if key not in _FIRST:
        _FIRST[key] = _made(Path(_PLACE.name) / str(len(_FIRST)), calibrate, base_options)
    first = _FIRST[key]
    origin = first.folder.parent
    shutil.copytree(origin, place, dirs_exist_ok=True)
    text = (place / "bundle" / "bundle.json").read_text(encoding="utf-8")
    text = text.replace(str(origin.resolve()), str(place.resolve()))
    (place / "bundle" / "bundle.json").write_text(text, encoding="utf-8")
    checksum(place / "base.gguf")  # as create_bundle does: it lies outside of the bundle
    return TinyBundle(
        place / "bundle",
        replace(first.base, path=place / "base.gguf"),
        place / "peft",
        replace(first.adapter, path=place / "es.gguf"),
    )


_FIRST: dict[Any, TinyBundle] = {}  # by their options
_PLACE = TemporaryDirectory()  # of those; it ends with the process


def _made(place: Path, is_calibrated: bool, base_options: dict[str, Any]) -> TinyBundle:
    place.mkdir(exist_ok=True)
    made = make_sources(place, **base_options)
    create_bundle(
        made.folder,
        made.base.path,
        {"math": made.peft, "es": made.adapter.path},
        name="tiny",
        strategy="qa-flora",  # which weighs all of them, whatever is asked
    )
    if is_calibrated:
        calibrate(made.folder, Engine)
    return made


def qaflora(*args: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], input=stdin)


def said_by(result: Result, code: int = 0) -> str:
    """Give what a command says on stderr; it prints nothing, and ends with this code."""
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    return result.stderr


def add_adapter(folder: Path, name: str, source: Path | str, **options: Any) -> None:
    add_adapters(folder, {name: source}, **options)


def bundle_json(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    return found


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = bundle_json(folder)
    change(raw)
    (folder / "bundle.json").write_text(json.dumps(raw), encoding="utf-8")


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below a folder, hidden ones included, with the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in sorted(folder.rglob("*"))
    }


def shared_settings(table: str) -> SharedOptions:
    """The shared options as environment and file set them, without a command line."""

    def nothing(options: SharedOptions) -> SharedOptions:
        return options

    nothing.__name__ = table
    taking = click.command()(shared_options(nothing))
    attach_variables(table, taking)
    with taking.make_context(table, [], default_map=file_defaults(table)) as context:
        chosen: SharedOptions = taking.invoke(context)
    return chosen
