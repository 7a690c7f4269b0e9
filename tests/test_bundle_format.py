"""The JSON Schema of bundle.json and the reader: each refuses what the other refuses.

The reader checks by the schema too; here it is judged by jsonschema, which shares no code with it.
"""

import base64
import copy
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from bundles import bundle_json

from qaflora_edge.errors import BundleError
from qaflora_edge.formats.bundle import BundleFields, is_inside, parse_bundle
from qaflora_edge.weighing.weigher import known_of

Raw = dict[str, Any]
Place = tuple[str | int, ...]
MISSING = object()

VALUES = (
    *(MISSING, None, True, 0, 1, -1, 3, 1.5, 2**62, 2**62 + 1, 10**400),
    *("", " ", "x\n", "é", "a/b", "../x", "a/../b", "/x", "\\x", "C:x", "a\0b", "a..b", "..", "-x"),
    *("x" * 64, "x" * 65, "x" * 100_001, "0" * 64, "0" * 64 + "\n", "A" * 64),
    *("owner/name", "owner/name/a/b.gguf@v1", "owner/name@", "owner/name@a/../b", "o/n/a.txt"),
    *("norm", "norm:0", "single:math", "manual:math=0.5,es=2", "manual:math", "raw", "mean"),
    *([], [1], ["x"], [None], ["x"] * 1025, {}, {"x": 1}, [{}]),
)


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = msgspec.json.schema(BundleFields)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module")
def raw(made) -> Raw:
    """A bundle.json with every field that there is."""
    found: Raw = bundle_json(made.folder)
    found["base"] |= {"registry": "tiny", "hub": "owner/name/base.gguf@v1"}
    found["adapters"][0] |= {"hub": "owner/name"}
    usual = {"mean": -3.5, "spread": 0.25, "each": [1.0, -1.0]}
    found["fusion"]["typical"] = {
        "math": {"raw": [1.0, 2, 0.5], "question_norm": [1.0, 2, 0.5], "added_last": usual}
    }
    found["fusion"]["typical_prompts"] = {"sha256": "0" * 64, "n_prompt": 3}
    embedding = base64.b64encode(np.ones(64, "<f4").tobytes()).decode("ascii")
    found["fusion"]["samples"] = {"math": {"embedding": embedding, "n_text": 3, "sha256": "0" * 64}}
    return found


def reader_takes(raw: Raw) -> bool:
    try:
        text = parse_bundle(json.dumps(raw).encode(), "bundle.json")
        known_of(text)
    except BundleError:
        return False
    return all(is_inside(adapter.file) for adapter in text.adapters)


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every place of a document that can be changed; of a list the first."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value[:1]):
            yield (*place, key)
            yield from places(inner, (*place, key))


def changed(raw: Raw, place: Place, value: Any) -> Raw:
    document = copy.deepcopy(raw)
    inner: Any = document
    for key in place[:-1]:
        inner = inner[key]
    if value is MISSING:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return document


def only_the_reader_knows(place: Place, value: Any) -> bool:
    """Rules between fields, which a schema cannot state; docs/bundle-format.md lists them."""
    if place == ("base", "n_layer"):
        return value in (1, 2)  # not the number of layers that were measured
    if place[-1] == "name" and place[0] == "adapters":
        return place[1] == 0 and isinstance(value, str)  # measurements name no adapter then
    if place == ("fusion", "strategy"):
        return isinstance(value, str)  # the reader knows the strategies and the adapters
    if place == ("adapters",) or place == ("adapters", 0):
        return value in ([], MISSING)  # measurements name no adapter then
    if place == ("fusion", "typical"):
        return value == {"x": {}}
    if place[:2] == ("fusion", "samples"):
        return place[-1] == "embedding" and isinstance(value, str)  # not n_embd numbers
    if place == ("base", "n_embd"):
        return isinstance(value, int)  # not the length of what was embedded
    return place[:2] == ("fusion", "typical") and len(place) >= 4 and value in (MISSING, [1])


def test_real_bundles_are_valid(validator, raw, checkout, calibrated) -> None:
    for path in (checkout / "models/demo/bundle.json", calibrated.folder / "bundle.json"):
        validator.validate(json.loads(path.read_text(encoding="utf-8")))
    validator.validate(raw)
    assert reader_takes(raw)
    minimal = {key: raw[key] for key in ("format", "base", "adapters")}
    for document in (minimal, {**raw, "colour": {"any": [1]}}, {**minimal, "adapters": []}):
        validator.validate(document)
        assert reader_takes(document)


@pytest.mark.slow
def test_schema_and_reader_refuse_the_same(validator, raw) -> None:
    """Each field in turn becomes each of many values, or is left out."""
    n_refused, differing = 0, []
    for place in places(raw):
        for value in VALUES:
            document = changed(raw, place, value)
            by_schema, by_reader = validator.is_valid(document), reader_takes(document)
            n_refused += not by_reader
            if by_schema != by_reader and not (by_schema and only_the_reader_knows(place, value)):
                differing.append((place, str(value)[:40], by_schema, by_reader))
    assert differing == []
    assert n_refused > 500


def test_what_older_bundles_have_is_kept_and_ignored(validator, raw) -> None:
    fusion = raw["fusion"] | {"pool": "mean", "strategy": "norm:2"}
    fusion["typical"] = {"math": {"fast_norm": [1.0], **fusion["typical"]["math"]}}
    document = {**raw, "fusion": fusion}
    assert validator.is_valid(document)
    text = parse_bundle(json.dumps(document).encode(), "bundle.json")
    assert text.raw == document
    assert (known_of(text).pool, known_of(text).strategy) == ("last", "norm:top=2")
