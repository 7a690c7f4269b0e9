"""What a strategy is, and the registry of those that there are.

A strategy is one object: its name, a word of help, and how it turns a query into weights. Those of
the package, of other packages and of a program stand in one registry, on one footing.

Help texts and completion name strategies, so numpy is imported by what computes with it only.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, Literal, Protocol

from qaflora_edge.arrays import F32, F64, ArrayLike
from qaflora_edge.config import SHAPING, Option, removed
from qaflora_edge.errors import StrategyError

Measure = Literal["kl", "cosine", "euclidean"]
PlaceMeasure = Literal["added", "cosine"]
Reading = Literal["arrow", "spectr"]

QUERIES = ("attn_q", "attn_qkv")
KINDS = ("attn_q", "attn_k", "attn_v", "attn_qkv")  # they read the same input

Span = tuple[int, int]  # where a part of a prompt begins, and where it ends

# adapter -> what is typical of it, by weighing.calibration.KEYS, as bundle.json stores it
Typical = Mapping[str, Mapping[str, Any]]

ENTRY_POINTS = "qaflora_edge.strategies"  # the group in which packages offer theirs
# Modules beside this one.
_BUILT_IN = ("divergence", "two_place", "baselines", "fixed")
_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")


@dataclass(frozen=True)
class Query:
    """What is weighed.

    tokens    ids of the prompt
    adapters  names of those in use, in the order of every first axis
    lens      "norm" or "raw", pool "last" or "question": see `qaflora weights --help`
    typical   adapter -> what is typical of it, where the bundle has it: see weighing.calibration
    centroids adapter -> float32 [n_embd], mean embedding of its sample texts, where it has them
    options   the strategy's own options, as they were given
    question  where the question's tokens stand: the last user turn of a prompt in chat form, else
              the whole prompt
    is_chat   whether the prompt is in chat form
    """

    tokens: tuple[int, ...]
    adapters: tuple[str, ...]
    n_layer: int
    lens: str
    pool: str
    typical: Typical
    centroids: Mapping[str, F32] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    question: Span = (0, 0)
    is_chat: bool = False


class Probe(Protocol):
    """What a strategy may measure of its query; each measure is computed once."""

    def divergence(self, measure: Measure = "kl") -> F64:
        """How far each adapter moves the base: float64 [n_adapter, n_layer], >= 0.

        measure  KL in nats through the query's lens, or a distance of states
        """

    def states(self) -> F32:
        """States after each block: float32 [1 + n_adapter, n_layer, n_embd], the base first."""

    def places(self, measure: PlaceMeasure) -> F64:
        """What adapters do in two places, in one pass: float64 [2, n_adapter, n_layer], at the last
        token and in the question's tokens.

        measure  "added": |scale B A x| at q, k and v, in a pass of the base alone; "cosine"
                 distances of states under each adapter
        """

    def embedding(self) -> F32:
        """The mean over tokens of the base's state after its last block: float32 [n_embd]."""

    def norms(self) -> F64:
        """|scale B A x| at a late query projection: float64 [n_adapter], in one pass of the base.

        Raises StrategyError when the adapters have no query projection in common.
        """

    def routing(self, reading: Reading) -> tuple[F64, F64]:
        """Arrow's or SpectR's weights, their mean over tokens and modules, and what they come from.

        returns  two float64 [n_adapter, n_layer], in one pass of the base

        Raises StrategyError when the adapters have no projection of the attention in common.
        """


@dataclass(frozen=True)
class Measured:
    """What a strategy measures of a query, as those read it who look at its weights.

    name   what stands above its numbers
    unit   with a space before it
    reads  of lens and pool, which one it depends on
    """

    name: str
    unit: str = ""
    reads: tuple[str, ...] = ()


ADDED = Measured("added to q, k, v")


@dataclass(frozen=True)
class Mix:
    """Weights [n_adapter, n_layer], and the measure [n_adapter, n_layer] that they come from."""

    weights: ArrayLike
    divergence: ArrayLike | None = None


class Strategy:
    """How adapters are weighed for a query. Subclass it, and give an object to register_strategy.

    name      as in `--strategy NAME`: small letters, digits and hyphens
    help      half a sentence on what it does
    argument  what stands behind a colon, as NAME in single:NAME; "" when nothing may
    needs_argument  whether it has to stand there
    is_probed whether weigh() asks the probe, so that weights differ from query to query
    options   what else may stand there, as in qa-flora:power=2, if it is probed. Those of SHAPING
              change what weigh() gives; its own, weigh() finds in query.options.
    reads_question  whether weigh() asks for what needs query.question, whatever the pool
    needs_typical   whether it needs what `qaflora bundle calibrate` measures
    compares  kinds of modules, such as attn_q, of which the adapters need one in common
    reads_of_each   kinds of which each adapter needs one
    measured  what stands in the divergence of its Mix
    """

    name: ClassVar[str]
    help: ClassVar[str] = ""
    argument: ClassVar[str] = ""
    needs_argument: ClassVar[bool] = False
    is_probed: ClassVar[bool] = True
    options: ClassVar[tuple[Option, ...]] = SHAPING
    reads_question: ClassVar[bool] = False
    needs_typical: ClassVar[bool] = False
    compares: ClassVar[tuple[str, ...]] = ()
    reads_of_each: ClassVar[tuple[str, ...]] = ()
    measured: ClassVar[Measured] = Measured("divergence", reads=("lens", "pool"))

    def parse(self, argument: str, adapters: Sequence[str], text: str) -> Any:
        """What weigh() gets for the text behind the colon ("" without one), options apart.

        text  all of it, for messages

        Raises StrategyError or WeightsError for what cannot be meant.
        """
        return argument

    def can_compare(self, targets: Iterable[Sequence[str]]) -> bool:
        """Whether adapters have one kind in common of those that it compares.

        targets  the kinds of modules that each adapts
        """
        return not self.compares or bool({*self.compares}.intersection(*targets))

    def check(self, argument: Any, query: Query) -> None:
        """Raise StrategyError where a query of this kind (its tokens apart) cannot be weighed."""

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Mix | ArrayLike:
        """Weights [n_adapter, n_layer], any finite numbers; in a Mix with the measure behind them.

        It has to give the same for the same query, and may be called from any thread.
        """
        raise NotImplementedError

    @property
    def usage(self) -> str:
        """How it is written, as in single:NAME."""
        if not self.argument:
            return self.name
        written = f"{self.name}:{self.argument}"
        return written if self.needs_argument else f"{self.name}[:{self.argument}]"


@dataclass(frozen=True)
class Chosen:
    """A strategy as it was written, read; options are those that were given."""

    text: str
    strategy: Strategy
    argument: Any
    options: Mapping[str, Any] = field(default_factory=dict)


_registry: dict[str, Strategy] = {}


def register_strategy(strategy: Strategy) -> None:
    """Let this process weigh by a strategy of its own, wherever a strategy is named.

    Packages offer theirs by an entry point in the group `qaflora_edge.strategies` that names a
    Strategy object. An object of the same class takes the place of the one before, so that a cell
    of a notebook can be run again.

    Raises StrategyError for a name that is taken or is none, or an object without weigh().
    """
    _load_built_in()
    name = getattr(strategy, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise StrategyError(
            f"The strategy {strategy!r} has the name {name!r}, expected small letters, digits and "
            "hyphens, at most 40, beginning with a letter."
        )
    if not isinstance(strategy, Strategy) or type(strategy).weigh is Strategy.weigh:
        raise StrategyError(
            f"The strategy {name!r} is {strategy!r}, expected an object of a subclass of "
            "qaflora_edge.Strategy that defines weigh()."
        )
    if name in _registry and _class_of(strategy) != _class_of(_registry[name]):
        raise StrategyError(
            f"The strategy {name!r} of {_class_of(strategy)} is there already, by "
            f"{_class_of(_registry[name])}; choose another name."
        )
    _registry[name] = strategy


def _class_of(strategy: Strategy) -> str:
    return f"{type(strategy).__module__}.{type(strategy).__qualname__}"


def strategies() -> list[Strategy]:
    """Every strategy: those of the package, then others in the order they came."""
    _load_built_in()
    _load_entry_points()
    return list(_registry.values())


def parse_strategy(text: str, adapters: Sequence[str]) -> Chosen:
    """Read a strategy's name and what follows its colon, as in single:NAME or qa-flora:power=2.

    Raises StrategyError for an unknown strategy, option or adapter, WeightsError for a weight that
    is no finite number.
    """
    name, colon, argument = text.partition(":")
    _load_built_in()
    if name not in _registry:
        _load_entry_points()
    strategy = _registry.get(name)
    options: dict[str, Any] = {}
    if strategy is not None and strategy.is_probed and argument:
        has_argument = bool(strategy.argument)
        argument, options = read_options(
            argument, strategy.options, text, has_argument=has_argument
        )
        colon = argument
    is_written = strategy is not None and (
        bool(argument) and bool(strategy.argument)
        if colon or strategy.needs_argument
        else not argument
    )
    if strategy is None and (instead := removed(name)):
        raise StrategyError(instead)
    if strategy is None or not is_written:
        near = [] if strategy else difflib.get_close_matches(name.lower(), _registry, n=1)
        hint = f"did you mean {_registry[near[0]].usage}? Expected" if near else "expected"
        raise StrategyError(
            f"Strategy {text!r} is not known; {hint} one of "
            f"{', '.join(each.usage for each in strategies())}."
        )
    return Chosen(text, strategy, strategy.parse(argument, adapters, text), options)


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


def measured_by(name: str) -> Measured:
    """What the strategy of this name measures; of one that is not known, what most do."""
    _load_built_in()
    return _registry.get(name, Strategy).measured


@cache
def _load_built_in() -> None:
    for name in _BUILT_IN:
        module = import_module(f"qaflora_edge.weighing.{name}")
        _registry.update({strategy.name: strategy for strategy in module.STRATEGIES})


@cache
def _load_entry_points() -> None:
    from importlib.metadata import entry_points  # slow to import

    for point in entry_points(group=ENTRY_POINTS):
        try:
            register_strategy(point.load())
        except Exception as error:  # another package's code: anything may come
            raise StrategyError(
                f"The strategy {point.name!r} of the entry point {point.value} cannot be used: "
                f"{error}. Correct or remove its package."
            ) from error
