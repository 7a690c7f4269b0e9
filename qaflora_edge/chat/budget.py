"""What a template may do: every piece of work is paid for by the size of what it handles."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

MAX_SECONDS = 5.0
MAX_DEPTH = 40  # macros in each other, and lists in lists


class TemplateLimit(Exception):
    """A template asks for more than it is given."""


class Budget:
    """Work that is left to one rendering.

    work  in steps and characters
    """

    def __init__(self, work: int) -> None:
        self._work = work
        self._end = time.thread_time() + MAX_SECONDS  # others may have the processor meanwhile

    def spend(self, n: int) -> None:
        """Pay for work before it is done. Raises TemplateLimit where too little is left."""
        self._work -= n
        if self._work < 0:
            raise TemplateLimit("more text or more steps than a conversation needs")
        if time.thread_time() > self._end:
            raise TemplateLimit(f"more than {MAX_SECONDS:.0f} seconds")

    def size(self, value: Any) -> int:
        """size(), not looked at any further than what is left pays for."""
        return size(value, max(0, self._work))

    def seen(self, value: Any) -> Any:
        """The value, paid for."""
        self.spend(self.size(value))
        return value

    def text(self, value: Any) -> str:
        """The value as text, paid for."""
        return value if isinstance(self.seen(value), str) else str(value)

    def steps(self, iterable: Iterable[Any]) -> Iterator[Any]:
        """The same items, each paid for as it is taken."""
        for item in iterable:
            self.spend(1)
            yield item


def size(value: Any, most: int, depth: int = 0) -> int:
    """How much a value is when it is written out: what is in it twice counts twice.

    Raises TemplateLimit where that is more than `most`, or lists are too deep in each other.
    """
    if isinstance(value, str):
        return 1 + len(value)
    if not isinstance(value, (dict, list, tuple)):
        return 1
    if depth > MAX_DEPTH:
        raise TemplateLimit(f"more than {MAX_DEPTH} lists or objects in each other")
    total = 1
    parts = value if isinstance(value, (list, tuple)) else [*value.keys(), *value.values()]
    for part in parts:
        total += size(part, most - total, depth + 1)
        if total > most:
            raise TemplateLimit("more text or more steps than a conversation needs")
    return total
