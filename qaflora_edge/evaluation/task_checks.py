"""What the items of a task have to be; what a template may name."""

import string
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from qaflora_edge.errors import TaskFileError
from qaflora_edge.evaluation.last_number import as_number
from qaflora_edge.formats.json_text import shortened, shown

CHOICES_MAX = len(string.ascii_uppercase)
ADVICE = "Correct the file; docs/evaluate.md says what it may have."


def wrong(where: str, found: str, expected: str) -> TaskFileError:
    """The failure of a line of a task file."""
    return TaskFileError(f"Cannot use the task {where}: {found}, expected {expected}. {ADVICE}")


def check_asked(key: str, value: Any, where: str, *, raw_prompt: bool) -> None:
    """Raise TaskFileError for what cannot be asked.

    key  question, prompt or messages
    """
    if key != "messages":
        _check_text({key: value}, key, where)
        return
    is_list = isinstance(value, list) and value
    if not is_list or not all(
        isinstance(each, dict)
        and isinstance(each.get("role"), str)
        and isinstance(each.get("content"), str)
        for each in value
    ):
        expected = 'a list of objects with role and content, as [{"role": "user", ...}]'
        raise wrong(where, f"messages is {shown(value)}", expected)
    if raw_prompt:
        raise wrong(where, "it has messages", "none where the task says raw_prompt")


def _check_text(fields: Mapping[str, Any], key: str, where: str) -> None:
    value = fields.get(key)
    if not isinstance(value, str) or not value.strip():
        raise wrong(where, _found(fields, key), "a text that is not blank")


def listed(answer: Any) -> list[Any]:
    """The answers of an item, one of which is enough."""
    return answer if isinstance(answer, list) else [answer]


def _found(fields: Mapping[str, Any], key: str) -> str:
    return f"{key} is {shown(fields[key]) if key in fields else 'missing'}"


def _is_text(value: Any) -> bool:
    is_one = isinstance(value, str | int | float) and not isinstance(value, bool)
    return is_one and bool(str(value).strip())


def _check_answer(
    is_right: Callable[[Any], bool], what: str, fields: Mapping[str, Any], where: str
) -> None:
    several = listed(fields.get("answer"))
    if not several or not all(map(is_right, several)):
        raise wrong(where, _found(fields, "answer"), f"{what}, or a list of them")


def _check_choice(fields: Mapping[str, Any], where: str) -> None:
    choices, answer = fields.get("choices"), fields.get("answer")
    if not (
        isinstance(choices, list)
        and 2 <= len(choices) <= CHOICES_MAX
        and all(isinstance(each, str) and each.strip() for each in choices)
    ):
        raise wrong(where, _found(fields, "choices"), f"a list of 2 to {CHOICES_MAX} texts")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        expected = f"the number of a choice, 0 to {len(choices) - 1}"
        raise wrong(where, _found(fields, "answer"), expected)


def _check_code(fields: Mapping[str, Any], where: str) -> None:
    _check_text(fields, "test", where)
    if "entry_point" in fields and not str(fields["entry_point"]).isidentifier():
        raise wrong(where, _found(fields, "entry_point"), "the name of a function")


def _check_loss(fields: Mapping[str, Any], where: str) -> None:
    _check_text(fields, "continuation", where)


# Metric -> what raises TaskFileError where the fields of an item do not fit it.
CHECKS: dict[str, Callable[[Mapping[str, Any], str], None]] = {
    "number": partial(_check_answer, lambda value: as_number(value) is not None, "a number"),
    "exact": partial(_check_answer, _is_text, "a text or number"),
    "contains": partial(_check_answer, _is_text, "a text or number"),
    "choice": _check_choice,
    "code": _check_code,
    "loss": _check_loss,
}


def check_template(template: str, known: Sequence[str], where: str, what: str) -> None:
    """Raise TaskFileError where a template is none, or names a field that there is not."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        expected = "names in braces, and {{ and }} for braces"
        raise wrong(where, f"{what} cannot be read ({error})", expected) from error
    for _, name, form, conversion in parts:
        if name is not None and (name not in known or form or conversion):
            names = shortened(", ".join(known))
            raise wrong(where, f"{what} names {shown(name)}", f"one of the fields {names}")


def filled(template: str, values: Mapping[str, str]) -> str:
    """A template with its names replaced; nothing else of Python's format language is in it."""
    parts = string.Formatter().parse(template)
    return "".join(text + ("" if name is None else values[name]) for text, name, _, _ in parts)
