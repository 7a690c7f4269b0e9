"""From a JSON schema to a grammar: what follows the grammar is valid under the schema.

Every keyword that restricts is either followed or refused by name; notes for readers, unknown
formats among them, restrict nothing. The grammar may allow less than the schema does (properties
come in the schema's order, and only those that are named unless additionalProperties is given),
never more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import unquote

from qaflora_edge.errors import GrammarError
from qaflora_edge.grammar.bounds import integer_rule, number_rule, read_bounds
from qaflora_edge.grammar.json_grammar import (
    FORMATS,
    JSON_RULES,
    joined,
    literal,
    members_in_order,
    other_key,
)
from qaflora_edge.grammar.json_values import are_apart, is_of, is_same
from qaflora_edge.grammar.pattern import pattern_rules

MAX_DEPTH = 64
MAX_ITEMS = 1000  # of arrays, and characters of strings whose number is bounded
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_NOTES = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
    | {"$schema", "$id", "$anchor", "$comment", "$defs", "definitions"}
    | {"contentEncoding", "contentMediaType", "contentSchema"}
    | {"example", "externalDocs", "discriminator", "nullable", "xml"}  # OpenAPI's
)
_KEYWORDS = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "format", "pattern"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
}


def json_schema_to_gbnf(schema: Any, *, source: str = "The JSON schema") -> str:
    """A grammar for llama.cpp whose texts are JSON, valid under the schema.

    schema  as json.loads gives it; True or {} takes any value
    source  how messages call the schema, such as "The schema person.json"

    Raises GrammarError for a schema that is malformed, or asks for what cannot be followed.
    """
    return _Converter(schema, source).grammar()


class _Converter:
    """Rules by name; each place in the schema that is visited becomes one or a few."""

    def __init__(self, schema: Any, source: str) -> None:
        self._schema, self._source = schema, source
        self._rules: dict[str, str] = {}
        self._of_reference: dict[str, str] = {}
        self._n_name = 0

    def grammar(self) -> str:
        root = self._visit(self._schema, "#", 0)
        rules = {"root": root, **self._rules, **JSON_RULES}
        return "".join(f"{name} ::= {rule}\n" for name, rule in rules.items())

    def _fail(self, place: str, found: str, advice: str) -> GrammarError:
        return GrammarError(f"{self._source}, at {place}: {found}; {advice}.")

    def _name(self, rule: str) -> str:
        self._n_name += 1
        name = f"r{self._n_name}"
        self._rules[name] = rule
        return name

    # one place of the schema

    def _visit(self, schema: Any, place: str, depth: int) -> str:
        """An expression for one schema: a rule's name, or something in brackets."""
        if depth > MAX_DEPTH:
            raise self._fail(place, f"more than {MAX_DEPTH} schemas in each other", "use $ref")
        if schema is True:
            return "value"
        if schema is False:
            raise self._fail(place, "found false, which nothing fits", "leave it out")
        if not isinstance(schema, Mapping):
            raise self._fail(place, f"found {_short(schema)}", "expected a schema (an object)")
        keys = {key for key in schema if key not in _NOTES and not str(key).startswith("x-")}
        if "$ref" in keys:
            self._check_alone(keys, "$ref", place)
            return self._reference(schema["$ref"], place, depth)
        for key in ("anyOf", "oneOf", "allOf"):
            if key in keys:
                self._check_alone(keys, key, place)
                return self._combined(schema[key], key, place, depth)
        if "const" in keys or "enum" in keys:
            return self._constants(schema, keys, place)
        kinds = self._kinds(schema, keys, place)
        known = {"type", "format"}.union(
            *(_KEYWORDS.get("integer" if kind == "number" else kind, ()) for kind in kinds)
        )
        for key in sorted(keys - known):
            raise self._fail(place, f"the keyword {key!r} is not supported here", "leave it out")
        if kinds == _TYPES:
            return "value"
        options = [self._typed(kind, schema, place, depth) for kind in kinds]
        return options[0] if len(options) == 1 else f"({' | '.join(options)})"

    def _check_alone(self, keys: set[str], key: str, place: str) -> None:
        for other in sorted(keys - {key}):
            raise self._fail(
                place, f"{key!r} beside {other!r} is not supported", "put them into one schema"
            )

    def _kinds(self, schema: Mapping[str, Any], keys: set[str], place: str) -> Sequence[str]:
        """The types a value may have; by its keywords where `type` is missing."""
        if "type" not in keys:
            if not keys:
                return _TYPES
            fitting = [kind for kind in _KEYWORDS if _KEYWORDS[kind] & keys]
            return fitting or ("object",)
        kinds = schema["type"]
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, list) or not kinds or any(kind not in _TYPES for kind in kinds):
            raise self._fail(
                place, f"'type' is {_short(schema['type'])}", f"expected of {', '.join(_TYPES)}"
            )
        return list(dict.fromkeys(kinds))

    def _typed(self, kind: str, schema: Mapping[str, Any], place: str, depth: int) -> str:
        if kind == "object":
            return self._object(schema, place, depth)
        if kind == "array":
            return self._array(schema, place, depth)
        if kind == "string":
            return self._string(schema, place)
        if kind == "integer":
            return self._integer(schema, place)
        if kind == "number":
            return self._number(schema, place)
        return kind

    # references and combinations

    def _reference(self, reference: Any, place: str, depth: int) -> str:
        known = self._of_reference.get(reference) if isinstance(reference, str) else None
        if known is None:
            target = self._target(reference, place)
            self._n_name += 1
            known = self._of_reference[reference] = f"r{self._n_name}"
            self._rules[known] = self._visit(target, reference, depth + 1)
        return known

    def _target(self, reference: Any, place: str) -> Any:
        if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
            raise self._fail(
                place, f"'$ref' is {_short(reference)}", "expected a place here, as in #/$defs/x"
            )
        found = self._schema
        for part in unquote(reference[1:]).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and part in found:
                found = found[part]
            elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            else:
                raise self._fail(place, f"'$ref' is {reference!r}", "expected a place that exists")
        return found

    def _combined(self, schemas: Any, key: str, place: str, depth: int) -> str:
        if not isinstance(schemas, list) or not schemas:
            raise self._fail(place, f"{key!r} is {_short(schemas)}", "expected a list of schemas")
        if key == "allOf" and len(schemas) > 1:
            raise self._fail(place, "'allOf' of several schemas is not supported", "join them")
        options = [
            self._visit(each, f"{place}/{key}/{i}", depth + 1)
            for i, each in enumerate(schemas)
            if each is not False
        ]
        if key == "oneOf":  # now that each is known to be a schema
            self._check_apart(schemas, place)
        if not options:
            raise self._fail(
                place, f"{key!r} fits nothing", "expected one schema that is not false"
            )
        return options[0] if len(options) == 1 else f"({' | '.join(options)})"

    def _check_apart(self, schemas: list[Any], place: str) -> None:
        resolved = [self._resolved(schema, place) for schema in schemas]
        for i, one in enumerate(resolved):
            for j in range(i):
                if not are_apart(one, resolved[j]):
                    raise self._fail(
                        f"{place}/oneOf",
                        f"a value may fit both {j} and {i}",
                        "give them different types, or a required property with different "
                        "constants, or use anyOf",
                    )

    def _resolved(self, schema: Any, place: str) -> Any:
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                return schema
            schema = self._target(schema["$ref"], place)
        raise self._fail(place, "'$ref' goes round in a circle", "let it end at a schema")

    def _constants(self, schema: Mapping[str, Any], keys: set[str], place: str) -> str:
        for key in sorted(keys - {"const", "enum", "type"}):
            raise self._fail(
                place, f"{key!r} beside const or enum is not supported", "leave it out"
            )
        values = schema.get("enum", [schema.get("const")])
        if not isinstance(values, list) or not values:
            raise self._fail(place, f"'enum' is {_short(values)}", "expected a list of values")
        if "const" in keys and "enum" in keys:
            values = [value for value in values if is_same(value, schema["const"])]
        if "type" in keys:
            kinds = self._kinds(schema, {"type"}, place)
            values = [value for value in values if any(is_of(value, kind) for kind in kinds)]
        if not values:
            raise self._fail(place, "no value fits type, const and enum", "expected at least one")
        return f"({' | '.join(self._constant(value, place) for value in values)})"

    def _constant(self, value: Any, place: str) -> str:
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
            text.encode("utf-8")
        except (ValueError, TypeError, RecursionError) as err:
            raise self._fail(
                place, f"a constant that JSON cannot write ({err})", "expected JSON values"
            ) from err
        return literal(text)

    # types

    def _object(self, schema: Mapping[str, Any], place: str, depth: int) -> str:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        rest = schema.get("additionalProperties", not properties and "properties" not in schema)
        if not isinstance(properties, Mapping) or not all(
            isinstance(key, str) for key in properties
        ):
            raise self._fail(place, f"'properties' is {_short(properties)}", "expected an object")
        if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
            raise self._fail(place, f"'required' is {_short(required)}", "expected a list of names")
        wanted = {name: (properties[name], f"{place}/properties/{name}") for name in properties}
        for name in required:
            if name not in wanted:
                if schema.get("additionalProperties", True) is False:
                    raise self._fail(
                        place,
                        f"the required {name!r} is neither in properties nor allowed beside them",
                        "add it to properties",
                    )
                extra = schema.get("additionalProperties", True)
                wanted[name] = (extra, f"{place}/additionalProperties")
        members: list[tuple[str, bool]] = []
        for name, (each, where) in wanted.items():
            if each is False and name not in required:
                continue
            value = self._visit(each, where, depth + 1)
            key = self._constant(name, place)
            members.append((self._name(f'{key} ws ":" ws {value} ws'), name in required))
        more = ""
        if rest is not False:
            value = self._visit(rest, f"{place}/additionalProperties", depth + 1)
            key = other_key(list(wanted), self._name) if wanted else "string"
            more = self._name(f'{key} ws ":" ws {value} ws')
        return self._name(f'"{{" ws {members_in_order(members, more, self._name)} "}}"')

    def _array(self, schema: Mapping[str, Any], place: str, depth: int) -> str:
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise self._fail(place, f"'prefixItems' is {_short(first)}", "expected a list")
        low, high = self._range(schema, "minItems", "maxItems", place)
        if high is not None:
            first = first[:high]
        parts = [
            self._visit(each, f"{place}/prefixItems/{i}", depth + 1) for i, each in enumerate(first)
        ]
        rest = schema.get("items", not first or low > len(first))
        if rest is False or len(first) == high:
            if low > len(first):
                raise self._fail(place, f"'minItems' is {low}", "expected items for so many")
            return self._name(f'"[" ws {joined(parts)} "]"')
        item = self._visit(rest, f"{place}/items", depth + 1)
        low = max(0, low - len(first))
        most = "" if high is None else str(high - len(first))
        if parts:
            tail = f'("," ws {item} ws){{{low},{most}}}'
            return self._name(f'"[" ws {joined(parts)} {tail} "]"')
        others = f"{{{max(0, low - 1)},{int(most) - 1 if most else ''}}}"
        some = f'{item} ws ("," ws {item} ws){others}'
        return self._name(f'"[" ws {some} "]"' if low else f'"[" ws ({some})? "]"')

    def _string(self, schema: Mapping[str, Any], place: str) -> str:
        low, high = self._range(schema, "minLength", "maxLength", place)
        form = schema.get("format")
        if "pattern" in schema:
            return self._pattern(schema["pattern"], form, low, high, place)
        if isinstance(form, str) and form in FORMATS:
            rule, least, most = FORMATS[form]
            if low > least or (high is not None and high < most):
                raise self._fail(
                    place,
                    f"'format' is {form!r}, of {least} to {most} characters, beside a length",
                    "leave the length out",
                )
            return self._name(rf'"\"" {rule} "\""')
        if low == 0 and high is None:
            return "string"
        return self._name(rf'"\"" char{{{low},{"" if high is None else high}}} "\""')

    def _pattern(self, pattern: Any, form: Any, low: int, high: int | None, place: str) -> str:
        fail = partial(self._fail, place)
        if not isinstance(pattern, str):
            raise fail(f"'pattern' is {_short(pattern)}", "expected a regular expression")
        if form in FORMATS:
            raise fail(f"'pattern' beside 'format' {form!r} is not supported", "leave one out")
        start = self._name("")
        self._rules.update(pattern_rules(pattern, low, high, start, fail))
        return self._name(rf'"\"" {start} "\""')

    def _range(
        self, schema: Mapping[str, Any], least: str, most: str, place: str
    ) -> tuple[int, int | None]:
        low, high = schema.get(least, 0), schema.get(most)
        for key, value in ((least, low), (most, high)):
            if value is None and key not in schema:
                continue
            most_here = MAX_ITEMS if key == least else float("inf")
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most_here:
                raise self._fail(
                    place, f"{key!r} is {_short(value)}", f"expected a number from 0 to {MAX_ITEMS}"
                )
        if high is not None and low > high:
            raise self._fail(place, f"{least!r} is {low}, {most!r} is {high}", "expected no more")
        return low, None if high is None else min(high, MAX_ITEMS)

    def _integer(self, schema: Mapping[str, Any], place: str) -> str:
        fail = partial(self._fail, place)
        rule = integer_rule(read_bounds(schema, fail), fail)
        return rule if rule == "integer" else self._name(rule)

    def _number(self, schema: Mapping[str, Any], place: str) -> str:
        fail = partial(self._fail, place)
        rule = number_rule(read_bounds(schema, fail), fail)
        return rule if rule == "number" else self._name(rule)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
