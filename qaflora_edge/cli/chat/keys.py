"""Keys that are typed while nothing is read: not shown, and there for the next input"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silent_keys() -> Iterator[None]:
    """Let the terminal on stdin keep keys as they are, without an echo in the middle of an answer.

    Enter stays a carriage return, which sends; the terminal would make it a line end. Ctrl-C
    interrupts as ever. An input with line editing brings its own mode and comes back to this one.
    """
    try:
        import termios
    except ImportError:  # Windows echoes nothing by itself
        yield
        return
    keys = sys.stdin.fileno()
    before = termios.tcgetattr(keys)
    silent = termios.tcgetattr(keys)
    silent[0] &= ~termios.ICRNL
    silent[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(keys, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(keys, termios.TCSADRAIN, before)
