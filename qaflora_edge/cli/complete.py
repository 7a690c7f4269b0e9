"""Completion at the shell's prompt: what may follow, and the scripts that ask for it.

Nothing here loads a model, and a broken bundle or settings file suggests nothing.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from qaflora_edge.weighing.strategy import strategies

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_QAFLORA_COMPLETE"
MAX_ENTRIES = 1000
Items: TypeAlias = "list[CompletionItem[str]]"

# Bash cuts words at : and = too. So it passes the line up to the cursor, and says with $2 how
# much of the last word it will replace.
_BASH = """\
%(complete_func)s() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        case $line in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain,*)
                COMPREPLY+=("${line#plain,}")
                [[ $line == *[=:,/] ]] && compopt -o nospace
                ;;
        esac
    done < <(COMP_WORDS="${COMP_LINE:0:COMP_POINT}" COMP_LAST="$2" \\
        %(complete_var)s=bash_complete "$1" 2>/dev/null)
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class _Bash(BashComplete):
    """Bash, with words that hold : and = taken whole."""

    source_template = _BASH

    def source(self) -> str:
        return self.source_template % self.source_vars()

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)[1:]
        if line.endswith(" ") and not line.endswith("\\ "):
            return words, ""
        return words[:-1], words[-1] if words else ""

    def complete(self) -> str:
        args, word = self.get_completion_args()
        last = (split_arg_string(os.environ.get("COMP_LAST", "")) or [""])[0]
        value = word.partition("=")[2] if re.match("--?[a-z-]+=", word) else word
        n_kept = len(value) - len(last) if value.endswith(last) else 0
        lines = []
        for item in self.get_completions(args, word):
            is_plain = item.type == "plain"
            lines.append(f"plain,{escaped(item.value[n_kept:])}" if is_plain else item.type)
        return "\n".join(lines)


def escaped(word: str) -> str:
    """A word as bash reads it back, with a backslash before what it would take for its own.

    Not before ~, which stands at the beginning only where the user has typed it.
    """
    return re.sub(r"""([\s"'\\$`!&|;<>()*?\[\]{}#])""", r"\\\1", word)


add_completion_class(_Bash)


def script(main: click.Command, shell: str) -> str:
    """The script that sets completion of a whole command line up in a shell."""
    shell_class = get_completion_class(shell)
    assert shell_class is not None
    return shell_class(main, {}, "qaflora", VARIABLE).source()


def complete_bundle(ctx: click.Context, param: click.Parameter, word: str) -> Items:
    """Bundles for DIR: folders near what is typed, and names from the setting `bundles`."""
    from qaflora_edge.errors import QafloraError
    from qaflora_edge.hub.names import named_bundles

    found = _folders_near(word)
    with contextlib.suppress(QafloraError):
        found += named_bundles()
    return _items(found, word) or [CompletionItem(word, type="dir")]


def _folders_near(word: str) -> list[str]:
    """Bundles whose path begins with `word`, at that depth or one below, written as typed."""
    from qaflora_edge.hub.names import bundles_in, is_bundle
    from qaflora_edge.settings import expanded

    head, slash, tail = word.rpartition("/")
    folder = expanded(head + slash) if head + slash else Path()
    found = []
    try:
        entries = sorted(itertools.islice(folder.iterdir(), MAX_ENTRIES))
    except OSError:
        return []
    for entry in entries:
        is_hidden = entry.name.startswith(".") and not tail.startswith(".")
        if is_hidden or not entry.name.startswith(tail):
            continue
        shown = head + slash + entry.name
        if is_bundle(entry):
            found.append(shown)
        else:
            found += [f"{shown}/{inner.name}" for inner in bundles_in(entry)]
    return found


def complete_strategy(ctx: click.Context, param: click.Parameter, word: str) -> Items:
    """Strategies; after their colon the adapters of the bundle on the line, or their options."""
    names = bundle_adapters(ctx)
    kind, colon, rest = word.partition(":")
    if colon and kind == "single":
        return _items((f"single:{name}" for name in names), word)
    if colon and kind == "manual":
        done, comma, _ = rest.rpartition(",")
        used = {pair.partition("=")[0] for pair in done.split(",")}
        left = (name for name in names if name not in used)
        return _items((f"manual:{done}{comma}{name}=" for name in left), word)
    if colon:
        return _items(_with_option(word, kind), word)
    return _items((each.name + ":" * each.needs_argument for each in strategies()), word)


def _with_option(word: str, name: str) -> Iterator[str]:
    """A strategy with the options that its last, unfinished one may become."""
    head, comma, _ = word.rpartition(",") if "," in word else word.partition(":")
    used = {item.partition("=")[0] for item in word.partition(":")[2].split(",")[:-1]}
    known = next((each for each in strategies() if each.name == name and each.is_probed), None)
    for option in known.options if known else ():
        if option.name not in used:
            forms = [f"{option.name}={each}" for each in (*option.choices, *option.words)]
            forms += [] if option.choices else [f"{option.name}="]
            yield from (f"{head}{comma}{form}" for form in forms)


def complete_adapter(ctx: click.Context, param: click.Parameter, word: str) -> Items:
    """Names of the adapters of the bundle on the line."""
    return _items(bundle_adapters(ctx), word)


def complete_pulled(ctx: click.Context, param: click.Parameter, word: str) -> Items:
    """Names of what was pulled."""
    from qaflora_edge.errors import QafloraError
    from qaflora_edge.hub.names import all_here

    try:
        return _items((here.name for here in all_here() if here.is_pulled), word)
    except (QafloraError, OSError):
        return []


def complete_model(ctx: click.Context, param: click.Parameter, word: str) -> Items:
    """Names of the registry's models."""
    from qaflora_edge.formats.names import load_registry

    return _items(load_registry(), word)


def bundle_adapters(ctx: click.Context) -> list[str]:
    """The adapters of the bundle that stands on the line already; none without one."""
    from qaflora_edge.hub.names import adapter_names

    return _of_bundle(ctx, adapter_names)


def _of_bundle(ctx: click.Context, names_in: Callable[[Path], list[str]]) -> list[str]:
    """What a function finds in the folder of the bundle that stands on the line already."""
    from qaflora_edge.errors import QafloraError
    from qaflora_edge.hub.names import named_bundles

    given = [ctx.params[key] for key in ("bundle", "folder") if ctx.params.get(key)]
    # Click leaves arguments unnamed when the option before the cursor has no value yet.
    text = next(iter([*given, *ctx.args]), None)
    if text is None:
        return []
    names = names_in(Path(text))
    if not names:
        with contextlib.suppress(QafloraError):
            folder = named_bundles().get(str(text))
            names = names_in(folder) if folder else []
    return names


def _items(values: Iterable[str], word: str) -> Items:
    """Those that begin with what is typed."""
    return [CompletionItem(value) for value in values if value.startswith(word)]
