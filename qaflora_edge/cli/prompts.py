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
from typing import BinaryIO

from qaflora_edge.cli.output import waiting
from qaflora_edge.errors import InputFileError
from qaflora_edge.formats.inputs import Json, read_json_object, reading, shown

FILE_BYTES_MAX = 16 << 20


@dataclass(frozen=True)
class Line:
    """A line that is not blank, as it stands in its file."""

    index: int
    data: bytes
    where: str

    @property
    def digest(self) -> str:
        """Equal where the lines are."""
        return hashlib.sha256(self.data.strip()).hexdigest()[:16]

    def parse(self) -> Json:
        """Read the JSON object. Raises InputFileError for what is none."""
        try:
            return read_json_object(self.data)
        except ValueError as error:  # errors of JSON and UTF-8 too
            raise InputFileError(
                f"Cannot read {self.where}: it is no JSON object ({error}), expected an object "
                'such as {"prompt": "How many ...?"}. Correct the line.'
            ) from error

    def prompt(self) -> str:
        """Read the prompt of a JSON object. Raises InputFileError."""
        prompt = self.parse().get("prompt")
        if isinstance(prompt, str) and prompt.strip():
            return prompt
        raise InputFileError(
            f'Cannot read {self.where}: "prompt" is {shown(prompt)}, expected a text that is not '
            "empty. Correct the line."
        )

    def text(self) -> str:
        """Read the line as text, without its end. Raises InputFileError."""
        return _decode(self.data, self.where).removesuffix("\n").removesuffix("\r")


def stream_name(path: str) -> str:
    return "stdin" if path == "-" else path


def no_lines(path: str, expected: str) -> InputFileError:
    return InputFileError(
        f"Cannot use the prompts in {stream_name(path)}: it has no line that is not blank, "
        f"expected one {expected} a line. Write one into it."
    )


def read_prompts(path: str) -> list[str]:
    """Read a file of prompts; `-` is stdin. Blank lines are skipped.

    A file that ends in .jsonl or .ndjson holds one JSON object a line, with `prompt`; any other
    holds one prompt a line. Raises InputFileError.
    """
    is_json = Path(path).suffix.lower() in (".jsonl", ".ndjson")
    with open_prompts(path) as stream:
        lines = list(filled_lines(stream, stream_name(path)))
    if not lines:
        raise no_lines(path, "prompt")
    return [line.prompt() if is_json else line.text() for line in lines]


def filled_lines(stream: BinaryIO, name: str) -> Iterator[Line]:
    """Read lines one at a time; blank ones are counted, and left out.

    name  of the stream, for messages
    """
    with reading(name):
        for index, data in enumerate(stream):
            plain = data.removeprefix(codecs.BOM_UTF8) if index == 0 else data
            if plain.strip():
                yield Line(index, plain, f"{name}, line {index + 1}")


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


def _decode(data: bytes, shown: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputFileError(
            f"Cannot read {shown}: it is not UTF-8 ({error.reason} at byte {error.start}), "
            "expected text in UTF-8. Convert it, for example with iconv."
        ) from error


def read_text(path: str) -> str:
    """Read a file of UTF-8 text, or stdin for `-`; a byte order mark is dropped."""
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
