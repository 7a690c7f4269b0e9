"""Every expected failure, as one tree.

    QafloraError
    ├── InputFileError            a file is missing, truncated, corrupted, or not what it claims
    │   ├── GgufFileError
    │   ├── SafetensorsFileError
    │   ├── PeftConfigError
    │   ├── SessionFileError
    │   ├── TaskFileError
    │   └── ResultsFileError
    ├── OutputFileError           a file cannot be written, or the disk is full
    │   └── ConversionError       a converted file does not say what its source says
    ├── UnsupportedAdapterError   a PEFT feature that a plain LoRA cannot represent
    ├── AdapterMismatchError      adapter and base do not belong together
    ├── BundleError               bundle.json or its folder is wrong
    │   └── ChecksumError         a file is not the one that was recorded
    ├── RegistryError             an unknown model name
    │   └── DownloadError         a file could not be fetched whole
    ├── LibraryError              the native library is missing, stock, or of another version
    ├── BackendError              the native library reported a failure
    │   └── WorkerError           a worker (--rpc) cannot be used
    ├── PromptError               a prompt is empty, or no text
    │   ├── ContextError          a prompt is longer than the context
    │   └── ModalityError         a message holds an image, audio or a file
    ├── ChatTemplateError         the base has no usable chat template
    │   └── ToolsError            it has one, which knows no tools
    ├── WeightsError              weights of the wrong shape, NaN or infinite
    ├── StrategyError             an unknown strategy, lens, pool or adapter name
    ├── SettingsError             the settings file cannot be read, or a key of it is wrong
    ├── OptionError               an engine or sampling option out of its range
    ├── GrammarError              a grammar or a JSON schema that cannot be followed
    ├── CancelledError            a call was ended by Engine.cancel before there was an answer
    ├── IncompleteAnswerError     an answer was cut before the grammar that it follows ended
    └── BusyError                 an Engine was used by two threads at once, or after close

A message has four parts: what failed, which file, tensor or field, what was found and what
was expected, and what to do next.
"""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_MAX_CHARS = 4000  # of a message


class QafloraError(Exception):
    """Base of every failure that a user can cause or cure.

    A message may repeat whatever was found: the middle of a long one is left out.
    """

    def __init__(self, message: str = "") -> None:
        half = _MAX_CHARS // 2
        is_long = len(message) > _MAX_CHARS
        super().__init__(f"{message[:half]} ... {message[-half:]}" if is_long else message)


@contextmanager
def os_errors(kind: type[QafloraError], failure: str, advice: str) -> Iterator[None]:
    """Raise an error of ours in place of the system's: what failed, its reason, what to do.

    Of a full disk the kind is OutputFileError, and the advice is to free some space.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            message = f"{failure}: the disk is full. Free some space and try again."
            raise OutputFileError(message) from error
        raise kind(f"{failure}: {error.strerror or error}. {advice}") from error


def is_disk_full(error: OSError) -> bool:
    """Tell whether the system ran out of space or quota."""
    return error.errno in {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


class InputFileError(QafloraError): ...


class GgufFileError(InputFileError): ...


class SafetensorsFileError(InputFileError): ...


class PeftConfigError(InputFileError): ...


class SessionFileError(InputFileError): ...


class TaskFileError(InputFileError): ...


class ResultsFileError(InputFileError): ...


class OutputFileError(QafloraError): ...


class ConversionError(OutputFileError):
    """A converted file does not say what its source says; `checks` has what was compared."""

    def __init__(self, message: str, checks: Sequence[Any]) -> None:
        super().__init__(message)
        self.checks = checks


class UnsupportedAdapterError(QafloraError): ...


class AdapterMismatchError(QafloraError): ...


class BundleError(QafloraError): ...


class ChecksumError(BundleError): ...


class RegistryError(QafloraError): ...


class DownloadError(RegistryError): ...


class LibraryError(QafloraError): ...


class BackendError(QafloraError): ...


class WorkerError(BackendError): ...


class PromptError(QafloraError): ...


class ContextError(PromptError): ...


class ModalityError(PromptError): ...


class ChatTemplateError(QafloraError): ...


class ToolsError(ChatTemplateError): ...


class WeightsError(QafloraError): ...


class StrategyError(QafloraError): ...


class SettingsError(QafloraError): ...


class OptionError(QafloraError):
    """An engine or sampling option is out of its range.

    option  its name as the caller gave it, where it is one
    """

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


def wrong_option(name: str, found: object, expected: str) -> OptionError:
    """An option that is not what it should be."""
    return OptionError(f"Option {name} is {found!r:.200}, expected {expected}.", name)


class GrammarError(QafloraError): ...


class CancelledError(QafloraError): ...


class IncompleteAnswerError(QafloraError): ...


class BusyError(QafloraError): ...
