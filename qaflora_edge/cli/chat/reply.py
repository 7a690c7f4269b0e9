"""An answer made by a thread of its own, so that Ctrl-C never lands inside the Engine."""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from qaflora_edge.inference.generation import Generation

_TICK_S = 0.05


class Reply:
    """Pieces of text from an answer that can be stopped at any time.

    begin       weighs and reads the prompt; called in the thread
    cancel      makes the Engine return early, if it is at work; any thread may call it
    text        the pieces given so far
    first_ms    from the beginning to the first piece; None before it
    is_stopped  whether stop() ended it

    To be used in a `with`: the thread has ended when the block is left.
    """

    def __init__(self, begin: Callable[[], Generation], cancel: Callable[[], None]) -> None:
        self.generation: Generation | None = None
        self.text = ""
        self.first_ms: float | None = None
        self.is_stopped = False
        self._is_over = False
        self._begin, self._cancel = begin, cancel
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._start = time.perf_counter()
        self._thread = threading.Thread(target=self._work, name="reply")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_over:
            self.stop()
            while self._thread.is_alive():
                self._cancel()
                self._thread.join(_TICK_S)
        self._thread.join()

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start

    def stop(self) -> None:
        """End the answer within a tick; what was not given yet is not part of it.

        It takes no lock, so that a signal may call it at any time.
        """
        self.is_stopped = True

    def pieces(self, tick: Callable[[], None]) -> Iterator[str]:
        """The pieces as they come; tick is called in between, some 20 times a second.

        Raises what the Engine raised, unless it was stopped.
        """
        while True:
            if self.is_stopped:
                self._cancel()  # again and again: the first may come before the Engine is at work
            try:
                piece = self._pieces.get(timeout=_TICK_S)
            except queue.Empty:
                tick()
                continue
            if piece is None:
                self._is_over = True
                break
            if self.is_stopped:
                continue
            if self.first_ms is None:
                self.first_ms = 1e3 * self.elapsed_s
            self.text += piece
            yield piece
        if self._error is not None and not self.is_stopped:
            raise self._error

    def _work(self) -> None:
        try:
            self.generation = self._begin()
            for piece in self.generation:
                self._pieces.put(piece)
                if self.is_stopped:
                    break
        except BaseException as error:
            self._error = error
        finally:
            self._pieces.put(None)


@contextlib.contextmanager
def interrupts_call(action: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call an action instead of raising KeyboardInterrupt somewhere in the block."""

    def handle(number: int, frame: FrameType | None) -> Any:
        action()

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: its owner decides about signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """Let the terminal on stdin keep keys for the next input, without an echo amid an answer.

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
