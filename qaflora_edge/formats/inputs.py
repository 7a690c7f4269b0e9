"""Files and JSON from anywhere: opened, read with limits, checked, hashed, compared with records.

A file is hashed, and its values are checked, once per size and time of change. The cache folder
remembers that; without it both are done again. A program that sets a file's time back hides its
change from the memory, not from `qaflora bundle verify`. The memory also tells which bases outside
of bundles somebody named on this machine: see bundles.open.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    BinaryIO,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import msgspec

from qaflora_edge import __version__
from qaflora_edge.errors import ChecksumError, InputFileError, QafloraError, changed_file, os_errors
from qaflora_edge.files import AnyPath, cache_dir, cache_lock, kind_of, write_text_atomic

Json = dict[str, Any]  # an object, as json.loads gives it
Object = Mapping[str, Any]  # one that is only read
FileState = tuple[int, int]  # bytes, and the time of the last change in ns

MAX_JSON_VALUES = 1 << 20  # a little text such as "[[],[]]" becomes much memory
MAX_JSON_DEPTH = 64
MAX_SHOWN_CHARS = 80
MIN_HOLLOW_BYTES = 64 << 20  # a file system may keep a small file elsewhere than in blocks
MIN_STORED = 1 / 8  # of a file's bytes; a compressing file system stores more of any weights
MEMORY_FILE = "checked.json"
MAX_REMEMBERED = 10_000
_LFS_START = b"version https://git-lfs.github.com/spec/"
_WORDS: dict[Any, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}
T = TypeVar("T")


def read_json_object(data: bytes) -> Json:
    """Parse a JSON object strictly: Unicode text, no key twice, finite numbers only.

    Raises ValueError with the reason.
    """
    # Commas in texts are counted too: the bound is for memory, not for exactness.
    n_value = data.count(b",") + data.count(b"[") + data.count(b"{")
    if n_value > MAX_JSON_VALUES:
        raise ValueError(f"it has about {n_value} values, and {MAX_JSON_VALUES} are the most")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    _check_depth(value, MAX_JSON_DEPTH)
    if b"\\u" in data:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            reason = "it has half of a surrogate pair, which is no Unicode text"
            raise ValueError(reason) from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> Json:
    fields = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"the key {key[:80]!r} is given twice")
        fields[key] = value
    return fields


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:80]} is not finite")
    return value


def _check_depth(value: object, left: int) -> None:
    if isinstance(value, dict | list):
        if left == 0:
            raise ValueError("it is nested too deeply")
        for child in value.values() if isinstance(value, dict) else value:
            _check_depth(child, left - 1)


class WrongField(ValueError):
    """A field that is not what it should be; the reader adds which file it is in.

    place     of the field, as adapters[0].name
    found     what is there, shown
    expected  in words
    value     what is there; None: nothing
    """

    def __init__(self, place: str, found: str, expected: str, value: object = None) -> None:
        super().__init__(f"field {place} is {found}, expected {expected}")
        self.place = place
        self.expected = expected
        self.value = value


class UnknownField(WrongField):
    """A field that does not exist, where others are refused; `expected` lists those that do."""


def read_as(annotation: type[T], document: object, place: str = "") -> T:
    """Read a document as a typed struct, the only list of its fields.

    What a field should be is said by the title of its type. Structs of a union are told apart by
    `type`.

    Raises WrongField for the first difference.
    """
    try:
        return msgspec.convert(document, annotation)
    except msgspec.ValidationError:
        raise _difference(annotation, document, place) from None


def _difference(annotation: Any, value: Any, place: str) -> WrongField:
    """Find the first value in a value that is not as its type says: at last the value itself."""
    members = [annotation]
    tags: list[str] = []
    for member in members:
        origin = get_origin(member)
        contents: Iterable[tuple[str, Any, Any]] = ()
        if origin is Annotated:
            members.append(get_args(member)[0])
        elif origin in (Union, UnionType):
            members += get_args(member)
        elif origin is dict and isinstance(value, dict):
            of_items = get_args(member)[1]
            contents = [(f"{place}.{key}", of_items, item) for key, item in value.items()]
        elif origin is list and isinstance(value, list):
            (of_items,) = get_args(member)
            contents = [(f"{place}[{at}]", of_items, item) for at, item in enumerate(value)]
        elif is_struct(member) and isinstance(value, dict):
            config = member.__struct_config__
            before = f"{place}." if place else ""
            if config.tag is None or value.get(config.tag_field) == config.tag:
                contents = _fields(member, value, before)
            else:
                tags.append(config.tag)
        for inner_place, inner_annotation, inner in contents:
            try:
                msgspec.convert(inner, inner_annotation)
            except msgspec.ValidationError:
                return _difference(inner_annotation, inner, inner_place)
    if tags:
        tag = value.get("type")
        return WrongField(f"{place}.type", shown(tag), f"one of {', '.join(tags)}", tag)
    return WrongField(shortened(place), shown(value), expected_of(annotation), value)


def _fields(
    struct: type[msgspec.Struct], value: Json, before: str
) -> Iterator[tuple[str, Any, Any]]:
    fields = {field.encode_name: field for field in msgspec.structs.fields(struct)}
    for name, field in fields.items():
        if name in value:
            yield before + name, field.type, value[name]
        elif field.required:
            raise WrongField(before + name, "missing", expected_of(field.type))
    for name in value.keys() - fields.keys():
        if struct.__struct_config__.forbid_unknown_fields:
            place = shortened(before + name)
            raise UnknownField(place, shown(value[name]), f"one of {', '.join(fields)}")


def is_struct(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, msgspec.Struct)


def expected_of(annotation: Any) -> str:
    """Say in words what a value of a type is: by the title of the type, if it has one."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *metas = get_args(annotation)
        titles = [meta.title for meta in metas if meta.title]
        return titles[-1] if titles else expected_of(inner)
    if origin in (Union, UnionType):
        return expected_of(get_args(annotation)[0])
    if origin is Literal:
        return f"one of {', '.join(get_args(annotation))}"
    return "an object" if is_struct(annotation) else _WORDS[origin or annotation]


def shown(value: object) -> str:
    """Show a value as JSON, short enough for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except ValueError:  # a number of more digits than Python prints
        return f"a {type(value).__name__}"
    return shortened(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."


def open_input(path: AnyPath) -> BufferedReader:
    """Open a regular file to read.

    A named pipe or a device would make a reader wait for ever or never end. Raises OSError for
    what is no regular file, and for the pointer that git leaves where Git LFS is missing.
    """
    # O_NONBLOCK: opening a pipe does not wait for its writer. Files are read as ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        handle = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except ValueError as error:
        raise OSError(errno.EINVAL, "the path has a null character") from error
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise OSError(errno.EINVAL, f"it is {kind_of(mode)}, not a file")
    file = os.fdopen(handle, "rb")
    if file.peek(len(_LFS_START)).startswith(_LFS_START):
        file.close()
        fault = "it is a Git LFS pointer; run `git lfs install` and `git lfs pull` in its folder"
        raise OSError(errno.EINVAL, fault)
    return file


def reading(path: AnyPath) -> AbstractContextManager[None]:
    """Raise InputFileError in place of the system's error."""
    failure = f"Cannot read {os.fspath(path)}: opening or reading it failed"
    return os_errors(InputFileError, failure, "Check that it exists and that you may read it.")


def read_input(path: AnyPath, most: int) -> bytes:
    """Read a regular file whole. Raises OSError, or ValueError where it has more bytes."""
    with open_input(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most} bytes")
    return data


def read_bytes(
    path: Path,
    offset: int,
    n_bytes: int,
    error_type: type[QafloraError],
    file: BinaryIO | None = None,
) -> bytes:
    """Read some bytes of a file. Raises InputFileError if it is gone, error_type if it is short."""
    with reading(path), contextlib.ExitStack() as stack:
        if file is None:
            file = stack.enter_context(open_input(path))
        file.seek(offset)
        data = file.read(n_bytes)
    if len(data) != n_bytes:
        raise changed_file(path, error_type)
    return data


def read_json_file(path: Path, most: int, error_type: type[QafloraError], advice: str) -> Json:
    """Read a JSON object from a file of at most so many bytes.

    Raises InputFileError when it cannot be opened, error_type when it holds anything else.
    """
    try:
        with reading(path):
            return read_json_object(read_input(path, most))
    except ValueError as error:
        raise error_type(
            f"Cannot read {path}: {error}; expected a JSON object. {advice}"
        ) from error


def sha256_file(path: AnyPath) -> str:
    """Hash a file. Raises InputFileError when it cannot be read, or is nearly all holes."""
    with reading(path), open_input(path) as file:
        _check_stored(file)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_stored(file: BufferedReader) -> None:
    """Refuse a file of hundreds of GB that takes no room on the disk: reading it takes minutes."""
    status = os.fstat(file.fileno())
    if status.st_size < MIN_HOLLOW_BYTES or not hasattr(os, "SEEK_HOLE"):
        return
    n_stored = status.st_blocks * 512
    if n_stored >= status.st_size * MIN_STORED:
        return
    # A file system that counts no blocks knows no holes either: the end is the first.
    has_hole = os.lseek(file.fileno(), 0, os.SEEK_HOLE) < status.st_size
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    if has_hole:
        found = f"{n_stored} of its {status.st_size} bytes are on the disk"
        raise OSError(errno.EINVAL, f"only {found}, the others are a hole; expected a whole file")


def check_unchanged(states: Mapping[Path, FileState]) -> None:
    """Check that files are still those whose states were kept when they were checked.

    Raises ChecksumError naming the first that was written, replaced or renamed since.
    """
    for path, state in states.items():
        if file_state(path) != state:
            raise changed_file(path, ChecksumError)


def file_state(path: Path) -> FileState:
    """Give a file's size and time of change. Raises InputFileError."""
    with reading(path):
        status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def checksum(path: Path, *, always_hash: bool = False) -> str:
    """Give the SHA-256 of a file, remembered or computed.

    Raises ChecksumError for a file that changes, InputFileError for an unreadable one.
    """
    state = file_state(path)
    key = str(path.resolve())
    remembered = _read_memory().get(key, [])
    if not always_hash and remembered[:2] == [*state]:
        return str(remembered[2])
    sha256 = sha256_file(path)
    check_unchanged({path: state})
    _remember({key: [*state, sha256]})
    return sha256


def is_remembered(path: Path, sha256: str) -> bool:
    """Tell whether a file was hashed here before and had this SHA-256; the file is not read."""
    with contextlib.suppress(OSError, ValueError):  # a name that no file can have
        remembered = _read_memory().get(os.path.realpath(path), [])
        return remembered[2:] == [sha256]
    return False


def passed(states: Mapping[Path, FileState], base: Path) -> set[Path]:
    """Find the files that passed every check of this version in these very states and roles."""
    memory = _read_memory()
    good = set()
    for path, state in states.items():
        if memory.get(_passed_key(path)) == [*state, path == base]:
            good.add(path)
    return good


def remember_passed(states: Mapping[Path, FileState], base: Path) -> None:
    """Remember that files passed every check, one as the base and the others as adapters."""
    _remember({_passed_key(path): [*state, path == base] for path, state in states.items()})


def _passed_key(path: Path) -> str:
    return f"{path.resolve()} passed {__version__}"


def _read_memory() -> dict[str, list[Any]]:
    """Read what is remembered: path -> bytes, time of change, SHA-256; and of checks passed."""
    path = cache_dir() / MEMORY_FILE
    with contextlib.suppress(OSError, TypeError, ValueError, RecursionError):
        status = path.stat()
        return _parsed_memory(path, status.st_ino, status.st_mtime_ns)
    return {}


@lru_cache(maxsize=1)
def _parsed_memory(path: Path, _inode: int, _changed_ns: int) -> dict[str, list[Any]]:
    """Parse the file once for all files of a bundle; each change of it is another inode."""
    return dict(json.loads(path.read_bytes()))


def _remember(entries: dict[str, list[Any]]) -> None:
    with contextlib.suppress(OSError, QafloraError), cache_lock(MEMORY_FILE):
        memory = _read_memory() | entries
        newest = dict(list(memory.items())[-MAX_REMEMBERED:])
        write_text_atomic(cache_dir() / MEMORY_FILE, json.dumps(newest, indent=0) + "\n")
