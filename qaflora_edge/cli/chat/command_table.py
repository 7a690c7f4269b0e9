"""The slash commands of a chat in words, and what completes them."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qaflora_edge.cli.chat.session import ChatSession
from qaflora_edge.weighing.strategy import strategies


@dataclass(frozen=True)
class Command:
    """What follows a command's name, what it does in a sentence, and the rest of its help."""

    argument: str
    help: str
    more: str = ""


COMMANDS = {
    "weights": Command(
        "",
        "Show what each adapter weighed for the last answer.",
        "A row for each adapter, a column for each layer; the brighter, the more it weighs there. "
        "Below stand the layers at which each weighs most. The line below an answer has the means.",
    ),
    "adapters": Command(
        "[on|off [NAME ...]]",
        "List the adapters, or switch some on or off.",
        "An adapter that is off is neither probed nor applied: answers are those of a bundle "
        "without it, and come sooner. Without names all are meant.",
    ),
    "strategy": Command(
        "[NAME]",
        "Show how adapters are weighed, or change it.",
        "two-place takes one adapter by where the answer begins and one by the question's words, "
        "or none; qa-flora weighs by how far each adapter moves the base for this conversation; "
        "calibrated does so relative to what is typical for the adapter; static weighs all alike; "
        "single:NAME and base take one or none; manual:NAME=W,NAME=W takes your numbers.",
    ),
    "system": Command(
        "[TEXT]",
        "Show the system prompt, or change it; - takes it away.",
        "It holds for the whole conversation, from the next answer on, and never drops out of it.",
    ),
    "temp": Command(
        "[T]",
        "Show the temperature of sampling, or change it; 0 is greedy.",
        "0 takes the likeliest token each time, so that the same question has the same answer. "
        "0.7 is lively; above 1 answers fall apart.",
    ),
    "penalty": Command(
        "[P|off]",
        "Show the penalty on repeated tokens, or change it.",
        "Tokens among the last 64 of an answer become less likely: 1.03 is mild, off is none. It "
        "ends loops of small models. 1.1 already spoils what has to repeat itself: sums, tables, "
        "long numbers.",
    ),
    "seed": Command(
        "[N|off]",
        "Show the seed of sampling, or change it.",
        "With a seed, and a temperature above 0, the same conversation is answered the same again. "
        "/retry takes the next seed. off: a new one each time.",
    ),
    "ctx": Command(
        "[N]",
        "Show how full the context is, or change its size.",
        "The context is the room for system prompt, conversation and answer, in tokens. Another "
        "size loads the base anew, which takes as long as at the start; the conversation stays.",
    ),
    "retry": Command(
        "",
        "Answer the last question again.",
        "With a seed, under the next one; at temperature 0 the answer changes only if something "
        "else did, such as the strategy or the adapters in use.",
    ),
    "undo": Command("[N]", "Take back the last question and its answer, or N of them."),
    "clear": Command(
        "",
        "Forget the conversation and begin anew.",
        "System prompt, strategy, adapters in use and sampling stay. /save keeps it in a file "
        "before.",
    ),
    "keep-history": Command(
        "[on|off]",
        "Whether a turn reads only what is new, for long chats.",
        "on: earlier turns stay as they were read, each under its own weights; long chats answer "
        "sooner, and not exactly as without it.",
    ),
    "save": Command(
        "FILE", "Save the conversation to a file.", "It overwrites nothing but an older session."
    ),
    "load": Command(
        "FILE",
        "Go on with a saved conversation.",
        "Strategy and adapters in use become those of the file, as far as the bundle has them.",
    ),
    "help": Command("[COMMAND]", "Show this list, or explain one command."),
    "quit": Command("", "Leave, as Ctrl-D and /exit do."),
    "exit": Command("", "Leave, as Ctrl-D and /quit do."),
}


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant, if there is one."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1)
    return near[0] if near else None


def completions(text: str, session: ChatSession) -> Iterator[str]:
    """What may stand in place of the last word of a slash command that is being typed."""
    words = text.split(" ")
    name, word = words[0][1:], words[-1]
    if len(words) == 1:
        candidates = [f"/{name}" for name in COMMANDS]
    elif len(words) == 2:
        candidates = {
            "strategy": lambda: list(strategy_names(session)),
            "adapters": lambda: ["on", "off"],
            "keep-history": lambda: ["on", "off"],
            "penalty": lambda: ["off"],
            "seed": lambda: ["off"],
            "help": lambda: list(COMMANDS),
        }.get(name, list)()
    elif name == "adapters":
        candidates = [n for n in session.engine.loaded_adapters if n not in words[2:-1]]
    else:
        candidates = []
    yield from (candidate for candidate in candidates if candidate.startswith(word))


def strategy_names(session: ChatSession) -> Iterator[str]:
    """The strategies that this bundle can follow; one that ends in a colon is to go on."""
    for strategy in strategies():
        if strategy.argument == "NAME":
            yield from (f"{strategy.name}:{name}" for name in session.engine.adapters)
        else:
            yield f"{strategy.name}:" if strategy.needs_argument else strategy.name
