"""Ctrl-C and SIGTERM end a command by an exception, so that it cleans up on its way."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN_S = 0.02


@contextmanager
def signals_unwind() -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C, and at SIGTERM an exit with code 143.

    Python drops an exception that begins in a function called by native code (llama.cpp's log), by
    a weak reference (each import has one) or in a __del__: the signal then comes again.
    """
    raised: list[tuple[BaseException, int]] = []  # the last one

    def leave(number: int, frame: FrameType | None) -> None:
        error = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        raised[:] = [(error, number)]
        raise error

    def come_again(dropped: "sys.UnraisableHookArgs") -> None:
        if not raised or dropped.exc_value is not raised[0][0]:
            previous_hook(dropped)
            return
        _, number = raised.pop()
        again = threading.Timer(_AGAIN_S, _signal_main_thread, [number])
        again.daemon = True
        again.start()

    if threading.current_thread() is not threading.main_thread():
        yield  # the main thread's owner decides about signals
        return
    previous_hook = sys.unraisablehook
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    if previous[signal.SIGINT] is not signal.default_int_handler:
        del previous[signal.SIGINT]  # ignored, as in the background of a shell, or somebody's own
    sys.unraisablehook = come_again
    for number in previous:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        sys.unraisablehook = previous_hook


def _signal_main_thread(number: int) -> None:
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:  # a signal of this thread would not end what the main one waits for
        signal.pthread_kill(threading.main_thread().ident or 0, number)
