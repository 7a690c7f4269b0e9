"""The constants and names of a JSON schema: what llguidance writes as it is given."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from qaflora_edge.errors import GrammarError
from qaflora_edge.grammar.bounds import is_exact
from qaflora_edge.grammar.json_values import is_of

MAX_DEPTH = 64
Fail = Callable[[str, str], GrammarError]
# By \u escapes llguidance spells a named property anew, so that its schema is passed by. They are
# switched off, and these have no other spelling.
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")


def checked_constant(value: Any, fail: Fail, depth: int = 0) -> Any:
    """A value of `const` or `enum`. Raises GrammarError for what would not be written so."""
    if depth > MAX_DEPTH:
        raise fail(f"a constant of more than {MAX_DEPTH} levels", "flatten it")
    if isinstance(value, (list, tuple)):
        return [checked_constant(each, fail, depth + 1) for each in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {
            checked_text(key, fail): checked_constant(each, fail, depth + 1)
            for key, each in value.items()
        }
    if isinstance(value, str):
        return checked_text(value, fail)
    if value is None or isinstance(value, bool):
        return value
    if is_of(value, "number") and abs(value) < 1e300:  # neither NaN nor infinite
        if not is_exact(value):
            raise fail(f"the constant {short(value)} has more than 15 digits", "round it")
        return value
    raise fail(f"the constant {short(value)}", "expected a JSON value")


def checked_text(text: str, fail: Fail) -> str:
    """A text that is written as a string or name. Raises GrammarError."""
    found = _UNWRITABLE.search(text)
    if found:
        raise fail(f"the character {found[0]!r} in {short(text)}", "leave it out")
    return text


def short(value: Any) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
