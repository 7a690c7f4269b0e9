"""A JSON schema, checked and written anew so that llguidance follows every word of it.

Every keyword that restricts is followed or refused with its place; notes for readers, unknown
formats among them, restrict nothing. llguidance passes over what it does not know, reads some
keywords in ways of its own, and names no place: what it is given here has nothing of the kind.
The result may allow less than the schema does (properties come in the schema's order, and only
those that are named unless additionalProperties is given), never more.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any
from urllib.parse import unquote

from qaflora_edge.errors import GrammarError
from qaflora_edge.grammar.json_values import (
    are_apart,
    are_few_multiples,
    can_end,
    checked_bounds,
    checked_constant,
    checked_multiple,
    checked_text,
    is_of,
    short,
)
from qaflora_edge.grammar.pattern import read_pattern

MAX_DEPTH = 64  # more of them in each other, or on a way of $ref, overflow llguidance's stack
MAX_SCHEMAS = 10_000
MAX_APART = 200  # of oneOf, each compared with each
MAX_ITEMS = 1000  # of arrays and objects, whose number is bounded: each becomes a rule
MAX_CHARACTERS = 100_000  # of strings whose number is bounded
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_NOTES = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
    | {"$schema", "$id", "$anchor", "$comment", "$defs", "definitions"}
    | {"contentEncoding", "contentMediaType", "contentSchema"}
    | {"example", "externalDocs", "discriminator", "nullable", "xml"}  # OpenAPI's
)
_KEYWORDS = {
    "object": (
        *("properties", "required", "additionalProperties", "patternProperties"),
        *("minProperties", "maxProperties"),
    ),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "format", "pattern"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_COMBINED = ("$ref", "allOf", "anyOf", "oneOf", "enum", "const")
_KNOWN = frozenset({"type", *_COMBINED}.union(*_KEYWORDS.values()))
_MONTHS = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
_DATE = f"[1-9][0-9]{{3}}-(?:{_MONTHS}|02-(?:0[1-9]|1[0-9]|2[0-8]))"
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{_CLOCK})"
# llguidance's own have the 29th of February in every year, and a 61st second.
_DATES = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
_FORMATS = frozenset({"duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
OPTIONS = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_pattern": r" |\n[ \t]{0,20}",
    # With \u a named property could be spelt anew, and its schema passed by.
    "json_allowed_escapes": 'nrbtf\\"',
}


@dataclass
class CheckedSchema:
    """A schema for llguidance.

    schema  whole, with options and definitions
    parts   every schema in it with its place, an inner one before what it stands in
    """

    schema: dict[str, Any]
    parts: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


def check_json_schema(schema: Any, *, source: str = "The JSON schema") -> CheckedSchema:
    """The schema as llguidance follows it.

    schema  as json.loads gives it; True or {} takes any value
    source  how messages call the schema, such as "The schema person.json"

    Raises GrammarError for a schema that is malformed, or asks for what cannot be followed.
    """
    return _Checker(schema, source).whole()


class _Checker:
    """One walk through a schema; what `$ref` names is visited once, and becomes a definition.

    alone  in the methods below: nothing else restricts what this schema does, so that it may be
           narrowed: by the types that its keywords speak of, and to properties that are named
    """

    def __init__(self, schema: Any, source: str) -> None:
        self._schema, self._source = schema, source
        self._definitions: dict[str, Any] = {}
        self._names: dict[tuple[str, bool], str] = {}
        self._parts: list[tuple[str, dict[str, Any]]] = []
        self._multiples: set[Decimal] = set()
        self._n_schema = 0

    def whole(self) -> CheckedSchema:
        root = self._visit(self._schema, "#", 0, alone=True)
        if root is False:
            raise self._fail("#", "found false, which nothing fits", "leave it out")
        endless = next(
            (name for name, ends in can_end(self._definitions).items() if not ends), None
        )
        if endless is not None:
            place = next(key[0] for key, name in self._names.items() if name == endless)
            raise self._fail(place, "what fits needs itself, without end", "let a part be left out")
        if not are_few_multiples(self._multiples):
            raise self._fail("#", "'multipleOf' is too large or too fine", "use smaller numbers")
        root = {} if root is True else root
        whole = {"x-guidance": OPTIONS, **root, "$defs": self._definitions}
        return CheckedSchema(whole, self._parts)

    def _fail(self, place: str, found: str, advice: str) -> GrammarError:
        return GrammarError(f"{self._source}, at {place}: {found}; {advice}.")

    def _visit(self, schema: Any, place: str, depth: int, *, alone: bool) -> Any:
        self._n_schema += 1
        if depth > MAX_DEPTH:
            raise self._fail(place, f"more than {MAX_DEPTH} schemas in each other", "use fewer")
        if self._n_schema > MAX_SCHEMAS:
            raise self._fail(place, f"more than {MAX_SCHEMAS} schemas", "make it smaller")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise self._fail(place, f"found {short(schema)}", "expected a schema (an object)")
        keys = [key for key in schema if key not in _NOTES and not str(key).startswith("x-")]
        for key in sorted(set(keys) - _KNOWN, key=str):
            raise self._fail(place, f"the keyword {key!r} is not supported", "leave it out")
        typed = [key for key in keys if key not in _COMBINED and key != "type"]
        combined = [key for key in keys if key in _COMBINED]
        alone = alone and len(combined) + bool(typed) <= 1
        written = self._typed(schema, typed, place, depth, alone=alone)
        joined = {
            key: self._combine(schema[key], key, place, depth, alone=alone) for key in combined
        }
        if "oneOf" in joined:
            self._check_apart(schema, place)
            # llguidance sees through no $ref, and so takes less for apart.
            options = {"anyOf": joined.pop("oneOf")}
            joined |= (
                {"allOf": [*joined.get("allOf", ()), options]} if "anyOf" in joined else options
            )
        # Properties come in this order, and llguidance joins typed keywords best as one.
        first = combined and (not typed or keys.index(combined[0]) < keys.index(typed[0]))
        result = {**joined, **written} if first else {**written, **joined}
        self._parts.append((place, result))
        return result

    # the keywords of types

    def _typed(
        self, schema: Mapping[str, Any], keys: list[str], place: str, depth: int, *, alone: bool
    ) -> dict[str, Any]:
        fail = partial(self._fail, place)
        written: dict[str, Any] = {}
        if "type" in schema:
            written["type"] = self._types(schema["type"], place)
        elif alone:
            kinds = [kind for kind in _KEYWORDS if set(keys) & set(_KEYWORDS[kind])]
            written |= {"type": kinds} if kinds else {}
        if set(keys) & set(_KEYWORDS["object"]):
            written |= self._object(schema, place, depth, alone=alone)
        if set(keys) & set(_KEYWORDS["array"]):
            written |= self._array(schema, place, depth, alone=alone)
        if set(keys) & set(_KEYWORDS["string"]):
            written |= self._string(schema, place)
        written |= checked_bounds(schema, fail)
        if "multipleOf" in schema:
            self._multiples.add(checked_multiple(schema["multipleOf"], fail))
            written["multipleOf"] = schema["multipleOf"]
        return written

    def _types(self, kinds: Any, place: str) -> list[str]:
        named = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(named, list) or not named or any(kind not in _TYPES for kind in named):
            raise self._fail(place, f"'type' is {short(kinds)}", f"expected of {', '.join(_TYPES)}")
        return list(dict.fromkeys(named))

    def _object(
        self, schema: Mapping[str, Any], place: str, depth: int, *, alone: bool
    ) -> dict[str, Any]:
        fail = partial(self._fail, place)
        properties = dict(self._map(schema, "properties", place))
        patterns = self._map(schema, "patternProperties", place)
        if len(properties) + len(patterns) > MAX_ITEMS:
            raise self._fail(place, f"more than {MAX_ITEMS} properties", "use fewer")
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
            raise self._fail(place, f"'required' is {short(required)}", "expected a list of names")
        visit = partial(self._visit, depth=depth + 1)
        inner = alone and not patterns
        rest = schema.get("additionalProperties")
        if rest is None:
            rest = not alone or not {"properties", "patternProperties"} & schema.keys()
            properties |= {name: True for name in required if name not in properties}
        written: dict[str, Any] = {
            "properties": {
                checked_text(name, fail): visit(
                    each, place=_under(place, "properties", name), alone=inner
                )
                for name, each in properties.items()
            },
            "required": [checked_text(name, fail) for name in dict.fromkeys(required)],
            "additionalProperties": visit(rest, place=f"{place}/additionalProperties", alone=alone),
        }
        if patterns:
            written["patternProperties"] = {
                read_pattern(name, partial(self._fail, _under(place, "patternProperties", name))): (
                    visit(each, place=_under(place, "patternProperties", name), alone=False)
                )
                for name, each in patterns.items()
            }
        counts = self._counts(schema, "minProperties", "maxProperties", MAX_ITEMS, place)
        if counts.get("minProperties", 0) > len(written["required"]) + 1:
            # llguidance may write a name twice, which counts once.
            raise self._fail(
                place,
                f"'minProperties' is {counts['minProperties']}, with "
                f"{len(written['required'])} required",
                "require all but one of so many by name",
            )
        return written | counts

    def _map(self, schema: Mapping[str, Any], key: str, place: str) -> Mapping[str, Any]:
        found = schema.get(key, {})
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
            raise self._fail(place, f"{key!r} is {short(found)}", "expected an object")
        return found

    def _array(
        self, schema: Mapping[str, Any], place: str, depth: int, *, alone: bool
    ) -> dict[str, Any]:
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise self._fail(place, f"'prefixItems' is {short(first)}", "expected a list")
        counts = self._counts(schema, "minItems", "maxItems", MAX_ITEMS, place)
        written: dict[str, Any] = {
            "prefixItems": [
                self._visit(each, f"{place}/prefixItems/{i}", depth + 1, alone=alone)
                for i, each in enumerate(first)
            ]
        }
        is_more = counts.get("minItems", 0) > len(first)
        rest = schema.get("items", not alone or not first or is_more)
        written["items"] = self._visit(rest, f"{place}/items", depth + 1, alone=alone)
        return written | counts

    def _string(self, schema: Mapping[str, Any], place: str) -> dict[str, Any]:
        written: dict[str, Any] = {}
        written |= self._counts(schema, "minLength", "maxLength", MAX_CHARACTERS, place)
        patterns = []
        if "pattern" in schema:
            pattern = schema["pattern"]
            if not isinstance(pattern, str):
                raise self._fail(
                    place, f"'pattern' is {short(pattern)}", "expected a regular expression"
                )
            patterns.append(read_pattern(pattern, partial(self._fail, place)))
        form = schema.get("format")
        if isinstance(form, str) and form in _DATES:
            if patterns:
                raise self._fail(
                    place, f"'pattern' beside 'format' {form!r} is not supported", "leave one out"
                )
            patterns.append(_DATES[form])
        elif isinstance(form, str) and form in _FORMATS:
            written["format"] = form
        return written | ({"pattern": patterns[0]} if patterns else {})

    def _counts(
        self, schema: Mapping[str, Any], least: str, most: str, limit: int, place: str
    ) -> dict[str, int]:
        counts = {}
        for key in (least, most):
            if key not in schema:
                continue
            value = schema[key]
            limit_here = limit if key == least else float("inf")
            if not is_of(value, "integer") or not 0 <= value <= limit_here:
                raise self._fail(
                    place, f"{key!r} is {short(value)}", f"expected a number from 0 to {limit}"
                )
            counts[key] = min(int(value), limit)
        low, high = counts.get(least, 0), counts.get(most)
        if high is not None and low > high:
            raise self._fail(place, f"{least!r} is {low}, {most!r} is {high}", "expected no more")
        return counts

    # references, combinations, constants

    def _combine(self, value: Any, key: str, place: str, depth: int, *, alone: bool) -> Any:
        if key == "$ref":
            return self._reference(value, place, depth, alone=alone)
        if key == "const":
            return checked_constant(value, partial(self._fail, place))
        if not isinstance(value, list) or not value:
            kind = "values" if key == "enum" else "schemas"
            raise self._fail(place, f"{key!r} is {short(value)}", f"expected a list of {kind}")
        if key == "enum":
            return [checked_constant(each, partial(self._fail, place)) for each in value]
        alone = alone and (key != "allOf" or len(value) == 1)
        return [
            self._visit(each, f"{place}/{key}/{i}", depth + 1, alone=alone)
            for i, each in enumerate(value)
        ]

    def _reference(self, reference: Any, place: str, depth: int, *, alone: bool) -> str:
        key = (reference if isinstance(reference, str) else "", alone)
        name = self._names.get(key)
        if name is None:
            target = self._target(reference, place)
            name = self._names[key] = f"d{len(self._names)}"
            self._definitions[name] = True  # until it is known
            self._definitions[name] = self._visit(target, reference, depth + 1, alone=alone)
        return f"#/$defs/{name}"

    def _target(self, reference: Any, place: str) -> Any:
        if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
            raise self._fail(
                place, f"'$ref' is {short(reference)}", "expected a place here, as in #/$defs/x"
            )
        for inner in _along(self._schema, place):
            if isinstance(inner, Mapping) and isinstance(inner.get("$id"), str):
                raise self._fail(place, "'$ref' below an inner '$id'", "leave the '$id' out")
        *_, found = self._schema, *_along(self._schema, reference)
        if found is _MISSING:
            raise self._fail(place, f"'$ref' is {reference!r}", "expected a place that exists")
        return found

    def _check_apart(self, schema: Mapping[str, Any], place: str) -> None:
        """Refuse oneOf unless it is plain that no value fits two of its schemas."""
        if len(schema["oneOf"]) > MAX_APART:
            raise self._fail(f"{place}/oneOf", f"more than {MAX_APART} schemas", "use anyOf")
        resolved = [self._resolved(each, schema, place) for each in schema["oneOf"]]
        for i, one in enumerate(resolved):
            for j in range(i):
                if not are_apart(one, resolved[j]):
                    raise self._fail(
                        f"{place}/oneOf",
                        f"a value may fit both {j} and {i}",
                        "give them different types, or a required property with different "
                        "constants, or use anyOf",
                    )

    def _resolved(self, schema: Any, around: Mapping[str, Any], place: str) -> Any:
        """What `$ref` leads to, with the types and required properties of what stands around."""
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                break
            schema = self._target(schema["$ref"], place)
        if not isinstance(schema, Mapping):
            return schema
        required = {*schema.get("required", ()), *around.get("required", ())}
        kinds = {"type": around["type"]} if "type" in around else {}
        return {**kinds, **schema, "required": sorted(required)}


_MISSING = object()
_INDEX = re.compile(r"[0-9]{1,9}")


def _along(schema: Any, place: str) -> Iterable[Any]:
    """What lies on the way of a pointer such as #/$defs/x, without the root; or _MISSING."""
    found = schema
    for part in unquote(place[1:]).split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, list) and _INDEX.fullmatch(part) and int(part) < len(found):
            found = found[int(part)]
        else:
            yield _MISSING
            return
        yield found


def _under(place: str, key: str, name: str) -> str:
    written = name.replace("~", "~0").replace("/", "~1").replace("%", "%25")
    return f"{place}/{key}/{written}"
