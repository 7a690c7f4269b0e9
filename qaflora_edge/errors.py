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
    │   ├── DownloadError         a file could not be fetched whole
    │   └── UploadError           the Hub did not take what was pushed
    ├── LibraryError              the native library is missing, stock, or of another version
    ├── BackendError              the native library reported a failure
    │   └── WorkerError           a worker (--rpc) cannot be used, or was lost
    ├── PromptError               a prompt is empty, or no text
    │   └── ContextError          a prompt is longer than the context
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


class InputFileError(QafloraError):
    """A file is missing, truncated, corrupted, or not what it claims to be."""


class GgufFileError(InputFileError):
    """A GGUF file cannot be read as what it is used for."""


class SafetensorsFileError(InputFileError):
    """A safetensors file cannot be read."""


class PeftConfigError(InputFileError):
    """An adapter_config.json cannot be read, or a field of it is wrong."""


class SessionFileError(InputFileError):
    """A saved chat cannot be read."""


class TaskFileError(InputFileError):
    """A task of an evaluation cannot be read, or an item of it is wrong."""


class ResultsFileError(InputFileError):
    """The results of an evaluation cannot be read."""


class OutputFileError(QafloraError):
    """A file cannot be written where it was asked for."""


class ConversionError(OutputFileError):
    """A converted file does not say what its source says; `checks` has what was compared."""

    def __init__(self, message: str, checks: Sequence[Any]) -> None:
        super().__init__(message)
        self.checks = checks


class UnsupportedAdapterError(QafloraError):
    """An adapter uses a PEFT feature that a plain LoRA cannot represent."""


class AdapterMismatchError(QafloraError):
    """An adapter does not fit the base it is used with."""


class BundleError(QafloraError):
    """A bundle's description or folder is wrong."""


class ChecksumError(BundleError):
    """A file of a bundle is not the one that was recorded."""


class RegistryError(QafloraError):
    """A model name is not in the registry, or the registry cannot be read."""


class DownloadError(RegistryError):
    """A file could not be fetched whole."""


class UploadError(RegistryError):
    """The Hub did not take what was pushed."""


class LibraryError(QafloraError):
    """The native library is missing, not patched, or of another version."""


class BackendError(QafloraError):
    """The native library reported a failure; the message is its own."""


class WorkerError(BackendError):
    """A worker cannot be reached or used, or its connection ended."""


class PromptError(QafloraError):
    """A prompt is empty, longer than the context, or no text."""


class ContextError(PromptError):
    """A prompt is longer than the context."""


class ChatTemplateError(QafloraError):
    """The base has no usable chat template and one is needed."""


class ToolsError(ChatTemplateError):
    """The base's chat template knows no tools, or has them called in a form that is not read."""


class WeightsError(QafloraError):
    """Fusion weights have the wrong shape, or are NaN or infinite."""


class StrategyError(QafloraError):
    """A strategy, lens, pool or adapter name is not known."""


class SettingsError(QafloraError):
    """The settings file cannot be read, or a key of it is wrong."""


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


class GrammarError(QafloraError):
    """A grammar or a JSON schema cannot be read, or asks for what cannot be followed."""


class CancelledError(QafloraError):
    """A call was ended by Engine.cancel before there was an answer."""


class IncompleteAnswerError(QafloraError):
    """An answer was cut before the grammar or JSON schema that it follows ended."""


class BusyError(QafloraError):
    """An Engine was used by two threads at once, or after it was closed."""
