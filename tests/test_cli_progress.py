"""Bars and waiting lines: on terminals that can take them back, and nowhere else."""

import os
import re
import subprocess
import sys

import pytest
from tmux import on_a_terminal

pytestmark = pytest.mark.skipif(os.name != "posix", reason="terminals are POSIX ones")

WAITING = """
import time
from qaflora_edge.cli.output import waiting
with waiting("Loading [base]") as wait:
    time.sleep(0.3)
    wait.tell("weighing", 45, 100)
    time.sleep(0.3)
print("done")
"""
BARS = """
from qaflora_edge.cli.output import progress_bars
with progress_bars() as tell:
    for done in (0, 5, 10):
        tell("first", done, 10)
    for done in (0, 3):
        tell("second", done, 3)
print("done")
"""

LINES = """
import time
from qaflora_edge.cli import output
output._LINES_S = 0.2
with output.progress_bars(or_lines=True) as tell:
    tell("first", 5, 10)
    time.sleep(0.5)
"""


def shown_by(code: str, **environment: str) -> str:
    """What a terminal is sent by a program."""
    return on_a_terminal([sys.executable, "-c", code], **environment).decode("utf-8")


def test_wait_is_shown_and_taken_back() -> None:
    shown = shown_by(WAITING)
    assert "Loading [base]" in shown
    assert "Weighing the adapters 45 %" in shown
    assert shown.endswith("\x1b[2Kdone\r\n")
    assert shown_by(WAITING, TERM="dumb") == "done\r\n"


def test_each_label_has_its_bar() -> None:
    shown = shown_by(BARS)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert re.search(r"first .* 10/10", plain)
    assert re.search(r"second .* 3/3", plain)


def test_lines_are_said_where_nothing_can_be_taken_back() -> None:
    done = subprocess.run([sys.executable, "-c", LINES], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert re.fullmatch(r"(first: 5 of 10, after \d s\n)+", done.stderr)
