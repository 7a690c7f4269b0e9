"""Options behind a strategy's name, as in calibrated:power=2,total=1.5."""

import difflib
from collections.abc import Sequence
from typing import Any

from qaflora_edge.config import Option
from qaflora_edge.errors import StrategyError


def read_options(
    behind: str, options: Sequence[Option], text: str, *, has_argument: bool
) -> tuple[str, dict[str, Any]]:
    """What stands behind a strategy's colon: its argument, and its options by name.

    behind        items with commas between them
    has_argument  whether items that are no option are the strategy's argument
    text          the whole of it, for messages

    Raises StrategyError for an unknown option, one that stands twice, or a value out of its range.
    """
    known = {option.name: option for option in options}
    found: dict[str, Any] = {}
    others = []
    for item in behind.split(","):
        name, equals, value = item.partition("=")
        if name not in known or not equals:
            if not has_argument:
                raise _unknown(item, name, options, text)
            others.append(item)
        elif name in found:
            raise StrategyError(f"Strategy {text!r} has the option {name} twice, expected it once.")
        else:
            found[name] = _value(known[name], value, text)
    return ",".join(others), found


def written(option: Option) -> str:
    """How an option is written, as in total=T or l2."""
    return f"{option.name}=" + " or ".join(
        (*option.choices, *((option.metavar,) if option.metavar else ()), *option.words)
    )


def _value(option: Option, value: str, text: str) -> Any:
    given: Any = value
    if option.kind in (int, float) and value not in option.words:
        try:
            given = option.kind(value)
        except ValueError:
            given = None  # fits nowhere
    if not option.fits(given):
        raise StrategyError(
            f"Strategy {text!r}: the option {option.name} is {value!r}, expected {option.expected}."
        )
    return given


def _unknown(item: str, name: str, options: Sequence[Option], text: str) -> StrategyError:
    near = difflib.get_close_matches(name, [option.name for option in options], n=1)
    hint = f"did you mean {near[0]}=? Expected" if near else "expected"
    forms = ", ".join(map(written, options))
    return StrategyError(
        f"Strategy {text!r}: {item!r} is no option of it; {hint} some of {forms}, with commas "
        "between them."
    )
