"""qaflora chat: a conversation with one Engine, from the first question to the last"""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qaflora_edge.ask import Ask
from qaflora_edge.cli import options as cli
from qaflora_edge.cli.output import thought_parts
from qaflora_edge.cli.places import bundle_folder
from qaflora_edge.errors import CancelledError, PromptError, QafloraError
from qaflora_edge.prompt import conversation
from qaflora_edge.show import doubts

if TYPE_CHECKING:
    from qaflora_edge.answering.generation import Generation
    from qaflora_edge.cli.chat.input import TerminalInput
    from qaflora_edge.cli.chat.view import View
    from qaflora_edge.engine import Engine
    from qaflora_edge.weighing.plan import FusionWeights

LEAVING = ("exit", "quit", "/exit", "/quit", "/bye")
N_RECALLED = 3  # turns of a loaded conversation that are shown
_MESSAGE = ("message", "for example with iconv")


@cli.command(
    "qaflora chat demo",
    "qaflora chat demo --strategy relay --temp 0",
    'qaflora chat demo --system "Answer in one sentence." --load talk.json',
)
@cli.bundle_argument
@click.option(
    "--load",
    "load_path",
    metavar="FILE",
    type=cli.PATH,
    help="Go on with a conversation that /save wrote to FILE.",
)
@cli.own_options
@cli.shared_options
def chat(
    bundle: str, system: str | None, load_path: Path | None, plain: bool, options: cli.SharedOptions
) -> None:
    """Talk with the weighed adapters.

    Each answer is weighed for the conversation so far; a line on stderr tells the speed and who
    spoke. A line that begins with a slash is a command; /help lists them. Ctrl-C stops an answer,
    Ctrl-D leaves. When the context is full the oldest turns drop out. A repeat penalty of 1.03
    prevents loops; /set repeat_penalty off takes it away.

    In a pipe each line of stdin is a message, and stdout has the answers alone.
    """
    from qaflora_edge.cli.chat.view import TerminalView, View

    folder = bundle_folder(bundle)
    is_dumb = os.environ.get("TERM", "").lower() in ("", "dumb", "unknown") and os.name != "nt"
    is_plain = plain or is_dumb or not (sys.stdin.isatty() and sys.stdout.isatty())
    with cli.open_engine(bundle, options, is_quiet=is_plain, n_parallel=1) as engine:
        view = View() if is_plain else TerminalView()
        talk = Chat(engine, folder, view, options)
        talk.tokens([{"role": "user", "content": "?"}])  # says that the base has no template
        if load_path is not None:
            talk.load(load_path)
        if system is not None:
            talk.set_system(system)
        if is_plain:
            talk.run(PlainInput())
        else:
            from qaflora_edge.cli.chat.input import TerminalInput

            talk.run(TerminalInput(engine))


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
    """Reads, answers and shows, until the user leaves.

    sampling  how tokens are chosen
    fusion    the weights of the last answer, if there was one
    """

    def __init__(
        self, engine: "Engine", folder: Path, view: "View", options: cli.SharedOptions
    ) -> None:
        self.engine = engine
        self.view = view
        self.folder = folder
        self.conversation = conversation.Conversation()
        self._is_raw = options.raw_prompt
        self.sampling = options.sampling
        self.fusion: FusionWeights | None = None

    def run(self, typed: "PlainInput | TerminalInput") -> None:
        """Chat until the end of the input or a command to leave."""
        from qaflora_edge.cli.chat.commands import run_command

        if sys.stdin.isatty():
            self._greet()
        while (line := _read(typed)) is not None and line.strip() not in LEAVING:
            if line.startswith("/") and not line.startswith("//"):
                run_command(self, line.rstrip())
                self.view.done()
            elif line.strip():
                self.ask(line[1:] if line.startswith("//") else line)
                self.view.done()

    def _greet(self) -> None:
        engine = self.engine
        penalty = self.sampling.repeat_penalty
        names = ", ".join(engine.adapters) or "no adapters"
        phrases = [engine.name, names, f"strategy {engine.strategy}"]
        self.view.note(*phrases, *[f"repeat penalty {penalty:g}"] * (penalty != 1.0))
        if engine.n_ctx > engine.n_ctx_train:
            self.view.note(
                f"warning: the base was trained for {engine.n_ctx_train} tokens; answers to longer "
                "conversations may fall apart"
            )
        self.view.done()

    def ask(self, question: str) -> bool:
        """Answer a question and tell how; False if no turn came of it."""
        try:
            return self._answer(question)
        except QafloraError as error:  # this question cannot be answered; the next one may
            self.view.error(error)
            return False

    def _answer(self, question: str) -> bool:
        view = self.view
        prompt = self._fit(question)
        stop = threading.Event()
        ask = Ask(
            prompt,
            sampling=self.sampling,
            cancel=stop,
            on_progress=view.progress,
            on_draft=view.expected,
        )
        text = ""
        generation: Generation | None = None
        view.begin()
        previous = signal.signal(signal.SIGINT, lambda *_: stop.set())
        try:
            with contextlib.suppress(CancelledError):
                generation = self.engine.submit(ask)
                for piece in generation.drafting():
                    view.thought(piece)
                if generation.draft is not None:
                    view.draft(generation.draft.text)
                for thought in generation.thoughts():
                    view.thought(thought)
                for piece in generation:
                    if not stop.is_set():
                        text += piece
                        view.piece(piece)
        finally:
            signal.signal(signal.SIGINT, previous)
            view.end()
        if generation is None or (stop.is_set() and not text):
            view.note("stopped before it began; the question is as if it had not been asked")
            return False
        reason = "cancelled" if stop.is_set() else generation.finish_reason or "cancelled"
        self.conversation.add(question, text, reason)
        self.fusion = generation.fusion
        view.status(_status(generation, reason), generation.fusion)
        return True

    def _fit(self, question: str) -> list[int]:
        """Tokenize the conversation and a question; the oldest turns may drop out."""
        cli.check_prompt(question, *_MESSAGE)
        n_ctx = self.engine.n_ctx
        n_before = self.conversation.n_dropped
        room = n_ctx // 4
        if self.sampling.max_tokens is not None:
            room = min(self.sampling.max_tokens, room)
        try:
            tokens = self.conversation.fit(question, self.tokens, n_ctx - room)
        except PromptError as error:
            raise PromptError(
                f"{error} For a larger context: /save FILE, then `qaflora chat --load FILE "
                "--ctx N`."
            ) from error
        if n_dropped := self.conversation.n_dropped - n_before:
            turns = "turn is" if n_dropped == 1 else f"{n_dropped} turns are"
            self.view.note(f"the context is full: the oldest {turns} no longer sent")
        return tokens

    def tokens(self, messages: list[conversation.Message]) -> list[int]:
        """Tokenize messages, under the base's template unless --raw-prompt leaves it out."""
        if self._is_raw:
            text = "\n".join(message["content"] for message in messages) + "\n"
            return self.engine.tokenize(text)
        return self.engine.chat_tokens(messages)

    def set_system(self, text: str | None) -> None:
        """Change the system prompt of the whole conversation, from the next turn on.

        Raises a QafloraError, and changes nothing, where the template or the context takes none.
        """
        if text is not None:
            begun = conversation.Conversation(cli.check_prompt(text, *_MESSAGE))
            self.tokens(begun.messages("?"))
        self.conversation.system = text

    def load(self, path: Path) -> None:
        """Go on with a saved conversation. Raises SessionFileError."""
        loaded = conversation.load_session(path)
        self.set_system(loaded.system)
        self.conversation = loaded
        self.fusion = None
        self.view.note(f"{self.turns} loaded from {path}")
        if loaded.system is not None:
            self.view.note(f"system prompt: {loaded.system}")
        n_before = loaded.n_turn - N_RECALLED
        if n_before > 0:
            self.view.note(f"{n_before} earlier {'turn' if n_before == 1 else 'turns'}")
        for message in loaded.said[-2 * N_RECALLED :]:
            mark = "> " if message["role"] == "user" else ""
            self.view.recall(mark + message["content"])

    @property
    def turns(self) -> str:
        n = self.conversation.n_turn
        return f"{n} {'turn' if n == 1 else 'turns'}"


def _read(typed: "PlainInput | TerminalInput") -> str | None:
    """Read a message; on a terminal Ctrl-C takes back what is being typed."""
    while True:
        try:
            return typed.read()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            click.echo(err=True)


def _status(generation: "Generation", reason: str) -> list[str]:
    timings = generation.timings
    ends = {"cancelled": ["stopped"], "length": ["cut at the limit of tokens"]}
    phrases = [*doubts(generation.fusion), *thought_parts(generation), *ends.get(reason, [])]
    if timings.n_decoded:
        phrases.append(f"{timings.tokens_per_second:.1f} tok/s")
    return [*phrases, f"first token {(timings.probe_ms + timings.prefill_ms) / 1e3:.2f} s"]
