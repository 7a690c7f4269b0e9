"""The library's functions, why they failed, and what every handle of it has in common."""

from collections import deque
from types import TracebackType
from typing import Any

from qaflora_edge.backend import native

_LOG_LEVEL_ERROR = 4  # ggml.h GGML_LOG_LEVEL_ERROR
_errors: deque[str] = deque(maxlen=4)
_log_callback: Any = None


def library() -> tuple[Any, Any]:
    """The binding and our functions, with the library's log kept off the terminal."""
    global _log_callback
    binding, functions = native.load()
    if _log_callback is None:

        def keep_errors(level: int, text: bytes, _: object) -> None:
            if level == _LOG_LEVEL_ERROR:
                _errors.append(text.decode("utf-8", "replace").strip())

        _log_callback = binding.llama_log_callback(keep_errors)
        binding.llama_log_set(_log_callback, None)
    return binding, functions


def said() -> str:
    """What llama.cpp gave as the reasons of its last failure."""
    return "; ".join(_errors) or "no reason given"


def has_said() -> bool:
    """Whether llama.cpp gave a reason since `forget_said`."""
    return bool(_errors)


def forget_said() -> None:
    """Forget the reasons of earlier failures."""
    _errors.clear()


class Handle:
    """Something of the library that is freed once, by close().

    There is no __del__: a garbage collector may take a model before its contexts.
    """

    _pointer: Any = None

    def close(self) -> None:
        if self._pointer is not None:
            pointer, self._pointer = self._pointer, None
            self._free(pointer)

    def _free(self, pointer: Any) -> None:
        raise NotImplementedError

    def __enter__(self):  # type: ignore[no-untyped-def]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
