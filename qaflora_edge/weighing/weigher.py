"""The weigher: from a strategy's name, or given weights, to the fusion weights of a query."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from qaflora_edge.arrays import F32
from qaflora_edge.ask import Prompt
from qaflora_edge.config import LENSES, POOLS, PREFILLS
from qaflora_edge.errors import QafloraError, StrategyError
from qaflora_edge.formats.bundle import BundleText, wrong_bundle
from qaflora_edge.formats.inputs import WrongField, shown
from qaflora_edge.weighing import numbers
from qaflora_edge.weighing.numbers import FusionWeights, normalise
from qaflora_edge.weighing.strategy import (
    Chosen,
    Mix,
    Probe,
    Query,
    Reason,
    Typical,
    find_strategy,
    parse_strategy,
    strategies,
)

Weights = FusionWeights | Mapping[str, float] | ArrayLike | str | None


@dataclass(frozen=True)
class Known:
    """Hold a bundle's defaults of weighing, and measurements of its adapters.

    prefill  who prefills prompts, of config.PREFILLS
    typical, centroids  see Query
    """

    strategy: str = numbers.DEFAULT_STRATEGY
    lens: str = numbers.DEFAULT_LENS
    pool: str = numbers.DEFAULT_POOL
    prefill: str = "auto"
    typical: Typical = field(default_factory=dict, repr=False)
    centroids: Mapping[str, F32] = field(default_factory=dict, repr=False)

    def under(self, **given: str | None) -> Self:
        """Replace the defaults by the strategy, lens, pool and prefill that a caller gives."""
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value}
        return replace(self, **chosen)


def known_of(text: BundleText | None) -> Known:
    """Collect what a bundle says of weighing; None: the defaults.

    Raises BundleError for a strategy that is not for its adapters, or a damaged sample embedding.
    """
    if text is None:
        return Known()
    fusion = text.fusion
    strategy = fusion.get("strategy")
    if strategy and re.fullmatch(r"norm:[1-9]\d*", strategy):  # of 0.1
        strategy = strategy.replace(":", ":top=")
    pool = fusion.get("pool")
    known = Known().under(
        strategy=strategy,
        lens=fusion.get("lens"),
        pool=None if pool == "mean" else pool,  # of 0.1 too
        prefill=fusion.get("prefill", "mix"),  # an older bundle answers as before
    )
    try:
        parse_strategy(known.strategy, [adapter.name for adapter in text.adapters])
    except QafloraError as error:
        expected = f"a strategy for these adapters ({error})"
        wrong = WrongField("fusion.strategy", shown(known.strategy), expected)
        raise wrong_bundle(text.where, wrong) from error
    centroids = {}
    for name, record in fusion.get("samples", {}).items():
        from qaflora_edge.weighing.baselines.centroid import parse_centroid

        try:
            centroids[name] = parse_centroid(record["embedding"], text.base.n_embd)
        except ValueError as error:
            expected = f"base64 of {text.base.n_embd} finite float32 numbers, not all 0"
            wrong = WrongField(f"fusion.samples.{name}.embedding", str(error), expected)
            raise wrong_bundle(text.where, wrong) from error
    return replace(known, typical=fusion.get("typical", {}), centroids=centroids)


@dataclass(frozen=True)
class Weigher:
    """Weigh for an Engine, by the adapters in use, defaults, and facts of each adapter.

    targets  adapter -> kinds of modules that it adapts, where known
    """

    adapters: tuple[str, ...]
    n_layer: int
    known: Known = Known()
    targets: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, choices in (("lens", LENSES), ("pool", POOLS), ("prefill", PREFILLS)):
            value = getattr(self.known, what)
            if value not in choices:
                expected = " or ".join(choices)
                raise StrategyError(f"The {what} {value!r} is not known; expected {expected}.")
        self.parse(self.known.strategy)

    def parse(self, text: str) -> Chosen:
        """Parse a strategy. Raises StrategyError if it is unknown or cannot be followed here."""
        chosen = parse_strategy(text, self.adapters)
        query = self.query(Prompt(()), chosen)
        chosen.strategy.check(chosen.argument, query)
        return chosen

    @property
    def followed(self) -> tuple[str, ...]:
        """List the strategies that can be followed here without an argument.

        First the base, the static mix and each adapter alone, then those that look at the query.
        """
        if not self.adapters:
            return ("base",)
        targets = [self.targets[name] for name in self.adapters if name in self.targets]
        fixed = []
        probed = []
        for strategy in strategies():
            compares = set(strategy.compares)
            if strategy.needs_argument or (compares and not compares.intersection(*targets)):
                continue
            if not strategy.is_probed:
                fixed.append(strategy.name)
            elif not strategy.is_baseline:
                probed.append(strategy.name)
        fixed.remove("base")
        followed = []
        for text in ("base", *fixed, *(f"single:{name}" for name in self.adapters), *probed):
            with suppress(QafloraError):
                self.parse(text)
                followed.append(text)
        return tuple(followed)

    def query(self, prompt: Prompt, chosen: Chosen | None = None) -> Query:
        """Make a query from a prompt, these defaults and the strategy's options."""
        options = {} if chosen is None else chosen.options
        n_token = len(prompt.tokens)
        thinking = prompt.thinking
        is_chat = prompt.question is not None
        return Query(
            tokens=prompt.tokens,
            adapters=self.adapters,
            n_layer=self.n_layer,
            lens=self.known.lens,
            pool=options.get("pool", self.known.pool),
            typical=self.known.typical,
            centroids=self.known.centroids,
            options=options,
            question=prompt.question or (0, n_token),
            is_chat=is_chat,
            is_later=prompt.is_later,
            can_relay=is_chat and thinking is None,
            n_weighed=n_token if thinking is None else thinking.n_weighed,
        )

    def n_base(self, weights: Weights, prompt: Prompt, prefill: str | None = None) -> int:
        """Count the tokens of a prompt that the base prefills: all but the last few, or none.

        weights  as weigh() takes them
        prefill  of config.PREFILLS, or None: the default
        """
        how = prefill or self.known.prefill
        if isinstance(weights, FusionWeights):
            weights = weights.strategy
        if isinstance(weights, Mapping) and not weights:
            weights = "base"
        if how == "auto" and isinstance(weights, str | None) and prompt.question:
            name, _, _ = (weights or self.known.strategy).partition(":")
            strategy = find_strategy(name)
            if strategy is not None and strategy.is_base_prefilled:
                how = "base"
        return numbers.n_base_of(len(prompt.tokens)) if how == "base" and self.adapters else 0

    def weigh(
        self, weights: Weights, prompt: Prompt, probe: Callable[[Query], Probe]
    ) -> FusionWeights:
        """Weigh a query by a strategy, or take given weights.

        weights  None (the default strategy), a strategy name, FusionWeights, a mapping from
                 adapter names to numbers, or an array [n_adapter, n_layer]
        probe    makes the probe of a query
        """
        if isinstance(weights, FusionWeights):
            if weights.adapters != self.adapters:
                raise StrategyError(
                    f"The weights are for the adapters {', '.join(weights.adapters)}, loaded are "
                    f"{', '.join(self.adapters)}; weigh the prompt with this Engine."
                )
            numbers.check_weights(weights.weights, self.adapters, self.n_layer)
            if weights.relay is not None and weights.relay.prompt != prompt.tokens:
                return replace(weights, relay=None)  # another prompt's draft
            return weights
        if isinstance(weights, Mapping):
            pairs = [f"{name}={weight}" for name, weight in weights.items()]
            weights = f"manual:{','.join(pairs)}" if pairs else "base"
        if weights is not None and not isinstance(weights, str):
            return self._fusion(Mix(weights), "manual", self.query(prompt))
        chosen = self.parse(weights or self.known.strategy)
        strategy = chosen.strategy
        query = self.query(prompt, chosen)
        if not self.adapters:
            return self._fusion(Mix(np.zeros((0, self.n_layer))), chosen.text, query)
        start = time.perf_counter()
        mix = strategy.weigh(query, probe(query), chosen.argument)
        spent_ms = 1e3 * (time.perf_counter() - start)
        probe_ms = spent_ms if strategy.is_probed else 0.0
        if not isinstance(mix, Mix):
            mix = Mix(mix)
        source = f"Strategy {chosen.text!r}: "
        fusion = self._fusion(mix, chosen.text, query, probe_ms, source=source)
        weights = shaped(fusion.weights, chosen.options, source)
        return _with_reasons(replace(fusion, weights=weights))

    def _fusion(
        self, mix: Mix, strategy: str, query: Query, probe_ms: float = 0.0, *, source: str = ""
    ) -> FusionWeights:

        def checked(array: ArrayLike) -> F32:
            return numbers.check_weights(array, self.adapters, self.n_layer, source=source)

        return FusionWeights(
            adapters=self.adapters,
            weights=checked(mix.weights),
            divergence=None if mix.divergence is None else checked(mix.divergence),
            strategy=strategy,
            lens=query.lens,
            pool=query.pool,
            prompt_tokens=len(query.tokens),
            probe_ms=probe_ms,
            because=mix.because,
            why=mix.why,
            relay=mix.relay,
            begun=mix.begun,
        )


def _with_reasons(fusion: FusionWeights) -> FusionWeights:
    """Add `because` and `why` for a strategy that measures one number an adapter."""
    measured = fusion.divergence
    if fusion.because or measured is None or (measured != measured[:, :1]).any():
        return fusion
    name = fusion.measured.name
    scores = measured[:, 0].tolist()  # [n_adapter]
    reasons = {}
    for adapter, score in zip(fusion.adapters, scores, strict=True):
        reasons[adapter] = Reason({name: score})
    highest = fusion.adapters[scores.index(max(scores))]
    because = f"{highest}: {name} {max(scores):.3g}, the highest."
    return replace(fusion, because=because, why=reasons)


def shaped(weights: F32, options: Mapping[str, Any], source: str) -> F32:
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
    relative = np.divide(wide, largest, out=np.zeros_like(wide), where=largest > 0)
    power = options.get("power", 1.0)
    shares = normalise(relative**power).astype(np.float64)
    if options.get("layers") == "mean":
        means = shares.mean(axis=1, keepdims=True)  # [n_adapter, 1]
        shares = np.repeat(means, shares.shape[1], axis=1)
    top = options.get("top")
    if top is not None:  # of the largest mean over layers
        kept = np.argsort(-shares.mean(axis=1), kind="stable")[:top]
        shares_of_kept = normalise(shares[kept])
        shares = np.zeros_like(shares)
        shares[kept] = shares_of_kept
    total: Any = options.get("total", 1.0)
    if total == "l2":
        lengths = np.sqrt((shares**2).sum(axis=0, keepdims=True))  # [1, n_layer]
        total = 1.0 / lengths
    return np.asarray(shares * total, np.float32)
