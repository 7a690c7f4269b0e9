"""Slash commands: what a chat does besides asking."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from qaflora_edge.cli.chat.command_table import COMMANDS, did_you_mean, strategy_names
from qaflora_edge.cli.chat.session import ChatSession
from qaflora_edge.cli.chat.view import View
from qaflora_edge.errors import QafloraError
from qaflora_edge.settings import expanded
from qaflora_edge.weighing.strategy import strategies

Ask = Callable[..., bool]


class LeaveChat(Exception):
    """The user wants to leave."""


@dataclass(frozen=True)
class Commands:
    """Runs slash commands of one chat.

    ask  answers a question: ask(question, is_retry=False); False if no turn came of it

    The method of a command has its name, with `_` for `-`; command_table has the words.
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
            getattr(self, name.replace("-", "_"))(argument.strip())
        except (QafloraError, click.UsageError) as error:
            self.view.error(error)

    def _unknown(self, name: str) -> None:
        rest = f" For a message that begins with a slash, type //{name}."
        self.view.error(_no_command(name, "/", rest))

    def help(self, argument: str) -> None:
        width = max(20, min(80, self.view.width))
        formatter = click.HelpFormatter(width=width)
        if argument:
            self._explain(argument.removeprefix("/"), formatter)
        else:
            rows = [(f"/{name} {c.argument}".rstrip(), c.help) for name, c in COMMANDS.items()]
            rows.append(("//TEXT", "Send a message that begins with one slash."))
            formatter.write_dl(rows, col_max=width // 3)
        self.view.show(formatter.getvalue().rstrip("\n"))
        if not argument:
            self.view.keys()

    def _explain(self, name: str, formatter: click.HelpFormatter) -> None:
        command = COMMANDS.get(name)
        if command is None:
            raise _no_command(name, "/help ")
        formatter.write_text(f"/{name} {command.argument}".rstrip())
        with formatter.indentation():
            formatter.write_text(f"{command.help} {command.more}".rstrip())

    def weights(self, argument: str) -> None:
        if self.session.fusion is None:
            self.view.note("nothing has been answered yet")
        else:
            self.view.weights(self.session.fusion)

    def adapters(self, argument: str) -> None:
        action, *names = argument.split() or [""]
        _check_switch("adapters", action, " [NAME ...]")
        if action:
            self.session.switch(names, is_on=action == "on")
        self.view.show("\n".join(self._adapter_lines()))

    def _adapter_lines(self) -> Iterator[str]:
        from qaflora_edge.show.text import mean_weights

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
            names = list(strategy_names(self.session))
            is_known = any(argument.partition(":")[0] == known.name for known in strategies())
            near = None if is_known else did_you_mean(argument, names)
            if near:
                raise click.UsageError(f"There is no strategy {argument}; did you mean {near}?")
            self.session.engine.use_strategy(argument)
        self.view.note(f"strategy {self.session.engine.strategy}")

    def system(self, argument: str) -> None:
        if argument:
            self.session.set_system(None if argument == "-" else argument)
        text = self.session.conversation.system
        if text is None:
            text = self.session.engine.system or None
        self.view.note("no system prompt" if text is None else f"system prompt: {text}")

    def temp(self, argument: str) -> None:
        self._sampled("temperature", "temperature", argument)

    def penalty(self, argument: str) -> None:
        self._sampled("repeat_penalty", "repeat penalty", argument, off=1.0)

    def seed(self, argument: str) -> None:
        self._sampled("seed", "seed", argument, off=None)

    def _sampled(self, option: str, name: str, argument: str, **off: float | None) -> None:
        """Show an option of sampling, or set it; `off` is its value then, where it has one."""
        if argument == "off" and off:
            self.session.set_sampling(option, off["off"])
        elif argument:
            self.session.set_sampling(option, _number(argument, name, is_whole=option == "seed"))
        value = self.session.sampling[option]
        is_off = bool(off) and value == off["off"]
        self.view.note(f"no {name}" if is_off else f"{name} {value}")

    def ctx(self, argument: str) -> None:
        session = self.session
        if argument:
            session.reopen(int(_number(argument, "number of tokens", is_whole=True)))
        n_train = session.engine.n_ctx_train
        parts = [f"context {session.engine.n_ctx}", f"{session.n_token} tokens of it in use"]
        self.view.note(*parts, f"the base was trained for {n_train}")

    def clear(self, argument: str) -> None:
        n_turn = len(self.session.conversation.turns)
        self.session.clear()
        self.view.note(f"{n_turn} {'turn' if n_turn == 1 else 'turns'} forgotten")

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
        n = _n_turn(argument or "1", len(turns))
        taken = [self.session.conversation.undo() for _ in range(n)][-1]
        self.session.fusion = None
        what = "taken back" if n == 1 else f"{n} turns taken back, from"
        self.view.note(f"{what}: {_short(taken.question if taken else '')}")

    def keep_history(self, argument: str) -> None:
        _check_switch("keep-history", argument)
        if argument == "on" and self.session.is_remote:
            raise click.UsageError("a server reads each turn under its own weights.")
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

    exit = quit


def _no_command(name: str, before: str, rest: str = "") -> click.UsageError:
    near = did_you_mean(name, COMMANDS)
    advice = f"did you mean {before}{near}?" if near else "see /help."
    return click.UsageError(f"There is no command /{name}; {advice}{rest}")


def _check_switch(name: str, action: str, rest: str = "") -> None:
    if action not in ("", "on", "off"):
        forms = f"/{name}, /{name} on{rest} or /{name} off{rest}"
        raise click.UsageError(f"/{name} {action} is no choice; expected {forms}.")


def _short(text: str) -> str:
    """A text on one line of at most 40 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def _n_turn(argument: str, n_most: int) -> int:
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
    return expanded(argument)


def _number(text: str, name: str, *, is_whole: bool) -> float:
    """The number that was typed."""
    try:
        return int(text) if is_whole else float(text)
    except ValueError:
        kind = "whole number" if is_whole else "number"
        raise click.UsageError(
            f"The {name} {_short(text)!r} is no {kind}; expected one such as "
            f"{'4096' if is_whole else '0.7'}."
        ) from None
