"""Measure a bundle's adapters, and check that a strategy can weigh them.

The class Engine is handed in: an Engine opens bundles, so nothing here imports it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from qaflora_edge.errors import BundleError, StrategyError
from qaflora_edge.files import package_data
from qaflora_edge.progress import Tell
from qaflora_edge.weighing.calibration import KEYS
from qaflora_edge.weighing.strategy import parse_strategy
from qaflora_edge.weighing.weigher import Known, Weigher

PROMPTS_FILE = "data/neutral_prompts.json"
CALIBRATION_CTX = 512  # tokens; the neutral prompts are short
OPENING, ONCE = "Opening the base", "Measuring what is typical of each adapter, once"

OpenEngine = Callable[..., AbstractContextManager[Any]]  # the class Engine


def neutral(kind: str) -> list[Any]:
    """Read what ships with the package: "prompts", "turns" of a few words, or "exchanges"."""
    return list(json.loads(package_data(PROMPTS_FILE).read_text(encoding="utf-8"))[kind])


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
    """
    adapters = {record["name"]: folder / record["file"] for record in raw["adapters"]}
    keys = (
        KEYS if strategy is None else parse_strategy(strategy, [*adapters]).strategy.needs_typical
    )
    prompts, turns, exchanges = map(neutral, ("prompts", "turns", "exchanges"))
    said = [message["content"] for exchange in exchanges for message in exchange]
    fusion, read = raw.setdefault("fusion", {}), [*prompts, *turns, *said]
    recorded = {"sha256": prompts_sha256(read), "n_prompt": len(read)}
    typical: dict[str, dict[str, Any]] = fusion.get("typical", {})
    if fusion.get("typical_prompts", {}).get("sha256") != recorded["sha256"]:
        typical = {}  # measured on other prompts
    lacking = {key: [name for name in adapters if key not in typical.get(name, {})] for key in keys}
    names = {name for each in lacking.values() for name in each}
    if names:
        paths = {name: path for name, path in adapters.items() if name in names}
        tell(OPENING, 0, 1)
        with engine(base=base_path, adapters=paths, n_ctx=CALIBRATION_CTX) as opened:
            tell(OPENING, 1, 1)
            tell(ONCE, 0, 1)
            found = opened.typical_divergence(
                prompts,
                lambda done, total: tell(ONCE, done, total),
                keys=[key for key, each in lacking.items() if each],
                turns=turns,
                exchanges=exchanges,
            )
        for name, values in found.items():
            typical[name] = typical.get(name, {}) | values
        fusion |= {"typical": typical, "typical_prompts": recorded}
    if strategy is not None:
        check_strategy(f"Cannot weigh the bundle {folder}", raw, strategy)
    return bool(names)


def check_strategy(what: str, raw: Mapping[str, Any], strategy: str) -> None:
    """Check that a strategy finds what it needs to know of a bundle's adapters.

    what  fails otherwise, as in "Cannot create the bundle b"
    raw   bundle.json; sample texts may come later

    Raises StrategyError for an unknown strategy, else BundleError.
    """
    names = tuple(record["name"] for record in raw["adapters"])
    if parse_strategy(strategy, names).strategy.needs_typical:
        known = Known(strategy=strategy, typical=raw.get("fusion", {}).get("typical", {}))
        try:
            Weigher(names, raw["base"]["n_layer"], known)
        except StrategyError as error:
            raise BundleError(f"{what}: {error}") from error
