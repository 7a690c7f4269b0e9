"""The documents as blocks: what is run, what is said not to run, and what is neither.

A page's commands stand in ```sh blocks, its scripts in ```python blocks. A block that cannot run
has `<!-- not run: REASON -->` on the line before it. What a block prints may stand in a block
```output below it, and is compared. Everything else is a sample.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

RUN = ("sh", "python")
OUTPUT = "output"
TRANSCRIPT = "transcript"  # typed by tests/transcript.py
FENCE = re.compile(r"^ *```(?P<language>\S*)\s*$")
NOT_RUN = re.compile(r"^<!-- not run: (?P<reason>\S.*?) -->$")
SHELLS = ("bash", "shell", "console", "zsh", "fish", "powershell", "sh-session", "")
# What a command looks like where only samples are allowed.
COMMAND = re.compile(r"^\s*(\$ |[A-Z_]+=\S+ )?(qaflora|make|pip|python3?|apt-get|git) +[a-z'-]")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    line     where it begins, from 1
    not_run  why it is not run
    output   what it prints, as the page shows it
    """

    line: int
    language: str
    text: str
    not_run: str | None
    output: str = ""


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
            if opening["language"] == OUTPUT:
                blocks[-1] = replace(blocks[-1], output=body)
            else:
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


# A score is in standard deviations: kernels that round otherwise moved none by more than 0.02.
TOLERANCE = 0.15
_STATUS = re.compile(r"\[(?P<mix>[^;\]]+)(?P<times>;.*)?\]")
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
_TIME = re.compile(rf"{_NUMBER.pattern}(?= (?:ms|s|tok/s)\b)")
_CELLS = re.compile("[▁▂▃▄▅▆▇█]+")


def differences(shown: str, printed: str) -> list[str]:
    """Compare what a page shows with what was printed: what is shown and was not printed.

    A line is looked for among those that were printed, in order. Words are compared as they are,
    numbers within TOLERANCE, times and cells of a heatmap not at all. Of an answer, which ends with
    `[its mix; ...]`, the facts are compared: another processor may write other words around them.
    """
    missing = []
    lines = iter(_lines(printed))
    for line in _lines(shown):
        if not any(_agrees(line, other) for other in lines):
            missing.append(line)
            lines = iter(_lines(printed))
    return missing


def _lines(text: str) -> list[str]:
    """Give the lines without spaces that lay them out; of each answer the facts and its mix."""
    lines: list[str] = []
    begun = 0  # where the answer that is being written began
    for line in text.splitlines():
        status = _STATUS.fullmatch(line.strip())
        if status is None:
            lines.append(" ".join(line.split()))
            continue
        answer = lines[begun:]
        last = answer[-1] if answer else ""
        facts = _NUMBER.findall(last) or [name for name in FACTS if name in last]
        lines[begun:] = [f"fact {fact}" for fact in facts]
        times = _NUMBER.sub("N", status["times"] or "")
        lines.append(f"[{status['mix']}{times}]")
        begun = len(lines)
    return [line for line in lines if line]


FACTS = ("Paris",)  # in answers that have no number


def _agrees(shown: str, printed: str) -> bool:
    for fact in FACTS:
        if fact in shown:  # an answer without a mix below it
            return fact in printed
    shown, printed = (_TIME.sub("time", _CELLS.sub("cells", text)) for text in (shown, printed))
    if _NUMBER.sub("N", shown) != _NUMBER.sub("N", printed):
        return False
    if shown.startswith("fact "):
        return shown == printed
    pairs = zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=True)
    return all(abs(float(one) - float(other)) <= TOLERANCE for one, other in pairs)
