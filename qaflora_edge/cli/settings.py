"""qaflora settings"""

from __future__ import annotations

import json

import click

from qaflora_edge.cli.options import example


@click.command(epilog=example("qaflora settings\nQAFLORA_THREADS=2 qaflora settings --json"))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, setting by setting.")
def settings(as_json: bool) -> None:
    """Show what is set by environment and settings file.

    Names each setting with its value and where that comes from; last come options that are set for
    one command alone, as in a table such as [chat]. The file need not exist.
    """
    from qaflora_edge.cli.setting_table import (
        all_settings,
        command_settings,
        file_settings,
        origin,
        unknown_variables,
    )
    from qaflora_edge.settings import settings_path

    path, found = settings_path(), file_settings()
    rows = [(row, *origin(row, found)) for row in all_settings()]
    own = [(row, *origin(row, found)) for row in command_settings()]
    rows += [row for row in own if row[2] != "default"]
    for name in unknown_variables():
        click.echo(f"Note: the variable {name} is no setting, and is not read.", err=True)
    if as_json:
        entries = {
            row.key or row.variables[0]: {"value": value, "from": source}
            for row, value, source in rows
        }
        shown = {"file": str(path), "exists": path.is_file(), "settings": entries, "as_read": found}
        click.echo(json.dumps(shown, ensure_ascii=False))
        return
    click.echo(f"{path}{'' if path.is_file() else ' (does not exist)'}")
    for row, value, source in rows:
        name = row.key or row.variables[0]
        is_file = source == str(path)
        shown_value = "" if value is None else json.dumps(value, ensure_ascii=False)
        line = f"{name:<22} {shown_value or '-':<20} {'the file' if is_file else source}"
        click.echo(line)
