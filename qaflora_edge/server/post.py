"""From the threads that compute to the one that sends."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Post:
    """Hands things to the thread of an event loop, which is woken once for all that are there."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._is_called = loop, False
        self._calls: deque[Callable[[], None]] = deque()

    def put(self, take: Callable[[T], None], what: T) -> None:
        """Let the loop's thread call take(what), in order; any thread may call it."""
        self._calls.append(lambda: take(what))
        if not self._is_called:
            self._is_called = True
            self._loop.call_soon_threadsafe(self._hand_on)

    def _hand_on(self) -> None:
        self._is_called = False  # first: what is put from here on is taken here or by a next call
        while self._calls:
            self._calls.popleft()()
