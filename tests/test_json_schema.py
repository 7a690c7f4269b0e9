"""JSON schemas as grammars: what follows them is valid JSON, by jsonschema's judgement."""

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
from tiny import write_tiny_base

from qaflora_edge.backend.model import Model
from qaflora_edge.errors import GrammarError
from qaflora_edge.grammar.gbnf import check_gbnf
from qaflora_edge.grammar.json_grammar import FORMATS
from qaflora_edge.grammar.json_schema import json_schema_to_gbnf
from qaflora_edge.inference.sampler import Sampler
from qaflora_edge.inference.sampling import Sampling


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    base = write_tiny_base(tmp_path_factory.mktemp("schema") / "base.gguf")
    with Model(base.path) as model:
        yield model


class Chance:
    """Stands where a context does: its logits are noise, with a leaning towards an end."""

    def __init__(self, model: Model, seed: int, closing: bytes) -> None:
        self._model, self._random, self._n = model, np.random.default_rng(seed), 0
        self._closing = np.array(
            [
                model.piece(i) in map(bytes, zip(closing)) or model.is_end(i)
                for i in range(model.n_vocab)
            ]
        )

    def logits(self) -> np.ndarray:
        self._n += 1
        lean = min(12.0, self._n / 20)
        noise = 2 * self._random.standard_normal(self._model.n_vocab)
        return (noise + lean * self._closing).astype(np.float32)


def write_text(model: Model, grammar: str, seed: int, closing: bytes = b'"}],:') -> str:
    """A text by chance under a grammar; the native sampler says what may come next."""
    sampler = Sampler(model, Sampling(grammar=grammar))
    chance = Chance(model, seed, closing)
    data = b""
    for _ in range(3000):
        token = sampler.sample(chance)  # type: ignore[arg-type]
        if model.is_end(token):
            return data.decode("utf-8")
        data += model.piece(token)
    raise AssertionError(f"no end: {data[-200:]!r}")


def check(model: Model, schema: Any, n: int = 4, closing: bytes = b'"}],:') -> list[Any]:
    grammar = json_schema_to_gbnf(schema)
    values = []
    for seed in range(n):
        text = write_text(model, grammar, seed, closing)
        value = json.loads(text)
        validator = jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        validator.validate(value)
        json.dumps(value, allow_nan=False).encode()  # no infinity, no lone surrogate
        values.append(value)
    return values


class Draw:
    """Schemas by chance, out of every keyword that is followed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def schema(self, depth: int = 0) -> Any:
        kinds = ["string", "number", "integer", "fixed", "simple", "many"]
        if depth < 3:
            kinds += ["object", "object", "array", "union", "ref", "one", "tuple"]
        return getattr(self, f"_{self.random.choice(kinds)}")(depth + 1)

    def _string(self, depth: int) -> Any:
        low = self.random.randrange(4)
        return self.random.choice(
            [
                {"type": "string"},
                {"type": "string", "minLength": low},
                {"type": "string", "minLength": low, "maxLength": low + self.random.randrange(5)},
                {"type": "string", "format": self.random.choice(sorted(FORMATS))},
                {"type": "string", "format": "unknown", "x-order": 1, "nullable": True},
                {"maxLength": 3, "type": "string"},
            ]
        )

    def _number(self, depth: int) -> Any:
        bounds = self._integer(depth)
        keys = self.random.sample(sorted(set(bounds) - {"type"}), self.random.randrange(3))
        unit = self.random.choice([1, 1, 8, 100])
        bounds = {key: bounds[key] / unit if unit > 1 else bounds[key] for key in keys}
        return {"type": "number", "format": "double"} | {key: bounds[key] for key in keys}

    def _integer(self, depth: int) -> Any:
        low = self.random.choice([0, 1, 7, 99, -5, -120, 12345, -(10**15)])
        return {
            "type": "integer",
            self.random.choice(["minimum", "exclusiveMinimum"]): low,
            self.random.choice(["maximum", "exclusiveMaximum"]): low
            + 2
            + self.random.choice([0, 3, 90, 4567]),
        }

    def _fixed(self, depth: int) -> Any:
        values = [1, "a", 'q"\\\n', None, True, 2.5, {"k": [1]}, [], "ñ 你"]
        if self.random.random() < 0.5:
            return {"enum": self.random.sample(values, 3)}
        return {"const": self.random.choice(values)}

    def _simple(self, depth: int) -> Any:
        return self.random.choice(
            [True, {}, {"type": "null"}, {"type": "boolean"}, {"type": "array"}, {"type": "object"}]
        )

    def _many(self, depth: int) -> Any:
        return {"type": ["string", "null", "integer"], "maxLength": 5, "minimum": 3}

    def _object(self, depth: int) -> Any:
        names = self.random.sample(
            ["a", "ab", "abc", "b", 'x"y', "z\\", "n m", "é", "", "^", "]"], 4
        )
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self.schema(depth) for name in names},
            "required": self.random.sample(names, self.random.randrange(4)),
        }
        if self.random.random() < 0.5:
            schema["additionalProperties"] = self.random.choice([True, False, {"type": "integer"}])
            if schema["additionalProperties"] is not False and self.random.random() < 0.5:
                schema["required"].append("other")
        return schema

    def _array(self, depth: int) -> Any:
        low = self.random.randrange(3)
        schema = {"type": "array", "items": self.schema(depth), "minItems": low}
        if self.random.random() < 0.7:
            schema["maxItems"] = low + self.random.randrange(3)
        return schema

    def _tuple(self, depth: int) -> Any:
        schema = {"type": "array", "prefixItems": [self.schema(depth) for _ in range(2)]}
        return schema | self.random.choice(
            [{}, {"items": False}, {"items": {"type": "null"}, "minItems": 3}, {"maxItems": 1}]
        )

    def _union(self, depth: int) -> Any:
        return {"anyOf": [self.schema(depth) for _ in range(2)]}

    def _one(self, depth: int) -> Any:
        return {
            "oneOf": [
                {"type": "integer"},
                {"type": "object", "properties": {"k": {"const": 1}}, "required": ["k"]},
                {"type": "object", "properties": {"k": {"const": 2}}, "required": ["k"]},
            ]
        }

    def _ref(self, depth: int) -> Any:
        return {"$ref": self.random.choice(["#/$defs/tree", "#/$defs/a~1b", "#/$defs/p%20q"])}

    def whole(self) -> Any:
        return {
            "allOf": [self.schema()],
            "$defs": {
                "tree": {
                    "type": "object",
                    "properties": {"left": {"$ref": "#/$defs/tree"}, "value": {"type": "integer"}},
                    "required": ["value"],
                },
                "a/b": {"type": "string", "description": "of a name with a slash"},
                "p q": {"enum": ["x", "y"]},
            },
        }


@pytest.mark.parametrize("seed", range(25))
def test_schemas_by_chance_are_followed(model: Model, seed: int) -> None:
    for i in range(3):
        check(model, Draw(1000 * seed + i).whole(), n=2)


def test_unnamed_keys_are_never_a_named_one_of_another_type(model: Model) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "null"}, "ab": {"type": "null"}},
        "additionalProperties": {"type": "boolean"},
        "required": ["c"],
    }
    values = check(model, schema, n=30)
    assert any(set(value) - {"a", "ab", "c"} for value in values)
    assert all(value["c"] in (True, False) for value in values)


def test_integer_ranges_are_exact(model: Model) -> None:
    """Every integer from -130 to 130 is taken exactly when it lies between the bounds."""
    draw = random.Random(5)
    for _ in range(3):
        low = draw.randint(-120, 110)
        high = draw.randint(low, 120)
        grammar = json_schema_to_gbnf({"type": "integer", "minimum": low, "maximum": high})
        for number in range(-130, 131):
            assert is_taken(model, grammar, str(number)) == (low <= number <= high), (low, high)


def test_number_ranges_are_exact(model: Model) -> None:
    """Numbers around the bounds are taken exactly when jsonschema finds them valid."""
    draw = random.Random(7)
    for _ in range(12):
        low = draw.randint(-12, 11)
        schema = {
            "type": "number",
            draw.choice(["minimum", "exclusiveMinimum"]): low,
            draw.choice(["maximum", "exclusiveMaximum"]): low + draw.randint(1, 12),
        }
        del schema[draw.choice(["type", *schema])]
        schema["type"] = "number"
        grammar = json_schema_to_gbnf(schema)
        bounds = {bound for key, bound in schema.items() if key != "type"} | {0}
        for bound in bounds:
            for text in (
                f"{bound + i}{end}" for i in range(-2, 3) for end in ("", ".0", ".5", ".01")
            ):
                number = float(text)
                is_valid = jsonschema.Draft202012Validator(schema).is_valid(number)
                if number != 0 or not text.startswith("-"):
                    assert is_taken(model, grammar, text) == is_valid, (schema, text)


@pytest.mark.parametrize("kind", ["number", "integer"])
def test_fractional_ranges_are_exact(model: Model, kind: str) -> None:
    """Numbers around the bounds are taken exactly when jsonschema finds them valid."""
    draw = random.Random(11)
    ends = ("", "0", "00", "1", "01", "49", "5", "9", "99")
    given: list[dict[str, Any]] = [
        {"exclusiveMinimum": 0.5, "maximum": 0.75},
        {"minimum": 0.25, "exclusiveMaximum": 1.5},
        {"exclusiveMinimum": -1, "exclusiveMaximum": 0.25},
    ]
    for _ in range(6):
        low, width = draw.randint(-250, 150), draw.choice([0, 1, 5, 100, 211])
        unit = draw.choice([10, 100, 1000])
        schema = {
            draw.choice(["minimum", "exclusiveMinimum"]): low / unit,
            draw.choice(["maximum", "exclusiveMaximum"]): (low + width) / unit,
        }
        if draw.random() < 0.3:
            del schema[draw.choice(sorted(schema))]
        given.append(schema)
    for schema in given:
        schema["type"] = kind
        grammar = grammar_or_nothing(schema)
        texts = {f"{n}" for n in range(-4, 5)}
        if kind == "number":
            for bound in (value for value in schema.values() if value != kind):
                near = [f"{bound + i / unit:.3f}".rstrip("0") for i in (-1, 0, 1)]
                texts |= {f"{text}{end}" for text in near for end in ends} | {"0.0", "1.0"}
        for text in texts:
            if text.endswith(".") or (float(text) == 0 and text.startswith("-")):
                continue
            is_valid = jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
            assert bool(grammar and is_taken(model, grammar, text)) == is_valid, (schema, text)


def grammar_or_nothing(schema: Any) -> str:
    """The grammar, or "" where no number fits."""
    try:
        return json_schema_to_gbnf(schema)
    except GrammarError as error:
        if "lies between" in str(error) or "lies from" in str(error):
            return ""
        raise


def test_no_fraction_is_rounded_onto_a_fractional_bound(model: Model) -> None:
    grammar = json_schema_to_gbnf({"type": "number", "exclusiveMaximum": 0.3})
    text = "0.2"
    while is_taken(model, grammar, f"{text}9"):
        text += "9"
    assert len(text) == 16
    assert float(text) < 0.3


@pytest.mark.parametrize("digits", [1, 5, 9, 14, 15])
def test_no_fraction_is_rounded_onto_a_bound(model: Model, digits: int) -> None:
    high = 10**digits
    grammar = json_schema_to_gbnf({"type": "number", "exclusiveMaximum": high})
    text = f"{high - 1}."
    while is_taken(model, grammar, f"{text}9"):
        text += "9"
    assert text[-1] == "9"
    assert float(text) < high


def is_taken(model: Model, grammar: str, text: str) -> bool:
    """Whether the native sampler takes a whole text, token by token."""
    sampler = Sampler(model, Sampling(grammar=grammar))
    end = next(i for i in range(model.n_vocab) if model.is_end(i))
    for token in [*model.tokenize(text, add_special=False, parse_special=False), end]:
        if not sampler._allows(token):
            return False
        model._lib.llama_sampler_accept(sampler._grammar, token)
    return True


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "object"}, '{"a": [1, {"b": null}], "c": "x"}'),
        ({"const": '\n"\\\\'}, '"\\n\\"\\\\\\\\"'),
        ({"type": "string", "maxLength": 1}, '"\\n"'),
        ({"type": "number"}, "-12.5e-3"),
        ({"type": "array", "prefixItems": [{"type": "null"}], "items": True}, "[null,1,2]"),
        ({"properties": {"a": {}, "b": {}}, "required": ["b"]}, '{"b":1}'),
        ({"properties": {"a": {}, "b": {}}, "required": ["b"]}, '{"a":0, "b":1}'),
        ({"allOf": [{"$ref": "#/definitions/x"}], "definitions": {"x": {"enum": [1]}}}, "1"),
        ({"oneOf": [{"type": "null"}, {"type": ["integer", "string"]}]}, "null"),
        ({"type": ["string", "null"], "enum": ["x", 3, None]}, "null"),
        ({"type": "array", "minItems": 1, "maxItems": 2}, "[1, 2]"),
        ({"type": "string", "format": "path", "maxLength": 5000}, '"a/b"'),
        (
            {"type": "string", "format": "uri", "maxLength": 2083},
            '"https://a-b.example.org/c?d=e#f"',
        ),
        ({"type": "string", "format": "email"}, '"first.last+tag@example.org"'),
        ({"format": "duration", "type": "string"}, '"P3DT4H5M"'),
        ({"type": "integer", "maximum": 2**53 - 1, "minimum": 1 - 2**53}, "-12"),
        ({"type": "integer", "format": "int32", "minimum": 1.0}, "1"),
    ],
)
def test_good_texts_are_taken(model: Model, schema: Any, text: str) -> None:
    assert is_taken(model, json_schema_to_gbnf(schema), text)
    jsonschema.validate(json.loads(text), schema)


def test_a_bound_of_thousands_of_digits_is_cut_as_others_are() -> None:
    """Python writes no integer of more than 4300 digits."""
    cut = json_schema_to_gbnf({"type": "integer", "minimum": 3, "maximum": 10**15})
    assert json_schema_to_gbnf({"type": "integer", "minimum": 3, "maximum": 10**5000}) == cut


REFUSED = [
    ({"type": "number", "multipleOf": 2}, "#", "the keyword 'multipleOf' is not supported here"),
    ({"type": "number", "maximum": "2"}, "#", "'maximum' is '2'; expected a number"),
    ({"type": "number", "maximum": float("inf")}, "#", "'maximum' is inf; expected a number"),
    ({"type": "number", "minimum": 0.5, "maximum": 0.25}, "#", "no number lies between 0.5 and"),
    ({"type": "number", "exclusiveMinimum": 0.5, "maximum": 0.5}, "#", "no number lies between"),
    ({"type": "number", "minimum": 123456.123456789}, "#", "bounds of more than 14 digits (1234"),
    ({"type": "number", "minimum": 2, "exclusiveMaximum": 2}, "#", "no number lies between 2"),
    ({"type": "number", "minimum": True}, "#", "'minimum' is True; expected a number"),
    ({"type": "number", "minimum": 10**16}, "#", "the bound 10000000000000000; expected one"),
    ({"type": "integer", "minimum": 10**5000}, "#", "the bound 1000000000000000000000000000000"),
    ({"type": "array", "uniqueItems": True}, "#", "the keyword 'uniqueItems' is not supported"),
    ({"type": "array", "contains": {}}, "#", "the keyword 'contains' is not supported here"),
    ({"type": "object", "patternProperties": {}}, "#", "the keyword 'patternProperties' is not"),
    ({"not": {}}, "#", "the keyword 'not' is not supported here"),
    ({"if": {}, "then": {}}, "#", "the keyword 'if' is not supported here"),
    ({"properties": {"a": {"type": "text"}}}, "#/properties/a", "'type' is 'text'; expected of"),
    ({"format": "date", "maxLength": 9}, "#", "'format' is 'date', of 10 to 10 characters, beside"),
    ({"type": "array", "minItems": 9999}, "#", "'minItems' is 9999; expected a number from 0"),
    ({"type": "array", "minItems": True}, "#", "'minItems' is True; expected a number from 0"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "#", "'minLength' is 3, 'maxLength' is"),
    ({"type": "integer", "minimum": 0.5, "maximum": 0.75}, "#", "no integer lies from 1 to 0"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "#", "no integer lies from 3 to 2"),
    ({"$ref": "https://example.org/s"}, "#", "'$ref' is 'https://example.org/s'; expected a place"),
    ({"$ref": "#/$defs/x"}, "#", "'$ref' is '#/$defs/x'; expected a place that exists"),
    ({"$ref": "#/$defs/x", "type": "null"}, "#", "'$ref' beside 'type' is not supported"),
    ({"allOf": [{}, {}]}, "#", "'allOf' of several schemas is not supported"),
    ({"anyOf": []}, "#", "'anyOf' is []; expected a list of schemas"),
    ({"anyOf": [False]}, "#", "'anyOf' fits nothing"),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "#/oneOf", "a value may fit both 0 and"),
    ({"oneOf": [{"$ref": "#"}, {}]}, "#/oneOf", "a value may fit both 0 and 1"),
    ({"oneOf": [{"type": [["x"]]}, {}]}, "#/oneOf/0", "'type' is [['x']]; expected of object"),
    ({"oneOf": [{"type": "object", "required": 5}] * 2}, "#/oneOf/0", "'required' is 5; expected"),
    ({"enum": []}, "#", "'enum' is []; expected a list of values"),
    ({"enum": ["a"], "minLength": 2}, "#", "'minLength' beside const or enum is not supported"),
    ({"enum": ["a"], "type": "null"}, "#", "no value fits type, const and enum"),
    ({"const": "\ud800"}, "#", "a constant that JSON cannot write"),
    ({"const": float("nan")}, "#", "a constant that JSON cannot write"),
    ({"properties": []}, "#", "'properties' is []; expected an object"),
    ({"required": "a"}, "#", "'required' is 'a'; expected a list of names"),
    ({"required": ["a"], "additionalProperties": False}, "#", "the required 'a' is neither in"),
    (False, "#", "found false, which nothing fits"),
    ("x", "#", "found 'x'; expected a schema (an object)"),
]


@pytest.mark.parametrize(("schema", "place", "found"), REFUSED)
def test_what_cannot_be_followed_is_refused(schema: Any, place: str, found: str) -> None:
    with pytest.raises(GrammarError) as caught:
        json_schema_to_gbnf(schema, source="The schema x.json")
    assert str(caught.value).startswith(f"The schema x.json, at {place}: {found}")
    assert str(caught.value).endswith(".")


def test_schemas_without_end_are_refused() -> None:
    deep: Any = {}
    for _ in range(100):
        deep = {"items": deep}
    with pytest.raises(GrammarError, match="more than 64 schemas in each other; use"):
        json_schema_to_gbnf(deep)
    circle: dict[str, Any] = {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    }
    with pytest.raises(GrammarError, match="can begin with itself"):
        check_gbnf(json_schema_to_gbnf(circle))
