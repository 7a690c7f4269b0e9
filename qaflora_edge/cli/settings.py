"""The options of each command, what environment and settings file can set, and who wins.

The command line wins over the environment, that over the file, that over a bundle's own
defaults, and those over what is built in.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import click

from qaflora_edge.config import (
    LIBRARY_KEYS,
    OUTTYPES,
    SHARED,
    Option,
    Table,
    in_group,
    read_settings,
    settings_path,
    unknown_key,
    wrong_value,
)

# fmt: off
# Adapters for a base alone: of every command that takes the shared options, and no setting.
ADAPTER = Option("adapter", tuple, flag="--adapter", section="Mix", metavar="[NAME=]PATH",
                 help="Weigh this adapter on a base alone; repeatable. PATH is a PEFT folder, an "
                 "adapter .gguf or the Hub's owner/name, and is converted once, into the cache. "
                 "NAME is the folder's or file's unless given.")
_OUTTYPE = Option("outtype", str, "f16", flag="--outtype", section="Options", choices=OUTTYPES,
                  help="Store tensors of adapters in this type.")
# What one command has besides, and can be set.
OWN_OPTIONS = {
    "run": (
        Option("system", str, flag="--system", short="-s", section="Prompt", metavar="TEXT",
               help="Say this first, as the system's message."),
    ),
    "chat": (
        Option("system", str, flag="--system", short="-s", section="Prompt", metavar="TEXT",
               help="Begin with this system prompt; /system changes it."),
        Option("plain", bool, False, flag="--plain/--no-plain", unset="so off a terminal",
               help="No escape codes, no line editing, no rendered Markdown."),
    ),
    "serve": (
        Option("host", str, "127.0.0.1", flag="--host", section="Server", metavar="ADDRESS",
               help="Listen here; 0.0.0.0 is every address of this machine."),
        Option("port", int, 8080, flag="--port", section="Server", low=0, high=65535,
               noun="a number of a port", help="Listen here; 0 chooses a free one."),
        Option("api_key", str, flag="--api-key", section="Server", metavar="KEY",
               variable="QAFLORA_API_KEY", is_secret=True, unset="none",
               help="Require this key of each request; better set the variable."),
        Option("max_queue", int, 64, flag="--max-queue", low=0, high=100_000,
               noun="a number of requests", help="Let so many requests wait, and refuse others."),
        Option("max_models", int, flag="--max-models", low=1, noun="a number", unset="all",
               help="Keep so many bundles open; close the one not used for the longest."),
        Option("timeout", float, 600.0, flag="--timeout", low=0, is_open=True, high=1e6,
               noun="a number of seconds",
               help="End what was computed for so many seconds; its answer is cut then."),
        Option("ttl", float, flag="--ttl", low=0, is_open=True, high=1e8, unset="never",
               noun="a number of seconds",
               help="Close a bundle unused for so long; the next request opens it."),
        Option("cors_origin", tuple, flag="--cors-origin", metavar="ORIGIN",
               help="Let pages of this origin ask, such as https://example.org; repeatable."),
        Option("allow_adapters", str, flag="--allow-adapters", metavar="FOLDER", unset="none",
               help="Let clients and the page add adapters out of this folder, and remove them. "
               "What the page uploads is kept in it until the server ends."),
        Option("allow_host", tuple, flag="--allow-host", metavar="NAME",
               help="Take requests to this host name, such as a proxy's; repeatable."),
        Option("teach", bool, flag="--teach/--no-teach", unset="where only this machine reaches it",
               help="Let who asks teach whose question one is; from other machines with a key."),
        Option("insecure", bool, False, flag="--insecure/--no-insecure",
               help="Serve beyond this machine without an API key: whoever reaches it may ask, by "
               "an address, this machine's name or --allow-host. With a key any name does."),
    ),
    "worker": (
        Option("host", str, "127.0.0.1", flag="--host", section="Options", metavar="ADDRESS",
               help="Listen at this IPv4 address; 0.0.0.0 is every one of this machine."),
        Option("port", int, 50052, flag="--port", section="Options", low=1, high=65535,
               noun="a number of a port", help="Listen here."),
        Option("cache", str, flag="--cache", section="Options", metavar="DIR", unset="none",
               help="Keep large tensors of clients in this folder, so that they are sent once. "
               "Nothing in it is ever removed."),
        replace(SHARED["threads"], section="Options"),
        Option("insecure", bool, False, flag="--insecure/--no-insecure",
               section="Options",
               help="Listen beyond this machine. Whoever reaches the port may read and write what "
               "is there, and nothing is encrypted."),
    ),
    "convert": (_OUTTYPE,),
    "export": (_OUTTYPE,),
}
# fmt: on
OWN = {
    command: {option.key: option for option in options} for command, options in OWN_OPTIONS.items()
}
# Options of sampling that say what is written, not how much of it.
_OF_TEXTS = in_group("sampling").keys() - {"max_tokens", "seed"}
# Command -> groups and names of shared options that would have no effect there, apart by spaces.
WITHOUT = {
    "serve": "raw_prompt",
    "chat": "n_parallel",
    "weights": "sampling n_parallel guesses reasoning",
    "decide": "sampling n_parallel guesses reasoning raw_prompt",
    "export": "sampling n_parallel guesses prefill reasoning",
    "bench": "n_ctx n_parallel raw_prompt reasoning " + " ".join(_OF_TEXTS),
}
PREFIX = "QAFLORA_"
# Tables that take the shared options.
SHARED_TABLES = ("run", "chat", "compare", "eval", "weights", "export", "bench", "serve")
TABLES = tuple(dict.fromkeys((*SHARED_TABLES, *OWN)))
# Options by their keys in the file, as in the documents.
OPTIONS = dict(SHARED)
for _table, _own in OWN.items():
    OPTIONS |= {f"{_table}.{key}": option for key, option in _own.items()}


def shared_by(command: str) -> dict[str, Option]:
    """The shared options that have an effect for a command, by their keys."""
    without = set(WITHOUT.get(command, "").split())
    return {k: o for k, o in SHARED.items() if not without & {o.name, *o.groups.split()}}


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
