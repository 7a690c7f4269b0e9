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
OPENING = "Opening the base"
ONCE = "Measuring what is typical of each adapter, once"

OpenEngine = Callable[..., AbstractContextManager[Any]]  # the class Engine


def neutral(kind: str) -> list[Any]:
    """Read what ships with the package: "prompts", "turns" of a few words, or "exchanges"."""
    text = package_data(PROMPTS_FILE).read_text(encoding="utf-8")
    return list(json.loads(text)[kind])


def prompts_sha256(prompts: Sequence[str]) -> str:
    """Hash prompts in UTF-8, each followed by a line feed."""
    lines = [f"{prompt}\n" for prompt in prompts]
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


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
    paths = {record["name"]: folder / record["file"] for record in raw["adapters"]}
    keys: Sequence[str] = KEYS
    if strategy is not None:
        keys = parse_strategy(strategy, list(paths)).strategy.needs_typical
    prompts = neutral("prompts")
    turns = neutral("turns")
    exchanges = neutral("exchanges")
    read = [*prompts, *turns]
    for exchange in exchanges:
        read += [message["content"] for message in exchange]
    recorded = {"sha256": prompts_sha256(read), "n_prompt": len(read)}
    fusion = raw.setdefault("fusion", {})
    typical: dict[str, dict[str, Any]] = fusion.get("typical", {})
    measured_on = fusion.get("typical_prompts", {}).get("sha256")
    if measured_on != recorded["sha256"]:
        typical = {}  # measured on other prompts
    lacking_keys = []
    lacking_names = set()
    for key in keys:
        lacking = [name for name in paths if key not in typical.get(name, {})]
        if lacking:
            lacking_keys.append(key)
        lacking_names.update(lacking)
    if lacking_keys:
        adapters = {name: path for name, path in paths.items() if name in lacking_names}
        tell(OPENING, 0, 1)
        with engine(base=base_path, adapters=adapters, n_ctx=CALIBRATION_CTX) as opened:
            tell(OPENING, 1, 1)
            tell(ONCE, 0, 1)
            measured = opened.typical_divergence(
                prompts,
                lambda done, total: tell(ONCE, done, total),
                keys=lacking_keys,
                turns=turns,
                exchanges=exchanges,
            )
        for name, values in measured.items():
            typical[name] = typical.get(name, {}) | values
        fusion["typical"] = typical
        fusion["typical_prompts"] = recorded
    if strategy is not None:
        check_strategy(f"Cannot weigh the bundle {folder}", raw, strategy)
    return bool(lacking_keys)


def check_strategy(what: str, raw: Mapping[str, Any], strategy: str) -> None:
    """Check that a strategy finds what it needs to know of a bundle's adapters.

    what  fails otherwise, as in "Cannot create the bundle b"
    raw   bundle.json; sample texts may come later

    Raises StrategyError for an unknown strategy, else BundleError.
    """
    names = tuple(record["name"] for record in raw["adapters"])
    if not parse_strategy(strategy, names).strategy.needs_typical:
        return
    typical = raw.get("fusion", {}).get("typical", {})
    known = Known(strategy=strategy, typical=typical)
    try:
        Weigher(names, raw["base"]["n_layer"], known)
    except StrategyError as error:
        raise BundleError(f"{what}: {error}") from error
