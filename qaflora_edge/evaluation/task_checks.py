"""What the items of a task have to be; what a template may name."""

import string
from collections.abc import Mapping, Sequence
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
        found = "missing" if key not in fields else shown(value)
        raise wrong(where, f"{key} is {found}", "a text that is not blank")


def listed(answer: Any) -> list[Any]:
    """The answers of an item, one of which is enough."""
    return answer if isinstance(answer, list) else [answer]


def _check_answer(fields: Mapping[str, Any], where: str) -> None:
    value = fields.get("answer")
    several = listed(value)
    if not several or not all(
        isinstance(each, str | int | float) and not isinstance(each, bool) and str(each).strip()
        for each in several
    ):
        found = "missing" if "answer" not in fields else shown(value)
        raise wrong(where, f"answer is {found}", "a text or number, or a list of them")


def _check_number(fields: Mapping[str, Any], where: str) -> None:
    value = fields.get("answer")
    several = listed(value)
    if not several or not all(as_number(each) is not None for each in several):
        found = "missing" if "answer" not in fields else shown(value)
        raise wrong(where, f"answer is {found}", "a number, or a list of them")


def _check_choice(fields: Mapping[str, Any], where: str) -> None:
    choices, answer = fields.get("choices"), fields.get("answer")
    if not (
        isinstance(choices, list)
        and 2 <= len(choices) <= CHOICES_MAX
        and all(isinstance(each, str) and each.strip() for each in choices)
    ):
        found = "missing" if "choices" not in fields else shown(choices)
        raise wrong(where, f"choices is {found}", f"a list of 2 to {CHOICES_MAX} texts")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        found = "missing" if "answer" not in fields else shown(answer)
        expected = f"the number of a choice, 0 to {len(choices) - 1}"
        raise wrong(where, f"answer is {found}", expected)


def _check_code(fields: Mapping[str, Any], where: str) -> None:
    _check_text(fields, "test", where)
    if "entry_point" in fields and not str(fields["entry_point"]).isidentifier():
        found = shown(fields["entry_point"])
        raise wrong(where, f"entry_point is {found}", "the name of a function")


def _check_loss(fields: Mapping[str, Any], where: str) -> None:
    _check_text(fields, "continuation", where)


# Metric -> what raises TaskFileError where the fields of an item do not fit it.
CHECKS = {
    "number": _check_number,
    "exact": _check_answer,
    "contains": _check_answer,
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
