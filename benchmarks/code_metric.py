"""The metric `code`: an answer is right where the test of its item passes.

    python benchmarks/code_metric.py eval models/demo humaneval.jsonl --limit 20

It registers the metric and is the command `qaflora` then. An item has `test`: Python that raises
where the answer is wrong; perhaps `prompt` with the head of a function and `entry_point`, its name.

This runs what a model writes. Out of the answer comes the block between fences that defines
`entry_point`, or the first block, or all of it. What does not define it is taken for the body of
the function that `prompt` begins. Then `test` runs, and `check(entry_point)` where it defines
`check`. sandbox.py says what keeps the code in bounds, and that it is no wall against an attack.
"""

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from sandbox import check_can_run, run_program

from qaflora_edge import Metric, register_metric

# A block between fences; one that is not closed goes to the end.
_FENCED = re.compile(
    r"^[ \t]*(?P<fence>```+|~~~+)[^\n]*\n(?P<code>.*?)(^[ \t]*(?P=fence)|\Z)", re.S | re.M
)
_CODE_LINE = re.compile(r"^(from \w|import \w|def |async def |class |@)", re.M)
_FUTURE = re.compile(r"^from __future__ import .*\n", re.M)
_SHORTENED_MAX = 40  # lines that may be left out at the end of an answer


def programs(answer: str, fields: Mapping[str, Any]) -> tuple[list[str], str]:
    """Readings of an answer as a program, the likeliest first, and the test that follows it.

    fields  of the item: `test`; `entry_point` and `prompt` where it has them. An answer that does
            not define the entry point is taken for the body of the prompt's function.
    """
    entry, header = str(fields.get("entry_point", "")), str(fields.get("prompt", ""))
    test = f"{fields['test']}\n"
    if entry and re.search(r"^def check\(", test, re.M):
        test += f"\ncheck({entry})\n"
    code = _code(answer, entry)
    if not entry or not header or _defines(code, entry):
        start = _before(header, entry)
        found = (f"{start}{each}\n" for each in _whole(code))
        return [reading for each in found for reading in (each, _ordered(each))], test
    return [f"{header.rstrip()}\n{each}\n" for each in _bodies(code)], test


def _ordered(program: str) -> str:
    """A program whose imports from __future__ are its first lines, as they have to be."""
    return "".join([*_FUTURE.findall(program), _FUTURE.sub("", program)])


def _code(answer: str, entry: str) -> str:
    """The block that defines the entry point, else the first block, else all of it."""
    blocks = [match["code"] for match in _FENCED.finditer(answer)]
    if not blocks:
        return answer
    return next((block for block in blocks if _defines(block, entry)), blocks[0])


def _defines(code: str, entry: str) -> bool:
    kinds = rf"((async )?def|class) {entry}\b|{entry} *= *lambda\b"
    return bool(entry) and re.search(rf"^[ \t]*({kinds})", code, re.M) is not None


def _before(header: str, entry: str) -> str:
    """What a prompt has before its function, such as imports."""
    if not entry:
        return ""
    found = re.search(rf"^((async )?def|class) {entry}\b", header, re.M)
    return header[: found.start()] if found else ""


def _whole(code: str) -> Iterator[str]:
    """The code; then without words before it; then without lines at its end."""
    code = textwrap.dedent(code)
    yield code
    found = _CODE_LINE.search(code)
    lines = code[found.start() if found else 0 :].rstrip().split("\n")
    for n in range(min(_SHORTENED_MAX, len(lines))):
        yield "\n".join(lines[: len(lines) - n])


def _bodies(code: str) -> Iterator[str]:
    """The lines of a function's body, which may have lost their indentation."""
    lines = code.strip("\n").split("\n")
    if lines[0][:1].isspace():
        n = next((i for i, line in enumerate(lines) if line and not line[0].isspace()), len(lines))
        yield "\n".join(lines[:n])
        for i in range(n - 1, max(0, n - _SHORTENED_MAX), -1):
            yield "\n".join(lines[:i])
    else:
        yield "\n".join(["    " + lines[0], *lines[1:]])
        yield textwrap.indent("\n".join(lines), "    ")


def score(answer: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Run an answer with its test; `failure` says why it did not pass."""
    verdict = run_program(*programs(answer, fields))
    return {
        "score": float(verdict.is_passed),
        "failure": verdict.failure,
        "isolated": list(verdict.isolated),
    }


def check(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """Expect a test, and the name of a function if there is an entry point."""
    if not isinstance(fields.get("test"), str) or not fields["test"].strip():
        return "test", "a text that is not blank"
    if "entry_point" in fields and not str(fields["entry_point"]).isidentifier():
        return "entry_point", "the name of a function"
    return None


def register() -> None:
    """Let tasks of this process have the metric. Exits where no process can be bounded."""
    check_can_run()
    register_metric(Metric("code", score, needs="test", check=check))


if __name__ == "__main__":
    from qaflora_edge.cli import main

    register()
    main(prog_name="qaflora")
