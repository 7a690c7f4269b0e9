"""Files: written whole or not at all; folders for the cache and for data."""

import contextlib
import glob
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qaflora_edge.config import APP, cache_setting
from qaflora_edge.errors import OutputFileError, os_errors

if TYPE_CHECKING:
    from filelock import FileLock

AnyPath = str | os.PathLike[str]
CHUNK_BYTES = 1 << 20
LEFT_OVER_SECONDS = 60
PACKAGE_DIR = Path(__file__).resolve().parent
_PLACE_ADVICE = "Create the folder, or choose one that you can write to."


def what_is_at(path: AnyPath) -> str:
    """Say what is at a path, such as "does not exist" or "is a folder"; never raise."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be examined ({getattr(error, 'strerror', error)})"
    return f"is {kind_of(mode)}"


def kind_of(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "a file"
    return "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"


@contextlib.contextmanager
def atomic_path(path: AnyPath, mode: int = 0o666) -> Iterator[Path]:
    """Give a temporary file that replaces `path` when the block succeeds.

    mode  its permissions, before the umask

    Raises OutputFileError when the place cannot be written to or the disk is full.
    """
    path = Path(path)
    _check_replaceable(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    failure = f"Cannot write {path}"
    with _temporary(path, failure, lambda new: os.close(os.open(new, flags, mode))) as temporary:
        yield temporary


@contextlib.contextmanager
def atomic_folder(folder: Path, failure: str) -> Iterator[Path]:
    """Give a temporary folder that gets the name `folder` when the block succeeds.

    failure  the beginning of messages, such as "Cannot create the bundle b"

    Raises OutputFileError when the place does not take a folder, or the disk is full.
    """
    with _temporary(folder, failure, os.mkdir) as temporary:
        yield temporary


@contextlib.contextmanager
def _temporary(path: Path, failure: str, make: Callable[[Path], None]) -> Iterator[Path]:
    name = os.fsencode(path.name)[:100].decode("utf-8", "ignore")  # file systems count bytes
    _remove_left_overs(path.parent, name)
    temporary = path.parent / f".tmp-{secrets.token_hex(4)}-{name}"
    refused = f"{failure}: the folder {path.parent} does not take a new file"
    with os_errors(OutputFileError, refused, _PLACE_ADVICE):
        make(temporary)
    advice = f"Check the disk and that you may write to {path.parent}; what was there is unchanged."
    try:
        with os_errors(OutputFileError, failure, advice):
            yield temporary
            if temporary.is_file():
                _sync(temporary)
            os.replace(temporary, path)
    finally:
        _remove(temporary)
    if os.name == "posix":
        with contextlib.suppress(OSError):  # some network file systems refuse to sync a folder
            _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_left_overs(folder: Path, name: str) -> None:
    """Remove what killed writers of the same file left, once it is 60 s old."""
    with contextlib.suppress(OSError):  # it does no harm where it cannot be removed
        for path in folder.glob(f".tmp-????????-{glob.escape(name)}"):
            is_old = time.time() - path.lstat().st_mtime > LEFT_OVER_SECONDS
            if is_old and not path.is_symlink():
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _check_replaceable(path: Path) -> None:
    """Refuse to put a file where something else is: /dev/null would be a file from then on."""
    parent = os.path.realpath(path.parent)
    is_system = parent == "/dev" or parent.startswith("/proc/")  # links there may lead to a file
    found = what_is_at(path)
    if is_system or found not in ("does not exist", "is a file"):
        raise OutputFileError(
            f"Cannot write {path}: it {found} in {parent}; expected a file's name in a folder of "
            "files. Choose another name."
        )


def check_takes_file(path: Path) -> None:
    """Raise, before any work, what atomic_path would raise where its place takes no file."""
    _check_replaceable(path)
    failure = f"Cannot write {path}: the folder {path.parent} does not take a new file"
    with os_errors(OutputFileError, failure, _PLACE_ADVICE):
        tempfile.TemporaryFile(dir=path.parent).close()


def write_text_atomic(path: AnyPath, text: str) -> None:
    """Write UTF-8 text with the given line ends, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def readable(name: str) -> str:
    """Give a file's name as text for a file or a message; what is no UTF-8 becomes a sign."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def one_line(text: str) -> str:
    """Join lines and spell control characters: a text in a file may command a terminal."""
    joined = " ".join(text.splitlines())
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in joined)


def cache_lock(key: str) -> "FileLock":
    """Make a lock between processes, in the cache folder. Raises OutputFileError."""
    from filelock import FileLock

    locks = cache_dir() / "locks"
    make_folder(locks, "the environment variable QAFLORA_CACHE")
    return FileLock(locks / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.lock")


def make_folder(folder: Path, setting: str) -> None:
    """Make a folder and its parents. Raises OutputFileError, which names `setting`."""
    advice = f"Name another with {setting}."
    with os_errors(OutputFileError, f"Cannot make the folder {folder}", advice):
        folder.mkdir(parents=True, exist_ok=True)


def cache_dir() -> Path:
    """Name the folder for downloads; it may not exist yet. Raises SettingsError."""
    if chosen := cache_setting():
        return chosen
    import platformdirs

    return platformdirs.user_cache_path(APP, appauthor=False, opinion=False)


def data_dir() -> Path:
    """Name the folder for lasting data, such as a history; it may not exist yet."""
    import platformdirs

    return platformdirs.user_data_path(APP, appauthor=False)


def package_data(name: str) -> Path:
    """Find a file that ships with the package, in its folder or at a checkout's top level."""
    path = PACKAGE_DIR / name
    return path if path.exists() else PACKAGE_DIR.parent / name
