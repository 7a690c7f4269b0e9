"""What environment and settings file can set, and who wins; and qaflora completion.

The command line wins over the environment, that over the file, that over a bundle's own
defaults, and those over what is built in.
"""

from collections.abc import Mapping
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from qaflora_edge.cli.options import command
from qaflora_edge.cli.own_options import OWN, shared_by
from qaflora_edge.config import (
    LIBRARY_KEYS,
    SHARED,
    Option,
    Table,
    read_settings,
    settings_path,
    unknown_key,
    wrong_value,
)

PREFIX = "QAFLORA_"
# Tables that take the shared options.
SHARED_TABLES = ("run", "chat", "compare", "eval", "weights", "export", "bench", "serve")
TABLES = tuple(dict.fromkeys((*SHARED_TABLES, *OWN)))
# Options by their keys in the file, as in the documents.
OPTIONS = dict(SHARED)
for _table, _own in OWN.items():
    OPTIONS |= {f"{_table}.{key}": option for key, option in _own.items()}


def variables(key: str, table: str) -> tuple[str, ...]:
    """Environment variables for a key: of one command first, then of all."""
    names = [f"{PREFIX}{table}_{key}".upper()] if table else []
    option = OWN.get(table, {}).get(key)
    if option is not None and option.variable:
        names.append(option.variable)
    if key in SHARED:
        names.append(f"{PREFIX}{key}".upper())
        old_key = SHARED[key].old_flag.removeprefix("--")
        if old_key:
            names.append(f"{PREFIX}{old_key}".upper())
    return tuple(names)


def table_options(table: str) -> dict[str, Option]:
    """The options that a table of the settings file may set, by their keys."""
    shared = shared_by(table) if table in SHARED_TABLES else {}
    return shared | OWN.get(table, {})


def file_settings() -> Table:
    """Read the settings file, and check all keys and values. Raises SettingsError."""
    path = settings_path()
    settings = read_settings()
    for table in settings.keys() & {*TABLES}:
        if not isinstance(settings[table], dict):
            raise wrong_value(path, table, settings[table], f"a table, as in [{table}]")
        _check(path, settings[table], f"{table}.", table_options(table))
    others = settings.keys() - {*TABLES, *LIBRARY_KEYS}
    _check(path, {key: settings[key] for key in others}, "", SHARED)
    return settings


def _check(path: Path, values: Table, prefix: str, options: Mapping[str, Option]) -> None:
    """Check the values of one table; that of the file itself has no prefix."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        option = options.get(key)
        if option is None:
            names = [f"{prefix}{other}" for other in options]
            if not prefix:
                names += [*LIBRARY_KEYS, *TABLES]
            raise unknown_key(path, name, names)
        if not option.fits(value):
            shown = "(secret)" if option.is_secret else value
            raise wrong_value(path, name, shown, option.expected)


def file_defaults(verb: str) -> Table:
    """What the settings file says for the options of one command, as click's default_map."""
    settings = file_settings()
    values = settings | settings.get(verb, {})
    return {key: values[key] for key in table_options(verb) if key in values}


def attach_variables(verb: str, command: click.Command) -> None:
    """Let the environment set the options of a command that can be set."""
    for param in command.params:
        if param.name in table_options(verb):
            param.envvar = list(variables(param.name, verb))


@command(
    "qaflora completion bash > ~/.local/share/bash-completion/completions/qaflora",
    "qaflora completion fish > ~/.config/fish/completions/qaflora.fish",
)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def completion(shell: str) -> None:
    """Print completion for a shell.

    It completes commands, options, bundles and strategies. SHELL is bash (4.4 or newer), zsh or
    fish; docs/settings.md says where each looks.
    """
    shell_class = get_completion_class(shell)
    assert shell_class is not None
    root = click.get_current_context().find_root().command
    click.echo(shell_class(root, {}, "qaflora", "_QAFLORA_COMPLETE").source(), nl=False)
