"""Messages typed on a terminal: line editing, history, several lines, completion."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import AnyFormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.styles import Style

from qaflora_edge.cli.chat.commands import completions
from qaflora_edge.files import data_dir

if TYPE_CHECKING:
    from qaflora_edge.cli.chat.session import ChatSession

_HINTS = ("Alt-Enter: new line", "/help", "Ctrl-D: leave")
_STYLE = Style.from_dict(
    {"bottom-toolbar": "noreverse fg:default bg:default", "bottom-toolbar.text": "", "hint": "dim"}
)


class TerminalInput:
    """Reads messages from the user. `why_no_history` tells why the history is not kept, if so."""

    def __init__(self, session: ChatSession) -> None:
        history, self.why_no_history = _history()
        is_command = Condition(lambda: get_app().current_buffer.text.startswith("/"))
        self._prompts: PromptSession[str] = PromptSession(
            history=history,
            multiline=True,
            key_bindings=_keys(),
            completer=_SlashCompleter(session),
            complete_while_typing=is_command,
            reserve_space_for_menu=5,
            prompt_continuation="  ",
            bottom_toolbar=_hint,
            style=_STYLE,
            color_depth=ColorDepth.DEPTH_1_BIT if os.environ.get("NO_COLOR") else None,
            enable_open_in_editor=True,
        )

    def read(self) -> str | None:
        """The next message, or None at Ctrl-D. Ctrl-C takes back what is being typed."""
        while True:
            try:
                return self._prompts.prompt("> ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return None


def _hint() -> AnyFormattedText:
    """As many hints as fit beside each other."""
    width, text = get_app().output.get_size().columns, ""
    for hint in _HINTS:
        longer = f"{text}   {hint}" if text else hint
        if len(longer) >= width:
            break
        text = longer
    return [("class:hint", text)]


def _keys() -> KeyBindings:
    """Enter sends; Alt-Enter (or Escape, then Enter) and Ctrl-J begin a new line."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text.strip():
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class _SlashCompleter(Completer):
    """Commands, strategies, adapters and file names; nothing for messages."""

    def __init__(self, session: ChatSession) -> None:
        self._session = session
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or text.startswith("//") or "\n" in text:
            return
        for command in ("/save ", "/load "):
            if text.startswith(command):
                path = Document(text.removeprefix(command))
                yield from self._paths.get_completions(path, event)
                return
        for candidate in completions(text, self._session):
            yield Completion(candidate, start_position=-len(text.split(" ")[-1]))


def _history() -> tuple[History, str | None]:
    """The history file, which only its owner may read, or why there is none."""
    path = data_dir() / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600))
        _check_regular(path)
    except OSError as error:
        return InMemoryHistory(), f"{path} cannot be used ({error.strerror})"
    return FileHistory(str(path)), None


def _check_regular(path: Path) -> None:
    if not path.is_file():
        raise OSError(0, "it is no ordinary file")
