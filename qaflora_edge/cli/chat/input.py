"""Messages typed on a terminal: line editing, history, several lines, completion."""

import contextlib
from collections.abc import Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, is_searching
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

from qaflora_edge.cli.chat.commands import completions
from qaflora_edge.engine import Engine
from qaflora_edge.files import data_dir

_PROMPT = "> "
_HINT = "Alt-Enter: new line   /help   Ctrl-D: leave"
_STYLE = Style.from_dict({"bottom-toolbar": "noreverse dim fg:default bg:default"})


class TerminalInput:
    """Reads messages from the user."""

    def __init__(self, engine: Engine) -> None:
        is_command = Condition(lambda: get_app().current_buffer.text.startswith("/"))
        self._prompts: PromptSession[str] = PromptSession(
            history=open_history(),
            multiline=True,
            key_bindings=_keys(),
            completer=_SlashCompleter(engine),
            complete_while_typing=is_command,
            prompt_continuation=" " * len(_PROMPT),
            bottom_toolbar=_HINT,
            style=_STYLE,
            enable_open_in_editor=True,
            reserve_space_for_menu=5,
        )

    def read(self) -> str | None:
        """Read the next message; None at Ctrl-D. Ctrl-C raises KeyboardInterrupt."""
        try:
            return self._prompts.prompt(_PROMPT)
        except EOFError:
            return None


def _keys() -> KeyBindings:
    """Enter sends, as does Ctrl-J: an Enter typed too early. Alt-Enter begins a new line."""
    keys = KeyBindings()

    @keys.add("enter", filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text.strip():
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class _SlashCompleter(Completer):
    """Completes commands, strategies, adapters and file names; nothing in messages."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or text.startswith("//") or "\n" in text:
            return
        for command in ("/save ", "/load ", "/add "):
            if text.startswith(command):
                path = Document(text.removeprefix(command))
                yield from self._paths.get_completions(path, event)
                return
        for candidate in completions(text, self._engine):
            yield Completion(candidate, start_position=-len(text.split(" ")[-1]))


class _File(FileHistory):
    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):  # a full disk is no reason to lose a conversation
            super().store_string(string)


def open_history() -> History:
    """Open what was typed before, in a file that only its owner may read.

    Where the file cannot be used, the history lasts as long as the chat.
    """
    path = data_dir() / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
    except OSError:
        return InMemoryHistory()
    return _File(str(path))
