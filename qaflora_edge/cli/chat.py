"""qaflora chat"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from qaflora_edge.cli.options import (
    SharedOptions,
    example,
    open_engine,
    read_prompt,
    shared_options,
)
from qaflora_edge.cli.run import summary_line
from qaflora_edge.errors import PromptError

if TYPE_CHECKING:
    from qaflora_edge.engine import Engine
    from qaflora_edge.generate import Generation

MAX_TOKENS, TEMPERATURE, TOP_P = 512, 0.7, 0.95
Message = dict[str, str]


@click.command(
    epilog=example(
        """
        qaflora chat models/demo
        qaflora chat models/demo --strategy calibrated --temp 0
        """
    )
)
@click.argument("bundle", metavar="DIR")
@click.option(
    "--keep-history",
    is_flag=True,
    help="Read only what is new in each turn; earlier turns stay as they were read, each under its "
    "own weights.",
)
@shared_options
def chat(bundle: str, keep_history: bool, options: SharedOptions) -> None:
    """Talk with the weighed adapters.

    Each answer is weighed anew for the conversation so far; a line on stderr tells the mix and the
    speed. Ctrl-C ends an answer, Ctrl-D leaves. When the context is full the oldest turns are
    dropped. Sampled at temperature 0.7 and top-p 0.95 unless --temp and --top-p say otherwise.
    """
    with open_engine(bundle, options) as engine:
        if not options.raw_prompt:
            engine.chat_tokens([{"role": "user", "content": "?"}])  # is there a template?
        if sys.stdin.isatty():
            click.echo(f"{engine.name}. Ctrl-C ends an answer, Ctrl-D leaves.", err=True)
        messages: list[Message] = []
        while (line := _read_line()) is not None:
            if line.strip():
                _turn(engine, options, messages, line, keep_history)


def _read_line() -> str | None:
    """The next line, or None at the end of the input."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() edits lines once it is imported)
    try:
        return input("> " if is_terminal else "")
    except EOFError:
        if is_terminal:
            click.echo(err=True)
        return None


def _turn(
    engine: Engine,
    options: SharedOptions,
    messages: list[Message],
    line: str,
    keep_history: bool,
) -> None:
    """Answer one line; the messages grow by the question and its answer."""
    sampling = options.sampling(max_tokens=MAX_TOKENS, temperature=TEMPERATURE, top_p=TOP_P)
    try:
        messages.append({"role": "user", "content": read_prompt_line(line)})
        tokens = _fit(engine, options, messages, sampling["max_tokens"])
    except PromptError as error:  # this question cannot be asked; the next one may
        click.echo(f"Error: {error}", err=True)
        if messages and messages[-1]["role"] == "user":
            messages.pop()
        return
    pieces: list[str] = []
    answer: Generation | None = None
    try:
        answer = engine.generate(tokens, keep_history=keep_history, **sampling)
        for piece in answer:
            pieces.append(piece)
            click.echo(piece, nl=False)
    except KeyboardInterrupt:
        click.echo("\n[stopped]", err=True, nl=False)
    click.echo()
    messages.append({"role": "assistant", "content": "".join(pieces)})
    if answer is not None:
        click.echo(summary_line(answer), err=True)


def read_prompt_line(line: str) -> str:
    """A line as a prompt; `-` is a line like any other here."""
    return line if line.strip() == "-" else read_prompt(line)


def _fit(
    engine: Engine, options: SharedOptions, messages: list[Message], max_tokens: int
) -> list[int]:
    """Token ids of the conversation, without the oldest turns that leave an answer no room.

    Raises PromptError when the last message alone is too long.
    """
    room = min(max_tokens, engine.n_ctx // 4)
    n_dropped = 0
    while True:
        tokens: list[int] | None = None
        try:
            tokens = _tokens(engine, options, messages)
        except PromptError:
            if len(messages) == 1:
                raise
        if tokens is not None and (len(messages) == 1 or len(tokens) + room <= engine.n_ctx):
            break
        del messages[:2]  # a question and its answer
        n_dropped += 1
    if n_dropped:
        turns = "turn" if n_dropped == 1 else f"{n_dropped} turns"
        click.echo(f"[the context is full: the oldest {turns} dropped]", err=True)
    return tokens


def _tokens(engine: Engine, options: SharedOptions, messages: list[Message]) -> list[int]:
    if options.raw_prompt:
        return engine.tokenize("\n".join(message["content"] for message in messages) + "\n")
    return engine.chat_tokens(messages)
