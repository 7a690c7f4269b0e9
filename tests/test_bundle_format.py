"""The fields of bundle.json: what a reader takes, and the JSON Schema that is made of them."""

import json
from typing import Any

import jsonschema
import msgspec
import pytest
from bundles import bundle_json

from qaflora_edge.errors import BundleError
from qaflora_edge.formats.bundle import BundleFields, TypicalRecord, parse_bundle
from qaflora_edge.weighing.calibration import KEYS
from qaflora_edge.weighing.weigher import known_of

Raw = dict[str, Any]


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
    return found


def read(raw: Raw) -> Any:
    return parse_bundle(json.dumps(raw).encode(), "bundle.json")


def test_real_bundles_are_valid(validator, raw, checkout, calibrated) -> None:
    for path in (checkout / "models/demo/bundle.json", calibrated.folder / "bundle.json"):
        validator.validate(json.loads(path.read_text(encoding="utf-8")))
    minimal = {key: raw[key] for key in ("format", "base", "adapters")}
    for document in (raw, minimal, {**raw, "colour": {"any": [1]}}, {**minimal, "adapters": []}):
        validator.validate(document)
        assert read(document).raw == document


def test_all_that_was_measured_of_the_demo_is_read(checkout) -> None:
    path = checkout / "demo/bundle.json"
    found = parse_bundle(path.read_bytes(), str(path))
    for name, keys in found.raw["fusion"]["typical"].items():
        read_keys = {key for key in keys if getattr(found.fusion.typical[name], key, None)}
        assert read_keys == keys.keys()


@pytest.mark.parametrize(
    ("place", "values"),
    [
        ("file", ("", " ", "../x", "a/../b", "/x", "\\x", "C:x", "a\0b", "..", "~/x", "file:x", 1)),
        ("name", ("", "-x", "a/b", "x\n", "é", "x" * 65, None)),
        ("sha256", ("0" * 64 + "\n", "A" * 64, "0" * 63)),
        ("hub", ("owner", "owner/name@", "owner/name@a/../b", "o/n/a.txt", "../n")),
        ("rank", (0, 1.5, True, 2**62 + 1, 10**400)),
        ("alpha", (True, "1", 10**400)),
        ("targets", (None, [1], ["x"] * 1025)),
        ("description", ("x" * 100_001,)),
    ],
)
def test_values_that_no_adapter_can_have_are_refused(raw, place, values) -> None:
    first, *others = raw["adapters"]
    for value in values:
        with pytest.raises(BundleError, match=rf"field adapters\[0\]\.{place}\S* is "):
            read({**raw, "adapters": [{**first, place: value}, *others]})


def test_what_older_bundles_have_is_kept_and_ignored(raw) -> None:
    fusion = raw["fusion"] | {"pool": "mean", "strategy": "norm:2"}
    fusion["typical"] = {"math": {"fast_norm": [1.0], **fusion["typical"]["math"]}}
    document = {**raw, "fusion": fusion}
    text = read(document)
    assert text.raw == document
    assert (known_of(text).pool, known_of(text).strategy) == ("last", "spectr:top=2")


def test_all_that_calibration_measures_is_read() -> None:
    assert {*TypicalRecord.__struct_fields__} == {*KEYS}
