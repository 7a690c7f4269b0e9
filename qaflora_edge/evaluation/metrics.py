"""How answers are scored: 1 or 0, or nats a token; the code of an answer as a program."""

import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.evaluation.last_number import as_number, is_number


def answer_score(metric: str, answer: str, expected: Any) -> float:
    """1.0 for a right answer, else 0.0.

    metric    number (the last one is it), exact (the same text) or contains (the text is in it)
    expected  a number or text, or several, one of which is enough
    """
    right = _METRICS[metric]
    several = expected if isinstance(expected, list) else [expected]
    return float(any(right(answer, each) for each in several))


def _ends_with_number(answer: str, expected: Any) -> bool:
    number = as_number(expected)
    return number is not None and is_number(answer, number)


_METRICS: dict[str, Callable[[str, Any], bool]] = {
    "number": _ends_with_number,
    "exact": lambda answer, expected: _spaced(answer) == _spaced(str(expected)),
    "contains": lambda answer, e: _spaced(str(e)).casefold() in _spaced(answer).casefold(),
}


def _spaced(text: str) -> str:
    """A text in Unicode's NFC, with single spaces for all white space and none at its ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def choice_score(log_probs: Sequence[F32], answer: int, score_by: str) -> dict[str, Any]:
    """Which choice is the likeliest, by all its tokens and by their mean.

    log_probs  of each choice's tokens, in nats: float32 [n_token] each
    score_by   "sum" or "mean": which of them is the score

    A tie is no right answer.
    """
    sums = [float(each.sum(dtype=np.float64)) for each in log_probs]
    n_tokens = [len(each) for each in log_probs]
    means = [total / n for total, n in zip(sums, n_tokens, strict=True)]
    scores = {"sum": _is_best(sums, answer), "mean": _is_best(means, answer)}
    return {
        "score": scores[score_by],
        "log_probs": [round(total, 4) for total in sums],
        "n_tokens": n_tokens,
        "score_sum": scores["sum"],
        "score_mean": scores["mean"],
    }


def _is_best(values: Sequence[float], index: int) -> float:
    return float(all(values[index] > value for i, value in enumerate(values) if i != index))


def loss(log_probs: F32) -> float:
    """Nats a token of a continuation whose tokens' log-probabilities are float32 [n_token]."""
    return -float(log_probs.mean(dtype=np.float64))


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
