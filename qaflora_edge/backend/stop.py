"""A flag that any thread can set to end native work."""

import ctypes
import sys
from functools import cache
from typing import Any


class Stop:
    """A flag set by one thread and read by another: between tokens, and inside llama_decode.

    llama.cpp asks its abort callback before every node of a graph. A Python function there would
    wait for the interpreter's lock each time; strlen of a buffer that is empty or "\\1" looks at
    the same byte without it.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(2)

    @property
    def is_set(self) -> bool:
        return self._buffer.raw[0] != 0

    def set(self) -> None:
        self._buffer[0] = b"\1"

    def clear(self) -> None:
        self._buffer[0] = b"\0"

    def watch(self, lib: Any, context: Any) -> None:
        """Let a llama_context end its work once the flag is set; both live as long as each other.

        Backends without abort callbacks (CUDA, Vulkan) end with their micro-batch.
        """
        callback = ctypes.cast(_strlen(), lib.ggml_abort_callback)
        lib.llama_set_abort_callback(context, callback, ctypes.addressof(self._buffer))


@cache
def _strlen() -> Any:
    return ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None).strlen
