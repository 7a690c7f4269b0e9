"""Match names of modules by the patterns of a PEFT config, in bounded time."""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

MAX_PATTERNS = 1 << 14
MAX_PATTERN_LENGTH = 256
MAX_REPEATS = 3  # of unbounded repeats in a pattern, so that matching cannot take for ever
MAX_CHOICES = 1 << 12  # ways through a pattern's alternatives and optional parts
MAX_WORK = 1 << 31  # steps of matching all patterns of a config with all modules; half a minute

_UNBOUNDED = re.compile(r"[*+{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_IN_BRACKETS = re.compile(r"\[\^?\]?[^\]]*\]")


def is_bounded(pattern: str) -> bool:
    """Tell whether matching a name surely ends: no repeated group, few repeats and choices.

    An expression may otherwise take time that is exponential in its length.
    """
    if len(pattern) > MAX_PATTERN_LENGTH:
        return False
    plain = _plain(pattern)
    return (
        _REPEATED_GROUP.search(plain) is None
        and len(_UNBOUNDED.findall(plain)) <= MAX_REPEATS
        and _n_choice(plain) <= MAX_CHOICES
    )


def match_work(pattern: str, n_char: int, *, n_repeat: int = 0) -> int:
    """Bound the steps of matching a bounded pattern with a name: choices times places of repeats.

    n_repeat  unbounded repeats that are put around the pattern
    """
    plain = _plain(pattern)
    n_repeat += len(_UNBOUNDED.findall(plain))
    return _n_choice(plain) * math.comb(n_char + n_repeat, n_repeat)


def _plain(pattern: str) -> str:
    """Put a dot in place of escaped signs and of sets, whose signs have no meaning."""
    return _IN_BRACKETS.sub(".", re.sub(r"\\.", ".", pattern, flags=re.DOTALL))


def _n_choice(plain: str) -> int:
    """Multiply the alternatives of each group, and two for each optional part."""
    n_choice, open_groups = 1, [1]
    for before, sign in zip(" " + plain, plain, strict=False):
        if sign == "(":
            open_groups.append(1)
        elif sign == "|":
            open_groups[-1] += 1
        elif sign == ")" and len(open_groups) > 1:
            n_choice *= open_groups.pop()
        elif sign == "?" and before not in "(*+?}":
            n_choice *= 2
    for n_alternative in open_groups:
        n_choice *= n_alternative
    return n_choice


@functools.lru_cache(maxsize=MAX_PATTERNS)
def compile_key(key: str) -> re.Pattern[str]:
    """Compile a key of rank_pattern or alpha_pattern. Raises re.error and its like."""
    return re.compile(rf"(.*\.)?({key})$")


def matching_key(patterns: Mapping[str, object], module: str) -> str:
    """Give the first key that matches the module's name or the end of it at a dot.

    As PEFT 0.21 does, peft/utils/other.py get_pattern_key.
    """
    for key in patterns:
        if compile_key(key).match(module):
            return key
    return module


@dataclass(frozen=True)
class TargetRule:
    """Which modules a config says are adapted.

    targets   names or ends of names; one expression; or None where the config leaves it open
    excluded  the same, for modules that are left out
    layers    the only layers that are adapted, or None
    fields    the config's fields that say so
    """

    targets: tuple[str, ...] | str | None = None
    excluded: tuple[str, ...] | str | None = None
    layers: tuple[int, ...] | None = None
    layers_patterns: tuple[str, ...] = ()
    fields: str = "target_modules, exclude_modules and layers_to_transform"

    def allows(self, module: str) -> bool:
        """Tell whether a module may be adapted; what cannot be decided may be.

        As PEFT 0.21 does, peft/tuners/tuners_utils.py check_target_module_exists.
        """
        if self.excluded is not None and _names(self.excluded, module) is True:
            return False
        if self.targets is None:
            return True
        is_named = _names(self.targets, module)
        if is_named is None or isinstance(self.targets, str) or module in self.targets:
            return is_named is not False
        return is_named and self._is_in_layers(module)

    def work(self, n_char: int) -> int:
        """Bound the steps of telling it for a name of `n_char` characters."""
        rules = [rule for rule in (self.targets, self.excluded) if rule is not None]
        return sum(
            len(rule)
            if isinstance(rule, tuple)
            else match_work(rule, n_char)
            if is_bounded(rule)
            else 0
            for rule in rules
        )

    def _is_in_layers(self, module: str) -> bool:
        if self.layers is None:
            return True
        patterns = [rf"(?:^|.*?\.){re.escape(name)}\.(\d+)\." for name in self.layers_patterns]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            if match := re.match(pattern, module):
                return int(match[1]) in self.layers
        return False


def _names(rule: tuple[str, ...] | str, module: str) -> bool | None:
    """Tell whether a rule names a module; None for an expression that is not safe to match."""
    if isinstance(rule, str):
        try:
            return bool(re.fullmatch(rule, module)) if is_bounded(rule) else None
        except (re.error, RecursionError, OverflowError):
            return None
    return module in rule or any(module.endswith(f".{name}") for name in rule)
