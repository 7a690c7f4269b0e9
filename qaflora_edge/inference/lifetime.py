"""What an Engine holds: freed together, used by one call at a time, told to stop by any thread."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from qaflora_edge.backend.stop import Stop
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
        self.stop = Stop()
        self.is_closed = False
        self._lock = threading.Lock()
        self._resources: list[Any] = []
        finalizer = weakref.finalize(owner, _close_all, self._resources)
        finalizer.atexit = False

    def keep(self, resource: T) -> T:
        """Close this resource at the end, before those that were kept earlier."""
        self._resources.append(resource)
        return resource

    def close(self) -> None:
        """Close all resources. A second call does nothing.

        Raises BusyError when another thread uses them. A forked process leaves them to its parent.
        """
        if not self.is_closed and _worker in (None, os.getpid()):
            with self.in_use():
                self.is_closed = True
                _close_all(self._resources)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep other threads out; BusyError when one is in, after close(), or after a fork."""
        global _worker
        _check_process()
        if not self._lock.acquire(blocking=False):
            raise BusyError(
                "This Engine is in use by another thread; an Engine serves one thread at a time. "
                "Wait for the other call, or make a second Engine."
            )
        try:
            if self.is_closed:
                raise BusyError("This Engine is closed; make a new one.")
            _worker = os.getpid()
            yield
        finally:
            self._lock.release()

    def __reduce__(self) -> Any:
        raise TypeError(
            "An Engine cannot be pickled or copied; give its options to the other process, and "
            "make one there."
        )

    @contextmanager
    def new_work(self) -> Iterator[None]:
        """The same for a call that begins something: it forgets an earlier request to stop."""
        with self.in_use():
            self.stop.clear()
            yield


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
