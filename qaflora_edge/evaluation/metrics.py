"""Metrics: how an answer is scored, and the registry of all that there are."""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.errors import TaskFileError

CHOICES_MAX = 26  # one for each letter
_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")
Fields = Mapping[str, Any]
# A field of an item, and what it should be; None where all is well.
Fault = tuple[str, str] | None


def listed(answer: Any) -> list[Any]:
    """Give the answers of an item as a list; one of them is enough."""
    return answer if isinstance(answer, list) else [answer]


def is_text(value: object) -> bool:
    """Tell whether a value is a text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def is_number(value: object) -> bool:
    """Tell whether a value is a number, or a text that is one."""
    return as_number(value) is not None


def check_answer(fields: Fields) -> Fault:
    """Expect `answer`: a text or number, or a list of them."""
    answers = listed(fields.get("answer"))
    if answers and all(is_text(answer) or is_number(answer) for answer in answers):
        return None
    return "answer", "a text or number, or a list of them"


def _check_number(fields: Fields) -> Fault:
    answers = listed(fields.get("answer"))
    if answers and all(map(is_number, answers)):
        return None
    return "answer", "a number, or a list of them"


@dataclass(frozen=True)
class Metric:
    """One way to score an item. Give an object to register_metric.

    name   as in {"task": {"metric": NAME}}: small letters, digits and hyphens
    score  answer, the item's fields -> 1.0 for right, 0.0 for wrong or a number between; or a dict
           with `score` and more fields for the results file
    needs  field that marks an item as one of this metric
    check  the item's fields -> the field that is wrong and what it should be, or None
    is_likelihood  score gets log-probabilities in nats, a float32 [n_token] for each text that is
           scored, in place of an answer: nothing is generated
    """

    name: str
    score: Callable[[Any, Fields], float | Fields]
    needs: str = "answer"
    check: Callable[[Fields], Fault] = check_answer
    is_likelihood: bool = False


_registry: dict[str, Metric] = {}


def register_metric(metric: Metric) -> None:
    """Let tasks of this process be scored by a metric of its own; the last one of a name counts.

    Raises TaskFileError for a name that is taken or malformed, or an object that is no Metric.
    """
    is_metric = isinstance(metric, Metric)
    is_named = is_metric and _NAME.fullmatch(str(metric.name)) is not None
    if not is_named or metric.name in BUILT_IN:
        raise TaskFileError(
            f"Cannot register the metric {metric!r}, expected a qaflora_edge.Metric whose name has "
            "small letters, digits and hyphens, at most 40, begins with a letter, and is none of "
            f"{', '.join(BUILT_IN)}. Correct it."
        )
    _registry[metric.name] = metric


def metrics() -> dict[str, Metric]:
    """Give every metric by its name: the package's own first."""
    return BUILT_IN | _registry


def _any_of(is_right: Callable[[str, Any], bool]) -> Callable[[str, Fields], float]:
    def score(text: str, fields: Fields) -> float:
        answers = listed(fields["answer"])
        return float(any(is_right(text, answer) for answer in answers))

    return score


def _plain(text: Any) -> str:
    composed = unicodedata.normalize("NFC", str(text))
    return " ".join(composed.split())


def _is_number(text: str, answer: Any) -> bool:
    return as_number(answer) in last_number(text)


def _is_same(text: str, answer: Any) -> bool:
    return _plain(text) == _plain(answer)


def _has(text: str, answer: Any) -> bool:
    """Tell whether a text has an answer, as whole words and numbers."""
    sought = _plain(answer).casefold()
    searched = _plain(text).casefold()
    inside = _inside_words(searched)
    start = searched.find(sought)
    while start >= 0:
        end = start + len(sought)
        if inside.isdisjoint((start, end)):
            return True
        start = searched.find(sought, start + 1)
    return False


def _inside_words(text: str) -> set[int]:
    """Find the places between two signs of one number, or of one word.

    Letters without a small form, as those of Chinese, make no words: no spaces divide them.
    """
    inside: set[int] = set()
    for number in _DIGITS.finditer(text):
        inside.update(range(number.start() + 1, number.end()))
    for at in range(1, len(text)):
        if text[at - 1].islower() and text[at].islower():
            inside.add(at)
    return inside


def is_same_json(text: str, value: Any) -> bool:
    """Tell whether a whole answer is JSON of this value, in any order of keys: 2 is not 2.0."""
    try:
        written = json.dumps(json.loads(text), sort_keys=True)
    except (ValueError, RecursionError):
        return False
    return written == json.dumps(value, sort_keys=True)


def choice_score(log_probs: Sequence[F32], fields: Fields) -> dict[str, Any]:
    """Tell whether the right choice is the likeliest, by the mean of its tokens; a tie is wrong.

    log_probs  of each choice's tokens, in nats: float32 [n_token] each
    """
    means = [float(of_choice.mean(dtype=np.float64)) for of_choice in log_probs]
    sums = [float(of_choice.sum(dtype=np.float64)) for of_choice in log_probs]
    best = int(np.argmax(means))
    is_alone = means.count(means[best]) == 1
    is_right = best == fields["answer"] and is_alone
    return {
        "score": float(is_right),
        "answer": fields["choices"][best],
        "log_probs": [round(total, 4) for total in sums],
        "n_tokens": [len(of_choice) for of_choice in log_probs],
    }


def loss(log_probs: Sequence[F32], fields: Fields) -> float:
    """Give the nats a token of one continuation: float32 [n_token] each, as `choice_score`."""
    return -float(log_probs[0].mean(dtype=np.float64))


def _check_choice(fields: Fields) -> Fault:
    choices = fields.get("choices")
    answer = fields.get("answer")
    n_choice = 0
    if isinstance(choices, list) and all(map(is_text, choices)):
        n_choice = len(choices)
    if not 2 <= n_choice <= CHOICES_MAX:
        return "choices", f"a list of 2 to {CHOICES_MAX} texts"
    if type(answer) is not int or not 0 <= answer < n_choice:
        return "answer", f"the number of a choice, 0 to {n_choice - 1}"
    return None


def _check_json(fields: Fields) -> Fault:
    is_right = fields.get("answer") not in (None, [])
    return None if is_right else ("answer", "the JSON that is right, or a list of such")


def _check_loss(fields: Fields) -> Fault:
    continuation = fields.get("continuation")
    return None if is_text(continuation) else ("continuation", "a text that is not blank")


_METRICS = (
    Metric("number", _any_of(_is_number), check=_check_number),
    Metric("exact", _any_of(_is_same)),
    Metric("contains", _any_of(_has)),
    Metric("json", _any_of(is_same_json), check=_check_json),
    Metric("choice", choice_score, "choices", _check_choice, is_likelihood=True),
    Metric("loss", loss, "continuation", _check_loss, is_likelihood=True),
)
BUILT_IN = {metric.name: metric for metric in _METRICS}

_DIGITS = re.compile(r"\d+(?:[.,]\d+)*")  # of one number, in any script

# the number that an answer ends with, as people of many languages write numbers
_GAP = "[ \u00a0\u2009\u202f]"  # between thousands, or between two numbers
_APOSTROPHE = re.compile(r"(?<=\d)['’٬](?=\d{3}(?!\d))")
# A minus that follows a word is a hyphen.
_TOKEN = re.compile(
    r"(?P<minus>(?<!\w)[-−–])?(?:[$€£¥₽₹]\s?)?"
    rf"(?P<digits>(?:(?<![\w.,])\.)?\d+(?:(?:[.,]|{_GAP})\d+)*)"
)
# `#### 12 eggs` marks the answer; a heading such as `#### 1. Count the eggs` does not.
_MARK = re.compile(
    r"\\boxed\s*+\{|####[ \t]*+(?!\d++\.\s)(?=[^\s\d]*+\d\S*+(?:[ \t]++\S++)?+[ \t]*+$)", re.M
)
# Thousands as most countries and India write them, with a decimal part or without one.
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:\.\d{3})+|[1-9]\d{0,2}(?:,\d\d\d?)*,\d{3}")
_NUMBER = re.compile(  # in a task
    r"[+-]?(\d{1,100}|[1-9]\d{0,2}(,\d{3})+)(\.\d{1,100})?([eE][+-]?\d{1,3})?", re.ASCII
)
_ASCII = str.maketrans("٫．，－", "..,-")


def last_number(answer: str) -> frozenset[Decimal]:
    """Find the values that the last number of an answer may stand for; none without a number.

    It is the first one in the last `\\boxed{}`, or after `####` where the line has little else.
    Digits are those of any script. 1.234 may have thousands or decimals, and stands for both.
    """
    with_points = answer.replace("{,}", ",").translate(_ASCII)
    joined = _APOSTROPHE.sub("", with_points)
    text = "".join(str(unicodedata.decimal(sign, sign)) for sign in joined)
    numbers = list(_TOKEN.finditer(text))
    marks = list(_MARK.finditer(text))
    if marks:
        marked = _TOKEN.search(text, marks[-1].end())
        numbers = [marked] if marked else numbers
    if not numbers:
        return frozenset()
    last = numbers[-1]
    sign = -1 if last["minus"] else 1
    return frozenset(sign * Decimal(reading) for reading in _readings(last["digits"]))


def _readings(token: str) -> set[str]:
    """Write digits with separators as every decimal number that they may stand for."""
    readings = set()
    groups = re.split(_GAP, token)[1:]
    if groups:
        is_grouped = all(re.match(r"\d{3}(?!\d)", group) for group in groups)
        if is_grouped:
            readings |= _readings(re.sub(_GAP, "", token))
        return readings | _readings(groups[-1])
    tail = re.split("[.,]", token)[-1]
    before = token.removesuffix(tail)
    head = before[:-1]
    point = before[-1:]
    if not point or _GROUPED.fullmatch(token):
        readings.add(re.sub("[.,]", "", token))
    is_grouped_head = point not in head and _GROUPED.fullmatch(head)
    is_whole = head.isdecimal() or not head or is_grouped_head
    is_thousand = point == "," and tail == "000"
    if point and is_whole and not is_thousand:
        digits = re.sub("[.,]", "", head)
        readings.add(f"{digits}.{tail}")
    return readings or {tail}  # a list


def as_number(value: object) -> Decimal | None:
    """Read a JSON number, or a text that is one number and nothing else; None for anything else.

    A text may have commas between thousands, and a point before decimals.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    text = str(value).strip()
    if not _NUMBER.fullmatch(text):
        return None
    return Decimal(text.replace(",", ""))
