"""Files: written whole or not at all, hashed, and kept inside their folder."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from qaflora_edge.errors import BundleError, InputFileError, OutputFileError, os_errors
from qaflora_edge.settings import APP, cache_setting

if TYPE_CHECKING:
    from filelock import FileLock

AnyPath = str | os.PathLike[str]

CHUNK_BYTES = 1 << 20
LEFT_OVER_SECONDS = 60
PACKAGE_DIR = Path(__file__).resolve().parent

# What to do with a file that is_lfs_pointer.
LFS_ADVICE = "Run `git lfs install` and `git lfs pull` in its folder, or fetch the file itself."
_PLACE_ADVICE = "Create the folder, or choose one that you can write to."
_LFS_START = b"version https://git-lfs.github.com/spec/"


# --- reading ------------------------------------------------------------------------------------


def open_input(path: AnyPath) -> BufferedReader:
    """Open a regular file to read.

    A named pipe or a device would make a reader wait for ever or never end. Raises OSError for
    what is no regular file; the reader says what it expected.
    """
    # O_NONBLOCK: opening a pipe does not wait for its writer. Files are read as ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        handle = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except ValueError as error:
        raise OSError(errno.EINVAL, "the path has a null character") from error
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, f"it is {_kind(mode)}, not a file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_input(path: AnyPath, most: int) -> bytes:
    """Read a regular file whole. Raises OSError, or ValueError where it has more bytes."""
    with open_input(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most} bytes")
    return data


def what_is_at(path: AnyPath) -> str:
    """Say what is at a path, such as "does not exist" or "is a folder"; never raise."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be examined ({getattr(error, 'strerror', error)})"
    return f"is {_kind(mode)}"


def _kind(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "a file"
    return "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"


def is_lfs_pointer(path: AnyPath) -> bool:
    """Tell whether a file is the pointer that git leaves where Git LFS is missing."""
    try:
        with open_input(path) as file:
            return file.read(len(_LFS_START)) == _LFS_START
    except OSError:
        return False


def sha256_file(path: AnyPath) -> str:
    """Hash a file. Raises InputFileError when it cannot be read."""
    failure = f"Cannot hash {os.fspath(path)}: reading it failed"
    advice = "Check that the file exists and that you may read it."
    with os_errors(InputFileError, failure, advice), open_input(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- writing ------------------------------------------------------------------------------------


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


# --- names and places ---------------------------------------------------------------------------


def readable(name: str) -> str:
    """Give a file's name as text for a file or a message; what is no UTF-8 becomes a sign."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def one_line(text: str) -> str:
    """Join lines and spell control characters: a text in a file may command a terminal."""
    joined = " ".join(text.splitlines())
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in joined)


def cache_lock(key: str) -> FileLock:
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


def safe_join(folder: AnyPath, relative: str, link_roots: Sequence[Path] = ()) -> Path:
    """Join a path written in a bundle to the bundle's folder.

    link_roots  other folders that a link may lead to

    The file need not exist. Raises BundleError for a path or link that leads out, or a device.
    """
    if not is_inside(relative):
        raise _unsafe(folder, relative, "it is absolute, climbs with '..', or is no file name")
    joined = Path(folder) / relative
    # Unlike Path.resolve, realpath raises nothing for a loop of links; stat below reports it.
    real = Path(os.path.realpath(joined))
    if not any(real.is_relative_to(os.path.realpath(root)) for root in (folder, *link_roots)):
        raise _unsafe(folder, relative, "a link in it leads out of the bundle")
    found = what_is_at(joined)
    if found not in ("does not exist", "is a file", "is a folder"):
        raise _unsafe(folder, relative, f"it {found}")
    return joined


def is_inside(relative: str) -> bool:
    """Tell whether a path written in a bundle leads into it on any system, links apart."""
    windows = PureWindowsPath(relative)  # a bundle made here may be opened there
    return not (
        not relative.strip()
        or any(sign == "\0" or "\ud800" <= sign <= "\udfff" for sign in relative)
        or relative.startswith(("/", "\\", "~"))
        or relative.lower().startswith("file:")
        or windows.drive
        or ".." in windows.parts
    )


def _unsafe(folder: AnyPath, relative: str, reason: str) -> BundleError:
    return BundleError(
        f"Refused the path {relative!r} in bundle {os.fspath(folder)}: {reason}; expected a "
        "relative path to a file inside the bundle. Copy the file into the bundle's folder and "
        "correct the path in bundle.json."
    )
