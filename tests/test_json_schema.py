"""JSON schemas as grammars: what follows them is valid JSON, by jsonschema's judgement."""

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, localcontext
from typing import Any

import jsonschema
import numpy as np
import pytest
from refusals import refused

from qaflora_edge.backend.model import Model
from qaflora_edge.errors import GrammarError
from qaflora_edge.inference.constraint import Constraint, Grammar, schema_grammar

FORMATS = ["date", "time", "date-time", "duration", "hostname", "ipv4", "ipv6", "uuid"]


def allowed(model: Model, constraint: Constraint) -> np.ndarray:
    bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits[: model.n_vocab])


def write_text(model: Model, grammar: Grammar, seed: int, closing: bytes = b'"}],:') -> str:
    """A text by chance under a grammar, with a growing leaning towards signs that close."""
    constraint, chance, data = Constraint(model, grammar), np.random.default_rng(seed), b""
    leaning = np.array(
        [
            model.piece(i) in map(bytes, zip(closing)) or model.is_end(i)
            for i in range(model.n_vocab)
        ]
    )
    for n in range(3000):
        tokens = allowed(model, constraint)
        weights = 2 * chance.standard_normal(len(tokens)) + min(12.0, n / 20) * leaning[tokens]
        token = int(tokens[weights.argmax()])
        if model.is_end(token):
            assert constraint.can_end()
            return data.decode("utf-8")
        data += model.piece(token)
        constraint.accept(token)
    raise AssertionError(f"no end: {data[-200:]!r}")


def check(model: Model, schema: Any, n: int = 4, closing: bytes = b'"}],:') -> list[Any]:
    """Texts by chance are valid under the schema, their numbers taken as they are written."""
    grammar = schema_grammar(schema)
    values = []
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    validator = jsonschema.Draft202012Validator(
        exact, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    for seed in range(n):
        text = write_text(model, grammar, seed, closing)
        value = json.loads(text, parse_float=Decimal)
        with localcontext() as context:
            context.prec = 3000
            assert validator.is_valid(value), (schema, text)
        text.encode()  # no lone surrogate
        values.append(value)
    return values


_KIND = {"type": "object", "required": ["kind"], "properties": {"kind": {"type": "string"}}}
TREE = {
    "type": "object",
    "properties": {"left": {"$ref": "#/$defs/tree"}, "value": {"type": "integer"}},
    "required": ["value"],
}
SHAPES: list[Any] = [
    *({"const": value} for value in (1.5, 1e10, 2**53, -0.0001, "", 'é😀"\\/\n\t', [False], {})),
    {"enum": [6, "foo", [], True, {"foo": 12}]},
    {"enum": ["abc", "abcdef", 3], "maxLength": 4},
    {"allOf": [{"enum": ["a", "b", 1]}, {"enum": ["b", 1, None]}, {"type": "string"}]},
    {"allOf": [{"multipleOf": 2}], "anyOf": [{"multipleOf": 3}], "type": "integer"},
    {"allOf": [{"prefixItems": [{"minimum": 3}]}], "items": {"minimum": 5}, "type": "array"},
    {"oneOf": [{"properties": {"kind": {"const": kind}}} for kind in "ab"], **_KIND},
    {"prefixItems": [{}], "items": {"type": "null"}, "minItems": 2, "maxItems": 5},
    {"properties": {name: {"type": "null"} for name in ("a\nb", 'a"b', "a\\b", "$ref", "a/b~c")}},
    {"properties": {"foo": {"$ref": "#"}, "bar": False}, "additionalProperties": False},
    {"patternProperties": {"^f": {"const": 1}, "^b": False}, "type": "object"},
    {"$defs": {"a~b/c%d": {"type": "null"}}, "$ref": "#/$defs/a~0b~1c%25d"},
    {"$defs": {"r": {"type": "array"}}, "properties": {"f": {"$ref": "#/$defs/r", "maxItems": 2}}},
    {"type": ["string", "null", "integer"], "minLength": 1, "maxLength": 5, "minimum": 3},
    {"type": "integer", "exclusiveMinimum": -5, "exclusiveMaximum": 98},
    {"type": "string", "pattern": "^[a-z]{2,4}$"},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1},
    {"type": "object", "additionalProperties": {"type": "null"}, "maxProperties": 2},
    {"$defs": {"tree": TREE}, "$ref": "#/$defs/tree"},
    {"$defs": {"tree": TREE}, "$ref": "#/$defs/tree", "required": ["left"]},
    *({"type": "string", "format": each} for each in FORMATS),
]


@pytest.mark.parametrize("schema", SHAPES, ids=repr)
def test_shapes_are_followed(model, schema) -> None:
    check(model, schema, n=3, closing=b'"@' if "format" in schema else b'"}],:')


def is_taken(model: Model, grammar: Grammar, text: str) -> bool:
    constraint = Constraint(model, grammar)
    for token in model.tokenize(text, add_special=False, parse_special=False):
        if token not in allowed(model, constraint):
            return False
        constraint.accept(token)
    return constraint.can_end()


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "object"}, '{"a": [1, {"b": null}], "c": "x"}'),
        ({"properties": {"a": {}, "b": {}}, "required": ["b"]}, '{"a":0, "b":1}'),
        ({"type": "string", "format": "uri", "maxLength": 2083}, '"https://a-b.example/c?d=e#f"'),
        ({"type": "string", "format": "email"}, '"first.last+tag@example.org"'),
        ({"type": "integer", "maximum": 2**53 - 1, "minimum": 1 - 2**53}, "-12"),
    ],
)
def test_good_texts_are_taken(model, schema, text) -> None:
    assert is_taken(model, schema_grammar(schema), text)
    jsonschema.validate(json.loads(text), schema)


REFUSED = [
    ({"type": "number", "multipleOf": 10**5 + 1}, "#", "'multipleOf' is too large or too fine; us"),
    ({"uniqueItems": True}, "#", "the keyword 'uniqueItems' is not supported; leave it out"),
    ({"items": [{}]}, "#/items", "found [{}]; expected a schema (an object)"),
    (
        {"properties": {"a/b": {"anyOf": [True, {"maxLenght": 2}]}}},
        "#/properties/a~1b/anyOf/1",
        "the keyword 'maxLenght' is not supported; leave it out",
    ),
    ({"minProperties": 2}, "#", "'minProperties' is 2; expected 0 or 1"),
    ({"$ref": "file:///etc/passwd"}, "#", "'$ref' is 'file:///etc/passwd'; expected #/ and a"),
    ({"items": {"$id": "x"}}, "#/items", "the keyword '$id' is not supported; leave it out"),
    ({"required": [["a"]]}, "#", "'required' is [['a']]; expected names"),
]


@pytest.mark.parametrize(("schema", "place", "found"), REFUSED)
def test_what_the_library_would_pass_over_is_refused(schema, place, found) -> None:
    told = refused(GrammarError, schema_grammar, schema, source="The schema x.json")
    assert told.startswith(f"The schema x.json, at {place}: {found}")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "text"}, "Invalid type: text"),
        ({"enum": ["a"], "type": "null"}, "Unsatisfiable schema: incompatible types"),
        ({"pattern": "a(?=b)"}, "regex parse error: a(?=b) ^^^ error: look-around, including"),
        ({"$ref": "#"}, "nothing can be written under it"),
    ],
)
def test_refusal_of_the_library_is_told(schema, reason) -> None:
    told = refused(GrammarError, schema_grammar, schema)
    assert told.startswith(f"The JSON schema cannot be followed: {reason}")
    assert told.endswith(". Correct it, or write it more simply.")


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(GrammarError, match=r"^The JSON schema is no JSON \(.*\); correct it\.$"):
        schema_grammar({"const": float("nan")})


def test_a_format_that_is_no_text_restricts_nothing(model) -> None:
    assert is_taken(model, schema_grammar({"type": "string", "format": []}), '"x"')


def test_only_named_properties_come_unless_schemas_are_combined(model) -> None:
    schema: dict[str, Any] = {"properties": {"a": {}}, "required": ["a"]}
    text = '{"a":1,"b":2}'
    assert not is_taken(model, schema_grammar(schema), text)
    assert not is_taken(model, schema_grammar(schema), "3")
    for more in ({"additionalProperties": True}, {"allOf": [schema]}):
        assert is_taken(model, schema_grammar(schema | more), text)


def ends_in_bounded_time(function: Callable[[], object]) -> None:
    """Run to the end or an error, on a stack of 512 KiB; Windows gives 1 MiB."""
    start = time.process_time()
    before = threading.stack_size(512 << 10)
    try:
        with contextlib.suppress(GrammarError), ThreadPoolExecutor(1) as pool:
            pool.submit(function).result()
    finally:
        threading.stack_size(before)
    assert time.process_time() - start < 60


def _deep(n: int) -> Any:
    schema: Any = {}
    for _ in range(n):
        schema = {"items": schema}
    return schema


def _chain(n: int) -> Any:
    names = {f"d{i}": {"properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": {**names, f"d{n}": {}}}


def _powers(n: int) -> Any:
    """A value of 2^n parts, all of them required."""
    parts = {
        f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}, "minItems": 2}
        for i in range(n)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**parts, f"d{n}": {"type": "null"}}}


def _grid(n: int) -> Any:
    options = [{"properties": {f"p{i}": {"type": "null"}}} for i in range(n)]
    return {"type": "object", "allOf": [{"anyOf": options} for _ in range(n)]}


HOSTILE = {
    "deep": _deep(900),
    "powers": _powers(60),
    "grid": _grid(30),
    "all of itself": {"allOf": [{"$ref": "#"}] * 50, "type": "object"},
    "long chain": _chain(48),
    "length": {"type": "string", "minLength": 90_000},
    "items": {"type": "array", "items": {"type": "array", "minItems": 900}, "minItems": 900},
    "multiples": {"allOf": [{"multipleOf": n} for n in (65521, 65519, 65497)], "type": "integer"},
    "multiple": {"type": "integer", "multipleOf": 99_999_999},
    "big": [{}] * 100_000,
    **{
        f"pattern {pattern[:20]}": {"type": "string", "pattern": pattern}
        for pattern in (
            *("(a{1000}){1000}", "(a|b){300}.*a.{300}$", "((a*)*)*b" * 200, "(" * 4000),
            *("(.{1,1000}a){9}", "[" + "a-z" * 1000 + "]*"),
        )
    },
}


def test_long_chains_never_reach_the_compiler() -> None:
    """20,000 references in a chain overflow a stack of 8 MiB, and end the process."""
    schema_grammar(_chain(48))
    with pytest.raises(GrammarError, match="more than 100 parts in each other at #"):
        schema_grammar(_chain(1000))
    for n in (70, 990, 5000):
        with pytest.raises(GrammarError, match=r"nested too deeply|recursion depth"):
            schema_grammar(_deep(n))
    with pytest.raises(GrammarError, match="characters, expected at most 65536"):
        schema_grammar({"enum": ["x" * 70_000]})


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_end_in_bounded_time(model, name) -> None:
    """With an error, or so many tokens; each within what a slow machine needs for its limits."""

    def follow() -> None:
        constraint, chance = Constraint(model, schema_grammar(HOSTILE[name])), random.Random(1)
        for _ in range(50):
            token = int(chance.choice(allowed(model, constraint)))
            if model.is_end(token):
                break
            constraint.accept(token)

    ends_in_bounded_time(follow)
