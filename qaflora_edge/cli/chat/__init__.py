"""qaflora chat"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qaflora_edge.cli.options import (
    BUNDLE,
    SharedOptions,
    bundle_folder,
    command,
    open_engine,
    own_options,
    shared_options,
)
from qaflora_edge.config import in_group
from qaflora_edge.errors import OptionError, QafloraError

if TYPE_CHECKING:
    from qaflora_edge.cli.chat.plain_input import PlainInput
    from qaflora_edge.cli.chat.reply import Reply
    from qaflora_edge.cli.chat.session import ChatSession
    from qaflora_edge.cli.chat.terminal_input import TerminalInput

_LONG_READ_S = 3.0  # a conversation that takes longer to read: the user is told what helps


@command(
    "qaflora chat models/demo",
    "qaflora chat models/demo --strategy calibrated --temp 0",
    'qaflora chat models/demo --system "Answer in one sentence." --load talk.json',
    "qaflora chat --server http://127.0.0.1:8080",
)
@click.argument("bundle", required=False, **BUNDLE)
@click.option(
    "--server",
    metavar="URL",
    help="Talk with a model of `qaflora serve` at URL; DIR is its name there, and need not be "
    "given where it is the only one.",
)
@click.option(
    "--load",
    "load_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Go on with a conversation that /save wrote to FILE.",
)
@own_options
@shared_options
@click.pass_context
def chat(
    ctx: click.Context,
    /,
    bundle: str | None,
    server: str | None,
    system: str | None,
    load_path: Path | None,
    keep_history: bool,
    plain: bool,
    options: SharedOptions,
) -> None:
    """Talk with the weighed adapters.

    Each answer is weighed anew for the conversation so far; a line on stderr tells the speed and
    the mix. A line that begins with a slash is a command; /help lists them. Ctrl-C stops an answer,
    Ctrl-D leaves. When the context is full the oldest turns drop out. A repeat penalty of 1.03
    holds off loops; /penalty off takes it away.

    In a pipe each line of stdin is a message, and stdout has the answers alone.
    """
    from qaflora_edge.cli.chat.reply import silent_keys

    if server is not None:
        _check_remote(ctx)
    elif bundle is None:
        raise click.MissingParameter(ctx=ctx, param=ctx.command.params[0])
    is_plain = plain or not _is_capable()
    with nullcontext() if is_plain else silent_keys():
        if server is not None:
            session = _remote_session(server, bundle, options)
        else:
            assert bundle is not None
            session = _local_session(bundle, options, keep_history)
        with session:
            session.check()
            _Chat(session, is_plain=is_plain).run(system, load_path)


def _local_session(bundle: str, options: SharedOptions, keep_history: bool) -> ChatSession:
    from qaflora_edge.chat.session_file import bundle_identity
    from qaflora_edge.cli.chat.context_size import context_size
    from qaflora_edge.cli.chat.session import ChatSession

    folder = bundle_folder(bundle)
    return ChatSession(
        lambda n_ctx: open_engine(bundle, options, n_ctx=n_ctx, n_parallel=1),
        context_size(folder, options.kv_type) if options.ctx is None else options.ctx,
        bundle_identity(folder),
        sampling=options.sampling,
        raw_prompt=options.raw_prompt,
        keep_history=keep_history,
    )


def _remote_session(url: str, model: str | None, options: SharedOptions) -> ChatSession:
    from qaflora_edge.cli.chat.remote import RemoteEngine, Server
    from qaflora_edge.cli.chat.session import ChatSession

    engine = RemoteEngine(Server(url), model)
    if options.strategy is not None:
        engine.use_strategy(options.strategy)

    def reopened(n_ctx: int) -> Any:
        if n_ctx != engine.n_ctx:
            raise OptionError(
                f"The context of {engine.n_ctx} tokens is the server's; start that with another "
                "--ctx."
            )
        return engine

    return ChatSession(
        reopened,
        engine.n_ctx,
        engine.identity,
        sampling=options.sampling,
        raw_prompt=options.raw_prompt,
        is_remote=True,
    )


def _check_remote(ctx: click.Context) -> None:
    """Refuse what was typed of a server's own: how its Engine is opened."""
    kept = {"strategy", "seed"}
    own = [option for option in in_group("engine").values() if option.name not in kept]
    flags = [(option.key, option.flag.split("/")[0]) for option in own if option.flag]
    for key, flag in (*flags, ("keep_history", "--keep-history")):
        if ctx.get_parameter_source(key) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{flag} is the server's matter: give it to `qaflora serve`.")


def _is_capable() -> bool:
    """Whether stdin and stdout are a terminal that can move its cursor."""
    if os.environ.get("TERM", "").lower() in ("", "dumb", "unknown") and os.name != "nt":
        return False
    return sys.stdin.isatty() and sys.stdout.isatty()


class _Chat:
    """Reads, answers and shows, until the user leaves."""

    def __init__(self, session: ChatSession, *, is_plain: bool) -> None:
        from qaflora_edge.cli.chat.commands import Commands
        from qaflora_edge.cli.chat.view import TerminalView, View

        self._session = session
        self._view: View
        self._input: PlainInput | TerminalInput
        if is_plain:
            from qaflora_edge.cli.chat.plain_input import PlainInput

            self._view, self._input = View(), PlainInput()
        else:
            from qaflora_edge.cli.chat.terminal_input import TerminalInput

            self._view, self._input = TerminalView(), TerminalInput(session)
            if self._input.why_no_history:
                self._view.note(f"the history is not kept: {self._input.why_no_history}")
        self._commands = Commands(session, self._view, self.ask)
        self._is_hinted = not sys.stdin.isatty()
        self._is_beyond = False

    def run(self, system: str | None, load_path: Path | None) -> None:
        from qaflora_edge.cli.chat.commands import LeaveChat
        from qaflora_edge.cli.chat.reply import interrupts_call

        if load_path is not None:
            self._commands.load_file(load_path)
        if system is not None:
            self._session.set_system(system)
        if sys.stdin.isatty():
            self._view.note(*self._session.title)
            self._view.done()
        # Whoever presses Ctrl-C once more than an answer needs stays: inputs take it by themselves.
        stays = interrupts_call(lambda: None) if sys.stdin.isatty() else nullcontext()
        with stays, suppress(LeaveChat):
            while (line := self._input.read()) is not None:
                if line.startswith("/") and not line.startswith("//"):
                    self._commands.run(line.rstrip())
                    self._view.done()
                elif line.strip():
                    self.ask(line[1:] if line.startswith("//") else line)
                    self._view.done()

    def ask(self, question: str, *, is_retry: bool = False) -> bool:
        """Answer a question and tell how; False if no turn came of it."""
        try:
            return self._answer(question, is_retry)
        except QafloraError as error:  # this question cannot be answered; the next one may
            self._view.error(error)
            return False

    def _answer(self, question: str, is_retry: bool) -> bool:
        from qaflora_edge.cli.chat.reply import Reply, interrupts_call

        session, view = self._session, self._view
        n_before = session.conversation.n_dropped
        begin = session.prepare(question, is_retry=is_retry)
        if n_dropped := session.conversation.n_dropped - n_before:
            turns = "turn is" if n_dropped == 1 else f"{n_dropped} turns are"
            view.note(f"the context is full: the oldest {turns} no longer read")
        reply = Reply(begin, session.engine.cancel)
        with interrupts_call(reply.stop), reply:
            view.begin()
            try:
                for piece in reply.pieces(lambda: view.tick(reply, session.progress)):
                    view.piece(piece)
            finally:
                view.end()
        reason = session.conclude(question, reply)
        if reason == "cancelled" and not reply.text:
            view.note("stopped before it began; the question is as if it had not been asked")
            return False
        view.status(_status(session, reply, reason), session.fusion)
        self._warn(reply)
        self._hint(reply)
        return True

    def _warn(self, reply: Reply) -> None:
        """Tell that the conversation has become longer than the base was trained for."""
        before = self._is_beyond
        self._is_beyond = reply.generation is not None and self._session.is_beyond(reply.generation)
        if self._is_beyond and not before:
            self._view.note(
                f"warning: the base was trained for {self._session.engine.n_ctx_train} tokens, and "
                "the conversation has more; answers may fall apart. /clear begins anew"
            )

    def _hint(self, reply: Reply) -> None:
        """Tell a person once that long conversations can be read in less time."""
        session, generation = self._session, reply.generation
        if self._is_hinted or session.keep_history or session.is_remote or generation is None:
            return
        read_s = generation.timings.prefill_ms / 1e3
        if len(session.conversation.turns) > 1 and read_s > _LONG_READ_S:
            self._is_hinted = True
            self._view.note(
                f"{read_s:.0f} s were spent on reading the conversation anew under these weights; "
                "/keep-history on reads only what is new"
            )


def _status(session: ChatSession, reply: Reply, reason: str) -> list[str]:
    """How an answer ended and how fast it was."""
    generation = reply.generation
    parts = []
    if reason == "cancelled":
        parts.append("stopped")
    elif reason == "length" and generation is not None:
        is_full = session.is_full(generation)
        parts.append("cut: the context is full" if is_full else "cut at --max-tokens")
    if generation is not None and generation.timings.n_decoded:
        parts.append(f"{generation.timings.tokens_per_second:.1f} tok/s")
    if reply.first_ms is not None:
        parts.append(f"first token {reply.first_ms / 1e3:.2f} s")
    return parts
