"""Strategies and their registry.

A strategy is one object: its name, a word of help, and how it turns a query into weights. Those of
the package and of a program have the same standing in one registry.

Help texts and completion name strategies, so modules of strategies import numpy in functions.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from qaflora_edge.arrays import F32, F64, ArrayLike
from qaflora_edge.ask import Prompt
from qaflora_edge.config import SHAPING, Option
from qaflora_edge.errors import StrategyError, nearest

if TYPE_CHECKING:
    from qaflora_edge.formats.adapter import AdapterInfo
    from qaflora_edge.prompt.calls import Calls
    from qaflora_edge.weighing.added import Listener
    from qaflora_edge.weighing.plan import Draft, Plan

Measure = Literal["kl", "cosine", "euclidean"]

KINDS = ("attn_q", "attn_k", "attn_v", "attn_qkv")  # modules with the same input

Span = tuple[int, int]  # begin and end of a part of a prompt

# adapter -> typical values by weighing.calibration.KEYS, as bundle.json stores them
Typical = Mapping[str, Mapping[str, Any]]
Options = Mapping[str, Any]  # of a strategy: name -> value

# Where each strategy of the package is.
_BUILT_IN = {
    "two-place": "two_place",
    "relay": "relay",
    "qa-flora": "published",
    "spectr": "published",
    "static": "fixed",
    "single": "fixed",
    "manual": "fixed",
    "base": "fixed",
    "calibrated": "published",
}
_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")


@dataclass(frozen=True)
class Query:
    """Hold one query, and what is known of the adapters in use.

    tokens    ids of the prompt
    adapters  names of those in use, in the order of every first axis
    lens      "norm" or "raw", pool "last" or "question": see `qaflora weights --help`
    typical   adapter -> typical values by calibration.KEYS, where the bundle has them
    folder    the bundle's, for messages; empty where there is none
    argument  what parse() of the strategy gave
    options   the strategy's own options, as given
    question  span of the question's tokens: the last user turn of a chat prompt, else all tokens
    is_chat   whether the prompt is in chat form, is_later: with another user turn before it
    can_draft whether another may write with a draft in view: not after a thought
    n_weighed  tokens before a thought that the chat template began, or before calls of tools: with
              them and without them the weights are the same; None: all
    n_thought  tokens at its end that begin a thought
    calls     how tools may be called, where the answer is free to; None: it is not
    neutral   see Prompt
    """

    tokens: tuple[int, ...]
    adapters: tuple[str, ...]
    n_layer: int
    lens: str
    pool: str
    typical: Typical
    folder: str = ""
    argument: Any = None
    options: Options = field(default_factory=dict)
    question: Span = (0, 0)
    is_chat: bool = False
    is_later: bool = False
    can_draft: bool = False
    n_weighed: int | None = None
    n_thought: int = 0
    calls: "Calls | None" = None
    neutral: tuple[tuple[Prompt, Prompt], ...] = field(default=(), repr=False)

    @property
    def has_results(self) -> bool:
        """Tell whether tools have given results since the question."""
        n_weighed = len(self.tokens) if self.n_weighed is None else self.n_weighed
        return n_weighed + self.n_thought < len(self.tokens)


@dataclass(frozen=True)
class Closeness:
    """Say how close a query is to the examples that were taught for an adapter.

    over_nobody  its score less that of "nobody", to whom generic questions belong; about 1 for an
                 example itself
    over_next    its score less the highest of others that were taught, the base among them
    n_example    example questions of this adapter; 0 where only a description is known
    """

    over_nobody: float
    over_next: float
    n_example: int


class Reading(Protocol):
    """Read a query for its strategy; each thing is computed once, when it is asked for.

    query  attribute: what is asked, and what is known of the adapters
    """

    query: Query

    def divergence(self, measure: Measure = "kl") -> F64:
        """Measure how far each adapter moves the base: float64 [n_adapter, n_layer], >= 0.

        measure  KL in nats through the query's lens, or a distance of states
        """

    def states(self) -> F32:
        """Give states after each block: float32 [1 + n_adapter, n_layer, n_embd], base first."""

    def added(self) -> F64:
        """Measure what adapters would add in two places: float64 [2, n_adapter, n_layer].

        |scale B A x| at q, k and v, in one pass of the base: at the last token, in the question.
        """

    def neutral(self) -> F64:
        """Measure the same of the query's neutral prompts: [2, 2, n_prompt, n_adapter, n_layer].

        First as usual, then behind the query's system prompt; of each both places.
        """

    def surprise(self) -> float:
        """Sum -log p of a chat question's second to 17th token, in nats, once added() is known."""

    def goes_on(self) -> float:
        """Tell how much less a later turn surprises the base than asked first, in nats.

        A question that goes on from what was said before surprises less, one that does not, more.
        """

    def earlier(self) -> tuple[float, F64]:
        """Read a few user turns before the last one.

        returns  the most that one of them surprises the base by, in nats, counted as surprise() is;
                 what adapters would add in each: float64 [n_question, n_adapter, n_layer]
        """

    def question(self) -> str:
        """Give the question's text."""

    def close(self) -> dict[str, Closeness]:
        """Compare with what was taught, by adapter of the query or BASE; no pass of the base more.

        Empty where nothing was taught.
        """

    def next_logits(self) -> F32:
        """Give the base's logits behind the prompt: float32 [n_vocab], once added() is known."""

    def drafts(
        self, names: Iterable[str], n_token: int, answer: ArrayLike | None = None
    ) -> "list[Draft]":
        """Let adapters, BASE or ANSWER answer the query, each alone and all in one batch.

        n_token  each draft has so many tokens, or is whole; one that was begun before goes on
        answer   weights [n_adapter, n_layer], for ANSWER: begin the answer under them too, in the
                 same batch, so that it need not begin again if these stay the weights
        """

    def base_logprobs(self, drafts: "Sequence[Draft]") -> list[tuple[float, ...]]:
        """Give log p, in nats, of each token of some drafts as the base's: all in one batch."""

    def expected(self, names: "Sequence[str]", goes_on: bool) -> list[tuple[float, ...]]:
        """Give log p, in nats, of the question's last tokens under adapters, or BASE, in one batch.

        goes_on  whether what was said before counts as the question
        """

    def listen(self, read: "type[AdapterMatrices]") -> Any:
        """Give a measure of what the base's q, k and v read, in one pass of the base.

        read  made of the adapters' files, once for many queries; its listener() measures one
        """


class AdapterMatrices(Protocol):
    """Hold what a measure takes of the adapters in use.

    infos    their facts: where each file is, and which modules it adapts
    n_layer  of the base
    """

    def __init__(self, infos: "Sequence[AdapterInfo]", n_layer: int) -> None: ...

    def listener(self, n_token: int) -> "Listener":
        """Listen to a query of n_token tokens."""


@dataclass(frozen=True)
class Measured:
    """Say how a strategy's measure is shown.

    name   heading of its numbers
    unit   with a space before it
    reads  "lens" and "pool", where the measure depends on them
    """

    name: str
    unit: str = ""
    reads: tuple[str, ...] = ()


ADDED = Measured("added to q, k, v")


class Strategy:
    """Plan how a query is answered. Subclass it, and give an object to register_strategy.

    name      as in `--strategy NAME`: small letters, digits and hyphens
    help      half a sentence on what it does
    argument  what follows a colon, as NAME in single:NAME; "" when nothing may
    needs_argument  whether it has to be given
    is_probed whether plan() reads the query, so that weights differ from query to query
    options   what follows the colon else, as in qa-flora:power=2, if it is probed. Those of
              SHAPING change the weights of plan(); its own are in query.options.
    needs_typical   what it needs of each adapter in query.typical, of calibration.KEYS
    compares  kinds of modules, such as attn_q; the adapters need one in common
    is_base_prefilled  whether the base prefills a chat prompt where prefill is "auto"
    reads_added  whether it reads added(): matrices of adapters are read while the base loads
    drafts    whether its plans may draft: a slot gets room for that
    undrafted  the strategy in its place where nothing may be drafted; "": its own last step
    measured  the divergence of its plans
    is_baseline  whether it is there to compare with: help and completion do not name it
    """

    name: ClassVar[str]
    help: ClassVar[str] = ""
    argument: ClassVar[str] = ""
    needs_argument: ClassVar[bool] = False
    is_probed: ClassVar[bool] = True
    options: ClassVar[tuple[Option, ...]] = SHAPING
    needs_typical: ClassVar[tuple[str, ...]] = ()
    compares: ClassVar[tuple[str, ...]] = ()
    is_base_prefilled: ClassVar[bool] = False
    reads_added: ClassVar[bool] = False
    drafts: ClassVar[bool] = False
    undrafted: ClassVar[str] = ""
    measured: ClassVar[Measured] = Measured("divergence", reads=("lens", "pool"))
    is_baseline: ClassVar[bool] = False

    def parse(self, argument: str, adapters: Sequence[str], text: str) -> Any:
        """Read the text after the colon ("" without one), options apart: query.argument.

        text  the whole strategy, for messages

        Raises StrategyError or WeightsError.
        """
        return argument

    def check(self, query: Query) -> None:
        """Raise StrategyError where such a query, tokens apart, cannot be weighed."""

    def plan(self, reading: Reading) -> "Plan | ArrayLike":
        """Give weights [n_adapter, n_layer], any finite numbers, or a Plan.

        The same query must get the same plan. Any thread may call.
        """
        raise NotImplementedError

    @property
    def reads_each(self) -> bool:
        """Whether each adapter reads the prompt, as well as the base."""
        return self.is_probed and bool(self.measured.reads)

    def measured_under(self, options: str) -> Measured:
        """Say how its measure is shown under options, as they stand behind the colon."""
        return self.measured

    @property
    def usage(self) -> str:
        """Write its form, as in single:NAME."""
        if not self.argument:
            return self.name
        written = f"{self.name}:{self.argument}"
        return written if self.needs_argument else f"{self.name}[:{self.argument}]"


@dataclass(frozen=True)
class ParsedStrategy:
    """Hold a strategy with what follows its name; options are the given ones."""

    text: str
    strategy: Strategy
    argument: Any = None
    options: Options = field(default_factory=dict)


_registry: dict[str, Strategy] = {}


def register_strategy(strategy: Strategy) -> None:
    """Add a strategy to this process, for use wherever a strategy is named.

    One of the same class replaces the one before: a notebook cell can run again.

    Raises StrategyError for a wrong or taken name, or an object without plan().
    """
    name = str(getattr(strategy, "name", None))
    _load_built_in(name)
    is_one = isinstance(strategy, Strategy) and type(strategy).plan is not Strategy.plan
    if not is_one or not _NAME.fullmatch(name):
        raise StrategyError(
            f"The strategy {name!r} is {strategy!r}, expected an object of a subclass of "
            "qaflora_edge.Strategy that defines plan(). Its name has small letters, digits and "
            "hyphens, at most 40, and begins with a letter."
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
    """List the strategies of the package, then others in order of registration."""
    for name in _BUILT_IN:
        _load_built_in(name)
    others = [strategy for name, strategy in _registry.items() if name not in _BUILT_IN]
    return [_registry[name] for name in _BUILT_IN] + others


def offered() -> list[Strategy]:
    """List the strategies that help and completion name."""
    return [strategy for strategy in strategies() if not strategy.is_baseline]


def find_strategy(name: str) -> Strategy | None:
    """Find a strategy by name, and import what it needs."""
    _load_built_in(name)
    return _registry.get(name)


def parse_strategy(text: str, adapters: Sequence[str]) -> ParsedStrategy:
    """Parse a strategy, as in single:NAME or qa-flora:power=2.

    Raises StrategyError for what is not known, WeightsError for a weight that is not finite.
    """
    name, colon, argument = text.partition(":")
    strategy = find_strategy(name)
    if strategy is None:
        usages = {other.name: other.usage for other in strategies()}
        raise _unknown(text, usages.get(nearest(name.lower(), usages), ""))
    if strategy.is_probed and argument and not strategy.argument:
        options = read_options(argument, strategy.options, text)
        return ParsedStrategy(text, strategy, strategy.parse("", adapters, text), options)
    has_argument = bool(argument and strategy.argument)
    if has_argument != bool(colon or strategy.needs_argument):
        raise _unknown(text)
    return ParsedStrategy(text, strategy, strategy.parse(argument, adapters, text))


def _unknown(text: str, near: str = "") -> StrategyError:
    hint = f"did you mean {near}? Expected" if near else "expected"
    usages = ", ".join(strategy.usage for strategy in offered())
    return StrategyError(f"Strategy {text!r} is not known; {hint} one of {usages}.")


def read_options(behind: str, options: Sequence[Option], text: str) -> dict[str, Any]:
    """Read the options after a strategy's colon: name -> value.

    behind  items with commas between them
    text    the whole strategy, for messages

    Raises StrategyError for an unknown or repeated option, or a value out of its range.
    """
    by_name = {option.name: option for option in options}
    values = {}
    for item in behind.split(","):
        name, equals, written_value = item.partition("=")
        if name not in by_name or not equals:
            near = nearest(name, by_name)
            hint = f"did you mean {near}=? Expected" if near else "expected"
            raise StrategyError(
                f"Strategy {text!r}: {item!r} is no option of it; {hint} some of "
                f"{', '.join(map(written, options))}, with commas between them."
            )
        if name in values:
            raise StrategyError(f"Strategy {text!r} has the option {name} twice, expected it once.")
        option = by_name[name]
        value = option.parsed(written_value)
        if not option.fits(value):
            raise StrategyError(
                f"Strategy {text!r}: the option {name} is {written_value!r}, expected "
                f"{option.expected}."
            )
        values[name] = value
    return values


def written(option: Option) -> str:
    """Write the form of an option, as in total=T or l2."""
    forms = [*option.choices, *option.words]
    if option.metavar:
        forms.insert(len(option.choices), option.metavar)
    return f"{option.name}={' or '.join(forms)}"


def measured_by(text: str) -> Measured:
    """Give how the measure of a strategy is shown; the default for an unknown one."""
    name, _, options = text.partition(":")
    strategy = find_strategy(name)
    return Strategy.measured if strategy is None else strategy.measured_under(options)


def _load_built_in(name: str) -> None:
    if name not in _BUILT_IN or name in _registry:
        return
    module = import_module(f"qaflora_edge.weighing.{_BUILT_IN[name]}")
    for strategy in module.STRATEGIES:
        _registry.setdefault(strategy.name, strategy)
