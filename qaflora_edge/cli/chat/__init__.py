"""qaflora chat"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from qaflora_edge.cli.options import (
    BUNDLE,
    SharedOptions,
    command,
    own_options,
    shared_options,
)
from qaflora_edge.errors import CancelledError, QafloraError

if TYPE_CHECKING:
    from qaflora_edge.cli.chat.input import TerminalInput
    from qaflora_edge.cli.chat.session import ChatSession
    from qaflora_edge.cli.chat.view import View
    from qaflora_edge.inference.generation import Generation

LEAVING = ("exit", "quit", "/exit", "/quit", "/bye")


@command(
    "qaflora chat models/demo",
    "qaflora chat models/demo --strategy calibrated --temp 0",
    'qaflora chat models/demo --system "Answer in one sentence." --load talk.json',
)
@click.argument("bundle", **BUNDLE)
@click.option(
    "--load",
    "load_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Go on with a conversation that /save wrote to FILE.",
)
@own_options
@shared_options
def chat(
    bundle: str,
    system: str | None,
    load_path: Path | None,
    keep_history: bool,
    plain: bool,
    options: SharedOptions,
) -> None:
    """Talk with the weighed adapters.

    Each answer is weighed for the conversation so far; a line on stderr tells the speed and who
    spoke. A line that begins with a slash is a command; /help lists them. Ctrl-C stops an answer,
    Ctrl-D leaves. When the context is full the oldest turns drop out. A repeat penalty of 1.03
    holds off loops; /penalty off takes it away.

    In a pipe each line of stdin is a message, and stdout has the answers alone.
    """
    from qaflora_edge.cli.chat.session import ChatSession
    from qaflora_edge.cli.chat.view import TerminalView, View

    is_plain = plain or not _is_capable()
    opened = ChatSession(bundle, options, keep_history=keep_history, is_plain=is_plain)
    with opened as session:
        session.check()
        if is_plain:
            Chat(session, View(), PlainInput()).run(system, load_path)
        else:
            from qaflora_edge.cli.chat.input import TerminalInput

            Chat(session, TerminalView(), TerminalInput(session)).run(system, load_path)


def _is_capable() -> bool:
    """Tell whether stdin and stdout are a terminal that can move its cursor."""
    if os.environ.get("TERM", "").lower() in ("", "dumb", "unknown") and os.name != "nt":
        return False
    return sys.stdin.isatty() and sys.stdout.isatty()


class PlainInput:
    """Reads lines from stdin; shows a terminal where to type."""

    def __init__(self) -> None:
        self._is_tty = sys.stdin.isatty()
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is told so

    def read(self) -> str | None:
        """Read the next line; None at the end of the input."""
        if self._is_tty:
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline().removeprefix("\ufeff")  # a byte order mark
        return line.removesuffix("\n").removesuffix("\r") if line else None


class Chat:
    """Reads, answers and shows, until the user leaves."""

    def __init__(self, session: ChatSession, view: View, typed: PlainInput | TerminalInput) -> None:
        from qaflora_edge.cli.chat.commands import Commands

        self._session, self._view, self._typed = session, view, typed
        self._commands = Commands(session, view, self.ask)
        self._is_beyond = False

    def run(self, system: str | None, load_path: Path | None) -> None:
        """Chat until the end of the input or a command to leave."""
        if load_path is not None:
            self._commands.load_file(load_path)
        if system is not None:
            self._session.set_system(system)
        if sys.stdin.isatty():
            self._view.note(*self._session.title)
            self._view.done()
        while (line := self._read()) is not None and line.strip() not in LEAVING:
            if line.startswith("/") and not line.startswith("//"):
                self._commands.run(line.rstrip())
                self._view.done()
            elif line.strip():
                self.ask(line[1:] if line.startswith("//") else line)
                self._view.done()

    def _read(self) -> str | None:
        """Read a message; on a terminal Ctrl-C takes back what is being typed."""
        while True:
            try:
                return self._typed.read()
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                click.echo(err=True)

    def ask(self, question: str, *, is_retry: bool = False) -> bool:
        """Answer a question and tell how; False if no turn came of it."""
        try:
            return self._answer(question, is_retry)
        except QafloraError as error:  # this question cannot be answered; the next one may
            self._view.error(error)
            return False

    def _answer(self, question: str, is_retry: bool) -> bool:
        session, view = self._session, self._view
        n_before = session.conversation.n_dropped
        begin = session.prepare(question, is_retry=is_retry)
        if n_dropped := session.conversation.n_dropped - n_before:
            turns = "turn is" if n_dropped == 1 else f"{n_dropped} turns are"
            view.note(f"the context is full: the oldest {turns} no longer sent")
        stop, text = threading.Event(), ""
        generation: Generation | None = None
        view.begin()
        try:
            with interrupts_call(stop.set), contextlib.suppress(CancelledError):
                generation = begin(stop, view.progress)
                for piece in generation:
                    if not stop.is_set():
                        text += piece
                        view.piece(piece)
        finally:
            view.end()
        if generation is None or (stop.is_set() and not text):
            view.note("stopped before it began; the question is as if it had not been asked")
            return False
        reason = "cancelled" if stop.is_set() else generation.finish_reason or "cancelled"
        session.conclude(question, text, reason, generation)
        view.status(_status(session, generation, reason), generation.fusion)
        self._warn(generation)
        return True

    def _warn(self, generation: Generation) -> None:
        """Tell once that the conversation is longer than the base was trained for."""
        before, n_train = self._is_beyond, self._session.engine.n_ctx_train
        self._is_beyond = generation.n_prompt + generation.n_completion > n_train
        if self._is_beyond and not before:
            self._view.note(
                f"warning: the base was trained for {n_train} tokens, and the conversation has "
                "more; answers may fall apart. /clear begins again"
            )


def _status(session: ChatSession, generation: Generation, reason: str) -> list[str]:
    """Say how an answer ended and how fast it was."""
    timings, parts = generation.timings, []
    if reason == "cancelled":
        parts.append("stopped")
    elif reason == "length":
        is_full = generation.n_prompt + generation.n_completion > session.engine.n_ctx
        parts.append("cut: the context is full" if is_full else "cut at --max-tokens")
    if timings.n_decoded:
        parts.append(f"{timings.tokens_per_second:.1f} tok/s")
    parts.append(f"first token {(timings.probe_ms + timings.prefill_ms) / 1e3:.2f} s")
    return parts


@contextlib.contextmanager
def interrupts_call(action: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call an action instead of raising KeyboardInterrupt somewhere in the block."""

    def handle(number: int, frame: FrameType | None) -> None:
        action()

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: its owner decides about signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
