"""What a search has tried so far, in a file: one that was ended goes on where it was."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qaflora_edge.errors import OutputFileError
from qaflora_edge.files import open_input, write_text_atomic
from qaflora_edge.fitting.lorahub import Tried

MAX_BYTES = 16 << 20


def read_tried(path: Path, header: Mapping[str, Any]) -> list[Tried]:
    """What the file has of a search with this header, in order; nothing where it is of another.

    A line that was cut off is left out.
    """
    try:
        with open_input(path) as file:
            first, *lines = file.read(MAX_BYTES).split(b"\n")[:-1] or [b""]
        if json.loads(first) != header:
            return []
        return [_tried(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []  # none, or none of ours


def _tried(record: Mapping[str, Any]) -> Tried:
    numbers = [float(number) for number in (*record["weights"], record["loss"])]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a number is not finite")
    return Tried(tuple(numbers[:-1]), numbers[-1])


@contextmanager
def writing(
    path: Path, header: Mapping[str, Any], tried: Sequence[Tried]
) -> Iterator[Callable[[Tried], None]]:
    """A file of what was tried before, and a function that adds to it; a kill loses no line.

    Raises OutputFileError when it cannot be written.
    """
    write_text_atomic(path, "".join(map(_line, (header, *map(_record, tried)))))

    def put(each: Tried) -> None:
        file.write(_line(_record(each)))
        file.flush()
        os.fsync(file.fileno())

    try:
        with path.open("a", encoding="utf-8") as file:
            yield put
    except OSError as error:
        raise OutputFileError(
            f"Cannot write {path}: {error.strerror}. Check that the disk has room and that you may "
            "write there."
        ) from error


def _record(tried: Tried) -> dict[str, Any]:
    return {"weights": list(tried.weights), "loss": tried.loss}


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"
