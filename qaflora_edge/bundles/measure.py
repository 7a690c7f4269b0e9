"""Measure a bundle's adapters, and check that a strategy can weigh them.

The class Engine is handed in: an Engine opens bundles, so nothing here imports it.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from qaflora_edge.arrays import F32
from qaflora_edge.errors import BundleError, StrategyError
from qaflora_edge.files import package_data
from qaflora_edge.progress import Tell, TellCount
from qaflora_edge.weighing.baselines import centroid_text
from qaflora_edge.weighing.calibration import KEYS
from qaflora_edge.weighing.strategy import parse_strategy
from qaflora_edge.weighing.weigher import Known, Weigher

PROMPTS_FILE = "data/neutral_prompts.json"
CALIBRATION_CTX = 512  # tokens; the neutral prompts are short
SAMPLE_CTX = 2048  # tokens of one sample text
ONCE = "Measuring what is typical of each adapter, once"  # label of the progress


class Measures(Protocol):
    """An opened Engine, as far as it is needed here."""

    def typical_divergence(
        self,
        prompts: Sequence[str],
        progress: TellCount | None = None,
        keys: Collection[str] = KEYS,
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


def measure_typical(
    folder: Path,
    raw: dict[str, Any],
    strategy: str | None,
    base_path: Path,
    engine: OpenEngine,
    tell: Tell,
) -> bool:
    """Measure what adapters lack of typical values (method.md section 7).

    raw       bundle.json; its fusion is changed
    strategy  measure what it needs; None: all
    returns   whether there was anything to measure

    Raises as check_strategy, before the work where it can.
    """
    what = f"Cannot weigh the bundle {folder}"
    adapters = {record["name"]: folder / record["file"] for record in raw["adapters"]}
    keys = (
        KEYS if strategy is None else parse_strategy(strategy, [*adapters]).strategy.needs_typical
    )
    if strategy is not None:
        check_strategy(what, raw, strategy, is_measured=False)
    prompts, fusion = neutral_prompts(), raw.setdefault("fusion", {})
    recorded = {"sha256": prompts_sha256(prompts), "n_prompt": len(prompts)}
    typical: dict[str, dict[str, Any]] = fusion.get("typical", {})
    if fusion.get("typical_prompts", {}).get("sha256") != recorded["sha256"]:
        typical = {}  # measured on other prompts
    lacking = {key: [name for name in adapters if key not in typical.get(name, {})] for key in keys}
    names = {name for each in lacking.values() for name in each}
    if names:
        paths = {name: path for name, path in adapters.items() if name in names}
        with engine(base=base_path, adapters=paths, n_ctx=CALIBRATION_CTX) as opened:
            found = opened.typical_divergence(
                prompts,
                lambda done, total: tell(ONCE, done, total),
                keys=[key for key, each in lacking.items() if each],
            )
        for name, values in found.items():
            typical[name] = typical.get(name, {}) | _rounded(values)
        fusion |= {"typical": typical, "typical_prompts": recorded}
    if strategy is not None:
        check_strategy(what, raw, strategy)
    return bool(names)


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


def check_strategy(
    what: str, raw: Mapping[str, Any], strategy: str, *, is_measured: bool = True
) -> None:
    """Check that a strategy can weigh a bundle's adapters.

    what         fails otherwise, as in "Cannot create the bundle b"
    raw          bundle.json
    is_measured  False: typical values come later

    Raises StrategyError for an unknown strategy, else BundleError.
    """
    targets = {record["name"]: record["targets"] for record in raw["adapters"]}
    kind = parse_strategy(strategy, tuple(targets)).strategy
    reads = kind.reads_of_each
    others = [name for name, kinds in targets.items() if reads and not {*kinds} & {*reads}]
    needed = ""
    if others:
        needed = f"one of {', '.join(reads)} in each adapter, and {', '.join(others)} has none"
    elif not kind.can_compare(targets.values()):
        needed = f"one of {', '.join(kind.compares)} in all adapters ({', '.join(targets)})"
    if needed:
        raise BundleError(
            f"{what}: the strategy {strategy!r} needs {needed}. Choose another with --strategy."
        )
    if is_measured and kind.needs_typical:
        known = Known(strategy=strategy, typical=raw.get("fusion", {}).get("typical", {}))
        try:
            Weigher(tuple(targets), raw["base"]["n_layer"], known)
        except StrategyError as error:
            raise BundleError(f"{what}: {error}") from error
