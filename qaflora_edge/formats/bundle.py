"""The text of bundle.json: read with every field checked, and nothing else touched.

Format "qaflora-bundle/1". The text may come from anywhere: what its fields may be is said by
`data/bundle.schema.json`, and the rules between them here. Unknown keys are kept in `raw`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from qaflora_edge.arrays import F32
from qaflora_edge.errors import BundleError, StrategyError, WeightsError
from qaflora_edge.files import unsafe_reason
from qaflora_edge.formats.json_text import (
    WrongField,
    check_schema,
    read_unicode_object,
    shortened,
    shown,
)
from qaflora_edge.weighing.baselines import parse_centroid
from qaflora_edge.weighing.calibration import LAYERS
from qaflora_edge.weighing.strategy import parse_strategy
from qaflora_edge.weighing.weigher import Known

FORMAT = "qaflora-bundle/1"
BUNDLE_FILE = "bundle.json"
MAX_BUNDLE_BYTES = 8 << 20
MAX_ADAPTERS = 256
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_RULE = "1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"

_ADVICE = "Correct the file, or create the bundle again with `qaflora bundle create`."


Record = TypeVar("Record")


@dataclass(frozen=True)
class BaseRecord:
    """Which base a bundle is for, and where to look for it."""

    architecture: str
    n_layer: int
    n_embd: int
    n_vocab: int
    sha256: str
    size_bytes: int
    file: str | None = None
    registry: str | None = None
    hub: str | None = None
    name: str = ""


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter file of a bundle; size_bytes is None where it was not recorded."""

    name: str
    file: str
    sha256: str
    rank: int
    alpha: float
    targets: Sequence[str]
    size_bytes: int | None = None
    source: str = ""
    license: str = ""
    description: str = ""
    hub: str | None = None
    trained_on: str = ""


@dataclass(frozen=True)
class BundleText:
    """What bundle.json says.

    known    what an Engine takes by default, and what was measured
    fits     name -> what was fitted to examples: weights, and on what evidence
    system   what conversations begin with, or empty
    raw      the whole object, unknown keys included
    """

    name: str
    description: str
    license: str
    base: BaseRecord
    adapters: tuple[AdapterRecord, ...]
    known: Known
    fits: Mapping[str, Mapping[str, Any]]
    system: str
    raw: Mapping[str, Any]

    @property
    def evidence(self) -> str:
        """Why the strategy is the default, in words; "" where nothing says so."""
        found = self.raw.get("fusion", {}).get("evidence", {})
        if not found.get("tasks"):
            return ""
        counts = [(task["name"], task["n_item"]) for task in found["tasks"]]
        tasks = ", ".join(f"{name} ({n} item{'s' * (n != 1)})" for name, n in counts)
        return f"by qaflora eval on {found.get('date', 'an unknown day')}: {tasks}"


def parse_bundle(data: bytes, where: str) -> BundleText:
    """Read bundle.json.

    where  names the file in messages

    Raises BundleError naming the field, what was found and what was expected.
    """
    if len(data) > MAX_BUNDLE_BYTES:
        raise BundleError(
            f"Cannot read {where}: it has more than {MAX_BUNDLE_BYTES} bytes, the most that a "
            f"bundle.json may have. {_ADVICE}"
        )
    try:
        raw = read_unicode_object(data)
    except ValueError as error:  # errors of JSON and UTF-8 too
        raise BundleError(
            f"Cannot read {where}: it is not a JSON object in UTF-8 ({error}). {_ADVICE}"
        ) from error
    try:
        check_schema(raw, "bundle")
        return _bundle_text(raw)
    except WrongField as problem:
        raise BundleError(f"Cannot use {where}: {problem}. {_ADVICE}") from problem


def packed_files(text: BundleText) -> tuple[str, ...]:
    """The files that belong into a bundle's folder besides bundle.json, as it names them."""
    files = dict.fromkeys(adapter.file for adapter in text.adapters)
    if text.base.file is not None and unsafe_reason(text.base.file) is None:
        files[text.base.file] = None
    return tuple(files)


def _bundle_text(raw: Mapping[str, Any]) -> BundleText:
    """The text of a document that the schema allows, with the rules between its fields checked."""
    fusion = raw.get("fusion", {})
    chosen = Known().under(**{key: fusion.get(key) for key in ("strategy", "lens", "pool")})
    adapters = tuple(_record(AdapterRecord, adapter) for adapter in raw["adapters"])
    names = [adapter.name for adapter in adapters]
    _check_names(names)
    try:
        parse_strategy(chosen.strategy, names)
    except (StrategyError, WeightsError) as error:  # the field is a fact of this file
        expected = f"a strategy for these adapters ({error})"
        raise WrongField("fusion.strategy", shown(chosen.strategy), expected) from error
    base = _record(BaseRecord, raw["base"])
    typical = fusion.get("typical", {})
    _check_typical(typical, names, base.n_layer)
    fits = _fits(fusion.get("fitted", {}), names)
    known = replace(
        chosen,
        typical=typical,
        centroids=_centroids(fusion.get("samples", {}), names, base.n_embd),
    )
    return BundleText(
        name=raw.get("name", ""),
        description=raw.get("description", ""),
        license=raw.get("license", ""),
        base=base,
        adapters=adapters,
        known=known,
        fits=fits,
        system=raw.get("system", ""),
        raw=raw,
    )


def _record(kind: type[Record], raw: Mapping[str, Any]) -> Record:
    """Those fields of an object that a record has."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: raw[name] for name in names if name in raw})


def _check_names(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name.lower() in seen:
            raise WrongField(
                f"adapters[{index}].name", shown(name), "a name that no other adapter has"
            )
        seen.add(name.lower())


def _check_adapter(place: str, name: str, value: object, names: Sequence[str]) -> None:
    if name not in names:
        expected = f"only adapters of this bundle ({', '.join(names)})"
        raise WrongField(shortened(place), shown(value), expected)


def _centroids(
    samples: Mapping[str, Mapping[str, Any]], names: Sequence[str], n_embd: int
) -> dict[str, F32]:
    found = {}
    for name, record in samples.items():
        place = f"fusion.samples.{name}"
        _check_adapter(place, name, record, names)
        try:
            found[name] = parse_centroid(record["embedding"], n_embd)
        except ValueError as error:
            expected = f"base64 of {n_embd} finite float32 numbers, not all 0"
            raise WrongField(f"{place}.embedding", str(error), expected) from error
    return found


def _fits(
    fits: Mapping[str, Mapping[str, Any]], names: Sequence[str]
) -> Mapping[str, Mapping[str, Any]]:
    for name, record in fits.items():
        for adapter, weight in record["weights"].items():
            _check_adapter(f"fusion.fitted.{name}.weights.{adapter}", adapter, weight, names)
    return fits


def _check_typical(
    typical: Mapping[str, Mapping[str, Any]], names: Sequence[str], n_layer: int
) -> None:
    for name, by_key in typical.items():
        place = f"fusion.typical.{name}"
        _check_adapter(place, name, by_key, names)
        for key in LAYERS:
            if key in by_key and len(by_key[key]) != n_layer:
                found = f"a list of {len(by_key[key])}"
                raise WrongField(f"{place}.{key}", found, f"{n_layer} numbers, one per layer")
