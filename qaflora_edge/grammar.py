"""Guards around llguidance, which compiles GBNF grammars and JSON schemas.

llguidance 1.9.1 alone overflows its stack on chains of 5,000 rules, takes minutes for a large
`multipleOf`, and passes over keywords that it does not know.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from graphlib import CycleError, TopologicalSorter
from math import lcm
from typing import Any
from urllib.parse import unquote

from qaflora_edge.errors import GrammarError, OptionError
from qaflora_edge.formats.inputs import Json, read_json_object

MAX_LENGTH = 1 << 16  # characters of a grammar or a schema
MAX_CHAIN = 100  # rules and groups, or schemas, in each other
MAX_MULTIPLE = 10**5  # common multiple of every `multipleOf` in a schema: 1.5 s


def _check_length(text: str, source: str) -> None:
    if len(text) > MAX_LENGTH:
        raise GrammarError(
            f"{source} has {len(text)} characters, expected at most {MAX_LENGTH}; make it smaller."
        )


def _check_chain(
    start: str, leads_to: Callable[[str], Iterable[tuple[str, int]]], source: str
) -> None:
    """Refuse more than MAX_CHAIN steps on a way; a name on its own way counts once.

    leads_to  gives the names that a name leads to, and the steps to each
    """
    lengths: dict[str, int] = {}

    def length(name: str, n_before: int) -> int:
        if n_before + lengths.get(name, 0) > MAX_CHAIN:
            raise GrammarError(
                f"{source} has more than {MAX_CHAIN} parts in each other at {name}, expected "
                "fewer; make it flatter."
            )
        if name not in lengths:
            lengths[name] = 0
            ways = [n + length(inner, n_before + n) for inner, n in leads_to(name)]
            lengths[name] = max(ways, default=0)
        return lengths[name]

    length(start, 0)


_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(-)|.)", re.DOTALL)
_CHAR = re.compile(r"\\x..|\\.|.", re.DOTALL)


def gbnf_to_lark(text: str, *, source: str = "The grammar") -> str:
    """Put a GBNF text with the start `root` into Lark's notation; messages begin with `source`.

    llguidance parses it. Its own printer changes the language, for a terminal takes the longest
    text that it can: under `ws ::= [ \\n]*` a newline that has to follow never comes. So the whole
    grammar becomes one terminal, or where a rule needs itself, each character does.

    Raises GrammarError.
    """
    from llguidance.gbnf_to_lark import GbnfToLarkError, GrammarParser

    _check_length(text, source)
    try:
        rules = GrammarParser().parse(_ESCAPE.sub(_plain_escape, text) + "\n")
        if "root" not in rules:
            raise ValueError("there is no rule 'root', expected root ::= ..., the start")
        names = {name: f"r{number}" for number, name in enumerate(rules)}
        uses: dict[str, dict[str, int]] = {name: {} for name in rules}
        lines = [
            f"{names[name]}: {_printed(rule.alternatives, names, uses[name])}\n"
            for name, rule in rules.items()
        ]
    except (GbnfToLarkError, ValueError, RecursionError) as error:
        raise GrammarError(f"{source} cannot be read: {error}; correct it there.") from error
    _check_chain("root", lambda name: uses[name].items(), source)
    lark = f"start: {names['root']}\n{''.join(lines)}"
    try:
        TopologicalSorter(uses).prepare()
    except CycleError:
        return lark
    return re.sub(r"\br(?=\d)", "R", lark)  # one terminal


def _plain_escape(match: re.Match[str]) -> str:
    """Write an escape so that llguidance's parser takes it."""
    digits = match[1] or match[2]
    if not digits:
        return r"\x2d" if match[3] else match[0]
    code = int(digits, 16)
    if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
        raise ValueError(f"found {match[0]}, expected a character of Unicode")
    return chr(code) if code > 0x7F else rf"\x{code:02x}"


def _printed(node: Any, names: Mapping[str, str], uses: dict[str, int], depth: int = 0) -> str:
    """Print a node of a rule in Lark's notation.

    names  rule -> its name in Lark
    uses   filled: rules in the node, each with the number of groups around it
    """
    node_type = type(node).__name__
    if node_type == "RuleRefNode":
        if node.name not in names:
            raise ValueError(f"the rule {node.name!r} is not defined, expected {node.name} ::=")
        uses[node.name] = max(depth, uses.get(node.name, 0))
        return names[node.name]
    if node_type == "LiteralNode":
        chars = _CHAR.findall(node.value)  # an escape means the same in a regular expression
        terminals = [f"/{c}/" if len(c) > 1 else rf"/\x{{{ord(c):x}}}/" for c in chars]
        return " ".join(terminals) or '""'
    if node_type == "RegexNode":  # && and ~~ mean something in a class of Rust
        regex = "(?s:.)" if node.rx == "." else re.sub("([&~]){2,}", r"\1", node.rx)
        return f"/{regex}/"
    depth += node_type == "AlternativeNode"
    inner = [_printed(child, names, uses, depth) for child in node.children()]
    if node_type != "RepetitionNode":
        sign = " | " if node_type == "AlternativeNode" else " "
        return f"({sign.join(inner)})" if inner else '""'
    most = "" if node.max_times is None else node.max_times
    return '""' if most == 0 else f"({inner[0]}){{{node.min_times},{most}}}"


_NOTES = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
_NOTES |= {"$schema", "$anchor", "$comment", "contentEncoding", "contentMediaType", "contentSchema"}
_NOTES |= {"example", "externalDocs", "discriminator", "nullable", "xml"}  # OpenAPI's
_NAMED = {"properties", "patternProperties"}
_TYPED = {
    "object": _NAMED | {"required", "additionalProperties", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "format", "pattern"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
_BY_NAME = _NAMED | {"$defs", "definitions"}
_LISTS = {"prefixItems", "allOf", "anyOf", "oneOf"}
_COMBINED = {"$ref", "allOf", "anyOf", "oneOf"}
_KNOWN = {"type", "enum", "const", "$id", "$defs", "definitions"}.union(_COMBINED, *_TYPED.values())
_FORMATS = {"date", "time", "date-time", "duration", "hostname", "ipv4", "ipv6", "uuid"}
_FORMATS |= {"email", "uri"}
OPTIONS = {
    "lenient": False,
    "coerce_one_of": True,
    "whitespace_pattern": r" |\n[ \t]{0,20}",
    # With \u a named property could be spelt another way, past its schema.
    "json_allowed_escapes": 'nrbtf\\"',
}


def checked_schema(
    schema: Any, *, source: str = "The JSON schema", is_lenient: bool = False
) -> Json:
    """Check a JSON schema, and write it so that llguidance follows every keyword.

    schema      as json.loads gives it; True or {} takes any value
    source      what messages begin with, such as "The schema person.json"
    is_lenient  leave out keywords that cannot be followed, in place of refusing them

    The result allows only named properties where the schema does not say, unless some value has to
    fit several schemas with keywords. It allows more where several schemas of `oneOf` fit.

    Raises GrammarError with the place.
    """
    try:
        text = json.dumps({"schema": schema}, allow_nan=False)
        _check_length(text, source)
        schema = read_json_object(text.encode())["schema"]
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"{source} is no JSON ({error}); correct it.") from error
    checker = _Checker(source, is_lenient=is_lenient)
    written = checker.visit(schema, "#")
    _check_chain("#", checker.leads_to, source)
    checker.check_multiples()
    if not checker.is_combined:
        checker.narrows = True
        written = checker.visit(schema, "#")
    if not isinstance(written, dict):  # true or false
        written = {"anyOf": [written]}
    return {"x-guidance": OPTIONS} | written


class _Checker:
    """Walk through a schema; llguidance itself checks the values of most keywords.

    is_combined  whether some value has to fit several schemas with keywords
    narrows      whether objects get named properties only, and schemas the types of their keywords
    """

    def __init__(self, source: str, *, is_lenient: bool) -> None:
        self._source = source
        self._is_lenient = is_lenient
        self.is_combined = False
        self.narrows = False
        self._references: dict[str, str] = {}  # place of a $ref -> place that it names
        self._multiples: list[Decimal] = []

    def _error(self, pointer: str, found: str, advice: str) -> GrammarError:
        return GrammarError(f"{self._source}, at {pointer:.200}: {found}; {advice}.")

    def visit(self, schema: Any, pointer: str) -> Any:
        """Give the schema without notes."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise self._error(pointer, f"found {schema!r:.60}", "expected a schema (an object)")
        written = {
            key: self._value(key, value, pointer)
            for key, value in schema.items()
            if key not in _NOTES and not key.startswith("x-")
            if not self._is_lenient or _is_followed(key, pointer)
            if key != "format" or str(value) in _FORMATS  # the others restrict nothing
        }
        json_types = [name for name, keys in _TYPED.items() if keys & written.keys()]
        n_restriction = len(_COMBINED & written.keys()) + bool(json_types)
        self.is_combined |= n_restriction > 1 or len(schema.get("allOf", [])) > 1
        if not self.narrows or not json_types:
            return written
        if _NAMED & written.keys() and "additionalProperties" not in written:
            names = written.get("properties", {})
            unnamed = {name: True for name in written.get("required", []) if name not in names}
            written |= {"properties": names | unnamed, "additionalProperties": False}
        return {"type": json_types} | written

    def _value(self, key: str, value: Any, pointer: str) -> Any:
        at = f"{pointer}/{key}"
        if not _is_followed(key, pointer):
            raise self._error(pointer, f"the keyword {key!r:.60} is not supported", "leave it out")
        if expected := _expected(key, value):
            raise self._error(pointer, f"{key!r} is {value!r:.60}", f"expected {expected}")
        if key == "$ref":
            self._references[pointer] = unquote(value)
        is_number = type(value) in (int, float)
        shift = {"exclusiveMinimum": 1e-9, "exclusiveMaximum": -1e-9}.get(key, 0)
        is_whole = is_number and value % 1 == 0 and abs(value) < 10**6
        if shift and is_whole and value * shift >= 0:
            return value + shift  # llguidance takes a whole bound itself near a fractional one
        if key == "multipleOf" and is_number:
            self._multiples.append(Decimal(repr(value)))
        if key in ("items", "additionalProperties"):
            return self.visit(value, at)
        if key in _LISTS:
            return [self.visit(inner, f"{at}/{i}") for i, inner in enumerate(value)]
        if key in _BY_NAME:
            visited = {}
            for name, inner in value.items():
                step = name.replace("~", "~0").replace("/", "~1")  # of a JSON pointer
                visited[name] = self.visit(inner, f"{at}/{step}")
            return visited
        return value

    def leads_to(self, pointer: str) -> list[tuple[str, int]]:
        """Give the places that references in a schema name, and how deep each reference stands."""
        return [
            (target, 1 + (inner.count("/") - pointer.count("/")) // 2)
            for inner, target in self._references.items()
            if f"{inner}/".startswith(f"{pointer}/")
        ]

    def check_multiples(self) -> None:
        """Refuse multiples that llguidance would take seconds for."""
        exponents = [int(n.normalize().as_tuple().exponent) for n in self._multiples]
        n_digit = -min(0, 0, *exponents)
        whole = [int(n.scaleb(n_digit)) for n in self._multiples]
        if lcm(*whole, 10**n_digit) > MAX_MULTIPLE:
            raise self._error("#", "'multipleOf' is too large or too fine", "use smaller numbers")


def _is_followed(key: str, pointer: str) -> bool:
    return key in _KNOWN and (key != "$id" or pointer == "#")


def _expected(key: str, value: Any) -> str:
    if key in _BY_NAME and not isinstance(value, dict):
        return "an object"
    if key in _LISTS | {"required"} and not isinstance(value, list):
        return "a list"
    if key == "required" and not all(isinstance(name, str) for name in value):
        return "names"
    if key == "minProperties" and value not in (0, 1):  # llguidance counts a name twice
        return "0 or 1"
    if key == "$ref" and not re.match("#(/|$)", str(value)):
        return "#/ and a place here"
    return ""


def moved_schema(schema: Any, pointer: str) -> Any:
    """Point the references of a schema, from `#` on, to its place in a larger schema.

    Raises OptionError for a schema of too many levels.
    """
    try:
        return _moved(schema, pointer)
    except RecursionError as error:
        raise OptionError(
            "Option tools has parameters of too many levels, expected fewer; use $defs.", "tools"
        ) from error


def _moved(schema: Any, pointer: str) -> Any:
    if isinstance(schema, list):
        return [_moved(inner, pointer) for inner in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, pointer) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = pointer + reference[1:]
    return moved
