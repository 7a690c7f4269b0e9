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
    Options,
    Probe,
    Query,
    Reason,
    Strategy,
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

    def under(self, **options: str | None) -> Self:
        """Replace the defaults by the strategy, lens, pool and prefill that a caller gives."""
        chosen: dict[str, Any] = {name: value for name, value in options.items() if value}
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
    if pool == "mean":  # of 0.1 too
        pool = None
    prefill = fusion.get("prefill", "mix")  # an older bundle answers as before
    known = Known().under(strategy=strategy, lens=fusion.get("lens"), pool=pool, prefill=prefill)
    try:
        parse_strategy(known.strategy, [adapter.name for adapter in text.adapters])
    except QafloraError as error:
        expected = f"a strategy for these adapters ({error})"
        wrong = WrongField("fusion.strategy", shown(known.strategy), expected)
        raise wrong_bundle(text.where, wrong) from error
    typical = fusion.get("typical", {})
    return replace(known, typical=typical, centroids=_centroids(text))


def _centroids(text: BundleText) -> dict[str, F32]:
    """Read the mean embeddings [n_embd] of adapters' sample texts, as far as there are some."""
    centroids = {}
    n_embd = text.base.n_embd
    for name, record in text.fusion.get("samples", {}).items():
        from qaflora_edge.weighing.baselines.centroid import parse_centroid

        try:
            centroids[name] = parse_centroid(record["embedding"], n_embd)
        except ValueError as error:
            expected = f"base64 of {n_embd} finite float32 numbers, not all 0"
            wrong = WrongField(f"fusion.samples.{name}.embedding", str(error), expected)
            raise wrong_bundle(text.where, wrong) from error
    return centroids


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
        known = self.known
        _check_one_of("lens", known.lens, LENSES)
        _check_one_of("pool", known.pool, POOLS)
        _check_one_of("prefill", known.prefill, PREFILLS)
        self.parse(known.strategy)

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
        fixed = []
        probed = []
        for strategy in strategies():
            if strategy.needs_argument or not self._can_compare(strategy):
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

    def _can_compare(self, strategy: Strategy) -> bool:
        """Tell whether all adapters adapt a kind of modules that a strategy compares."""
        targets = [self.targets[name] for name in self.adapters if name in self.targets]
        shared = set(strategy.compares).intersection(*targets)
        return bool(shared) or not strategy.compares

    def query(self, prompt: Prompt, chosen: Chosen | None = None) -> Query:
        """Make a query from a prompt, these defaults and the strategy's options."""
        options = {} if chosen is None else chosen.options
        n_token = len(prompt.tokens)
        thinking = prompt.thinking
        n_weighed = n_token if thinking is None else thinking.n_weighed
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
            n_weighed=n_weighed,
            neutral=prompt.neutral,
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
        if how != "base" or not self.adapters:
            return 0
        return numbers.n_base_of(len(prompt.tokens))

    def weigh(
        self, weights: Weights, prompt: Prompt, probe: Callable[[Query], Probe]
    ) -> FusionWeights:
        """Weigh a query by a strategy, or take given weights.

        weights  None (the default strategy), a strategy name, FusionWeights, a mapping from
                 adapter names to numbers, or an array [n_adapter, n_layer]
        probe    makes the probe of a query
        """
        if isinstance(weights, FusionWeights):
            return self._weighed_before(weights, prompt)
        if isinstance(weights, Mapping):
            pairs = [f"{name}={weight}" for name, weight in weights.items()]
            weights = f"manual:{','.join(pairs)}" if pairs else "base"
        if weights is not None and not isinstance(weights, str):
            return self._fusion(Mix(weights), "manual", self.query(prompt))
        chosen = self.parse(weights or self.known.strategy)
        strategy = chosen.strategy
        query = self.query(prompt, chosen)
        if not self.adapters:
            nothing = np.zeros((0, self.n_layer))
            return self._fusion(Mix(nothing), chosen.text, query)
        start_s = time.perf_counter()
        mix = strategy.weigh(query, probe(query), chosen.argument)
        seconds = time.perf_counter() - start_s
        probe_ms = 1e3 * seconds if strategy.is_probed else 0.0
        if not isinstance(mix, Mix):
            mix = Mix(mix)
        source = f"Strategy {chosen.text!r}: "
        fusion = self._fusion(mix, chosen.text, query, probe_ms, source=source)
        weights = shaped(fusion.weights, chosen.options, source)
        return _with_reasons(replace(fusion, weights=weights))

    def _weighed_before(self, fusion: FusionWeights, prompt: Prompt) -> FusionWeights:
        if fusion.adapters != self.adapters:
            raise StrategyError(
                f"The weights are for the adapters {', '.join(fusion.adapters)}, loaded are "
                f"{', '.join(self.adapters)}; weigh the prompt with this Engine."
            )
        self._checked(fusion.weights)
        relay = fusion.relay
        if relay is not None and relay.prompt != prompt.tokens:
            return replace(fusion, relay=None)  # another prompt's draft
        return fusion

    def _checked(self, weights: ArrayLike, source: str = "") -> F32:
        return numbers.check_weights(weights, self.adapters, self.n_layer, source=source)

    def _fusion(
        self, mix: Mix, strategy: str, query: Query, probe_ms: float = 0.0, *, source: str = ""
    ) -> FusionWeights:
        divergence = None
        if mix.divergence is not None:
            divergence = self._checked(mix.divergence, source)
        return FusionWeights(
            adapters=self.adapters,
            weights=self._checked(mix.weights, source),
            divergence=divergence,
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
    return replace(fusion, because=because, why=reasons)


def _check_one_of(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        expected = " or ".join(choices)
        raise StrategyError(f"The {what} {value!r} is not known; expected {expected}.")


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
