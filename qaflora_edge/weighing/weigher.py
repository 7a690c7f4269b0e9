"""The weigher: from a strategy's name, or given weights, to the fusion weights of a query."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from qaflora_edge.arrays import F32
from qaflora_edge.ask import Prompt, Weighing
from qaflora_edge.config import LENSES, POOLS, PREFILLS
from qaflora_edge.errors import QafloraError, StrategyError, wrong_option
from qaflora_edge.formats.bundle import BundleText, wrong_bundle
from qaflora_edge.formats.inputs import WrongField, shown
from qaflora_edge.weighing import numbers
from qaflora_edge.weighing.numbers import normalise
from qaflora_edge.weighing.plan import (
    BASE,
    DEFAULT_LENS,
    DEFAULT_POOL,
    DEFAULT_STRATEGY,
    VIEWS,
    DraftStep,
    FusionWeights,
    Plan,
    Reason,
    Step,
    WriteStep,
)
from qaflora_edge.weighing.strategy import (
    Options,
    ParsedStrategy,
    Query,
    Reading,
    Strategy,
    Typical,
    find_strategy,
    parse_strategy,
    strategies,
)

Weights = FusionWeights | Mapping[str, float] | ArrayLike | str | None


@dataclass(frozen=True)
class WeighingFacts:
    """Hold a bundle's defaults of weighing, and measurements of its adapters.

    prefill  who prefills prompts, of config.PREFILLS
    typical  see Query
    folder   the bundle's, for messages; empty where there is none
    """

    strategy: str = DEFAULT_STRATEGY
    lens: str = DEFAULT_LENS
    pool: str = DEFAULT_POOL
    prefill: str = "auto"
    typical: Typical = field(default_factory=dict, repr=False)
    folder: str = ""

    def under(self, **options: str | None) -> Self:
        """Replace the defaults by the strategy, lens, pool and prefill that a caller gives."""
        chosen: dict[str, Any] = {name: value for name, value in options.items() if value}
        return replace(self, **chosen)


def known_of(text: BundleText | None) -> WeighingFacts:
    """Collect what a bundle says of weighing; None: the defaults.

    Raises BundleError for a strategy that is not for its adapters.
    """
    if text is None:
        return WeighingFacts()
    fusion = text.fusion
    strategy = fusion.strategy
    pool = None if fusion.pool == "mean" else fusion.pool  # of 0.1
    options = {"lens": fusion.lens, "pool": pool, "prefill": fusion.prefill}
    known = WeighingFacts().under(strategy=strategy, **options)
    try:
        parse_strategy(known.strategy, [adapter.name for adapter in text.adapters])
    except QafloraError as error:
        expected = f"a strategy for these adapters ({error})"
        wrong = WrongField("fusion.strategy", shown(known.strategy), expected)
        raise wrong_bundle(text.where, wrong) from error
    folder = str(Path(text.where).parent)
    return replace(known, typical=msgspec.to_builtins(fusion.typical), folder=folder)


@dataclass(frozen=True)
class Choice:
    """Hold what weighs one prompt: a strategy, or weights that were given.

    query     the prompt, and what is known of the adapters
    parsed    the strategy with its options; None where weights are given
    given     those; None where a strategy plans
    is_read_by_base  whether the base prefills the prompt, all but the last few tokens
    may_relay  False: who writes answers alone
    """

    query: Query
    parsed: ParsedStrategy | None
    given: FusionWeights | None
    is_read_by_base: bool
    may_relay: bool

    @property
    def drafts(self) -> bool:
        """Tell whether its plan may draft."""
        return self.parsed is not None and self.parsed.strategy.drafts

    def weigh(self, reading: Reading) -> FusionWeights:
        """Plan how the query is answered."""
        fusion = (
            self._planned(reading) if self.given is None else _for_query(self.given, self.query)
        )
        if self.may_relay:
            return fusion
        return fusion.undrafted()

    def _planned(self, reading: Reading) -> FusionWeights:
        parsed = self.parsed
        assert parsed is not None
        query = self.query
        start_s = time.perf_counter()
        plan: Any = Plan.mix(np.zeros((0, query.n_layer)))
        if query.adapters:
            plan = parsed.strategy.plan(reading)
        probe_ms = 0.0
        if parsed.strategy.is_probed and query.adapters:
            probe_ms = 1e3 * (time.perf_counter() - start_s)
        if not isinstance(plan, Plan):
            plan = Plan.mix(plan)
        plan = _checked(plan, parsed, query)
        fusion = FusionWeights(
            adapters=query.adapters,
            plan=plan,
            strategy=parsed.text,
            lens=query.lens,
            pool=query.pool,
            prompt=query.tokens,
            probe_ms=probe_ms,
            drafts=plan.read_drafts,
        )
        return _with_reasons(fusion)


def _checked(plan: Plan, parsed: ParsedStrategy, query: Query) -> Plan:
    """Check a plan, and shape its weights as the strategy's options ask for.

    Raises StrategyError.
    """
    source = f"Strategy {parsed.text!r}: "
    steps = plan.steps
    if not isinstance(steps, tuple) or not steps:
        raise StrategyError(f"{source}its steps are {steps!r:.100}, expected a tuple of them.")
    check = partial(
        numbers.check_weights,
        adapters=query.adapters,
        n_layer=query.n_layer,
        source=source,
        error_type=StrategyError,
    )

    checked: list[Step] = []
    for number, step in enumerate(steps, 1):
        at = f"{source}step {number} of {len(steps)}"
        expected = WriteStep if number == len(steps) else DraftStep
        if not isinstance(step, expected):
            found = type(step).__name__
            raise StrategyError(f"{at} is a {found}, expected a {expected.__name__}.")
        if step.view not in VIEWS:
            raise StrategyError(f"{at} has the view {step.view!r}, expected '' or 'before'.")
        if isinstance(step, WriteStep):
            weights = check(step.weights)
            options = parsed.options if query.adapters else {}
            step = replace(step, weights=shaped(weights, options, source))
        elif step.knower not in (BASE, *query.adapters):
            names = ", ".join((BASE, *query.adapters))
            raise StrategyError(f"{at} has the knower {step.knower!r}, expected one of {names}.")
        elif step.mix is not None:
            step = replace(step, mix=check(step.mix))
        checked.append(step)
    divergence = None
    if plan.divergence is not None:
        divergence = check(plan.divergence)
    return replace(plan, steps=tuple(checked), divergence=divergence)


@dataclass(frozen=True)
class Weigher:
    """Weigh for an Engine, by the adapters in use, defaults, and facts of each adapter.

    targets  adapter -> kinds of modules that it adapts, of all that are loaded
    """

    adapters: tuple[str, ...]
    n_layer: int
    known: WeighingFacts = WeighingFacts()
    targets: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = self.known
        for name, choices in (("lens", LENSES), ("pool", POOLS), ("prefill", PREFILLS)):
            value = getattr(known, name)
            if value not in choices:
                expected = " or ".join(choices)
                raise StrategyError(f"The {name} {value!r} is not known; expected {expected}.")
        self.parse(known.strategy)

    def using(self, names: Sequence[str] | None) -> Self:
        """Weigh these adapters alone, of those that are loaded; None: as they are.

        Raises OptionError, or StrategyError for an unknown name.
        """
        if names is None:
            return self
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise wrong_option("adapters", names, "a list of their names")
        for name in names:
            if name not in self.targets:
                raise not_loaded(name, self.targets)
        return replace(self, adapters=tuple(name for name in self.targets if name in names))

    def parse(self, text: str) -> ParsedStrategy:
        """Parse a strategy. Raises StrategyError if it is unknown or cannot be followed here."""
        parsed = parse_strategy(text, self.adapters)
        parsed.strategy.check(self.query(Prompt(()), parsed))
        return parsed

    def strategy_of(self, text: str | None) -> Strategy | None:
        """Find a strategy by its name, whatever follows that; None: the default one."""
        name, _, _ = (text or self.known.strategy).partition(":")
        return find_strategy(name)

    def by_of(self, weighing: Weighing) -> Weights:
        """Give weights or a strategy: another one where it drafts, and nobody may relay."""
        by = weighing.by
        if weighing.relays or not isinstance(by, str | None):
            return by
        strategy = self.strategy_of(by)
        return (strategy and strategy.undrafted) or by

    @property
    def followed(self) -> tuple[str, ...]:
        """List the strategies that can be followed here without an argument.

        First the base, the static mix and each adapter alone, then those that look at the query.
        One that compares modules needs a kind of them that all adapters adapt.
        """
        if not self.adapters:
            return ("base",)
        targets = [self.targets[name] for name in self.adapters if name in self.targets]
        fixed = []
        probed = []
        for strategy in strategies():
            compared = set(strategy.compares).intersection(*targets)
            if strategy.needs_argument or (strategy.compares and not compared):
                continue
            if not strategy.is_probed:
                fixed.append(strategy.name)
            elif not strategy.is_baseline:
                probed.append(strategy.name)
        fixed.remove("base")
        singles = [f"single:{name}" for name in self.adapters]
        followed = []
        for text in ("base", *fixed, *singles, *probed):
            with suppress(QafloraError):
                self.parse(text)
                followed.append(text)
        return tuple(followed)

    def query(self, prompt: Prompt, parsed: ParsedStrategy | None = None) -> Query:
        """Make a query from a prompt, these defaults, and what follows the strategy's name."""
        argument = None
        options: Options = {}
        if parsed is not None:
            argument = parsed.argument
            options = parsed.options
        n_token = len(prompt.tokens)
        thinking = prompt.thinking
        n_thought = 0 if thinking is None else n_token - thinking.n_weighed
        n_weighed = prompt.n_weighed or n_token - n_thought
        is_chat = prompt.question is not None
        calls = prompt.calls
        return Query(
            tokens=prompt.tokens,
            adapters=self.adapters,
            n_layer=self.n_layer,
            lens=self.known.lens,
            pool=options.get("pool", self.known.pool),
            typical=self.known.typical,
            folder=self.known.folder,
            argument=argument,
            options=options,
            question=prompt.question or (0, n_token),
            is_chat=is_chat,
            is_later=prompt.is_later,
            can_draft=is_chat and thinking is None,
            n_weighed=n_weighed,
            n_thought=n_thought,
            calls=None if calls is None or calls.tools.required else calls,
            neutral=prompt.neutral,
        )

    def choice(self, prompt: Prompt, weighing: Weighing) -> Choice:
        """Find what weighs a prompt, and check it.

        weighing.by  None (the default strategy), a strategy's name, FusionWeights, a mapping from
                     adapter names to numbers, or an array [n_adapter, n_layer]

        Raises StrategyError or WeightsError.
        """
        if weighing.adapters is not None:
            weigher = self.using(weighing.adapters)
            return weigher.choice(prompt, replace(weighing, adapters=None))
        by = self.by_of(weighing)
        if isinstance(by, Mapping):
            pairs = [f"{name}={weight}" for name, weight in by.items()]
            by = f"manual:{','.join(pairs)}" if pairs else "base"
        parsed = None
        given = None
        if by is None or isinstance(by, str):
            parsed = self.parse(by or self.known.strategy)
            strategy: Strategy | None = parsed.strategy
        else:
            given = self._given(by)
            strategy = self.strategy_of(given.strategy)
        how = weighing.prefill or self.known.prefill
        if how == "auto" and prompt.question and strategy and strategy.is_base_prefilled:
            how = "base"
        query = self.query(prompt, parsed)
        is_read_by_base = how == "base" and bool(self.adapters)
        return Choice(query, parsed, given, is_read_by_base, weighing.relays)

    def _given(self, by: FusionWeights | ArrayLike) -> FusionWeights:
        """Check weights that are given for each layer."""
        if not isinstance(by, FusionWeights):
            weights = numbers.check_weights(by, self.adapters, self.n_layer)
            return FusionWeights(self.adapters, Plan.mix(weights))
        if by.adapters != self.adapters:
            raise StrategyError(
                f"The weights are for the adapters {', '.join(by.adapters)}, loaded are "
                f"{', '.join(self.adapters)}; weigh the prompt with this Engine."
            )
        numbers.check_weights(by.weights, self.adapters, self.n_layer)
        return by


def _for_query(fusion: FusionWeights, query: Query) -> FusionWeights:
    """Take weights that were given; their drafts are for one prompt alone."""
    if not fusion.prompt:
        return replace(fusion, lens=query.lens, pool=query.pool, prompt=query.tokens)
    if fusion.prompt == query.tokens:
        return fusion
    return fusion.undrafted()


def _with_reasons(fusion: FusionWeights) -> FusionWeights:
    """Add `because` and `why` for a strategy that measures one number an adapter."""
    measured = fusion.divergence
    if fusion.because or measured is None:
        return fusion
    first_layer = measured[:, :1]
    if (measured != first_layer).any():
        return fusion
    name = fusion.measured.name
    scores = measured[:, 0].tolist()  # [n_adapter]
    reasons = {}
    for adapter, score in zip(fusion.adapters, scores, strict=True):
        reasons[adapter] = Reason({name: score})
    highest = max(scores)
    who = fusion.adapters[scores.index(highest)]
    because = f"{who}: {name} {highest:.3g}, the highest."
    return replace(fusion, plan=replace(fusion.plan, because=because, why=reasons))


def not_loaded(name: str, loaded: Iterable[str]) -> StrategyError:
    return StrategyError(
        f"The adapter {name!r} is not loaded; expected names out of: "
        f"{', '.join(loaded) or 'none is loaded'}."
    )


def shaped(weights: F32, options: Options, source: str) -> F32:
    """Apply power, layers, top and total, in this order; without any, weights stay as they are.

    weights  [n_adapter, n_layer], finite, of a strategy
    options  given ones of config.SHAPING
    source   begins messages
    returns  [n_adapter, n_layer]

    Raises StrategyError for options on weights below 0.
    """
    if not options.keys() & {"power", "layers", "top", "total"}:
        return weights
    wide = np.asarray(weights, np.float64)
    if (wide < 0).any():
        raise StrategyError(
            f"{source}its weights go down to {wide.min():g}, expected none below 0 where power, "
            "layers, top or total shape them; leave these options out."
        )
    largest = wide.max(axis=0, keepdims=True)  # [1, n_layer]
    # Of shares of the largest no power underflows at all places.
    zeros = np.zeros_like(wide)
    relative = np.divide(wide, largest, out=zeros, where=largest > 0)
    power = options.get("power", 1.0)
    sharpened = relative**power
    shares = normalise(sharpened).astype(np.float64)
    if options.get("layers") == "mean":
        means = shares.mean(axis=1, keepdims=True)  # [n_adapter, 1]
        shares = np.repeat(means, shares.shape[1], axis=1)
    top = options.get("top")
    if top is not None:  # of the largest mean over layers
        means = shares.mean(axis=1)  # [n_adapter]
        heaviest_first = np.argsort(-means, kind="stable")
        kept = heaviest_first[:top]
        shares_of_kept = normalise(shares[kept])
        shares = np.zeros_like(shares)
        shares[kept] = shares_of_kept
    total: Any = options.get("total", 1.0)
    if total == "l2":
        squares = shares**2
        lengths = np.sqrt(squares.sum(axis=0, keepdims=True))  # [1, n_layer]
        total = 1.0 / lengths
    return np.asarray(shares * total, np.float32)
