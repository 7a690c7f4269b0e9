"""The command `qaflora`: a thin layer over the package, one file per verb, loaded when used."""

import contextlib
import importlib
import io
import os
import signal
import sys
import threading
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from qaflora_edge import __version__
from qaflora_edge.errors import OutputFileError, QafloraError, is_disk_full, nearest
from qaflora_edge.files import one_line

# Groups of verbs, and for each its line in `qaflora --help`. The first line of a command's own help
# says the same.
GROUPS = {
    "Ask": {
        "run": "Answer a prompt with the weighed adapters.",
        "chat": "Talk with the weighed adapters.",
        "compare": "Show what several strategies answer, side by side.",
        "decide": "Choose one of several answers, with probabilities.",
        "weights": "Show what each adapter weighs for a prompt.",
    },
    "Serve": {
        "serve": "Serve bundles to programs and browsers that speak OpenAI's API.",
        "worker": "Lend this machine's memory to a base that does not fit another.",
    },
    "Make": {
        "bundle": "Make, change, show and verify bundles.",
        "convert": "Convert a PEFT adapter to an adapter GGUF.",
        "export": "Write a mix as one adapter.",
    },
    "Fetch": {
        "pull": "Fetch a model, an adapter or a bundle.",
        "models": "List the models that can be pulled.",
        "list": "List the bundles and bases that are here.",
        "remove": "Remove a model, an adapter or a bundle that was pulled.",
    },
    "Measure": {
        "eval": "Score tasks under several strategies.",
        "bench": "Measure speed on this machine.",
    },
    "Set up": {
        "doctor": "Report the library, the devices and the versions.",
        "completion": "Print completion for a shell.",
    },
}
VERBS = {verb: line for verbs in GROUPS.values() for verb, line in verbs.items()}
ALIASES = {"ls": "list", "rm": "remove"}
# Verb -> its module and function, where they do not have its name.
_PLACES = {verb: ("hub", verb) for verb in ("pull", "models", "remove")}
_PLACES |= {
    "list": ("hub", "list_here"),
    "chat": ("chat.app", "chat"),
    "completion": ("options", "completion"),
    "decide": ("weights", "decide"),
    "export": ("convert", "export"),
    "worker": ("serve", "worker"),
}
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


class VerbGroup(click.Group):
    """Imports a verb's module when the verb is used, and turns failures into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = ALIASES.get(cmd_name, cmd_name)
        if verb not in VERBS:
            return None
        from qaflora_edge.cli.settings import attach_variables

        module, function = _PLACES.get(verb, (verb, verb))
        command: click.Command = getattr(
            importlib.import_module(f"qaflora_edge.cli.{module}"), function
        )
        attach_variables(verb, command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; it would look for similar names among the commands that are loaded."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = nearest(args[0], VERBS)
            hint = f" Did you mean {near!r}?" if near else ""
            raise click.UsageError(f"{error.message}{hint}", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = {verb: f"{verb}, {alias}" for alias, verb in ALIASES.items()}
        width = max(map(len, [*VERBS, *names.values()]))
        for group, verbs in GROUPS.items():
            with formatter.section(group):
                rows = [(names.get(verb, verb).ljust(width), help) for verb, help in verbs.items()]
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read the output has seen enough
            _drop_output()
            sys.exit(0)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        _prepare_streams()
        if threading.current_thread() is threading.main_thread():
            # A command that is told to end cleans up on its way.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            code = super().main(*args, **kwargs)
        except QafloraError as error:
            _fail(str(error))
        except click.ClickException as error:
            _with_variable(error).show()
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            sys.exit(EXIT_INTERRUPTED)
        except OSError as error:
            # Files say so themselves (files.atomic_path); what is left is stdout, and a file that
            # another program changed between two looks at it.
            if is_disk_full(error) and error.filename is None:
                _drop_output()
                _fail("Cannot write the output: the disk is full. Free some space and try again.")
            if error.filename is None:
                raise
            _fail(
                f"Cannot use {os.fsdecode(error.filename)}: {error.strerror}. Check that it is "
                "there, that you may use it, and that no other program changes it; try again."
            )
        except MemoryError:
            _fail(
                "There is not enough memory for this. Close other programs, or take a smaller "
                "base, fewer adapters or a smaller --ctx."
            )
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    click.echo(f"Error: {one_line(message)}", err=True)
    sys.exit(EXIT_FAILED)


def _with_variable(error: click.ClickException) -> click.ClickException:
    """Say so in a usage error when the wrong value came from the environment."""
    if not (isinstance(error, click.BadParameter) and error.ctx and error.param):
        return error
    if error.ctx.get_parameter_source(error.param.name or "") is not ParameterSource.ENVIRONMENT:
        return error
    variable = next(filter(os.environ.get, error.param.envvar or ()))
    message = f"{error.message} It is the environment variable {variable}; correct or unset it."
    return click.BadParameter(message, error.ctx, error.param, error.param_hint)


def _prepare_streams() -> None:
    """Let text that a terminal's encoding lacks be shown as `?` instead of ending the command.

    A stream that the caller closed is an empty one, but stdout: an answer would be lost there.
    """
    for name, mode in (("stdin", "rb"), ("stdout", "wb"), ("stderr", "wb")):
        if getattr(sys, name) is None:
            stream_type = _ClosedOutput if name == "stdout" else io.TextIOWrapper
            setattr(sys, name, stream_type(open(os.devnull, mode), encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


class _ClosedOutput(io.TextIOWrapper):
    """Stands for stdout where there is none; its file keeps others from getting its number."""

    def write(self, text: str) -> int:
        raise OutputFileError(
            "Cannot write the output: stdout is closed. Open it, as with `> FILE`."
        )


def _drop_output() -> None:
    """Send stdout nowhere: Python flushes it once more at its end, which would fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


EPILOG = """\
\b
Example:
  qaflora pull qwen2.5-coder-0.5b-instruct
  qaflora run demo "What is the capital of France, and which river flows through it?"
  qaflora weights demo "Una camisa cuesta 12 euros. ¿Cuánto cuestan 3 camisas?"

\b
Environment:
  QAFLORA_CONFIG  the settings file to read instead of the usual one
  QAFLORA_CACHE   the folder for downloads
  QAFLORA_...     any shared option, as QAFLORA_THREADS=4; see docs/settings.md
  NO_COLOR        no colours

`qaflora COMMAND --help` explains a command, `--help-all` with all of its options."""


@click.group(cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(__version__, prog_name="qaflora")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Several LoRA adapters at once on a quantised base, weighed for each query.

    DIR is the folder of a bundle, one base and its adapters (see `qaflora bundle create`). Run,
    chat, serve, compare, eval and weights also take a base alone: a GGUF file, or its name in
    `qaflora models`.
    """
    verb = ctx.invoked_subcommand or ""
    command = main.get_command(ctx, verb)
    if command is not None and verb != "completion":  # which has to work in any case
        from qaflora_edge.cli.settings import file_defaults

        ctx.default_map = {verb: file_defaults(verb)}
