"""Messages typed on a terminal: line editing, history, several lines, completion."""

import contextlib
import itertools
import os
import re
import signal
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import (
    CompleteEvent,
    Completer,
    Completion,
    PathCompleter,
    get_common_complete_suffix,
)
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, is_searching
from prompt_toolkit.formatted_text import AnyFormattedText, StyleAndTextTuples
from prompt_toolkit.formatted_text.utils import fragment_list_to_text
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.processors import Processor, Transformation, TransformationInput
from prompt_toolkit.layout.utils import explode_text_fragments
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.styles import Style
from prompt_toolkit.utils import get_cwidth

from qaflora_edge.cli.chat.command_table import completions
from qaflora_edge.cli.chat.session import ChatSession
from qaflora_edge.cli.show import terminal_size
from qaflora_edge.errors import OutputFileError
from qaflora_edge.files import atomic_path, data_dir

_PROMPT = "> "
_MENU_ROWS = 5
_HINTS = ("Alt-Enter: new line", "/help", "Ctrl-D: leave")
_STYLE = Style.from_dict(
    {"bottom-toolbar": "noreverse fg:default bg:default", "bottom-toolbar.text": "", "hint": "dim"}
)


class TerminalInput:
    """Reads messages from the user. `why_no_history` tells why the history is not kept, if so."""

    def __init__(self, session: ChatSession) -> None:
        history, self.why_no_history = open_history()
        is_command = Condition(lambda: get_app().current_buffer.text.startswith("/"))
        self._prompts: PromptSession[str] = PromptSession(
            history=history,
            multiline=True,
            key_bindings=_keys(),
            completer=_SlashCompleter(session),
            complete_while_typing=is_command,
            prompt_continuation=" " * len(_PROMPT),
            bottom_toolbar=_hint,
            style=_STYLE,
            color_depth=ColorDepth.DEPTH_1_BIT if os.environ.get("NO_COLOR") else None,
            enable_open_in_editor=True,
            input_processors=[WordWrap(n_prefix=len(_PROMPT))],
        )

    def read(self) -> str | None:
        """The next message, or None at Ctrl-D. Ctrl-C takes back what is being typed."""
        while True:
            try:
                # A menu never takes the room of what is typed and of the hint below.
                n_menu = max(0, min(_MENU_ROWS, terminal_size(sys.stdout)[1] - 3))
                with _no_interrupt():
                    # A handler of its own would for a moment leave Python's, which raises.
                    return self._prompts.prompt(
                        _PROMPT, reserve_space_for_menu=n_menu, handle_sigint=False
                    )
            except KeyboardInterrupt:
                continue
            except EOFError:
                return None


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ignore Ctrl-C where prompt_toolkit does not read it as a key: as it begins and ends.

    A KeyboardInterrupt there would lose the message that was just sent, or end the chat.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
    """Enter sends; Alt-Enter (or Escape, then Enter) and Ctrl-J begin a new line.

    While Ctrl-R searches, keys are prompt_toolkit's: Enter takes what was found, Ctrl-C nothing.
    """
    keys = KeyBindings()

    @keys.add("c-c", filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        # The prompt stays: ended and begun anew, a second Ctrl-C could meet a closed event loop.
        event.current_buffer.reset()

    @keys.add("enter", filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text.strip():
            event.current_buffer.validate_and_handle()

    @keys.add("tab", filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        # At once: what is asked for while the menu is being made would be forgotten.
        buffer = event.current_buffer
        if buffer.complete_state:
            buffer.complete_next()
            return
        asked = CompleteEvent(completion_requested=True)
        found = list(buffer.completer.get_completions(buffer.document, asked))
        if len(found) == 1:
            buffer.apply_completion(found[0])
        elif common := get_common_complete_suffix(buffer.document, found):
            buffer.insert_text(common)
        elif found:
            buffer.start_completion()

    @keys.add("escape", "enter", filter=~is_searching)
    @keys.add("c-j", filter=~is_searching)
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


class WordWrap(Processor):
    """Fills rows with blanks up to their end where the next word does not fit.

    prompt_toolkit alone breaks them at any letter.

    n_prefix  columns that each row begins with: the prompt, or what continues it
    """

    def __init__(self, n_prefix: int) -> None:
        self._n_prefix = n_prefix

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        fragments = explode_text_fragments(transformation_input.fragments)
        width = max(1, transformation_input.width - self._n_prefix)
        n_blank = blanks(fragment_list_to_text(fragments), width)
        # Of each letter, where it stands in the line that is shown.
        places = [place + n for place, n in enumerate(itertools.accumulate(n_blank))]
        shown: StyleAndTextTuples = []
        for fragment, n in zip(fragments, n_blank, strict=True):
            shown += [("", " " * n), fragment] if n else [fragment]
        end = len(fragments) + sum(n_blank)

        def to_display(place: int) -> int:
            return places[place] if place < len(places) else end + place - len(places)

        def to_source(place: int) -> int:
            return max(0, bisect_right(places, place) - 1) if place < end else len(places)

        return Transformation(shown, source_to_display=to_display, display_to_source=to_source)


def blanks(text: str, width: int) -> list[int]:
    """How many blanks go before each letter, so that no word breaks that is not wider than a row.

    A blank that ends a row stays in it; where there is no room, it begins the next one.
    """
    n_blank = [0] * len(text)
    column = 0
    for word in re.finditer(" +|[^ ]+", text):
        n_word = get_cwidth(word[0])
        if column + n_word > width >= n_word and column and word[0][0] != " ":
            n_blank[word.start()] = width - column
            column = 0
        for n in map(get_cwidth, word[0]):
            column = column + n if column + n <= width else n
        column %= width
    return n_blank


BYTES_MAX = 1 << 20
_ENTRY = b"\n# "  # what begins an entry; the lines of a message begin with a plus


class _BoundedFile(FileHistory):
    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):  # a full disk is no reason to lose a conversation
            super().store_string(string)


def open_history() -> tuple[History, str | None]:
    """What was typed, which Up and Ctrl-R bring back, in a file that only its owner may read.

    Also why it is not kept, if so.
    """
    path = data_dir() / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600))
        if not path.is_file():
            raise OSError(0, "it is no ordinary file")
        if path.stat().st_size > BYTES_MAX:
            _forget_oldest(path)
    except OSError as error:
        return InMemoryHistory(), f"{path} cannot be used ({error.strerror})"
    return _BoundedFile(str(path)), None


def _forget_oldest(path: Path) -> None:
    """Keep the newest entries of a history, half of what it may have."""
    with path.open("rb") as file:
        file.seek(-BYTES_MAX // 2, os.SEEK_END)
        data = file.read()
    _, begin, kept = data.partition(_ENTRY)
    place = os.path.realpath(path)
    with contextlib.suppress(OutputFileError), atomic_path(place, mode=0o600) as temporary:
        temporary.write_bytes(begin + kept)
