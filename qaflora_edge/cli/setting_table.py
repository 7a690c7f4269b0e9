"""What can be set by environment and settings file: the table, its checks, and who wins.

The command line wins over the environment, that over the file, that over a bundle's own
defaults, and those over what is built in.
"""

from __future__ import annotations

import importlib
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from qaflora_edge.cli.options import SharedOptions, shared_options
from qaflora_edge.settings import (
    LIBRARY_KEYS,
    read_settings,
    settings_path,
    unknown_key,
    wrong_value,
)

PREFIX = "QAFLORA_"
# Tables that take the shared options; `llm` is the plugin for the program of that name.
SHARED_TABLES = ("run", "chat", "weights", "bench", "llm")
# Options of one command that can be set in its table.
OWN_KEYS = {
    "run": ("system",),
    "chat": ("system", "keep_history", "plain"),
    "convert": ("outtype",),
}
TABLES = tuple(dict.fromkeys((*SHARED_TABLES, *OWN_KEYS)))


@click.command()
@shared_options
def _shared(options: SharedOptions) -> SharedOptions:
    """The shared options alone, to ask what they are."""
    return options


SHARED: Mapping[str, click.Option] = {
    param.name: param
    for param in _shared.params
    if isinstance(param, click.Option) and param.name is not None
}


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


def variables(key: str, table: str | None) -> tuple[str, ...]:
    """Environment variables for a key: of one command first, then of all."""
    own = (f"{PREFIX}{table}_{key}".upper(),) if table else ()
    shared = (f"{PREFIX}{key}".upper(),) if key in SHARED else ()
    return own + shared


LIBRARY_SETTINGS = (
    Setting("cache", ("QAFLORA_CACHE",), "a folder", "Where downloads are kept."),
    Setting(
        "bundles",
        ("QAFLORA_BUNDLES",),
        "a list of folders",
        "Bundles, or folders of bundles, that can be used by name; in the environment separated "
        "as in PATH.",
    ),
)
ENVIRONMENT_SETTINGS = (
    Setting(None, ("QAFLORA_CONFIG",), "a file", "The settings file to read instead of the usual."),
    Setting(
        None,
        ("QAFLORA_LIB_PATH",),
        "a folder",
        "The native library to load instead of the package's own.",
    ),
    Setting(
        None,
        ("QAFLORA_CPU_KERNELS",),
        "avx512, avx2, neon, portable or ggml",
        "Kernels for adapters on the CPU, for comparisons; ggml is its own operations.",
    ),
    Setting(
        None,
        ("QAFLORA_SOURCE_ARCHIVE",),
        "a file",
        "llama.cpp's source for the build, instead of fetching it.",
    ),
)


def all_settings() -> list[Setting]:
    """Every setting, in the order of the documents: the table of docs/settings.md."""
    rows = [*LIBRARY_SETTINGS]
    rows += [_setting(key, None, option) for key, option in SHARED.items()]
    for table, keys in OWN_KEYS.items():
        module = importlib.import_module(f"qaflora_edge.cli.{table}")
        options = options_by_name(getattr(module, table))
        rows += [_setting(key, table, options[key]) for key in keys]
    return [*rows, *ENVIRONMENT_SETTINGS]


def command_settings() -> list[Setting]:
    """What all commands share, as set for one command alone, such as run.temp."""
    return [
        Setting(f"{table}.{key}", variables(key, table)[:1], expected(option), option.help or "")
        for table in SHARED_TABLES
        for key, option in SHARED.items()
    ]


def _setting(key: str, table: str | None, option: click.Option) -> Setting:
    meaning = (option.help or "").partition("  [")[0]
    name = f"{table}.{key}" if table else key
    kind = expected(option) + ("; in the environment one text" if option.multiple else "")
    return Setting(name, variables(key, table), kind, meaning)


def expected(option: click.Option) -> str:
    """What a value of an option has to be, in words."""
    kind = option.type
    if option.is_flag:
        return "true or false"
    if option.multiple:
        return "a list of texts that are not empty"
    if isinstance(kind, click.Choice):
        return f"one of {', '.join(map(str, kind.choices))}"
    if isinstance(kind, click.IntRange | click.FloatRange):
        noun = "a whole number" if isinstance(kind, click.IntRange) else "a number"
        low = "" if kind.min is None else f" {'above' if kind.min_open else 'from'} {kind.min:g}"
        high = "" if kind.max is None else f" to {kind.max:.10g}"
        return f"{noun}{low}{high}" + ("" if high or not low else " up")
    return "a whole number" if kind is click.INT else "a text"


def fits(option: click.Option, value: object) -> bool:
    """Tell whether a value of the file has the type and the range of an option."""
    if option.is_flag:
        return isinstance(value, bool)
    if option.multiple:
        return isinstance(value, list) and all(isinstance(item, str) and item for item in value)
    number = isinstance(option.type, click.types.FloatParamType)
    whole = isinstance(option.type, click.types.IntParamType)
    types: tuple[type, ...] = (int, float) if number else (int,) if whole else (str,)
    if isinstance(value, bool) or not isinstance(value, types) or value != value:
        return False  # the last for NaN, which every range lets pass
    try:
        option.type.convert(value, option, None)
    except click.BadParameter:
        return False
    return True


def options_by_name(command: click.Command) -> dict[str, click.Option]:
    """The options of a command by the names of their parameters."""
    return {
        param.name: param
        for param in command.params
        if isinstance(param, click.Option) and param.name is not None
    }


def table_keys(table: str) -> tuple[str, ...]:
    """The keys that a table of the settings file may have."""
    shared = tuple(SHARED) if table in SHARED_TABLES else ()
    return shared + OWN_KEYS.get(table, ())


def file_settings() -> dict[str, Any]:
    """The settings file with all keys known and the shared ones checked.

    Raises SettingsError.
    """
    path, settings = settings_path(), read_settings()
    for key, value in settings.items():
        if key in SHARED:
            _check(path, key, SHARED[key], value)
        elif key in TABLES:
            if not isinstance(value, dict):
                raise wrong_value(path, key, value, f"a table, as in [{key}]")
            for name in value:
                if name not in table_keys(key):
                    raise unknown_key(path, f"{key}.{name}", _dotted(key))
                if name in SHARED:
                    _check(path, f"{key}.{name}", SHARED[name], value[name])
        elif key not in LIBRARY_KEYS:
            raise unknown_key(path, key, (*SHARED, *LIBRARY_KEYS, *TABLES))
    return settings


def _dotted(table: str) -> list[str]:
    return [f"{table}.{name}" for name in table_keys(table)]


def _check(path: Path, key: str, option: click.Option, value: object) -> None:
    if not fits(option, value):
        raise wrong_value(path, key, value, expected(option))


def file_defaults(verb: str, command: click.Command) -> dict[str, Any]:
    """What the settings file says for the options of one command, as click's default_map."""
    settings = file_settings()
    if verb not in TABLES:
        return {}
    shared = {key: value for key, value in settings.items() if key in SHARED}
    found: dict[str, Any] = (shared if verb in SHARED_TABLES else {}) | settings.get(verb, {})
    options = options_by_name(command)
    for key in OWN_KEYS.get(verb, ()):
        if key in found and key in options:
            _check(settings_path(), f"{verb}.{key}", options[key], found[key])
    return found


def attach_variables(verb: str, command: click.Command) -> None:
    """Let the environment set the options of a command that can be set, and its help say so."""
    options = options_by_name(command)
    keys = [key for key in table_keys(verb) if key in options and variables(key, verb)]
    for key in keys:
        options[key].envvar = list(variables(key, verb))
    if keys and _NOTE not in (command.epilog or ""):
        lines = textwrap.fill(_help_note(verb, keys), 76, break_on_hyphens=False)
        command.epilog = f"{command.epilog}\n\n\b\n{_NOTE}\n{textwrap.indent(lines, '  ')}"


_NOTE = "Environment and files:"


def _help_note(verb: str, keys: list[str]) -> str:
    """What the help of a command says of its settings: one as example, the others by name."""
    key = "temp" if "temp" in keys else keys[0]
    own, *shared = variables(key, verb)
    others = ", ".join(f"--{other.replace('_', '-')}" for other in keys if other != key)
    return (
        f"--{key.replace('_', '-')} is set by the variable {own}"
        + (f", or {shared[0]} for all commands," if shared else "")
        + f" and by the key {key} of the settings file, in its table [{verb}]"
        + (" or above all tables" if shared else "")
        + (f"; likewise {others}" if others else "")
        + ". `qaflora settings` shows the file and what is set."
    )


def shared_settings(table: str) -> SharedOptions:
    """The shared options as environment and file set them, without a command line."""

    @click.command()
    @shared_options
    def nothing(options: SharedOptions) -> SharedOptions:
        return options

    attach_variables(table, nothing)
    defaults = file_defaults(table, nothing)
    context = nothing.make_context(table, [], default_map=defaults, auto_envvar_prefix=None)
    with context:
        chosen: SharedOptions = nothing.invoke(context)
    return chosen


def unknown_variables() -> list[str]:
    """Variables of the environment that look like settings and are none."""
    rows = [*all_settings(), *command_settings()]
    known = {variable for row in rows for variable in row.variables}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def origin(row: Setting, settings: Mapping[str, Any]) -> tuple[Any, str]:
    """The value of a setting and where it comes from: a variable, the file, or `default`.

    settings  what the file says, as file_settings gives it
    """
    for variable in row.variables:
        if value := os.environ.get(variable):
            return value, variable
    found: Any = settings
    for part in (row.key or "").split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return (None, "default") if found is None else (found, str(settings_path()))
