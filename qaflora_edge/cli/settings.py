"""qaflora settings and completion: what environment and settings file can set, and who wins.

The command line wins over the environment, that over the file, that over a bundle's own
defaults, and those over what is built in.
"""

import json
import os
from dataclasses import dataclass
from typing import Any

import click
from click.shell_completion import get_completion_class

from qaflora_edge.cli.answers import print_json, say
from qaflora_edge.cli.options import SharedOptions, command, json_option, meaning, shared_options
from qaflora_edge.config import (
    LIBRARY_KEYS,
    OWN,
    SHARED,
    Option,
    Table,
    read_settings,
    settings_path,
    shared_by,
    unknown_key,
    wrong_value,
)

PREFIX = "QAFLORA_"
SECRET = "(secret)"  # shown instead of a value that is one
# Tables that take the shared options; `llm` is the plugin for the program of that name.
SHARED_TABLES = ("run", "chat", "compare", "eval", "weights", "export", "bench", "serve", "llm")
TABLES = tuple(dict.fromkeys((*SHARED_TABLES, *OWN)))
# Options by their keys in the file: those of the documents, and shared ones for one command alone.
_OPTIONS = dict(SHARED)
for _table, _own in OWN.items():
    _OPTIONS |= {f"{_table}.{key}": option for key, option in _own.items()}
_OF_COMMANDS: dict[str, Option] = {}
for _table in SHARED_TABLES:
    _OF_COMMANDS |= {f"{_table}.{key}": option for key, option in shared_by(_table).items()}


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    key        its name in the settings file, None when the environment alone sets it
    variables  of the environment, the first that is set wins
    """

    key: str | None
    variables: tuple[str, ...]
    kind: str
    meaning: str
    is_secret: bool = False


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


# Kind and meaning of what no command takes: by keys of the file, and by variables alone.
_OF_LIBRARY = {
    "cache": ("a folder", "Where downloads are kept."),
    "bundles": (
        "a list of folders",
        "Bundles, or folders of bundles, that can be used by name; in the environment separated "
        "as in PATH.",
    ),
}
_OF_ENVIRONMENT = {
    "QAFLORA_CONFIG": ("a file", "The settings file to read instead of the usual."),
    "QAFLORA_LIB_PATH": ("a folder", "The native library to load instead of the package's own."),
    "QAFLORA_CPU_KERNELS": (
        "avx512vnni, avxvnni, avx512, avx2, i8mm, dotprod, neon, portable or ggml",
        "Kernels for adapters on the CPU, for comparisons; ggml is its own operations.",
    ),
    "QAFLORA_RPC_TIMEOUT": (
        "a number of seconds from 0 to 999999",
        "A worker of --rpc that sends nothing for so long while it is waited for is lost; 60 if "
        "not set, 0 waits without end.",
    ),
    "QAFLORA_SOURCE_ARCHIVE": (
        "a file",
        "llama.cpp's source for the build, instead of fetching it.",
    ),
}


def all_settings() -> list[Setting]:
    """List every setting, in the order of the documents: the table of docs/settings.md."""
    return [
        *(Setting(k, (f"{PREFIX}{k}".upper(),), *said) for k, said in _OF_LIBRARY.items()),
        *(_setting(key, option) for key, option in _OPTIONS.items()),
        *(Setting(None, (name,), *said) for name, said in _OF_ENVIRONMENT.items()),
    ]


def _setting(name: str, option: Option) -> Setting:
    table, _, key = name.rpartition(".")
    kind = option.expected + ("; in the environment one text" if option.kind is tuple else "")
    return Setting(name, variables(key, table), kind, meaning(option), option.is_secret)


def table_options(table: str) -> dict[str, Option]:
    """The options that a table of the settings file may set, by their keys."""
    shared = shared_by(table) if table in SHARED_TABLES else {}
    return shared | OWN.get(table, {})


def file_settings() -> Table:
    """Read the settings file, and check all keys and values. Raises SettingsError."""
    path = settings_path()
    settings = read_settings()
    options = _OPTIONS | _OF_COMMANDS
    for key in settings.keys() & {*TABLES}:
        if not isinstance(settings[key], dict):
            raise wrong_value(path, key, settings[key], f"a table, as in [{key}]")
    for name, value in _by_key(settings).items():
        option = options.get(name)
        if option is not None and not option.fits(value):
            shown = SECRET if option.is_secret else value
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


@command("qaflora settings", "QAFLORA_THREADS=2 qaflora settings --json")
@json_option("Print one JSON object.")
def settings(as_json: bool) -> None:
    """Show what is set by environment and settings file."""
    path = settings_path()
    in_file = _by_key(file_settings())
    of_commands = [_setting(key, option) for key, option in _OF_COMMANDS.items()]
    values: dict[str, Any] = {}
    names: set[str] = set()
    for row in (*all_settings(), *of_commands):
        names.update(row.variables)
        said = {row.key: in_file[row.key]} if row.key in in_file else {}
        said |= {name: os.environ[name] for name in row.variables if os.environ.get(name)}
        values |= dict.fromkeys(said, SECRET) if row.is_secret else said
    for name in sorted(os.environ.keys() - names):
        if name.startswith(PREFIX):
            say(f"Note: the variable {name} is no setting, and is not read.")
    if as_json:
        print_json({"file": str(path), "exists": path.is_file(), "settings": values})
        return
    click.echo(f"{path}{'' if path.is_file() else ' (does not exist)'}")
    for name, value in values.items():
        click.echo(f"{name:<22} {json.dumps(value, ensure_ascii=False)}")


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
