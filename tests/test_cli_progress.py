"""Bars and waiting lines: on terminals that can take them back, and nowhere else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import TinyBundle, make_sources
from patience import PATIENCE_S

pytestmark = pytest.mark.skipif(os.name != "posix", reason="terminals are POSIX ones")

# Shortened, so that a test does not wait for what takes long. The work ends once
# the line is shown, or after so many seconds.
WAITING = """
import threading
from qaflora_edge.cli import progress
progress.PATIENCE_SECONDS, progress.TURN_SECONDS = {patience}, 0.01
shown, echo = threading.Event(), progress.click.echo
def tell(*args, **options):
    echo(*args, **options)
    shown.set()
progress.click.echo = tell
with progress.waiting("Loading " + "x" * {length}):
    shown.wait({work})
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
    shown = on_terminal(python(WAITING.format(patience=0, length=5, work=PATIENCE_S)))
    assert re.match(r"\rLoading xxxxx \.\.\. \d+ s", shown)
    assert re.search(r"\r +\rdone\r\n$", shown)


TELLING = """
import threading
from qaflora_edge.cli import progress
progress.PATIENCE_SECONDS, progress.TURN_SECONDS = 0, 0.01
shown, echo = threading.Event(), progress.click.echo
def show(text, *args, **options):
    echo(text, *args, **options)
    if "45 %" in text:
        shown.set()
progress.click.echo = show
with progress.waiting("Weighing the adapters and reading the prompt") as tell:
    tell("weighing", 45, 100)
    shown.wait({work})
print("done")
"""


def test_progress_is_shown_where_it_is_told() -> None:
    shown = on_terminal(python(TELLING.format(work=PATIENCE_S)))
    assert re.search(r"\rWeighing the adapters \.\.\. 45 %, \d+ s", shown)
    assert re.search(r"\r +\rdone\r\n$", shown)


def test_short_wait_is_not_shown() -> None:
    assert on_terminal(python(WAITING.format(patience=3600, length=5, work=0))) == "done\r\n"


def test_each_label_has_its_bar() -> None:
    shown = on_terminal(python(BARS))
    assert re.search(r"first  \[#+\]  100%", shown)
    assert re.search(r"second  \[#+\]  100%", shown)


@pytest.fixture
def made(tmp_path: Path) -> TinyBundle:
    return make_sources(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "label"),
    [
        (["convert", "{peft}", "--base", "{base}", "-o", "{place}/out.gguf"], r"\[#+\]  100%"),
        (
            ["bundle", "create", "{place}/b", "--base", "{base}", "--adapter", "m={peft}"],
            r"\[#+\]  100%",
        ),
    ],
    ids=["convert", "bundle create"],
)
def test_long_work_has_a_bar(args: list[str], label: str, made: TinyBundle) -> None:
    places = {"peft": made.peft, "base": made.base.path, "place": made.folder.parent}
    command = [sys.executable, "-m", "qaflora_edge", *(part.format(**places) for part in args)]
    assert re.search(label, on_terminal(command))
