"""Bars and waiting lines: on terminals that can take them back, and nowhere else."""

import os
import re
import subprocess
import sys

import pytest
from patience import PATIENCE_S

pytestmark = pytest.mark.skipif(os.name != "posix", reason="terminals are POSIX ones")

WAITING = """
import time
from qaflora_edge.cli.progress import waiting
with waiting("Loading [base]") as tell:
    time.sleep(0.3)
    tell("weighing", 45, 100)
    time.sleep(0.3)
print("done")
"""
BARS = """
from qaflora_edge.cli.progress import progress_bars
with progress_bars() as tell:
    for done in (0, 5, 10):
        if tell is not None:
            tell("first", done, 10)
    for done in (0, 3):
        if tell is not None:
            tell("second", done, 3)
print("done")
"""


def on_terminal(args: list[str], **environment: str) -> str:
    """What a terminal is sent by a command whose stdout and stderr it is."""
    controller, terminal = os.openpty()
    process = subprocess.Popen(
        args,
        stdout=terminal,
        stderr=terminal,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm", **environment},
    )
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(controller, 4096):
            shown += chunk
    except OSError:  # Linux's end of a terminal whose other side is closed
        pass
    os.close(controller)
    assert process.wait(timeout=PATIENCE_S) == 0, shown
    return shown.decode("utf-8")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_wait_is_shown_and_taken_back() -> None:
    shown = on_terminal(python(WAITING))
    assert "Loading [base]" in shown
    assert "Weighing the adapters 45 %" in shown
    assert shown.endswith("\x1b[2Kdone\r\n")
    assert on_terminal(python(WAITING), TERM="dumb") == "done\r\n"


def test_each_label_has_its_bar() -> None:
    shown = on_terminal(python(BARS))
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert re.search(r"first .* 10/10", plain)
    assert re.search(r"second .* 3/3", plain)
