"""Ctrl-C and SIGTERM end a command by an exception, so that it cleans up on its way."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# llama.cpp calls a function of this module while it works.
_CALLED_BY_NATIVE_CODE = "qaflora_edge.backend.library"
_AGAIN_S = 0.02


@contextmanager
def signals_unwind() -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C, and at SIGTERM an exit with code 143.

    An exception cannot pass through native code: one that would begin in a function that native
    code calls comes after it.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        if _is_called_by_native_code(frame):
            again = threading.Timer(_AGAIN_S, signal.raise_signal, [number])
            again.daemon = True
            again.start()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # the main thread's owner decides about signals
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    if previous[signal.SIGINT] is not signal.default_int_handler:
        del previous[signal.SIGINT]  # ignored, as in the background of a shell, or somebody's own
    for number in previous:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_called_by_native_code(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == _CALLED_BY_NATIVE_CODE:
            return True
        frame = frame.f_back
    return False
