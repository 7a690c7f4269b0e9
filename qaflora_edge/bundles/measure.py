"""Measure a bundle's adapters, and check that they can be weighed by a strategy.

The class Engine is handed in: an Engine opens bundles, so nothing here imports it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from qaflora_edge.arrays import F32
from qaflora_edge.errors import BundleError, StrategyError
from qaflora_edge.files import package_data
from qaflora_edge.progress import Tell, TellCount
from qaflora_edge.weighing import numbers
from qaflora_edge.weighing.baselines import centroid_text
from qaflora_edge.weighing.calibration import KEYS
from qaflora_edge.weighing.strategy import parse_strategy
from qaflora_edge.weighing.weigher import Known, Weigher

PROMPTS_FILE = "data/neutral_prompts.json"
CALIBRATION_CTX = 512  # tokens; the neutral prompts are short
SAMPLE_CTX = 2048  # tokens of one sample text


class Measures(Protocol):
    """An opened Engine, as far as it is needed here."""

    def typical_divergence(
        self, prompts: Sequence[str], progress: TellCount | None = None
    ) -> dict[str, dict[str, Any]]: ...

    def centroid(self, texts: Sequence[str], progress: TellCount | None = None) -> F32: ...


OpenEngine = Callable[..., AbstractContextManager[Measures]]  # the class Engine


def neutral_prompts() -> list[str]:
    """Read the prompts that ship with the package, in order."""
    data = json.loads(package_data(PROMPTS_FILE).read_text(encoding="utf-8"))
    return [str(prompt) for prompt in data["prompts"]]


def prompts_sha256(prompts: Sequence[str]) -> str:
    """Hash prompts in UTF-8, each followed by a line feed."""
    return hashlib.sha256("".join(f"{prompt}\n" for prompt in prompts).encode("utf-8")).hexdigest()


def unmeasured(fusion: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Name the adapters that lack typical divergences on the neutral prompts of this version.

    fusion  of bundle.json
    """
    prompts, typical = fusion.get("typical_prompts"), fusion.get("typical", {})
    recorded = prompts.get("sha256") if isinstance(prompts, Mapping) else None
    if recorded != prompts_sha256(neutral_prompts()):
        return [*names]
    return [name for name in names if not all(key in typical.get(name, {}) for key in KEYS)]


def measure_typical(
    fusion: dict[str, Any],
    base_path: Path,
    adapters: Mapping[str, Path],
    engine: OpenEngine,
    tell: Tell,
) -> None:
    """Measure typical divergences of unmeasured adapters (method.md section 7).

    fusion    of bundle.json; it is changed
    adapters  name -> adapter GGUF, of all that the bundle has
    """
    names, prompts = unmeasured(fusion, [*adapters]), neutral_prompts()
    if not names:
        return
    if len(names) == len(adapters):
        fusion["typical"] = {}
    paths = {name: adapters[name] for name in names}
    with engine(base=base_path, adapters=paths, n_ctx=CALIBRATION_CTX) as opened:
        found = opened.typical_divergence(
            prompts, lambda done, total: tell("calibration", done, total)
        )
    fusion.setdefault("typical", {}).update(_rounded(found))
    fusion["typical_prompts"] = {"sha256": prompts_sha256(prompts), "n_prompt": len(prompts)}


def measure_samples(
    base_path: Path, texts: Sequence[str], engine: OpenEngine, tell: Tell
) -> dict[str, Any]:
    """Embed sample texts: what bundle.json keeps of them, which is no text."""
    with engine(base=base_path, n_ctx=SAMPLE_CTX) as opened:
        centroid = opened.centroid(texts, lambda *done: tell("samples", *done))
    return {
        "embedding": centroid_text(centroid),
        "n_text": len(texts),
        "sha256": prompts_sha256(texts),
    }


def _rounded(value: Any) -> Any:
    """Round numbers to nine digits, all that float32 has."""
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else float(f"{value:.9g}")


def needs_typical(strategy: str, names: Sequence[str]) -> bool:
    """Tell whether a strategy needs typical divergences. Raises StrategyError for an unknown one.

    names  adapters of the bundle
    """
    return parse_strategy(strategy, names).strategy.needs_typical


def check_measured(what: str, strategy: str, names: Sequence[str]) -> None:
    """Check that a strategy can weigh adapters that will not be measured.

    what  fails otherwise, as in "Cannot add the adapter a to b"

    Raises StrategyError for an unknown strategy, else BundleError.
    """
    if needs_typical(strategy, names):
        raise BundleError(
            f"{what}: its strategy is {strategy!r}, which needs typical divergences, and they are "
            "not to be measured. Leave --no-calibrate out, or choose another with --strategy."
        )


def check_strategy(what: str, raw: Mapping[str, Any], *, is_measured: bool = True) -> None:
    """Check that a bundle's adapters can be weighed by its strategy.

    what         fails otherwise, as in "Cannot add the adapter a to b"
    raw          bundle.json; sample texts may come later
    is_measured  False: typical divergences come later

    Raises StrategyError for an unknown strategy, else BundleError.
    """
    fusion = raw.get("fusion", {})
    text = fusion.get("strategy", numbers.DEFAULT_STRATEGY)
    targets = {record["name"]: record["targets"] for record in raw["adapters"]}
    strategy = parse_strategy(text, tuple(targets)).strategy
    reads = strategy.reads_of_each
    others = [name for name, kinds in targets.items() if not {*kinds} & {*reads}]
    if others and reads:
        raise BundleError(
            f"{what}: its strategy is {text!r}, which goes by what adapters add to "
            f"{', '.join(reads)}, and {', '.join(others)} adds nothing to any of them. Choose "
            "another with --strategy, or leave it out."
        )
    if not strategy.can_compare(targets.values()):
        raise BundleError(
            f"{what}: its strategy is {text!r}, which compares adapters by "
            f"{', '.join(strategy.compares)}, and no one of these is adapted by all of "
            f"{', '.join(targets)}. Choose another with --strategy."
        )
    if is_measured and needs_typical(text, tuple(targets)):
        known = Known(strategy=text, typical=fusion.get("typical", {}))
        known = known.under(lens=fusion.get("lens"), pool=fusion.get("pool"))
        try:
            Weigher(tuple(targets), raw["base"]["n_layer"], known)
        except StrategyError as error:
            raise BundleError(f"{what}: {error}") from error
