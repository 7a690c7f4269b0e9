"""What an Engine holds: freed together, once, when no call uses it."""

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from qaflora_edge.errors import BusyError

T = TypeVar("T")
_worker: int | None = None  # the process in which the library computed first


class Lifetime:
    """Resources in order of making, closed in reverse order, once.

    owner  when it is collected and nobody closed it, the resources are closed: a garbage collector
           may take a model before the contexts that use it
    """

    def __init__(self, owner: object) -> None:
        _check_process()
        self.is_closed = False
        self._idle = threading.Condition()
        self._n_call: dict[int, int] = {}  # of each thread
        self._telling: int | None = None  # the thread, which computes
        self._resources: list[Any] = []
        finalizer = weakref.finalize(owner, _close_all, self._resources)
        finalizer.atexit = False

    def keep(self, resource: T) -> T:
        """Close this resource at the end, before those that were kept earlier."""
        self._resources.append(resource)
        return resource

    @contextmanager
    def call(self) -> Iterator[None]:
        """Keep the resources open meanwhile; BusyError after close(), or after a fork."""
        global _worker
        _check_process()
        me = threading.get_ident()
        with self._idle:
            self.check_open()
            if me == self._telling:
                raise BusyError(
                    "This Engine is in use by the call whose on_progress is told of the weighing; "
                    "ask it after that call has returned."
                )
            self._n_call[me] = self._n_call.get(me, 0) + 1
        _worker = os.getpid()
        try:
            yield
        finally:
            with self._idle:
                self._n_call[me] -= 1
                if not self._n_call[me]:
                    del self._n_call[me]
                    self._idle.notify_all()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Refuse calls of this thread, the one that computes: they would wait for it for ever."""
        self._telling = threading.get_ident()
        try:
            yield
        finally:
            self._telling = None

    def check_open(self) -> None:
        """Raise BusyError after close()."""
        if self.is_closed:
            raise BusyError("This Engine is closed; make a new one.")

    def close(self, end_calls: Callable[[], None] = lambda: None) -> None:
        """Close all resources once no call uses them. A second call does nothing.

        end_calls  makes calls of other threads end early

        Raises BusyError within a call of the same thread, such as on_weights. A forked process
        leaves the resources to its parent.
        """
        if _worker not in (None, os.getpid()):
            return
        with self._idle:
            me = threading.get_ident()
            if me in self._n_call or me == self._telling:
                raise BusyError(
                    "This Engine is in use by the call that close() was called from; close it "
                    "after the call has returned."
                )
            self.is_closed = True
        end_calls()
        with self._idle:
            self._idle.wait_for(lambda: not self._n_call)
        _close_all(self._resources)

    def __reduce__(self) -> Any:
        raise TypeError(
            "An Engine cannot be pickled or copied; give its options to the other process, and "
            "make one there."
        )


def _check_process() -> None:
    """Raise BusyError in a process that was forked from one in which the library has computed.

    Its threads are not there after a fork, and it would wait for them for ever.
    """
    if _worker not in (None, os.getpid()):
        raise BusyError(
            f"This process was forked from process {_worker}, in which an Engine was in use, and "
            "the library's threads are not here. Start processes with multiprocessing's method "
            "'spawn', or fork before the first Engine is used."
        )


def _close_all(resources: list[Any]) -> None:
    while resources:
        resources.pop().close()
