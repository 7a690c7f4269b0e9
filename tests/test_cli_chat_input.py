"""What is typed at the prompt of a chat, without a terminal"""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.application import create_app_session
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from prompt_toolkit.utils import get_cwidth

from qaflora_edge.cli.chat.reply import interrupts_call
from qaflora_edge.cli.chat.session import ChatSession
from qaflora_edge.cli.chat.terminal_input import TerminalInput, blanks


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PipeInput]:
    """What is sent here is typed."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with create_pipe_input() as keys, create_app_session(keys, DummyOutput()):
        yield keys


@pytest.fixture
def prompt() -> TerminalInput:
    return TerminalInput(cast(ChatSession, None))  # of use to completion alone


def test_ctrl_c_at_the_prompt_takes_back_what_is_typed(
    keys: PipeInput, prompt: TerminalInput
) -> None:
    keys.send_text("not this\x03the thing\r")
    assert prompt.read() == "the thing"


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("/wei\t", "/weights"),
        ("/s\ty\t me", "/system me"),  # the first finds several that go on differently
        ("/keep-history o\tff", "/keep-history off"),
        ("/we\t\t", "/weights"),
        ("a\tb", "ab"),  # a message has nothing to complete
    ],
)
def test_tab_completes_however_fast_it_is_pressed(
    keys: PipeInput, prompt: TerminalInput, typed: str, line: str
) -> None:
    keys.send_text(f"{typed}\r")
    assert prompt.read() == line


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("\x12ing\r\x05 and more\r", "the thing and more"),
        ("\x12ing\n\r", "the thing"),
        ("\x12ing\x03on a ring\r", "on a ring"),
        ("\x12nowhere\ron a ring\r", "on a ring"),
    ],
)
def test_a_search_of_the_history_ends_by_enter_and_by_ctrl_c(
    keys: PipeInput, prompt: TerminalInput, typed: str, line: str
) -> None:
    keys.send_text("the thing\r")
    assert prompt.read() == "the thing"
    keys.send_text(typed)
    keys.close()  # who is still in the search then gets nothing
    assert prompt.read() == line


def test_ctrl_d_leaves(keys: PipeInput, prompt: TerminalInput) -> None:
    keys.send_text("\x04")
    assert prompt.read() is None


@pytest.mark.slow
def test_interrupts_after_enter_lose_no_message(
    keys: PipeInput, prompt: TerminalInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at every line that calls something between Enter and the end of the prompt."""
    accept, lines = Buffer.validate_and_handle, set()

    def interrupt(frame: FrameType, event: str, argument: Any) -> None:
        line = (frame.f_code, frame.f_lineno)
        if line not in lines:
            lines.add(line)
            signal.raise_signal(signal.SIGINT)

    def accept_and_interrupt(buffer: Buffer) -> None:
        accept(buffer)
        sys.setprofile(interrupt)

    monkeypatch.setattr(Buffer, "validate_and_handle", accept_and_interrupt)
    keys.send_text("the thing\r\x04")
    with interrupts_call(lambda: None):  # as the chat does
        try:
            message = prompt.read()
        finally:
            sys.setprofile(None)
    assert message == "the thing"
    assert len(lines) > 100


@given(st.text("ab漢 -", max_size=60), st.integers(2, 12))
def test_no_word_breaks_that_fits_in_a_row(text: str, width: int) -> None:
    n_blank = blanks(text, width)
    assert len(n_blank) == len(text)
    places, column, row = [], 0, 0  # the row of each letter on a terminal of that width
    for char in "".join(" " * n + char for n, char in zip(n_blank, text, strict=True)):
        if column + get_cwidth(char) > width:
            column, row = 0, row + 1
        column += get_cwidth(char)
        places.append(row)
    at = 0
    for word in text.split(" "):
        start = at + sum(n_blank[: at + 1])
        at += len(word) + 1
        if word and get_cwidth(word) <= width:
            assert len(set(places[start : start + len(word)])) == 1, word
