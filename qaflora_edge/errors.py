"""Every expected failure, as one tree: QafloraError is its root.

A message has four parts: what failed, which file, tensor or field, what was found and what
was expected, and what to do next.
"""

import difflib
import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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


# The tree; what a class stands for is beside it. Those with fields of their own come after.
# fmt: off
class InputFileError(QafloraError): ...  # a file is missing, truncated, or not what it claims
class GgufFileError(InputFileError): ...
class SafetensorsFileError(InputFileError): ...
class PeftConfigError(InputFileError): ...
class SessionFileError(InputFileError): ...
class TaskFileError(InputFileError): ...
class ResultsFileError(InputFileError): ...
class OutputFileError(QafloraError): ...  # a file cannot be written, or the disk is full
class UnsupportedAdapterError(QafloraError): ...  # a PEFT feature that no plain LoRA represents
class AdapterMismatchError(QafloraError): ...  # adapter and base do not belong together
class BundleError(QafloraError): ...  # bundle.json or its folder is wrong
class ChecksumError(BundleError): ...  # a file is not the one that was recorded
class RegistryError(QafloraError): ...  # an unknown model name
class DownloadError(RegistryError): ...  # a file could not be fetched whole
class LibraryError(QafloraError): ...  # the native library is missing, stock, or of another version
class BackendError(QafloraError): ...  # the native library reported a failure
class WorkerError(BackendError): ...  # a worker (--rpc) cannot be used
class PromptError(QafloraError): ...  # a prompt is empty, or no text
class ContextError(PromptError): ...  # a prompt is longer than the context
class ModalityError(PromptError): ...  # a message holds an image, audio or a file
class ChatTemplateError(QafloraError): ...  # the base has no usable chat template
class ToolsError(ChatTemplateError): ...  # it has one, which knows no tools
class WeightsError(QafloraError): ...  # weights of the wrong shape, NaN or infinite
class StrategyError(QafloraError): ...  # an unknown strategy, lens, pool or adapter name
class SettingsError(QafloraError): ...  # the settings file cannot be read, or a key of it is wrong
class GrammarError(QafloraError): ...  # a grammar or a JSON schema that cannot be followed
class CancelledError(QafloraError): ...  # a call was ended before there was an answer
class IncompleteAnswerError(QafloraError): ...  # an answer was cut before its grammar ended
class BusyError(QafloraError): ...  # an Engine was used after close, or in a forked process
# fmt: on


class ConversionError(OutputFileError):
    """A converted file does not say what its source says; `checks` has what was compared."""

    def __init__(self, message: str, checks: Sequence[Any]) -> None:
        super().__init__(message)
        self.checks = checks


class OptionError(QafloraError):
    """An engine or sampling option is out of its range.

    option  its name as the caller gave it, where it is one
    """

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


@contextmanager
def os_errors(error_type: type[QafloraError], failure: str, advice: str) -> Iterator[None]:
    """Raise an error of ours in place of the system's: what failed, its reason, what to do.

    Of a full disk the error is an OutputFileError, and the advice is to free some space.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            message = f"{failure}: the disk is full. Free some space and try again."
            raise OutputFileError(message) from error
        raise error_type(f"{failure}: {error.strerror or error}. {advice}") from error


def is_disk_full(error: OSError) -> bool:
    return error.errno in {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


def nearest(word: str, words: Iterable[str]) -> str:
    """Give the one of some words that is most like a wrong one; "" where none is like it."""
    return next(iter(difflib.get_close_matches(word, list(words), n=1)), "")


def changed_file(path: Path, error_type: type[QafloraError]) -> QafloraError:
    return error_type(
        f"Cannot read {path}: it changed while it was read; expected a file that stays as it is. "
        "Try again."
    )


def wrong_option(name: str, found: object, expected: str) -> OptionError:
    return OptionError(f"Option {name} is {found!r:.200}, expected {expected}.", name)


def wrong_field(name: str, value: object, expected: str) -> OptionError:
    return OptionError(f"The field {name} is {value!r:.100}, expected {expected}.", name)
