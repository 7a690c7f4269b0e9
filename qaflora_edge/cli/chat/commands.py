"""Slash commands: what a chat does besides asking."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qaflora_edge.errors import QafloraError
from qaflora_edge.weighing.strategy import strategies

if TYPE_CHECKING:
    from qaflora_edge.cli.chat.session import ChatSession
    from qaflora_edge.cli.chat.view import View

Ask = Callable[..., bool]


class LeaveChat(Exception):
    """The user wants to leave."""


@dataclass(frozen=True)
class Commands:
    """Runs slash commands of one chat.

    ask  answers a question: ask(question, is_retry=False); False if it could not be asked
    """

    session: ChatSession
    view: View
    ask: Ask

    def run(self, line: str) -> None:
        """Run `/name argument`. A failure is shown, and the chat goes on."""
        parts = [] if line[1:2].isspace() else line[1:].split(maxsplit=1)
        name, argument = (*parts, "", "")[:2]
        command = COMMANDS.get(name)
        if command is None:
            self._unknown(name)
            return
        try:
            if argument and not command.argument:
                raise click.UsageError(f"/{name} takes nothing behind it, found {argument!r}.")
            command.run(self, argument.strip())
        except (QafloraError, click.UsageError) as error:
            self.view.error(error)

    def _unknown(self, name: str) -> None:
        near = difflib.get_close_matches(name.lower(), COMMANDS, n=1)
        advice = f"did you mean /{near[0]}?" if near else "see /help."
        self.view.error(
            click.UsageError(
                f"There is no command /{name}; {advice} For a message that begins with a slash, "
                f"type //{name}."
            )
        )

    def help(self, argument: str) -> None:
        width = max(20, min(80, self.view.width))
        formatter = click.HelpFormatter(width=width)
        rows = [(f"/{name} {c.argument}".rstrip(), c.help) for name, c in COMMANDS.items()]
        rows.append(("//TEXT", "Send a message that begins with one slash."))
        formatter.write_dl(rows, col_max=width // 3)
        self.view.show(formatter.getvalue().rstrip("\n"))
        self.view.keys()

    def weights(self, argument: str) -> None:
        if self.session.fusion is None:
            self.view.note("nothing has been answered yet")
        else:
            self.view.weights(self.session.fusion)

    def adapters(self, argument: str) -> None:
        action, *names = argument.split() or [""]
        if action not in ("", "on", "off"):
            raise click.UsageError(
                f"/adapters {action} is no choice; expected /adapters, /adapters on [NAME ...] or "
                "/adapters off [NAME ...]."
            )
        if action:
            self.session.switch(names, is_on=action == "on")
        self.view.show("\n".join(self._adapter_lines()))

    def _adapter_lines(self) -> Iterator[str]:
        from qaflora_edge.cli.show import mean_weights

        fusion, engine = self.session.fusion, self.session.engine
        means = {} if fusion is None else mean_weights(fusion)
        width = max((len(name) for name in engine.loaded_adapters), default=0)
        for name in engine.loaded_adapters:
            state = "on " if name in engine.adapters else "off"
            last = f"  {100 * means[name]:3.0f} % of the last answer" if name in means else ""
            yield f"{name:<{width}}  {state}{last}"
        if not engine.loaded_adapters:
            yield "The bundle has no adapters: the base answers alone."

    def strategy(self, argument: str) -> None:
        if argument:
            self.session.engine.use_strategy(argument)
        self.view.note(f"strategy {self.session.engine.strategy}")

    def system(self, argument: str) -> None:
        if argument:
            self.session.set_system(None if argument == "-" else argument)
        text = self.session.conversation.system
        self.view.note("no system prompt" if text is None else f"system prompt: {text}")

    def retry(self, argument: str) -> None:
        turn = self.session.conversation.undo()
        if turn is None:
            self.view.note("nothing has been asked yet")
        elif not self.ask(turn.question, is_retry=True):
            self.session.conversation.turns.append(turn)

    def undo(self, argument: str) -> None:
        turns = self.session.conversation.turns
        if not turns:
            self.view.note("nothing has been asked yet")
            return
        n = _number(argument or "1", len(turns))
        taken = [self.session.conversation.undo() for _ in range(n)][-1]
        self.session.fusion = None
        what = "taken back" if n == 1 else f"{n} turns taken back, from"
        self.view.note(f"{what}: {_short(taken.question if taken else '')}")

    def keep_history(self, argument: str) -> None:
        if argument not in ("", "on", "off"):
            raise click.UsageError(
                f"/keep-history {argument} is no choice; expected /keep-history, /keep-history on "
                "or /keep-history off."
            )
        if argument:
            self.session.keep_history = argument == "on"
        self.view.note(
            "each turn reads only what is new; earlier turns stay as they were read"
            if self.session.keep_history
            else "each turn reads the whole conversation anew, under its own weights"
        )

    def save(self, argument: str) -> None:
        path = _path(argument, "save")
        self.session.save(path)
        n_turn = len(self.session.conversation.turns)
        self.view.note(f"{n_turn} {'turn' if n_turn == 1 else 'turns'} saved to {path}")

    def load(self, argument: str) -> None:
        self.load_file(_path(argument, "load"))

    def load_file(self, path: Path) -> None:
        """Go on with a saved chat. Raises SessionFileError."""
        for warning in self.session.load(path):
            self.view.note(f"warning: {warning}")
        turns = self.session.conversation.turns
        parts = [f"{len(turns)} {'turn' if len(turns) == 1 else 'turns'} loaded from {path}"]
        if turns:
            parts.append(f"the last question was: {_short(turns[-1].question)}")
        self.view.note(*parts)

    def quit(self, argument: str) -> None:
        raise LeaveChat


@dataclass(frozen=True)
class Command:
    """What follows a command's name, what it does in a sentence, and doing it."""

    argument: str
    help: str
    run: Callable[[Commands, str], None]


COMMANDS = {
    "weights": Command("", "Show what each adapter weighed for the last answer.", Commands.weights),
    "adapters": Command(
        "[on|off [NAME ...]]", "List the adapters, or switch some on or off.", Commands.adapters
    ),
    "strategy": Command(
        "[NAME]", "Show how adapters are weighed, or change it.", Commands.strategy
    ),
    "system": Command(
        "[TEXT]", "Show the system prompt, or change it; - takes it away.", Commands.system
    ),
    "retry": Command("", "Answer the last question again.", Commands.retry),
    "undo": Command(
        "[N]", "Take back the last question and its answer, or N of them.", Commands.undo
    ),
    "keep-history": Command(
        "[on|off]", "Whether a turn reads only what is new, for long chats.", Commands.keep_history
    ),
    "save": Command("FILE", "Save the conversation to a file.", Commands.save),
    "load": Command("FILE", "Go on with a saved conversation.", Commands.load),
    "help": Command("", "Show this list.", Commands.help),
    "quit": Command("", "Leave, as Ctrl-D does.", Commands.quit),
}


def _short(text: str) -> str:
    """A text on one line of at most 40 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def _number(argument: str, n_most: int) -> int:
    """How many turns are meant."""
    try:
        number = int(argument)
    except ValueError:
        number = 0
    if not 1 <= number <= n_most:
        raise click.UsageError(
            f"/undo {_short(argument)} cannot be done: expected a number of turns, from 1 to the "
            f"{n_most} there {'is' if n_most == 1 else 'are'}."
        )
    return number


def _path(argument: str, name: str) -> Path:
    if not argument:
        raise click.UsageError(f"/{name} got no file name; expected /{name} FILE.")
    return Path(argument).expanduser()


def completions(text: str, session: ChatSession) -> Iterator[str]:
    """What may stand in place of the last word of a slash command that is being typed."""
    words = text.split(" ")
    name, word = words[0][1:], words[-1]
    if len(words) == 1:
        candidates = [f"/{name}" for name in COMMANDS]
    elif name == "strategy" and len(words) == 2:
        candidates = list(_strategies(session))
    elif name in ("adapters", "keep-history") and len(words) == 2:
        candidates = ["on", "off"]
    elif name == "adapters":
        candidates = [n for n in session.engine.loaded_adapters if n not in words[2:-1]]
    else:
        candidates = []
    yield from (candidate for candidate in candidates if candidate.startswith(word))


def _strategies(session: ChatSession) -> Iterator[str]:
    for strategy in strategies():
        if strategy.argument == "NAME":
            yield from (f"{strategy.name}:{name}" for name in session.engine.adapters)
        else:
            yield f"{strategy.name}:" if strategy.needs_argument else strategy.name
