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
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, BinaryIO

from qaflora_edge.errors import BundleError, InputFileError, OutputFileError, os_errors
from qaflora_edge.progress import TellBytes
from qaflora_edge.settings import APP, cache_setting

if TYPE_CHECKING:
    from filelock import FileLock

AnyPath = str | os.PathLike[str]

HASH_CHUNK_BYTES = 1 << 20
LEFT_OVER_SECONDS = 60
PACKAGE_DIR = Path(__file__).resolve().parent

# What to do with a file that is_lfs_pointer.
LFS_ADVICE = "Run `git lfs install` and `git lfs pull` in its folder, or fetch the file itself."
_PLACE_ADVICE = "Create the folder, or choose one that you can write to."
_LFS_START = b"version https://git-lfs.github.com/spec/"

_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_input(path: AnyPath) -> BinaryIO:
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
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
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
    except OSError as error:
        return f"cannot be examined ({error.strerror})"
    except ValueError:
        return "cannot be examined (the path has a null character)"
    return f"is {_kind(mode)}"


def is_lfs_pointer(path: AnyPath) -> bool:
    """Tell whether a file is the pointer that git leaves where Git LFS is missing."""
    try:
        with open_input(path) as file:
            return file.read(len(_LFS_START)) == _LFS_START
    except OSError:
        return False


@contextlib.contextmanager
def atomic_path(path: AnyPath, mode: int = 0o666) -> Iterator[Path]:
    """Give a temporary file beside `path` that replaces it when the block succeeds.

    mode  its permissions, from which the umask takes some

    Raises OutputFileError when the place cannot be written to or the disk is full.
    """
    path = Path(path)
    _check_replaceable(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL

    def make(temporary: Path) -> None:
        os.close(os.open(temporary, flags, mode))

    with _temporary(path, f"Cannot write {path}", make) as temporary:
        yield temporary


@contextlib.contextmanager
def atomic_folder(folder: Path, failure: str) -> Iterator[Path]:
    """Give a temporary folder beside `folder` that gets its name when the block succeeds.

    failure  the beginning of messages, such as "Cannot create the bundle b"

    Raises OutputFileError when the place does not take a folder, or the disk is full.
    """
    with _temporary(folder, failure, os.mkdir) as temporary:
        yield temporary


@contextlib.contextmanager
def _temporary(path: Path, failure: str, make: Callable[[Path], None]) -> Iterator[Path]:
    name = cut_name(path.name, 100)
    _remove_left_overs(path.parent, name)
    temporary = path.parent / f".tmp-{secrets.token_hex(4)}-{name}"
    with os_errors(OutputFileError, _refused(path, failure), _PLACE_ADVICE):
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


def _refused(path: Path, failure: str) -> str:
    return f"{failure}: the folder {path.parent} does not take a new file"


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
    if parent == "/dev" or parent.startswith("/proc/"):  # links there may lead to a file
        where = f"files are not made in {path.parent}"
        raise OutputFileError(f"Cannot write {path}: {where}. Choose another name.")
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # nothing is there, or making the file says what is wrong
    if not stat.S_ISREG(mode):
        found = f"it is {_kind(mode)} and a file was expected"
        raise OutputFileError(f"Cannot write {path}: {found}. Choose another name.")


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def cut_name(name: str, n_byte: int) -> str:
    """Shorten a file's name, whose limit is one of bytes, between two characters."""
    return os.fsencode(name)[:n_byte].decode("utf-8", "ignore")


def readable(name: str) -> str:
    """Give a file's name as text for a file or a message; what is no UTF-8 becomes a sign."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def one_line(text: str) -> str:
    """Join lines and spell control characters: a text in a file may command a terminal."""
    joined = " ".join(text.splitlines())
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in joined)


def check_has_folder(path: Path, *, is_added_to: bool = False) -> None:
    """Raise OutputFileError, before any work, where a file to come has no folder that takes it."""
    if not path.parent.is_dir():
        where = f"there is no folder {path.parent}"
        raise OutputFileError(f"Cannot write {path}: {where}. Create it, or choose another.")
    if not (is_added_to and os.path.lexists(path)):
        check_takes_file(path)


def check_takes_file(path: Path) -> None:
    """Raise what atomic_path would raise where its place cannot be written to."""
    _check_replaceable(path)
    with os_errors(OutputFileError, _refused(path, f"Cannot write {path}"), _PLACE_ADVICE):
        tempfile.TemporaryFile(dir=path.parent).close()


def write_text_atomic(path: AnyPath, text: str) -> None:
    """Write UTF-8 text with the given line ends, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def sha256_file(path: AnyPath, progress: TellBytes | None = None) -> str:
    """Hash a file; `progress` is told the bytes done so far.

    Raises InputFileError when the file cannot be read.
    """
    digest = hashlib.sha256()
    done_bytes = 0
    failure = f"Cannot hash {os.fspath(path)}: reading it failed"
    advice = "Check that the file exists and that you may read it."
    with os_errors(InputFileError, failure, advice), open_input(path) as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
            done_bytes += len(chunk)
            if progress is not None:
                progress(done_bytes)
    return digest.hexdigest()


def cache_lock(key: str) -> FileLock:
    """A lock between processes, held in a `with` block; it lies in the cache folder.

    Raises OutputFileError when that folder cannot be made.
    """
    from filelock import FileLock

    locks = cache_dir() / "locks"
    make_folder(locks, "the environment variable QAFLORA_CACHE")
    return FileLock(locks / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.lock")


def make_folder(folder: Path, setting: str) -> None:
    """Make a folder and those above it.

    setting  by which another one can be named

    Raises OutputFileError.
    """
    advice = f"Name another with {setting}."
    with os_errors(OutputFileError, f"Cannot make the folder {folder}", advice):
        folder.mkdir(parents=True, exist_ok=True)


def cache_dir() -> Path:
    """Name the folder for downloads and fetched sources; it may not exist yet.

    Raises SettingsError when the settings file, which may name it, cannot be read.
    """
    if chosen := cache_setting():
        return chosen
    import platformdirs

    return platformdirs.user_cache_path(APP, appauthor=False, opinion=False)


def data_dir() -> Path:
    """Name the folder for what a user would miss, such as a history; it may not exist yet."""
    import platformdirs

    return platformdirs.user_data_path(APP, appauthor=False)


def safe_join(folder: AnyPath, relative: str, link_roots: Sequence[Path] = ()) -> Path:
    """Join a path written in a bundle to the bundle's folder.

    link_roots  other folders that a link may lead to

    The file need not exist. Raises BundleError when the path is absolute, climbs with `..`, leads
    out through a link, or names something that is neither a file nor a folder.
    """
    reason = unsafe_reason(relative)
    if reason:
        raise _unsafe(folder, relative, reason)
    joined = Path(folder) / relative
    # Unlike Path.resolve, realpath raises nothing for a loop of links; stat below reports it.
    real = Path(os.path.realpath(joined))
    if not any(real.is_relative_to(os.path.realpath(root)) for root in (folder, *link_roots)):
        raise _unsafe(folder, relative, "a link in it leads out of the bundle")
    try:
        mode = joined.stat().st_mode
    except FileNotFoundError:
        return joined
    except OSError as error:
        raise _unsafe(folder, relative, f"it cannot be examined ({error.strerror})") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise _unsafe(folder, relative, "it is neither a file nor a folder")
    return joined


def unsafe_reason(relative: str) -> str | None:
    """Say why a path written in a bundle could lead out of it; None when it cannot by itself."""
    windows = PureWindowsPath(relative)  # a bundle made here may be opened there
    if not relative.strip():
        return "it is empty"
    if "\0" in relative:
        return "it contains a null character"
    if any("\ud800" <= sign <= "\udfff" for sign in relative):
        return "it contains half a character (a lone surrogate), which no file name has"
    if relative.startswith(("/", "\\")) or windows.drive or windows.is_absolute():
        return "it is absolute"
    if ".." in windows.parts:
        return "it contains '..'"
    if relative.startswith("~"):
        return "it begins with '~', which stands for a home folder"
    if relative.lower().startswith("file:"):
        return "it is an address"
    return None


def _unsafe(folder: AnyPath, relative: str, reason: str) -> BundleError:
    return BundleError(
        f"Refused the path {relative!r} in bundle {os.fspath(folder)}: {reason}; expected a "
        "relative path to a file inside the bundle. Copy the file into the bundle's folder and "
        "correct the path in bundle.json."
    )


def package_data(name: str) -> Path:
    """Find a file that ships with the package, such as `models/registry.json`.

    An installed package carries it beside its modules, a source checkout at its top level.
    """
    candidates = (PACKAGE_DIR / name, PACKAGE_DIR.parent / name)
    for candidate in candidates:
        if candidate.exists():
            return candidate
    places = " or ".join(str(candidate) for candidate in candidates)
    raise InputFileError(
        f"Cannot find {name}, which ships with qaflora-edge: neither {places} exists. "
        "Install the package again."
    )
