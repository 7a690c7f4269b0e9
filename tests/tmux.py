"""Commands on terminals: on a bare one, and in a tmux window whose screen is read."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Self

import pytest
from patience import PATIENCE_S


def on_a_terminal(command: Sequence[str], typed: bytes = b"", **env: str) -> bytes:
    """All bytes that a command writes to the terminal that is its stdin, stdout and stderr."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONUTF8": "1", "TERM": "xterm", **env},
        start_new_session=True,
    )
    os.close(theirs)
    os.write(ours, typed)
    written = b""
    with contextlib.suppress(OSError):  # the other side was closed
        while data := os.read(ours, 1 << 16):
            written += data
    os.close(ours)
    assert process.wait(timeout=PATIENCE_S) == 0, written.decode()
    return written


def need_tmux() -> None:
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")


class Window:
    """A tmux server with one window; what the command leaves with is shown as `LEFT 0`."""

    def __init__(
        self, command: Sequence[str], *, columns: int, rows: int, env: Mapping[str, str]
    ) -> None:
        self._folder = tempfile.mkdtemp(prefix="qaflora-tmux-")  # a socket's path must be short
        settings = " ".join(f"{name}={quote(value)}" for name, value in env.items())
        run = f"{settings} {' '.join(map(quote, command))}"
        # Ctrl-C reaches the shell too, which would leave without a word.
        line = f"trap : INT; {run}; echo LEFT $?; sleep {2 * PATIENCE_S:.0f}"
        size = ["-x", str(columns), "-y", str(rows)]
        config = Path(self._folder, "config")
        config.write_text("set -g status off\nset -g default-terminal screen-256color\n")
        self._tmux("-f", str(config), "new-session", "-d", *size, "sh", "-c", line)

    def _tmux(self, *args: str) -> str:
        return subprocess.run(
            ["tmux", "-S", f"{self._folder}/socket", *args],
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tmux("kill-server")
        shutil.rmtree(self._folder)

    def type(self, text: str) -> None:
        self._tmux("send-keys", "-l", text)

    def key(self, *names: str) -> None:
        self._tmux("send-keys", *names)

    def paste(self, text: str) -> None:
        """As a terminal pastes: marked as such where the program asked for it."""
        self._tmux("set-buffer", text)
        self._tmux("paste-buffer", "-p", "-r")

    def resize(self, columns: int, rows: int) -> None:
        self._tmux("resize-window", "-x", str(columns), "-y", str(rows))

    def screen(self) -> str:
        """What is on the screen, and above it what scrolled out."""
        return self._tmux("capture-pane", "-p", "-S", "-")

    def visible(self) -> str:
        return self._tmux("capture-pane", "-p")

    def wait_until(self, is_there: Callable[[str], object], what: str) -> str:
        """The screen, once it is as it should be."""
        there, screen = self.look(is_there, within_s=PATIENCE_S)
        assert there, f"{what} did not come; the screen is\n{screen}"
        return screen

    def look(self, is_there: Callable[[str], object], *, within_s: float) -> tuple[bool, str]:
        """Whether the screen became as it should be in that time, and the last one seen."""
        end = time.monotonic() + within_s
        while not is_there(screen := self.screen()):
            if time.monotonic() > end:
                return False, screen
            time.sleep(0.03)
        return True, screen

    def wait_for(self, text: str, *, count: int = 1) -> str:
        """The screen, once a text is on it so many times, wherever its lines break."""
        text = " ".join(text.split())
        return self.wait_until(lambda screen: " ".join(screen.split()).count(text) >= count, text)
