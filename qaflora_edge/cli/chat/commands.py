"""Slash commands: what a chat does besides asking."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from qaflora_edge.cli.options import slow_weighing
from qaflora_edge.cli.output import waiting
from qaflora_edge.config import expanded, in_group
from qaflora_edge.errors import QafloraError, nearest
from qaflora_edge.prompt.conversation import Conversation, bundle_identity, save_session
from qaflora_edge.weighing.plan import BASE
from qaflora_edge.weighing.strategy import strategies

if TYPE_CHECKING:
    from qaflora_edge.cli.chat.app import Chat
    from qaflora_edge.engine import Engine

Command = Callable[["Chat", str], None]
ADAPTERS = ("on", "off", "only")  # what /adapters does with names
KEYS = "Enter: send; Alt-Enter: new line; Ctrl-C: stop an answer; Ctrl-D: leave"

# Command -> its function, whose docstring is the help, and what follows its name.
COMMANDS: dict[str, tuple[Command, str]] = {}
# Numbers that /set changes, by their keys in the settings.
SAMPLING = {
    option.key: option
    for option in in_group("sampling").values()
    if option.flag and option.kind is not tuple
}


def _command(follows: str = "") -> Callable[[Command], Command]:
    def added(function: Command) -> Command:
        COMMANDS[function.__name__.rstrip("_")] = function, follows
        return function

    return added


def run_command(chat: "Chat", line: str) -> None:
    """Run `/name argument`. A failure is shown, and the chat goes on."""
    name, _, argument = line[1:].partition(" ")
    name = "help" if name == "?" else name
    try:
        if name not in COMMANDS:
            near = nearest(name.lower(), COMMANDS)
            advice = f"did you mean /{near}?" if near else "see /help."
            raise click.UsageError(
                f"There is no command /{name}; {advice} For a message that begins with a slash, "
                f"type //{name}."
            )
        function, follows = COMMANDS[name]
        is_needed = follows[:1].isalpha()
        if (argument and not follows) or (is_needed and not argument):
            raise click.UsageError(f"Cannot run {line[:80]!r}; expected /{name} {follows}".rstrip())
        function(chat, argument.strip())
    except (QafloraError, click.UsageError) as error:
        chat.view.error(error)


def completions(text: str, engine: "Engine") -> Iterator[str]:
    """Complete the last word of a slash command that is being typed."""
    words = text.split(" ")
    command = words[0]
    if len(words) == 1:
        candidates = [
            f"/{name} " if follows else f"/{name}" for name, (_, follows) in COMMANDS.items()
        ]
    elif command == "/adapters" and len(words) > 2:
        candidates = [name for name in engine.loaded_adapters if name not in words[2:-1]]
    elif len(words) > 2:
        candidates = []
    elif command == "/teach":
        candidates = [*engine.loaded_adapters, BASE, "undo"]
    else:
        arguments = {"/strategy": engine.strategies, "/set": SAMPLING, "/adapters": ADAPTERS}
        arguments["/drop"] = engine.loaded_adapters
        candidates = list(arguments.get(command, ()))
    yield from (candidate for candidate in candidates if candidate.startswith(words[-1]))


@_command()
def weights(chat: "Chat", argument: str) -> None:
    """Show what each adapter weighed for the last answer."""
    if chat.fusion is None:
        chat.view.note("nothing has been answered yet")
    else:
        chat.view.weights(chat.fusion)


@_command("[on|off|only [NAME ...]]")
def adapters(chat: "Chat", argument: str) -> None:
    """List the adapters, or switch some on or off, without names all; only: no others."""
    engine = chat.engine
    action, *names = argument.split() or [""]
    if action not in ("", *ADAPTERS) or (action == "only" and not names):
        raise click.UsageError(
            f"/adapters {action} is no choice; expected /adapters [on|off|only [NAME ...]]."
        )
    loaded = set(engine.loaded_adapters)
    in_use = set(engine.adapters)
    chosen = set(names) or loaded
    if action == "on":
        engine.use_adapters(sorted(in_use | chosen))
    elif action == "off":
        engine.use_adapters(sorted(in_use - chosen | chosen - loaded))  # refuses unknown names
    elif action == "only":
        engine.use_adapters(names)
    means = {} if chat.fusion is None else chat.fusion.means
    rows = []
    width = max(map(len, engine.loaded_adapters), default=0)
    for name in engine.loaded_adapters:
        last = f"  ×{means[name]:.2f} in the last answer" if name in means else ""
        rows.append(f"{name:<{width}}  {'on ' if name in engine.adapters else 'off'}{last}")
    chat.view.show("\n".join(rows) or "The bundle has no adapters: the base answers alone.")


@_command("PATH [NAME]")
def add(chat: "Chat", argument: str) -> None:
    """Load an adapter: a PEFT folder, an adapter .gguf or the Hub's owner/name."""
    path = argument
    name = None
    if " " in path and not expanded(path).exists():
        path, name = path.rsplit(maxsplit=1)
    with waiting(f"Loading {path}"):
        name = chat.engine.add_adapter(name, path)
    chat.view.note(f"{name} takes part from now on", f"strategy {chat.engine.strategy}")


@_command("NAME")
def drop(chat: "Chat", argument: str) -> None:
    """Unload an adapter."""
    chat.engine.remove_adapter(argument)
    chat.view.note(f"{argument} is unloaded")


@_command("[NAME]")
def strategy(chat: "Chat", argument: str) -> None:
    """List the strategies, or choose one."""
    if argument:
        chat.engine.use_strategy(argument)
    else:
        followed = {text.partition(":")[0] for text in chat.engine.strategies} | {"manual"}
        rows = [(each.usage, each.help) for each in strategies() if each.name in followed]
        chat.view.show(_table(rows))
    warning = slow_weighing(chat.engine)
    chat.view.note(f"strategy {chat.engine.strategy}", *([warning] if warning else []))


@_command("[TEXT]")
def system(chat: "Chat", argument: str) -> None:
    """Show the system prompt, or change it; - takes it away."""
    if argument:
        chat.set_system(None if argument == "-" else argument)
    text = chat.conversation.system or chat.engine.system or None
    chat.view.note("no system prompt" if text is None else f"system prompt: {text}")


@_command("[NAME [VALUE]]")
def set_(chat: "Chat", argument: str) -> None:
    """Show how tokens are sampled, or change it, as in /set temp 0; off takes it back."""
    key, _, text = argument.partition(" ")
    if key and key not in SAMPLING:
        raise click.UsageError(f"/set has no {key!r}; expected one of {', '.join(SAMPLING)}.")
    if text:
        option = SAMPLING[key]
        value = option.default if text == "off" else option.parsed(text)
        chat.sampling = chat.sampling.updated({option.name: value})
    keys = [key] if key else SAMPLING
    chat.view.note(*(f"{key} {getattr(chat.sampling, SAMPLING[key].name)}" for key in keys))


@_command()
def retry(chat: "Chat", argument: str) -> None:
    """Answer the last question again; under a seed, change it first."""
    turn = chat.conversation.undo()
    if not turn:
        chat.view.note("nothing has been asked yet")
    elif not chat.ask(turn[0]["content"]):
        chat.conversation.said += turn


@_command()
def undo(chat: "Chat", argument: str) -> None:
    """Take back the last question and its answer."""
    turn = chat.conversation.undo()
    chat.fusion = None
    note = f"taken back: {turn[0]['content'][:40]}" if turn else "nothing has been asked yet"
    chat.view.note(note)


@_command("NAME")
def teach(chat: "Chat", argument: str) -> None:
    """Say who should have answered the last question, or base; undo takes it back."""
    if argument == "undo":
        undone = chat.engine.unteach()
        note = f"taken back: a question of {undone}" if undone else "nothing has been taught yet"
        chat.view.note(note)
        return
    question = chat.conversation.last_question
    if question is None:
        chat.view.note("nothing has been asked yet")
        return
    n_taught = chat.engine.teach(question, argument)
    chat.view.note(f"{argument} is for questions as this one", f"examples of it {n_taught}")


@_command()
def clear(chat: "Chat", argument: str) -> None:
    """Forget the conversation; system prompt, strategy and adapters stay."""
    chat.conversation = Conversation(chat.conversation.system)
    chat.fusion = None
    chat.view.note("the conversation is forgotten")


@_command("FILE")
def save(chat: "Chat", argument: str) -> None:
    """Save the conversation to a file, over nothing but an older session."""
    path = expanded(argument)
    save_session(
        path,
        chat.conversation,
        bundle=bundle_identity(chat.folder),
        strategy=chat.engine.strategy,
        adapters=chat.engine.adapters,
    )
    chat.view.note(f"{chat.turns} saved to {path}")


@_command("FILE")
def load(chat: "Chat", argument: str) -> None:
    """Go on with a saved conversation."""
    chat.load(expanded(argument))


@_command()
def help_(chat: "Chat", argument: str) -> None:
    """Show this list, as /? does."""
    rows = [
        (f"/{name} {follows}".rstrip(), str(function.__doc__))
        for name, (function, follows) in COMMANDS.items()
    ]
    rows += [
        ("/quit", "Leave, as exit, quit, /bye and Ctrl-D do."),
        ("//TEXT", "Send a message that begins with one slash."),
    ]
    chat.view.show(f"{_table(rows)}\n\n{KEYS}")


def _table(rows: list[tuple[str, str]]) -> str:
    formatter = click.HelpFormatter(width=80)
    formatter.write_dl(rows)
    return formatter.getvalue().rstrip("\n")
