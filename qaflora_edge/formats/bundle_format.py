"""The text of bundle.json: read with every field checked, and nothing else touched.

Format "qaflora-bundle/1". The text may come from anywhere, so sizes, types, names and numbers are
checked before use. Unknown keys are kept in `raw`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from qaflora_edge.errors import BundleError, RegistryError, StrategyError, WeightsError
from qaflora_edge.files import unsafe_reason
from qaflora_edge.formats.hub_ref import parse_hub_ref
from qaflora_edge.formats.json_text import read_json_object
from qaflora_edge.weighing import numbers as fuse
from qaflora_edge.weighing.strategy import parse_strategy

FORMAT = "qaflora-bundle/1"
BUNDLE_FILE = "bundle.json"
MAX_BUNDLE_BYTES = 8 << 20
MAX_ADAPTERS = 256
MAX_LAYERS = 1024
MAX_TARGETS = 1024
MAX_TEXT_CHARS = 100_000
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_RULE = "1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_ADVICE = "Correct the file, or create the bundle again with `qaflora bundle create`."


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
    size_bytes: int | None
    rank: int
    alpha: float
    targets: tuple[str, ...]
    source: str
    license: str
    description: str
    hub: str | None = None
    trained_on: str = ""


@dataclass(frozen=True)
class BundleText:
    """What bundle.json says.

    fusion   strategy, lens and pool that an Engine takes by default
    typical  adapter -> lens -> typical divergence of each layer, n_layer numbers > 0
    raw      the whole object, unknown keys included
    """

    name: str
    description: str
    license: str
    base: BaseRecord
    adapters: tuple[AdapterRecord, ...]
    fusion: Mapping[str, str]
    typical: Mapping[str, Mapping[str, list[float]]]
    raw: Mapping[str, Any]


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
    root = _Fields(_parse_json(data, where), where, "")
    if root.raw.get("format") != FORMAT:
        root.fail("format", json.dumps(FORMAT) + " (another format needs another qaflora-edge)")
    base = _parse_base(root.object("base"))
    adapters = _parse_adapters(root)
    names = [adapter.name for adapter in adapters]
    fusion = root.object("fusion", required=False)
    return BundleText(
        name=root.text("name", default=""),
        description=root.text("description", default=""),
        license=root.text("license", default=""),
        base=base,
        adapters=adapters,
        fusion=_parse_fusion(fusion, names),
        typical=_parse_typical(fusion, names, base.n_layer),
        raw=root.raw,
    )


def packed_files(text: BundleText) -> tuple[str, ...]:
    """The files that belong into a bundle's folder besides bundle.json, as it names them."""
    files = dict.fromkeys(adapter.file for adapter in text.adapters)
    if text.base.file is not None and unsafe_reason(text.base.file) is None:
        files[text.base.file] = None
    return tuple(files)


def _parse_json(data: bytes, where: str) -> dict[str, Any]:
    try:
        return read_json_object(data)
    except ValueError as error:  # errors of JSON and UTF-8 too
        raise BundleError(
            f"Cannot read {where}: it is not a JSON object in UTF-8 ({error}). {_ADVICE}"
        ) from error


class _Fields:
    """One JSON object, whose fields are taken with their type and range checked."""

    def __init__(self, raw: dict[str, Any], where: str, prefix: str) -> None:
        self.raw, self.where, self.prefix = raw, where, prefix

    def fail(self, key: str, expected: str, found: Any = None) -> NoReturn:
        if found is None:
            found = _show(self.raw[key]) if key in self.raw else "missing"
        raise BundleError(
            f"Cannot use {self.where}: field {self.prefix}{key} is {found}, "
            f"expected {expected}. {_ADVICE}"
        )

    def text(self, key: str, default: str | None = None, expected: str = "a text") -> str:
        value = self.raw.get(key, default)
        if not isinstance(value, str) or (default is None and not value.strip()):
            self.fail(key, expected)
        if len(value) > MAX_TEXT_CHARS:
            self.fail(key, f"at most {MAX_TEXT_CHARS} characters", f"{len(value)} characters long")
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self.raw.get(key) is None else self.text(key)

    def count(self, key: str, largest: int = 1 << 62) -> int:
        value = self.raw.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            self.fail(key, f"a whole number from 1 to {largest}")
        return value

    def sha256(self, key: str) -> str:
        value = self.raw.get(key)
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            self.fail(key, "64 digits 0-9a-f")
        return value

    def list(self, key: str, largest: int) -> Sequence[Any]:
        value = self.raw.get(key)
        if not isinstance(value, list) or len(value) > largest:
            found = f"a list of {len(value)}" if isinstance(value, list) else None
            self.fail(key, f"a list of at most {largest}", found)
        return value

    def object(self, key: str, required: bool = True) -> _Fields:
        value = self.raw.get(key) if required else self.raw.get(key, {})
        if not isinstance(value, dict):
            self.fail(key, "an object")
        return _Fields(value, self.where, f"{self.prefix}{key}.")

    def choice(self, key: str, default: str, choices: Sequence[str]) -> str:
        value = self.raw.get(key, default)
        if value not in choices:
            self.fail(key, f"one of {', '.join(choices)}")
        return str(value)


def _parse_base(base: _Fields) -> BaseRecord:
    registry = base.optional_text("registry")
    if registry is not None and not NAME_PATTERN.fullmatch(registry):
        base.fail("registry", "a name of the registry (see `qaflora models`)")
    return BaseRecord(
        architecture=base.text("architecture"),
        n_layer=base.count("n_layer", MAX_LAYERS),
        n_embd=base.count("n_embd"),
        n_vocab=base.count("n_vocab"),
        sha256=base.sha256("sha256"),
        size_bytes=base.count("size_bytes"),
        file=base.optional_text("file"),
        registry=registry,
        hub=_parse_hub(base),
        name=base.text("name", default=""),
    )


def _parse_hub(fields: _Fields) -> str | None:
    hub = fields.optional_text("hub")
    if hub is not None:
        try:
            parse_hub_ref(hub)
        except RegistryError as error:  # the field is a fact of this file
            fields.fail("hub", f"a Hub reference ({error})")
    return hub


def _parse_adapters(root: _Fields) -> tuple[AdapterRecord, ...]:
    adapters: list[AdapterRecord] = []
    for index, raw in enumerate(root.list("adapters", MAX_ADAPTERS)):
        if not isinstance(raw, dict):
            root.fail(f"adapters[{index}]", "an object", _show(raw))
        fields = _Fields(raw, root.where, f"adapters[{index}].")
        adapter = _parse_adapter(fields)
        if any(adapter.name.lower() == other.name.lower() for other in adapters):
            fields.fail("name", "a name that no other adapter has")
        adapters.append(adapter)
    return tuple(adapters)


def _parse_adapter(fields: _Fields) -> AdapterRecord:
    name = fields.text("name", expected=NAME_RULE)
    if not NAME_PATTERN.fullmatch(name):
        fields.fail("name", NAME_RULE)
    alpha: Any = fields.raw.get("alpha")
    if not _is_finite(alpha):
        fields.fail("alpha", "a finite number")
    targets = fields.list("targets", MAX_TARGETS)
    if not all(isinstance(target, str) for target in targets):
        fields.fail("targets", "a list of texts")
    return AdapterRecord(
        name=name,
        file=fields.text("file"),
        sha256=fields.sha256("sha256"),
        size_bytes=fields.count("size_bytes") if "size_bytes" in fields.raw else None,
        rank=fields.count("rank"),
        alpha=float(alpha),
        targets=tuple(targets),
        source=fields.text("source", default=""),
        license=fields.text("license", default=""),
        description=fields.text("description", default=""),
        hub=_parse_hub(fields),
        trained_on=fields.text("trained_on", default=""),
    )


def _parse_fusion(fusion: _Fields, names: Sequence[str]) -> dict[str, str]:
    strategy = fusion.text("strategy", default=fuse.DEFAULT_STRATEGY)
    try:
        parse_strategy(strategy, names)
    except (StrategyError, WeightsError) as error:  # the field is a fact of this file
        fusion.fail("strategy", f"a strategy for these adapters ({error})")
    return {
        "strategy": strategy,
        "lens": fusion.choice("lens", fuse.DEFAULT_LENS, fuse.LENSES),
        "pool": fusion.choice("pool", fuse.DEFAULT_POOL, fuse.POOLS),
    }


def _parse_typical(
    fusion: _Fields, names: Sequence[str], n_layer: int
) -> dict[str, dict[str, list[float]]]:
    typical: dict[str, dict[str, list[float]]] = {}
    by_adapter = fusion.object("typical", required=False)
    for name in by_adapter.raw:
        if name not in names:
            by_adapter.fail(name, f"only adapters of this bundle ({', '.join(names)})")
        by_lens = by_adapter.object(name)
        typical[name] = {
            lens: _parse_layers(by_lens, lens, n_layer)
            for lens in fuse.LENSES
            if lens in by_lens.raw
        }
    return typical


def _parse_layers(fields: _Fields, key: str, n_layer: int) -> list[float]:
    values = fields.list(key, MAX_LAYERS)
    if len(values) != n_layer:
        fields.fail(key, f"{n_layer} numbers, one per layer", f"a list of {len(values)}")
    for layer, value in enumerate(values):
        if not _is_finite(value) or not value > 0:
            fields.fail(f"{key}[{layer}]", "a finite number above 0", _show(value))
    return [float(value) for value in values]


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # an integer beyond the range of a float
        return False


def _show(value: Any) -> str:
    """A value as JSON, short enough for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
