"""What environment and settings file can set, and who wins; and qaflora completion.

The command line wins over the environment, that over the file, that over a bundle's own
defaults, and those over what is built in.
"""

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
# Options by their keys in the file: those of the documents, and shared ones for one command alone.
OPTIONS = dict(SHARED)
for _table, _own in OWN.items():
    OPTIONS |= {f"{_table}.{key}": option for key, option in _own.items()}
OF_COMMANDS: dict[str, Option] = {}
for _table in SHARED_TABLES:
    OF_COMMANDS |= {f"{_table}.{key}": option for key, option in shared_by(_table).items()}


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
    options = OPTIONS | OF_COMMANDS
    for key in settings.keys() & {*TABLES}:
        if not isinstance(settings[key], dict):
            raise wrong_value(path, key, settings[key], f"a table, as in [{key}]")
    for name, value in _by_key(settings).items():
        option = options.get(name)
        if option is not None and not option.fits(value):
            shown = "(secret)" if option.is_secret else value
            raise wrong_value(path, name, shown, option.expected)
        if option is None and name not in LIBRARY_KEYS:
            table = name.rpartition(".")[0]
            alike = [other for other in options if other.rpartition(".")[0] == table]
            raise unknown_key(path, name, alike if table else [*alike, *LIBRARY_KEYS, *TABLES])
    return settings


def _by_key(settings: Table) -> Table:
    """Give values by their keys; those of tables as run.temp."""
    values: Table = {}
    for key, value in settings.items():
        if key in TABLES:
            values |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            values[key] = value
    return values


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
