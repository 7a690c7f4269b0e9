"""What verbs have in common: options and their completion, prompts, bases, the Engine they make."""

import contextlib
import functools
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem, get_completion_class

from qaflora_edge.ask import Chat, Question, Sampling
from qaflora_edge.cli.output import progress_bars, say, waiting
from qaflora_edge.cli.places import bundle_folder
from qaflora_edge.cli.prompts import read_message
from qaflora_edge.cli.settings import ADAPTER, OWN, shared_by
from qaflora_edge.config import ADVANCED, SECTIONS, Option, expanded, in_group
from qaflora_edge.errors import PromptError, QafloraError
from qaflora_edge.files import check_takes_file

if TYPE_CHECKING:
    from qaflora_edge.engine import Engine

Decorator = Callable[..., Any]  # also a command, which it takes and gives
Keywords = dict[str, Any]  # of a call, by their names
Pairs = list[tuple[str, str]]  # of texts: adapters and where they are, flags and their help


class SharedOptions(SimpleNamespace):
    """The shared options by their keys in the settings; None where nothing is set."""

    def keywords(self, group: str) -> Keywords:
        """The options of a group of `config`, by their names in Python."""
        keywords = {}
        for option in in_group(group).values():
            if hasattr(self, option.key):
                value = getattr(self, option.key)
                if option.is_negated and value is not None:
                    value = not value
                keywords[option.name] = value
        return keywords

    @property
    def engine(self) -> Keywords:
        return self.keywords("engine")

    @property
    def sampling(self) -> Sampling:
        return Sampling().updated(self.keywords("sampling"))


class _Number(click.ParamType):  # type: ignore[type-arg]
    """A number, or one of some words, as an option of `config` takes it."""

    name = "number"

    def __init__(self, option: Option) -> None:
        self._option = option

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        number = self._option.parsed(str(value))
        if not self._option.fits(number):
            self.fail(f"{value!r} is not {self._option.expected}.", param, ctx)
        return number


class WholeText(click.types.StringParamType):
    """A text of an option that is repeatable, taken whole out of the environment."""

    envvar_list_splitter = "\0"  # which is in no variable


# What may stand in place of a word, where a shell asks: nothing here loads a model, and a broken
# bundle or settings file suggests nothing.


def complete_bundle(ctx: click.Context, param: click.Parameter, word: str) -> list[Any]:
    """Names from the setting `bundles`, else folders and files."""
    from qaflora_edge.hub import named_bundles

    return _items(named_bundles, word) or [CompletionItem(word, type="file")]


def complete_strategy(ctx: click.Context, param: click.Parameter, word: str) -> list[Any]:
    """Strategies that need no argument."""
    from qaflora_edge.weighing.strategy import offered

    names = [strategy.name for strategy in offered() if not strategy.needs_argument]
    return _items(lambda: names, word)


def _items(values: Callable[[], Iterable[str]], word: str) -> list[Any]:
    with contextlib.suppress(QafloraError, OSError):
        return [CompletionItem(value) for value in values() if value.startswith(word)]
    return []


N_SLOW = 16  # adapters; weighing more of them one by one takes seconds

# Keywords of click.argument for DIR.
BUNDLE: Keywords = {"metavar": "DIR", "shell_complete": complete_bundle}
bundle_argument = click.argument("bundle", **BUNDLE)
PATH = click.Path(path_type=Path)


def json_option(help: str = "Print one JSON object.") -> Decorator:
    """The option --json of a command, which gets it as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=help)


def out_file(*suffixes: str, metavar: str = "FILE") -> Keywords:
    """Keywords of click.option for a file that is written, and has to end so."""

    def check(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
        if value == Path("-"):
            raise click.BadParameter("a file is needed, stdout will not do.")
        if value is not None and suffixes and value.suffix.lower() not in suffixes:
            raise click.BadParameter(f"{str(value)!r} does not end in {', '.join(suffixes)}.")
        return value

    kind = click.Path(dir_okay=False, path_type=Path)
    return {"metavar": metavar, "type": kind, "callback": check}


def check_outputs(
    written: Sequence[Path | str | None], read: Sequence[Path], *, added_to: Path | None = None
) -> None:
    """Fail before the work where files cannot be written.

    Raises click.UsageError for one that is named twice or is read, OutputFileError for one whose
    folder is not there or does not take it.
    """
    taken = {path.resolve() for path in read}
    for name in written:
        if name is None:
            continue
        target = Path(name)
        path = target.resolve()
        if path in taken and (path.is_file() or not path.exists()):
            raise click.UsageError(f"{path.name} is named twice; give each FILE a name of its own.")
        taken.add(path)
        if target != added_to or not os.path.lexists(target):
            check_takes_file(target)


def meaning(option: Option) -> str:
    """The help text of an option, with the strategies that there are by now."""
    if "{strategies}" not in option.help:
        return option.help
    from qaflora_edge.weighing.strategy import offered, written

    strategies = offered()
    *others, last = [strategy.usage for strategy in strategies]
    forms: dict[str, None] = {}
    for strategy in strategies:
        if strategy.is_probed:
            forms |= dict.fromkeys(map(written, strategy.options))
    text = option.help.replace("{strategies}", f"{', '.join(others)} or {last}")
    return text.replace("{options}", ", ".join(forms))


class _Option(click.Option):
    """An option of `config`, explained when help is asked for: strategies may come until then."""

    def __init__(self, *args: Any, declared: Option, unset: str, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.declared = declared
        self.unset = unset

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        self.help = meaning(self.declared)
        if self.unset:
            self.help += f"  [default: {self.unset}]"
        return super().get_help_record(ctx)


def click_option(option: Option, command: str) -> Decorator:
    """An option as a decorator for a command."""
    default = option.defaults.get(command, option.default)
    shown = default
    if option.is_negated and default is not None:
        shown = not default
    keywords: Keywords = {}
    if option.kind is not tuple:
        keywords["default"] = shown
    if option.name == "strategy":
        keywords["shell_complete"] = complete_strategy
    unset = option.unset
    if command in option.defaults:
        unset = ""
    has_words = unset or option.kind is bool
    return click.option(
        *filter(None, (option.flag, option.short, option.old_flag)),
        cls=_Option,
        declared=option,
        unset=unset,
        help=option.help,
        metavar=option.metavar or {int: "N", float: "X"}.get(option.kind),
        type=_click_type(option),
        multiple=option.kind is tuple,
        show_default=not has_words and default is not None,
        **keywords,
    )


def _click_type(option: Option) -> Any:
    if option.choices:
        return click.Choice(option.choices)
    if option.kind in (int, float):
        return _Number(option)
    if option.kind is tuple:
        return WholeText()
    return option.kind


def own_options(command: Decorator) -> Decorator:
    """Add the options of `config` that are those of one command, which its function names."""
    for option in reversed(OWN[command.__name__].values()):
        command = click_option(option, command.__name__)(command)
    return command


def shared_options(command: Decorator) -> Decorator:
    """Add the shared options; the command gets them as one argument `options`."""
    options = list(shared_by(command.__name__).values())

    @functools.wraps(command)
    def collected(**kwargs: Any) -> Any:
        shared = {option.key: kwargs.pop(option.key) for option in options}
        if adapters := adapter_pairs(kwargs.pop(ADAPTER.key)):
            if "bundles" in kwargs:
                kwargs["bundles"] = (_with_adapters(adapters, *kwargs["bundles"]),)
            else:
                kwargs["bundle"] = _with_adapters(adapters, kwargs["bundle"])
        if command.__name__ in SAMPLED_BY_BUNDLE and "bundle" in kwargs:
            shared |= _sampling_of_bundle(kwargs["bundle"])
        return command(options=SharedOptions(**shared), **kwargs)

    decorated: Decorator = collected
    for option in (*reversed(options), ADAPTER):
        decorated = click_option(option, command.__name__)(decorated)
    return decorated


# Commands that sample as a bundle says; `serve` does so for each of its bundles.
SAMPLED_BY_BUNDLE = ("run", "chat", "compare")


def _sampling_of_bundle(bundle: str) -> Keywords:
    """Give the options that a bundle sets, by key, where nobody who calls chose a value."""
    from qaflora_edge.formats.bundle import read_bundle_text

    options = in_group("sampling")
    values = {}
    with contextlib.suppress(QafloraError):  # what opens the bundle will say what is wrong
        for name, value in read_bundle_text(bundle_folder(bundle)).sampling.items():
            if not is_chosen(options[name].key):
                values[options[name].key] = value
    return values


def is_chosen(key: str) -> bool:
    """Tell whether an option comes from the command line, the environment or the settings."""
    source = click.get_current_context().get_parameter_source(key)
    return source not in (None, ParameterSource.DEFAULT)


def adapter_pairs(values: Sequence[str]) -> Pairs:
    """Read [NAME=]PATH; the folder, file or repository gives the name where there is none.

    Raises BadParameter where a side is empty, as for a folder whose name has no Latin letter.
    """
    pairs = []
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or os.path.exists(expanded(value)):
            path = value
            last_part, _, _ = expanded(path).resolve().name.partition("@")
            title = last_part.removesuffix(".gguf")
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", title).lstrip("-._")[:64]
        if not (name and path):
            raise click.BadParameter(f"{value!r} gives no name; write it as NAME={path or 'PATH'}.")
        pairs.append((name, path))
    return pairs


def _with_adapters(adapters: Sequence[tuple[str, str]], base: str, *others: str) -> str:
    """Find or make the bundle of a base and adapters in the cache; say how to make one to keep."""
    from qaflora_edge.bundles.create import cached_bundle
    from qaflora_edge.formats.bundle import is_base

    base_path = bundle_folder(base)
    if others or not is_base(base_path):
        raise click.UsageError(
            f"--adapter goes with one base, a .gguf file, and not with {' '.join((base, *others))};"
            " to put an adapter into a bundle: qaflora bundle add DIR PATH."
        )
    with progress_bars() as tell:
        folder = cached_bundle(base_path, adapters, tell)
    words = ["qaflora", "bundle", "create", "my-bundle", "--base", base]
    for name, path in adapters:
        words += ["--adapter", f"{name}={path}"]
    say(f"To keep these adapters, measured for relay: {shlex.join(words)}")
    return str(folder)


class _Command(click.Command):
    """A command whose options stand in sections.

    sections  parameter -> its section, for options that are not in `config`

    Where some are advanced, `--help` leaves these out and shows the first sentence of others.
    """

    def __init__(self, *args: Any, sections: Mapping[str, str], **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._sections = sections
        if any(self._section(param) == ADVANCED for param in self.params):
            self.params.append(_HELP_ALL)

    def _section(self, param: click.Parameter) -> str:
        if isinstance(param, _Option):
            return param.declared.section
        is_help = not {"--help", "--help-all"}.isdisjoint(param.opts)
        if is_help and _HELP_ALL in self.params:
            return ADVANCED
        return self._sections.get(param.name or "", SECTIONS[0])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, Pairs] = {name: [] for name in SECTIONS}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                rows[self._section(param)].append(record)
        is_short = bool(rows[ADVANCED]) and not ctx.meta.get(_ALL)
        if is_short:
            del rows[ADVANCED]
        width = max(len(flags) for records in rows.values() for flags, _ in records)
        for name, records in filter(itemgetter(1), rows.items()):
            lines = []
            for flags, text in records:
                shown = _FURTHER.sub("", text) if is_short else text
                lines.append((flags.ljust(min(width, 30)), shown))
            with formatter.section(name):
                formatter.write_dl(lines)
        if is_short:
            more = "-h, --help shows this; --help-all shows the advanced options too."
            formatter.write(f"\n  {more}\n")


def _show_all(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[_ALL] = True
        click.echo(ctx.get_help())
        ctx.exit()


ARGUMENTS = "qaflora.arguments"  # of ctx.meta: what was typed behind the verb
_ALL = "qaflora.help_all"
_HELP_ALL = click.Option(
    ["--help-all"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_all,
    help="Show all options, and all about them.",
)
_FURTHER = re.compile(r"(?<=\.) (?! ).*?(?=  \[|$)", re.DOTALL)  # sentences after the first


def command(
    *lines: str, group: Any = click, sections: Mapping[str, str] | None = None, **keywords: Any
) -> Callable[..., click.Command]:
    """A command whose help ends with an example in these lines, and how it ends."""
    example = "\n".join(f"  {line}" for line in lines)
    ends = "Exit codes: 0 done, 1 failed (stderr says why), 2 wrong usage, 130 Ctrl-C"
    keywords["epilog"] = f"\b\nExample:\n{example}\n\n\b\n{ends}"
    keywords["sections"] = sections or {}
    decorator: Callable[..., click.Command] = group.command(cls=_Command, **keywords)
    return decorator


def open_engine(
    bundle: str, options: SharedOptions, *, is_quiet: bool = False, **changes: Any
) -> "Engine":
    """Open an Engine for a bundle; a terminal shows that it takes long, unless is_quiet.

    changes  keywords of Engine in place of those that the options give
    """
    from qaflora_edge.bundles.open import unmeasured
    from qaflora_edge.engine import Engine

    folder = bundle_folder(bundle)
    with contextlib.nullcontext() if is_quiet else waiting(f"Loading {folder}"):
        engine = Engine(folder, **options.engine | changes)
    if warning := slow_weighing(engine) or unmeasured(folder, engine.memory.files.text):
        say(f"[{warning}]")
    return engine


def slow_weighing(engine: "Engine") -> str:
    """Say so where the strategy reads each prompt once for every adapter, and these are many."""
    strategy = engine.memory.current.weigher.strategy_of(None)
    n_adapter = len(engine.adapters)
    if strategy is None or not strategy.reads_each or n_adapter <= N_SLOW:
        return ""
    return (
        f"{engine.strategy} reads each prompt {n_adapter + 1} times, under the base and under each "
        "adapter; two-place reads it once"
    )


def read_prompt(text: str) -> str:
    """PROMPT as given, or stdin for `-` (without its last line end).

    Raises PromptError when it is empty, InputFileError when stdin is no UTF-8 or too long.
    """
    if text == "-":
        text = read_message("-")
    return check_prompt(text)


def check_prompt(
    text: str, what: str = "prompt", way: str = "or give it on stdin with PROMPT `-`"
) -> str:
    """The text itself. Raises PromptError when it is empty or no Unicode text."""
    if not text.strip():
        raise PromptError(f"The {what} is empty; give at least one character.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes of the command line, or a pipe, that were none
        raise PromptError(
            f"The {what} is not UTF-8 (at character {error.start}); expected text in UTF-8. "
            f"Convert it, {way}."
        ) from error
    return text


def question(prompt: str, options: SharedOptions, system: str | None = None) -> Question:
    """Ask with a prompt: as a question under the chat template, or as it is."""
    if options.raw_prompt:
        return prompt
    messages = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    messages.append({"role": "user", "content": prompt})
    return Chat(messages)


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
