"""A file of prompts: a line each, or JSON lines that can name them."""

import codecs
import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qaflora_edge.cli.progress import waiting
from qaflora_edge.errors import InputFileError
from qaflora_edge.formats.inputs import reading
from qaflora_edge.formats.json_text import read_json_object, shown

FILE_BYTES_MAX = 16 << 20
LINE_BYTES_MAX = 4 << 20  # of a file that is read line by line


@dataclass(frozen=True)
class Prompt:
    """A prompt, a name for it, and for messages the file and line that it is from."""

    text: str
    name: str | None = None
    where: str | None = None

    @property
    def label(self) -> str:
        """The name, or else the text on one line."""
        return self.name or " ".join(self.text.split())


@dataclass(frozen=True)
class Line:
    """A line that is not blank, as it stands in its file; without data where it is too long."""

    index: int
    data: bytes | None
    where: str

    @property
    def digest(self) -> str:
        """Equal where the lines are."""
        return hashlib.sha256((self.data or b"").strip()).hexdigest()[:16]

    def parse(self) -> dict[str, Any]:
        """Read the JSON object. Raises InputFileError for what is none."""
        try:
            return read_json_object(self._whole())
        except ValueError as error:  # errors of JSON and UTF-8 too
            raise self._wrong(f"it is no JSON object ({error})") from error

    def text(self) -> str:
        """Read the line as text, without its end. Raises InputFileError."""
        return _decode(self._whole(), self.where)

    def _whole(self) -> bytes:
        if self.data is None:
            raise self._wrong(f"it is longer than {LINE_BYTES_MAX >> 20} MiB")
        return self.data.removesuffix(b"\n").removesuffix(b"\r")

    def _wrong(self, fault: str) -> InputFileError:
        return InputFileError(
            f"Cannot read {self.where}: {fault}, expected an object such as "
            '{"prompt": "How many ...?"}. Correct the line.'
        )


def stream_name(path: str) -> str:
    """Name a file, or stdin for `-`, in messages."""
    return "stdin" if path == "-" else path


def no_lines(path: str, expected: str) -> InputFileError:
    """Make the error for a file of blank lines."""
    return InputFileError(
        f"Cannot use the prompts in {stream_name(path)}: it has no line that is not blank, "
        f"expected one {expected} a line. Write one into it."
    )


def read_prompts(path: str) -> list[Prompt]:
    """Read a file of prompts; `-` is stdin. Blank lines are skipped.

    A file that ends in .jsonl or .ndjson holds one JSON object a line, with `prompt` and perhaps
    `name`; any other holds one prompt a line. Raises InputFileError.
    """
    is_json = Path(path).suffix.lower() in (".jsonl", ".ndjson")
    with open_prompts(path) as stream:
        lines = list(filled_lines(stream, stream_name(path)))
    if not lines:
        raise no_lines(path, "prompt")
    return [_prompt(line, is_json) for line in lines]


def _prompt(line: Line, is_json: bool) -> Prompt:
    if not is_json:
        return Prompt(line.text(), where=line.where)
    fields = line.parse()
    text = fields.get("prompt")
    name = fields.get("name")
    if not (isinstance(text, str) and text.strip()):
        raise InputFileError(
            f'Cannot read {line.where}: "prompt" is {shown(text)}, expected a text that is not '
            "empty. Correct the line."
        )
    return Prompt(text, None if name is None else str(name), line.where)


def filled_lines(stream: BinaryIO, name: str) -> Iterator[Line]:
    """Read lines one at a time; blank ones are counted, and left out.

    name  of the stream, for messages
    """
    for index, data in enumerate(read_lines(stream, name)):
        if index == 0 and data is not None:
            data = data.removeprefix(codecs.BOM_UTF8)
        if data is None or data.strip():
            yield Line(index, data, f"{name}, line {index + 1}")


@contextmanager
def open_prompts(path: str) -> Iterator[BinaryIO]:
    """Open a file, a pipe, or stdin for `-`. Raises InputFileError when it cannot be opened."""
    if path == "-":
        yield sys.stdin.buffer
        return
    with reading(path):
        file = open(path, "rb")  # noqa: SIM115
    with file:
        yield file


def read_lines(stream: BinaryIO, shown: str) -> Iterator[bytes | None]:
    """Lines with their ends, one at a time; None for one longer than LINE_BYTES_MAX.

    shown  the name of the stream in messages

    Raises InputFileError.
    """
    is_inside = False  # a line that is too long
    while True:
        with reading(shown):
            piece = stream.readline(LINE_BYTES_MAX + 1)
        if not piece:
            return
        is_long = len(piece) > LINE_BYTES_MAX
        if not is_inside:
            yield None if is_long else piece
        is_inside = (is_inside or is_long) and not piece.endswith(b"\n")


def _decode(data: bytes, shown: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputFileError(
            f"Cannot read {shown}: it is not UTF-8 ({error.reason} at byte {error.start}), "
            "expected text in UTF-8. Convert it, for example with iconv."
        ) from error


def read_text(path: str) -> str:
    """Read a file of UTF-8 text, or stdin for `-`; a byte order mark is dropped.

    Raises InputFileError.
    """
    name = stream_name(path)
    with open_prompts(path) as file, reading(name):
        data = file.read(FILE_BYTES_MAX + 1)
    if len(data) > FILE_BYTES_MAX:
        raise InputFileError(
            f"Cannot read {name}: it is larger than {FILE_BYTES_MAX >> 20} MiB, the most that is "
            "read as text. Split it, or check that it is the right file."
        )
    return _decode(data, name)


def read_message(path: str) -> str:
    """Read a file as read_text does, without its last line end."""
    return read_text(path).removesuffix("\n").removesuffix("\r")


def read_piped() -> str:
    """What stands in stdin unasked: of a pipe, or of a file from its beginning; else "".

    A terminal and a device such as /dev/null say nothing. Neither does a file that something has
    begun to read, as the loop `while read line; do ...; done < FILE` does.

    Raises InputFileError.
    """
    try:
        number = sys.stdin.fileno()
        mode = os.fstat(number).st_mode
        is_whole = stat.S_ISREG(mode) and os.lseek(number, 0, os.SEEK_CUR) == 0
    except (OSError, ValueError):  # no file behind it
        return ""
    if not (is_whole or stat.S_ISFIFO(mode)):
        return ""
    with waiting("Reading stdin (for none, add < /dev/null)"):
        text = read_message("-")
    return text if text.strip() else ""
