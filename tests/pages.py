"""The documents as blocks: what is run, what is said not to run, and what is neither.

A page's commands stand in ```sh blocks, its scripts in ```python blocks. A block that cannot run
has `<!-- not run: REASON -->` on the line before it. Everything else is a sample.
"""

import re
from dataclasses import dataclass
from pathlib import Path

RUN = ("sh", "python")
TRANSCRIPT = "transcript"  # typed by tests/transcript.py
FENCE = re.compile(r"^ *```(?P<language>\S*)\s*$")
NOT_RUN = re.compile(r"^<!-- not run: (?P<reason>\S.*?) -->$")
SHELLS = ("bash", "shell", "console", "zsh", "fish", "powershell", "sh-session", "")
# What a command looks like where only samples are allowed.
COMMAND = re.compile(r"^\s*(\$ |[A-Z_]+=\S+ )?(qaflora|make|pip|python3?|apt-get|git|llm) +[a-z'-]")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, its text, and why it is not run."""

    line: int
    language: str
    text: str
    not_run: str | None


def page_paths(checkout: Path) -> list[Path]:
    """README and every page of docs/, in the order of their names."""
    return [checkout / "README.md", *sorted((checkout / "docs").glob("*.md"))]


def read_blocks(text: str) -> list[Block]:
    """The fenced blocks of a page. Raises ValueError when one has no end."""
    blocks: list[Block] = []
    lines = text.splitlines()
    start: int | None = None
    for index, line in enumerate(lines):
        fence = FENCE.match(line)
        if start is None and fence:
            start = index
        elif start is not None and fence and not fence["language"]:
            opening = FENCE.match(lines[start])
            assert opening is not None
            before = NOT_RUN.match(lines[start - 1].strip()) if start else None
            body = "\n".join(lines[start + 1 : index]) + "\n"
            reason = before["reason"] if before else None
            blocks.append(Block(start + 1, opening["language"], body, reason))
            start = None
    if start is not None:
        raise ValueError(f"the block that begins in line {start + 1} has no end")
    return blocks


def escaped_commands(text: str) -> list[str]:
    """Commands of a page that are neither run nor said not to run: `line: what is wrong`."""
    blocks = read_blocks(text)
    found = [
        f"{block.line}: a block of {block.language or 'no language'}; use sh, or text for a sample"
        for block in blocks
        if block.language in SHELLS
    ]
    for block in blocks:
        if block.language not in (*RUN, TRANSCRIPT):
            found += [
                f"{block.line}: a command in a block of {block.language}: {line.strip()}"
                for line in block.text.splitlines()
                if COMMAND.match(line)
            ]
    is_inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if FENCE.match(line):
            is_inside = not is_inside
        elif not is_inside and line.startswith("    ") and COMMAND.match(line):
            found.append(f"{number}: a command in an indented block: {line.strip()}")
    return found
