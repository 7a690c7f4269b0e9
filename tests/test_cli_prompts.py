"""Files of prompts: lines, JSON lines, and what is wrong with a file or a line of it."""

from pathlib import Path

import pytest
from refusals import refused

from qaflora_edge.cli import prompts
from qaflora_edge.cli.prompts import read_prompts, read_text
from qaflora_edge.errors import InputFileError


def message(path: Path | str) -> str:
    return refused(InputFileError, read_prompts, str(path))


def test_lines(tmp_path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffone  two\r\n\n  \n¿qué? \u2028 still\n".encode())
    assert read_prompts(str(path)) == ["one  two", "¿qué? \u2028 still"]


def test_json_lines(tmp_path) -> None:
    path = tmp_path / "p.JSONL"
    path.write_text('{"prompt": "a\\nb"}\n{"name": null, "prompt": "c"}')
    assert read_prompts(str(path)) == ["a\nb", "c"]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('["a"]', "it is no JSON object (it holds a list"),
        ('{"prompt": " "}', '"prompt" is " ", expected a text that is not empty'),
    ],
)
def test_bad_lines_are_named(line, wrong, tmp_path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    shown = message(path)
    assert shown.startswith(f"Cannot read {path}, line 2: {wrong}")
    assert shown.endswith("Correct the line.")


def test_bad_files_are_named(tmp_path, monkeypatch) -> None:
    path = tmp_path / "p.txt"
    assert message(path) == (
        f"Cannot read {path}: opening or reading it failed: No such file or directory. Check that "
        "it exists and that you may read it."
    )
    path.write_bytes(b"\n \r\n")
    assert message(path) == (
        f"Cannot use the prompts in {path}: it has no line that is not blank, expected one prompt "
        "a line. Write one into it."
    )
    path.write_bytes(b"ab\xff")
    assert message(path) == (
        f"Cannot read {path}, line 1: it is not UTF-8 (invalid start byte at byte 2), expected "
        "text in UTF-8. Convert it, for example with iconv."
    )
    monkeypatch.setattr(prompts, "FILE_BYTES_MAX", 1 << 20)
    path.write_bytes(b"a" * ((1 << 20) + 1))
    assert refused(InputFileError, read_text, str(path)) == (
        f"Cannot read {path}: it is larger than 1 MiB, the most that is read as text. Split it, "
        "or check that it is the right file."
    )
