"""What an Engine holds: freed together, used by one call at a time, told to stop by any thread."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from qaflora_edge.backend.stop import Stop
from qaflora_edge.errors import BusyError

T = TypeVar("T")


class Lifetime:
    """Resources in order of making, closed in reverse order, once.

    owner  when it is collected and nobody closed it, the resources are closed: a garbage collector
           may take a model before the contexts that use it
    """

    def __init__(self, owner: object) -> None:
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

        Raises BusyError when another thread uses them.
        """
        if not self.is_closed:
            with self.in_use():
                self.is_closed = True
                _close_all(self._resources)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep other threads out; BusyError when one is in, or after close()."""
        if not self._lock.acquire(blocking=False):
            raise BusyError(
                "This Engine is in use by another thread; an Engine serves one thread at a time. "
                "Wait for the other call, or make a second Engine."
            )
        try:
            if self.is_closed:
                raise BusyError("This Engine is closed; make a new one.")
            yield
        finally:
            self._lock.release()

    @contextmanager
    def new_work(self) -> Iterator[None]:
        """The same for a call that begins something: it forgets an earlier request to stop."""
        with self.in_use():
            self.stop.clear()
            yield


def _close_all(resources: list[Any]) -> None:
    while resources:
        resources.pop().close()
