"""Slash commands: what a chat does besides asking."""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from qaflora_edge.cli.chat.session import ChatSession
from qaflora_edge.cli.chat.view import View
from qaflora_edge.errors import QafloraError
from qaflora_edge.settings import expanded
from qaflora_edge.show.text import mean_weights
from qaflora_edge.weighing.strategy import strategies

Ask = Callable[..., bool]
KEYS = "Enter: send; Alt-Enter or Ctrl-J: new line; Ctrl-C: stop an answer; Ctrl-D: leave"

# Command -> what follows its name, what it does, and the rest of its help.
COMMANDS = {
    "weights": (
        "",
        "Show what each adapter weighed for the last answer.",
        "A row for each adapter, a sign for each layer; the higher, the more it weighs there.",
    ),
    "adapters": (
        "[on|off [NAME ...]]",
        "List the adapters, or switch some on or off.",
        "An adapter that is off is neither probed nor applied. Without names all are meant.",
    ),
    "strategy": (
        "[NAME]",
        "List the strategies, or choose one.",
        "manual:NAME=W,NAME=W takes your numbers; single:NAME takes one adapter.",
    ),
    "system": (
        "[TEXT]",
        "Show the system prompt, or change it; - takes it away.",
        "It holds for the whole conversation, from the next answer on, and never drops out of it.",
    ),
    "temp": (
        "[T]",
        "Show the temperature of sampling, or change it; 0 is greedy.",
        "0 takes the likeliest token each time, so that the same question has the same answer. "
        "0.7 is lively; above 1 answers fall apart.",
    ),
    "penalty": (
        "[P|off]",
        "Show the penalty on repeated tokens, or change it.",
        "Tokens among the last 64 of an answer become less likely: 1.03 is mild, off is none. It "
        "ends loops of small models. 1.1 already spoils sums, tables and long numbers.",
    ),
    "seed": (
        "[N|off]",
        "Show the seed of sampling, or change it.",
        "With a seed, the same conversation is answered the same again. /retry takes the next "
        "seed. off: a new one each time.",
    ),
    "ctx": (
        "",
        "Show how full the context is.",
        "The context holds system prompt, conversation and answer, in tokens; --ctx sets its size.",
    ),
    "retry": (
        "",
        "Answer the last question again.",
        "With a seed, under the next one; at temperature 0 the answer changes only if something "
        "else did, such as the strategy or the adapters in use.",
    ),
    "undo": ("[N]", "Take back the last question and its answer, or N of them.", ""),
    "clear": (
        "",
        "Forget the conversation.",
        "System prompt, strategy, adapters in use and sampling stay. /save keeps it in a file.",
    ),
    "keep-history": (
        "[on|off]",
        "Prefill only what is new in each turn, for long chats.",
        "on: the KV state of earlier turns stays, each under its own weights. Long chats answer "
        "sooner, and not exactly as without it.",
    ),
    "save": ("FILE", "Save the conversation to a file, over nothing but an older session.", ""),
    "load": (
        "FILE",
        "Go on with a saved conversation.",
        "Strategy and adapters in use become those of the file, as far as the bundle has them.",
    ),
    "help": ("[COMMAND]", "Show this list, or explain one command.", ""),
    "quit": ("", "Leave, as exit, /bye and Ctrl-D do.", ""),
}


def completions(text: str, session: ChatSession) -> Iterator[str]:
    """Complete the last word of a slash command that is being typed."""
    words = text.split(" ")
    name, word = words[0][1:], words[-1]
    candidates: list[str] = []
    if len(words) == 1:
        candidates = [f"/{name}" for name in COMMANDS]
    elif name == "adapters" and len(words) > 2:
        candidates = [n for n in session.engine.loaded_adapters if n not in words[2:-1]]
    elif len(words) == 2:
        found = {"strategy": session.engine.strategies, "help": COMMANDS, "penalty": ("off",)}
        found |= {"adapters": ("on", "off"), "keep-history": ("on", "off"), "seed": ("off",)}
        candidates = list(found.get(name, ()))
    yield from (candidate for candidate in candidates if candidate.startswith(word))


@dataclass(frozen=True)
class Commands:
    """Runs the slash commands of one chat; the method of a command has its name.

    ask  answers a question: ask(question, is_retry=False); False if no turn came of it
    """

    session: ChatSession
    view: View
    ask: Ask

    def run(self, line: str) -> None:
        """Run `/name argument`. A failure is shown, and the chat goes on."""
        parts = [] if line[1:2].isspace() else line[1:].split(maxsplit=1)
        name, argument = (*parts, "", "")[:2]
        name = "help" if name == "?" else name
        try:
            if name not in COMMANDS:
                more = f" For a message that begins with a slash, type //{name}."
                raise _no_command(name, "/", more)
            if argument and not COMMANDS[name][0]:
                raise click.UsageError(f"/{name} takes nothing after it, found {argument!r}.")
            getattr(self, name.replace("-", "_"))(argument.strip())
        except (QafloraError, click.UsageError) as error:
            self.view.error(error)

    def help(self, argument: str) -> None:
        formatter = click.HelpFormatter(width=80)
        if argument:
            name = argument.removeprefix("/")
            if name not in COMMANDS:
                raise _no_command(name, "/help ")
            follows, does, more = COMMANDS[name]
            formatter.write_text(f"/{name} {follows}".rstrip())
            with formatter.indentation():
                formatter.write_text(f"{does} {more}".rstrip())
        else:
            rows = [(f"/{name} {how}".rstrip(), does) for name, (how, does, _) in COMMANDS.items()]
            formatter.write_dl([*rows, ("//TEXT", "Send a message that begins with one slash.")])
            formatter.write(f"\n{KEYS}\n")
        self.view.show(formatter.getvalue().rstrip("\n"))

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
        fusion, engine = self.session.fusion, self.session.engine
        means = {} if fusion is None else mean_weights(fusion)
        rows, width = [], max(map(len, engine.loaded_adapters), default=0)
        for name in engine.loaded_adapters:
            last = f"  {100 * means[name]:3.0f} % of the last answer" if name in means else ""
            rows.append(f"{name:<{width}}  {'on ' if name in engine.adapters else 'off'}{last}")
        self.view.show("\n".join(rows) or "The bundle has no adapters: the base answers alone.")

    def strategy(self, argument: str) -> None:
        engine = self.session.engine
        if argument:
            engine.use_strategy(argument)
        else:
            formatter = click.HelpFormatter(width=80)
            followed = {text.partition(":")[0] for text in engine.strategies} | {"manual"}
            known = [each for each in strategies() if each.name in followed]
            formatter.write_dl([(each.usage, each.help) for each in known])
            self.view.show(formatter.getvalue().rstrip("\n"))
        self.view.note(f"strategy {engine.strategy}")

    def system(self, argument: str) -> None:
        if argument:
            self.session.set_system(None if argument == "-" else argument)
        text = self.session.conversation.system or self.session.engine.system or None
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
        engine, n_token = self.session.engine, self.session.n_token
        parts = [f"context {engine.n_ctx}", f"{n_token} tokens of it in use"]
        self.view.note(*parts, f"the base was trained for {engine.n_ctx_train}")

    def clear(self, argument: str) -> None:
        turns = _turns(len(self.session.conversation.turns))
        self.session.clear()
        self.view.note(f"{turns} forgotten")

    def retry(self, argument: str) -> None:
        turn = self.session.conversation.undo()
        if turn is None:
            self.view.note("nothing has been asked yet")
        elif not self.ask(turn.question, is_retry=True):
            self.session.conversation.turns.append(turn)

    def undo(self, argument: str) -> None:
        conversation, n_turn = self.session.conversation, len(self.session.conversation.turns)
        if not n_turn:
            self.view.note("nothing has been asked yet")
            return
        n = int(argument or "1") if (argument or "1").isdecimal() and len(argument) < 9 else 0
        if not 1 <= n <= n_turn:
            raise click.UsageError(
                f"/undo {_short(argument)} cannot be done: expected a number of turns, from 1 to "
                f"the {n_turn} there {'is' if n_turn == 1 else 'are'}."
            )
        taken = [conversation.undo() for _ in range(n)][-1]
        self.session.fusion = None
        what = "taken back" if n == 1 else f"{n} turns taken back, from"
        self.view.note(f"{what}: {_short(taken.question if taken else '')}")

    def keep_history(self, argument: str) -> None:
        _check_switch("keep-history", argument)
        if argument:
            self.session.keep_history = argument == "on"
        self.view.note(
            "each turn prefills only what is new; earlier turns keep their KV state"
            if self.session.keep_history
            else "each turn prefills the whole conversation under its own weights"
        )

    def save(self, argument: str) -> None:
        path = _path(argument, "save")
        self.session.save(path)
        self.view.note(f"{_turns(len(self.session.conversation.turns))} saved to {path}")

    def load(self, argument: str) -> None:
        self.load_file(_path(argument, "load"))

    def load_file(self, path: Path) -> None:
        """Go on with a saved chat. Raises SessionFileError."""
        for warning in self.session.load(path):
            self.view.note(f"warning: {warning}")
        turns = self.session.conversation.turns
        parts = [f"{_turns(len(turns))} loaded from {path}"]
        if turns:
            parts.append(f"the last question was: {_short(turns[-1].question)}")
        self.view.note(*parts)


def _no_command(name: str, before: str, rest: str = "") -> click.UsageError:
    near = difflib.get_close_matches(name.lower(), COMMANDS, n=1)
    advice = f"did you mean {before}{near[0]}?" if near else "see /help."
    return click.UsageError(f"There is no command /{name}; {advice}{rest}")


def _check_switch(name: str, action: str, rest: str = "") -> None:
    if action not in ("", "on", "off"):
        forms = f"/{name}, /{name} on{rest} or /{name} off{rest}"
        raise click.UsageError(f"/{name} {action} is no choice; expected {forms}.")


def _turns(n: int) -> str:
    return f"{n} {'turn' if n == 1 else 'turns'}"


def _short(text: str) -> str:
    """A text on one line of at most 40 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def _path(argument: str, name: str) -> Path:
    if not argument:
        raise click.UsageError(f"/{name} got no file name; expected /{name} FILE.")
    return expanded(argument)


def _number(text: str, name: str, *, is_whole: bool) -> float:
    """Read the number that was typed."""
    try:
        return int(text) if is_whole else float(text)
    except ValueError:
        kind = "whole number" if is_whole else "number"
        raise click.UsageError(
            f"The {name} {_short(text)!r} is no {kind}; expected one such as "
            f"{'4096' if is_whole else '0.7'}."
        ) from None
