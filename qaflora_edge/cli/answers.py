"""Answers, printed as they come, as JSON, or written to a file that can be gone on with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qaflora_edge.cli.prompts import read_lines
from qaflora_edge.cli.requests import Line
from qaflora_edge.errors import OutputFileError
from qaflora_edge.files import open_input
from qaflora_edge.line_file import LineFile
from qaflora_edge.show.text import can_show, visible, who_spoke

if TYPE_CHECKING:
    from qaflora_edge.inference.generation import Generation
    from qaflora_edge.weighing.numbers import FusionWeights


@dataclass(frozen=True)
class Answer:
    """What one strategy answers.

    facts  what `qaflora run --json` prints of it
    """

    strategy: str
    fusion: FusionWeights
    facts: dict[str, Any]

    @property
    def text(self) -> str:
        """The answer, with a remark where a limit cut it, or "(nothing)"."""
        text = self.facts["text"].strip() or "(nothing)"
        return text + ("\n[cut at the limit of tokens]" if self.is_cut else "")

    @property
    def is_cut(self) -> bool:
        return bool(self.facts["finish_reason"] == "length")


def stream_answer(answer: Generation) -> None:
    """Write an answer to stdout piece by piece, and end its line however it ends.

    A terminal gets none of its control characters; a pipe or a file gets it as it is.
    """
    is_terminal = sys.stdout.isatty()
    try:
        for piece in answer:
            click.echo(visible(piece) if is_terminal else piece, nl=False)
    finally:
        click.echo()


def print_json(value: dict[str, Any]) -> None:
    """Print JSON on one line; escaped where the output's encoding lacks a character."""
    text = json.dumps(value, ensure_ascii=False)
    click.echo(text if can_show(text, sys.stdout.encoding) else json.dumps(value))


def answer_dict(answer: Generation, *, with_fusion: bool = True) -> dict[str, Any]:
    """The object that `qaflora run --json` prints; takes the whole answer first."""
    text = answer.text()
    return {
        "text": text,
        "finish_reason": answer.finish_reason,
        "usage": {"prompt_tokens": answer.n_prompt, "completion_tokens": answer.n_completion},
        **({"fusion": answer.fusion.to_dict()} if with_fusion else {}),
        "timings": answer.timings.to_dict(),
    }


def summary_line(answer: Generation) -> str:
    """Mix, times and the reason of the end, in one line."""
    timings = answer.timings
    parts = [
        who_spoke(answer.fusion),
        f"probe {timings.probe_ms:.0f} ms",
        f"prefill {timings.prefill_ms:.0f} ms",
        f"{answer.n_completion} tokens at {timings.tokens_per_second:.1f} tok/s",
    ]
    if answer.finish_reason == "length":
        parts.append("cut at the limit of tokens")
    return f"[{'; '.join(parts)}]"


_BEGIN = b'{"index": '  # of every line that is written


class Answers:
    """One JSON object a line, written whole when an answer ends.

    Each says in `request` what it answers: options, and a line. So a file that was interrupted is
    gone on with, and no other file is taken for one.

    path  None: stdout
    key   equal where the options are
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._lines = None if path is None else LineFile(path, "answers")
        self._key = key
        self._digests: dict[int, str] = {}  # of the lines that the file answers, by their index
        self.n_failed = 0
        self.first_failure = ""

    @property
    def indexes(self) -> set[int]:
        """The lines that the file answers."""
        return set(self._digests)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Read what the file has, and keep others from writing into it.

        Raises OutputFileError when it cannot be written to, or has anything else in it.
        """
        if self._lines is None:
            yield
            return
        with self._lines.opened():
            self._read(self._lines)
            yield

    def has(self, line: Line) -> bool:
        """Tell whether the file answers a line. Raises OutputFileError if it answers another."""
        digest = self._digests.get(line.index)
        if digest not in (None, line.digest):
            assert self._lines is not None
            raise self._lines.refused(
                f"it answers another text than {line.where}", "Give the same lines"
            )
        return digest is not None

    def write(self, line: Line, answer: dict[str, Any]) -> None:
        """Add the answer to a line."""
        request = f"{self._key}-{line.digest}"
        record = {"index": line.index, **answer, "request": request}
        self._note(line.index, answer.get("error", {}).get("message", ""))
        if self._lines is None:
            print_json(record)
        else:
            self._lines.add(json.dumps(record, ensure_ascii=False))

    def _read(self, lines: LineFile) -> None:
        try:
            file = open_input(lines.path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise lines.refused(error.strerror or str(error), "Leave -o out for stdout") from error
        with file:
            for number, data in enumerate(read_lines(file, str(lines.path)), 1):
                if data is not None and not data.endswith(b"\n"):
                    if not data.startswith(_BEGIN[: len(data)]):
                        raise _not_ours(lines, number)
                    return
                self._take(lines, number, data)
                lines.n_byte += len(data or b"")

    def _take(self, lines: LineFile, number: int, data: bytes | None) -> None:
        """Note a line of the file."""
        try:
            record = json.loads(data or b"")
            index, (key, digest) = int(record["index"]), record["request"].split("-")
            error = record.get("error", {}).get("message", "")
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise _not_ours(lines, number) from None
        if key != self._key:
            raise lines.refused(
                f"line {number} was answered by another bundle or under other options than these",
                "Give those that it was begun with",
            )
        self._digests[index] = digest
        self._note(index, error)

    def _note(self, index: int, error: str) -> None:
        self.n_failed += bool(error)
        if error and not self.first_failure:
            self.first_failure = f"line {index + 1}: {error}"


def _not_ours(lines: LineFile, number: int) -> OutputFileError:
    return lines.refused(
        f"line {number} is no answer of this command, and a file was expected that it began",
        "Leave the file",
    )
