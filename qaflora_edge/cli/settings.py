"""qaflora settings"""

import json

import click

from qaflora_edge.cli.answers import print_json
from qaflora_edge.cli.options import command


@command("qaflora settings", "QAFLORA_THREADS=2 qaflora settings --json")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, setting by setting.")
def settings(as_json: bool) -> None:
    """Show what is set by environment and settings file.

    Names each setting with its value and where that comes from, or its default; last come options
    that are set for one command alone, as in a table such as [chat]. The file need not exist.
    """
    from qaflora_edge.cli.setting_table import (
        all_settings,
        command_settings,
        file_settings,
        origin,
        unknown_variables,
        without_secrets,
    )
    from qaflora_edge.settings import settings_path

    path, found = settings_path(), file_settings()
    rows = [(row, *origin(row, found)) for row in all_settings()]
    own = [(row, *origin(row, found)) for row in command_settings()]
    rows += [row for row in own if row[2] != "default"]
    for name in unknown_variables():
        click.echo(f"Note: the variable {name} is no setting, and is not read.", err=True)
    defaults = {row.key: _default(row.key) for row, _, _ in rows if row.key}
    if as_json:
        entries = {
            row.key or row.variables[0]: {"value": value, "from": source}
            | ({"default": defaults[row.key]} if row.key and defaults[row.key] else {})
            for row, value, source in rows
        }
        shown = {"file": str(path), "exists": path.is_file(), "settings": entries}
        print_json(shown | {"as_read": without_secrets(found)})
        return
    click.echo(f"{path}{'' if path.is_file() else ' (does not exist)'}")
    for row, value, source in rows:
        name = row.key or row.variables[0]
        is_file = source == str(path)
        shown_value = "" if value is None else json.dumps(value, ensure_ascii=False)
        shown_value = shown_value or defaults.get(row.key or "") or "-"
        click.echo(f"{name:<22} {shown_value:<24} {'the file' if is_file else source}")


def _default(key: str) -> str:
    """The default of a setting in words; "" where there is none."""
    from qaflora_edge.config import OWN, SHARED
    from qaflora_edge.files import cache_dir

    table, _, name = key.rpartition(".")
    option = OWN.get(table, {}).get(name) or SHARED.get(name)
    if option is None:
        return str(cache_dir()) if key == "cache" else ""

    def shown(value: object) -> str:
        if isinstance(value, bool):  # of the flag, which may turn off what is on
            return json.dumps(value is not option.is_negated)
        return "" if value in (None, ()) else str(value)

    if option.unset:
        return option.unset
    others = {} if table else option.defaults
    parts = [shown(option.default_of(table))]
    parts += [f"{verb} {shown(value)}" for verb, value in others.items() if shown(value)]
    return ", ".join(part for part in parts if part)
