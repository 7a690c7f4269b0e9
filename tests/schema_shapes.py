"""Schemas in the shapes of JSON-Schema-Test-Suite (draft 2020-12), by keyword: all are followed."""

from itertools import product
from typing import Any

_INTEGER, _STRING, _NULL = {"type": "integer"}, {"type": "string"}, {"type": "null"}
_NODE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "number"},
                "subtree": {"$ref": "#/$defs/tree"},
            },
            "required": ["value"],
        },
        "tree": {
            "type": "object",
            "properties": {
                "meta": _STRING,
                "nodes": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["nodes"],
        },
    }
}

SHAPES: dict[str, list[Any]] = {
    "boolean schemas": [True, {}, {"properties": {"foo": True, "bar": False}}],
    "additionalProperties": [
        {
            "properties": {"foo": {}, "bar": {}},
            "patternProperties": {"^v": {}},
            "additionalProperties": False,
        },
        {"patternProperties": {"^á": {}}, "additionalProperties": False},
        {"properties": {"foo": {}, "bar": {}}, "additionalProperties": {"type": "boolean"}},
        {"additionalProperties": {"type": "boolean"}},
        {"properties": {"foo": {}, "bar": {}}},
        {
            "allOf": [{"properties": {"foo": {}}}],
            "additionalProperties": {"type": "boolean"},
        },
    ],
    "allOf": [
        {
            "allOf": [
                {"properties": {"bar": _INTEGER}, "required": ["bar"]},
                {"properties": {"foo": _STRING}, "required": ["foo"]},
            ]
        },
        {
            "properties": {"bar": _INTEGER},
            "required": ["bar"],
            "allOf": [
                {"properties": {"foo": _STRING}, "required": ["foo"]},
                {"properties": {"baz": _NULL}, "required": ["baz"]},
            ],
        },
        {"allOf": [{"maximum": 30}, {"minimum": 20}]},
        {"allOf": [True, True]},
        {"allOf": [{}]},
        {"allOf": [{}, {"type": "number"}]},
        {"allOf": [{"allOf": [_NULL]}]},
        {"allOf": [{"multipleOf": 2}], "anyOf": [{"multipleOf": 3}], "type": "integer"},
        {"allOf": [{"enum": ["a", "b", 1]}, {"enum": ["b", 1, None]}, {"type": "string"}]},
        {"allOf": [{"minLength": 2}, {"maxLength": 4}, {"pattern": "^[ab]"}], "type": "string"},
        {"allOf": [{"minItems": 1}, {"maxItems": 2}, {"items": _INTEGER}], "type": "array"},
        {"allOf": [{"exclusiveMinimum": 0}, {"maximum": 0.5}], "type": "number"},
    ],
    "anyOf": [
        {"anyOf": [_INTEGER, {"minimum": 2}]},
        {"type": "string", "anyOf": [{"maxLength": 2}, {"minLength": 4}]},
        {"anyOf": [True, True]},
        {"anyOf": [True, False]},
        {
            "anyOf": [
                {"properties": {"bar": _INTEGER}, "required": ["bar"]},
                {"properties": {"foo": _STRING}, "required": ["foo"]},
            ]
        },
        {"anyOf": [{"type": "number"}, {}]},
        {"anyOf": [{"anyOf": [_NULL]}]},
    ],
    "oneOf": [
        {"oneOf": [_INTEGER, _STRING]},
        {"oneOf": [{"const": 1}, {"const": 2}, {"enum": ["x", "y"]}]},
        {"oneOf": [{"$ref": "#/$defs/a"}, _NULL], "$defs": {"a": {"type": "array"}}},
        {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": kind}, kind: _INTEGER},
                    "required": ["kind", kind],
                }
                for kind in ("cat", "dog", "cow")
            ]
        },
        {
            "type": "object",
            "required": ["kind"],
            "properties": {"kind": _STRING},
            "oneOf": [{"properties": {"kind": {"const": kind}}} for kind in "ab"],
            "anyOf": [{"properties": {"n": _NULL}}, {"required": ["m"]}],
        },
    ],
    "const": [
        {"const": value}
        for value in (
            *(2, -7, 0, 1.5, 1e10, 2**53, -0.0001, None, True, False, "", "é😀", '"\\/\n\t'),
            *({"foo": "bar", "baz": "bax"}, [{"foo": "bar"}], [False], [], {}, {"a": [0, 1.0]}),
        )
    ],
    "enum": [
        {"enum": [1, 2, 3]},
        {"enum": [6, "foo", [], True, {"foo": 12}]},
        {"enum": [6, None]},
        {
            "properties": {"foo": {"enum": ["foo"]}, "bar": {"enum": ["bar"]}},
            "required": ["bar"],
        },
        {"enum": ["foo\nbar", "foo\rbar"]},
        {"enum": [[0], [False], {"a": 0}]},
        {"enum": [[[0]], [[False]]]},
        {"type": ["string", "null"], "enum": ["a", 1, None]},
        {"enum": ["abc", "abcdef", 3], "maxLength": 4},
    ],
    "numbers": [
        {"type": kind, low: a, high: b}
        for kind, low, high, (a, b) in product(
            ("number", "integer"),
            ("minimum", "exclusiveMinimum"),
            ("maximum", "exclusiveMaximum"),
            ((-2, 3), (1.1, 300), (0, 1.5), (-1.5, 0), (0.25, 1.75)),
        )
    ]
    + [{"minimum": 1.1}, {"maximum": 300}, {"exclusiveMaximum": 0}, {"exclusiveMinimum": 9.5}]
    + [{"type": "number", "minimum": -0.5, "exclusiveMaximum": 0}],
    "multipleOf": [
        {"type": kind, "multipleOf": each, **more}
        for kind, each, more in product(
            ("number", "integer"),
            (2, 1.5, 0.01, 100, 7),
            ({}, {"minimum": 1, "maximum": 5000}),
        )
    ],
    "lengths": [
        {"type": "string", "minLength": low, **({} if more is None else {"maxLength": low + more})}
        for low, more in product((0, 1, 2, 20), (None, 0, 1, 30))
    ]
    + [{"minLength": 2}],
    "items": [
        {"items": _INTEGER},
        {"items": {"type": "array", "items": {"type": "array", "items": _NULL}}},
        {"prefixItems": [_INTEGER, _STRING]},
        {"prefixItems": [{}, {}, {}], "items": False},
        {"prefixItems": [{}], "items": _INTEGER, "minItems": 2, "maxItems": 5},
        {"prefixItems": [_STRING], "minItems": 2},
        {"items": False},
        {"allOf": [{"prefixItems": [{"minimum": 3}]}], "items": {"minimum": 5}, "type": "array"},
        {"minItems": 1},
        {"maxItems": 2},
        {"maxItems": 0, "type": "array"},
        {"type": "array", "items": {"$ref": "#/$defs/x"}, "$defs": {"x": _NULL}, "maxItems": 3},
    ],
    "properties": [
        {"properties": {"foo": _INTEGER, "bar": _STRING}},
        {
            "properties": {"foo": {"type": "array", "maxItems": 3}, "bar": {"type": "array"}},
            "patternProperties": {"f.o": {"minItems": 2}},
            "additionalProperties": _INTEGER,
        },
        {
            "properties": {
                name: {"type": "number"}
                for name in ("foo\nbar", 'foo"bar', "foo\\bar", "foo\rbar", "foo\tbar", "foo\fbar")
            }
        },
        {"properties": {"__proto__": {"type": "number"}, "toString": {"maxLength": 2}}},
        {"properties": {"$ref": _STRING, "$id": _NULL, "properties": _INTEGER}},
        {"required": ["foo", "a.b", "__proto__"]},
        {"properties": {"foo": {}}, "required": ["foo", "bar"]},
        {"properties": {"a": _NULL}, "required": ["b"], "additionalProperties": _INTEGER},
        {"type": "object", "minProperties": 1},
        {"type": "object", "maxProperties": 2},
        {"type": "object", "maxProperties": 0},
        {
            "type": "object",
            "properties": {"a": {}, "b": {}},
            "minProperties": 1,
            "additionalProperties": False,
        },
    ],
    "patternProperties": [
        {"patternProperties": {"f.*o": _INTEGER}},
        {"patternProperties": {"^a*$": _INTEGER, "^b+$": {"maximum": 20}}},
        {"patternProperties": {"^[0-9]{2,}$": {"type": "boolean"}, "^X_": _STRING}}
        | {"additionalProperties": False},
        {"patternProperties": {"^f": {"const": 1}, "^b": False}, "type": "object"},
        {"patternProperties": {r"^\S$": _NULL}, "required": ["x"]},
    ],
    "references": [
        {"properties": {"foo": {"$ref": "#"}}, "additionalProperties": False},
        {"properties": {"foo": _INTEGER, "bar": {"$ref": "#/properties/foo"}}},
        {"prefixItems": [_INTEGER, {"$ref": "#/prefixItems/0"}], "minItems": 2},
        {
            "$defs": {"tilde~field": _INTEGER, "slash/field": _STRING, "percent%field": _NULL},
            "properties": {
                "tilde": {"$ref": "#/$defs/tilde~0field"},
                "slash": {"$ref": "#/$defs/slash~1field"},
                "percent": {"$ref": "#/$defs/percent%25field"},
            },
            "required": ["tilde", "slash", "percent"],
        },
        {
            "$defs": {
                "a": _INTEGER,
                "b": {"$ref": "#/$defs/a"},
                "c": {"$ref": "#/$defs/b"},
            },
            "$ref": "#/$defs/c",
        },
        {
            "$defs": {"r": {"type": "array"}},
            "properties": {"f": {"$ref": "#/$defs/r", "maxItems": 2}},
        },
        {"$ref": "#/$defs/tree", **_NODE},
        {"type": "array", "items": {"$ref": "#/$defs/node"}, "minItems": 1, **_NODE},
        {"anyOf": [{"type": "array", "items": {"$ref": "#"}, "maxItems": 2}, _INTEGER]},
    ],
    "type": [
        {"type": kind}
        for kind in (
            *("integer", "number", "string", "object", "array", "boolean", "null"),
            *(
                ["string"],
                ["array", "object"],
                ["integer", "string", "null"],
                ["number", "integer"],
            ),
        )
    ],
    "format": [
        {"type": "string", "format": each}
        for each in (
            *("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6"),
            *("uuid", "uri", "unknown"),
        )
    ]
    + [
        {"type": "string", "format": "date", "maxLength": 10},
        {"type": "string", "format": "uri", "maxLength": 40},
        {"type": "string", "format": "email", "pattern": "^[a-z]{2,5}@[a-z]{2,4}[.]org$"},
        {"format": "ipv4"},
    ],
}
