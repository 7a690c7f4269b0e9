"""Arguments of calls: read as JSON, and written as rules of a grammar.

Qwen3-Coder and Qwen3.5 write tags; LFM2 writes Python, and Gemma 4 a form of its own:

    <function=name>
    <parameter=x>
    a text as it is, or JSON
    </parameter>
    </function>
    name(x=1, y="a text")
    name{x:1,y:<|"|>a text<|"|>}
"""

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from qaflora_edge.formats.inputs import Object
from qaflora_edge.grammar import checked_schema, moved_schema
from qaflora_edge.inference.constraint import Grammar, lark_grammar

_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>(?:\n|(?=[^\n]))")
_FUNCTION_END = re.compile(r"\s*</function>")
_VALUE_END = re.compile(r"\n?</parameter>(?=\s*(?:<parameter=|</function>))")
# What may become the end of a value with more text; at times a little more.
_MAY_END = re.compile(r"\n?(?:</parameter>\s*\S{0,12}|</?[a-z]{0,10})?\Z")
_WORDS = {"True": "true", "False": "false", "None": "null"}  # as Python and jinja write them
_SOURCE = "The parameters of tools"  # as messages call a grammar of them
_TYPES = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


class TagArguments:
    """Follow the arguments of a call, and write them as an object of JSON.

    schema  of the arguments: it tells texts from JSON
    """

    begin = _PARAMETER  # the name of an argument
    end = _FUNCTION_END

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._held = ""
        self._value: Value | None = None
        self._n_value = 0

    def feed(self, piece: str) -> tuple[str, str | None]:
        """Give more of the arguments, and what follows them; None: they go on."""
        self._held += piece
        written = ""
        while True:
            if self._value is not None:
                n_here, n_ended = self._span()
                written += self._value.add(self._held[:n_here])
                self._held = self._held[n_ended or n_here :]
                if n_ended is None:
                    return written, None
                written += self._value.end()
                self._value = None
            elif begin := self.begin.match(self._held):
                self._held = self._held[begin.end() :]
                name = begin[1].strip()
                self._value = self._new_value(name)
                written += "{" if self._n_value == 0 else ", "
                written += json.dumps(name, ensure_ascii=False) + ": " + self._value.begin
                self._n_value += 1
            elif end := self.end.match(self._held):
                rest = self._held[end.end() :]
                closing = "}" if self._n_value else "{}"
                return written + closing, rest
            else:
                return written, None

    def _new_value(self, name: str) -> "Value":
        return Value(types_of(_property(self._schema, name), self._schema))

    def _span(self) -> tuple[int, int | None]:
        """Count the characters that are the value's, and those with its end; None: it goes on."""
        end = _VALUE_END.search(self._held)
        may_end = end or _MAY_END.search(self._held)
        n_here = may_end.start() if may_end else len(self._held)
        n_ended = end.end() if end else None
        return n_here, n_ended


class Value:
    """Write one value as JSON: a text as it comes, anything else when it is whole.

    types  of JSON that it may have; none: unknown
    """

    def __init__(self, types: set[str]) -> None:
        self._types = types
        self._is_text = types == {"string"}
        self._text = ""
        self.begin = '"' if self._is_text else ""

    def add(self, text: str) -> str:
        if self._is_text:
            return json.dumps(text, ensure_ascii=False)[1:-1]
        self._text += text
        return ""

    def end(self) -> str:
        if self._is_text:
            return '"'
        text = _WORDS.get(self._text.strip(), self._text)
        try:
            value = json.loads(text, parse_constant=refuse)
        except (ValueError, RecursionError):
            value = text
        is_other = "string" in self._types and self._type(value) not in self._types
        if isinstance(value, str) or is_other:
            return json.dumps(self._text, ensure_ascii=False)
        return text

    def _type(self, value: Any) -> str:
        name = _TYPES.get(type(value), "null")
        return "number" if name == "integer" and name not in self._types else name


def refuse(name: str) -> NoReturn:
    raise ValueError(name)


def _property(schema: Any, name: str) -> Any:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties.get(name) if isinstance(properties, Mapping) else None


def resolved(schema: Any, root: Any) -> Any:
    """Follow a reference inside of the root, once."""
    reference = schema.get("$ref") if isinstance(schema, Mapping) else None
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return schema
    for name in reference[2:].split("/"):
        root = root.get(name) if isinstance(root, Mapping) else None
    return root


def types_of(schema: Any, root: Any) -> set[str]:
    """Name the types of JSON that a schema lets a value have; none where it does not say."""
    types = set()
    outer = resolved(schema, root)
    options = [outer]
    for field in ("anyOf", "oneOf"):
        inner = outer.get(field) if isinstance(outer, Mapping) else None
        options += inner if isinstance(inner, list) else []
    for option in options:
        fields = resolved(option, root)
        if not isinstance(fields, Mapping):
            continue
        names = fields.get("type")
        texts = texts_of(fields)
        if isinstance(names, str):
            types.add(names)
        elif isinstance(names, list):
            types |= {name for name in names if isinstance(name, str)}
        elif texts:
            types.add("string")
    return types


def texts_of(schema: Any) -> list[str]:
    """List the texts that a schema names; none where it names none, or other values too."""
    fields = schema if isinstance(schema, Mapping) else {}
    values = [fields["const"]] if "const" in fields else fields.get("enum")
    is_texts = isinstance(values, list) and all(isinstance(value, str) for value in values)
    return values if is_texts and values else []


def tool_grammar(
    begin: str, end: str, tools: Sequence[Object], arguments: Callable[[str, Object], list[str]]
) -> Grammar:
    """Make the grammar of one call of one of these tools.

    begin, end  texts around the arguments; {name} is the tool's
    arguments   writes the rules of a name, from a schema
    """
    rules = []
    for i, tool in enumerate(tools):
        function = tool["function"]
        schema = checked_schema(function.get("parameters") or {}, source=_SOURCE, is_lenient=True)
        head = json.dumps(begin.replace("{name}", function["name"]))
        rules.append(f"tool{i}: {head} tool{i}arguments {json.dumps(end)}")
        rules += arguments(f"tool{i}arguments", schema)
    start = " | ".join(f"tool{i}" for i in range(len(tools)))
    return lark_grammar("\n".join([f"start: {start}", *rules, ""]), _SOURCE)


def tag_rules(rule: str, schema: Object) -> list[str]:
    required = schema.get("required") or []
    arguments = []
    written = []
    for i, (name, value) in enumerate((schema.get("properties") or {}).items()):
        argument = f"{rule}value{i}"
        mark = "" if name in required else "?"
        arguments.append(argument + mark)
        head = json.dumps(f"<parameter={name}>\n")
        written.append(f"{argument}: {head} {argument}inner")
        written.append(_value_rule(f"{argument}inner", value, schema))
    whole = " ".join(arguments) or '""'
    return [f"{rule}: {whole}", *written]


def _value_rule(rule: str, schema: Any, root: Any) -> str:
    end = json.dumps("\n</parameter>\n")
    types = types_of(schema, root)
    fields = resolved(schema, root)
    texts = texts_of(fields)
    if texts:
        return f"{rule}: ({' | '.join(json.dumps(text) for text in texts)}) {end}"
    if not types or "string" in types:
        text = f"{rule}text[lazy]: /(.|\\n)*<\\/parameter>/"
        return f'{rule}: {rule}text "\\n"\n{text}'
    return f"{rule}: {json_rule(schema, root)} {end}"


def json_rule(schema: Any, root: Any) -> str:
    """Write a rule for JSON under a schema, with references into its root."""
    pointer = "#/$defs/whole"
    whole = moved_schema(schema, pointer) | {"$defs": {"whole": moved_schema(root, pointer)}}
    return f"%json {json.dumps(whole)}"


_MARK = '<|"|>'
_QUOTES = (_MARK, '"', "'")
_ESCAPES = {"\\'": "'", '"': '\\"'}  # of Python in a text -> of JSON
_AFTER = r"\s*[,)}:\]]"  # what stands behind a text
_NO_MARK = r'<(?!\|"\|>|\|?"?\|?\Z)'


def _inside(quote: str) -> str:
    """Write what matches the inside of a text; small bases do not escape each quote in it."""
    if quote == _MARK:
        return f"(?:[^<]++|{_NO_MARK})*+"
    return rf"(?:[^{quote}\\]++|\\.|{quote}(?!{_AFTER}|\s*\Z))*+"


def _end(quote: str, after: str = _AFTER) -> str:
    return re.escape(quote) if quote == _MARK else f"{quote}(?={after})"


_INSIDES = {quote: re.compile(_inside(quote), re.DOTALL) for quote in _QUOTES}
_ENDS = {quote: re.compile(_end(quote)) for quote in _QUOTES}
_WHOLE = "|".join(re.escape(q) + _inside(q) + _end(q, rf"{_AFTER}|\s*\Z") for q in _QUOTES)
_NAME = re.compile(r"[\s,]*([^\s=:,(){}\[\]<|\"']+)\s*[=:]\s*")
_CLOSE = re.compile(r"[\s,]*[)}]")
# Parts of a value: where a text begins, a bracket, a comma, anything else.
_PART = re.compile(
    rf"(?P<quote>{'|'.join(map(re.escape, _QUOTES))})"
    rf"|(?P<open>[\[({{])|(?P<close>[\])}}])|(?P<comma>,)|[^\"'<\[\](){{}},]+|{_NO_MARK}"
)
_TOKEN = re.compile(
    rf"(?P<text>{_WHOLE})|(?<![\w.])(?P<word>[^\W\d][\w.-]*)(?P<key>\s*:)?", re.DOTALL
)


class NamedArguments(TagArguments):
    """Follow the arguments of a call behind its bracket; values show their types themselves."""

    begin = _NAME
    end = _CLOSE
    _depth = 0  # of brackets in a value
    _quote = ""  # of a text in it

    def _new_value(self, name: str) -> Value:
        self._depth = 0
        return _NamedValue(set())

    def _span(self) -> tuple[int, int | None]:
        at = 0
        while True:
            if self._quote:
                inside = _INSIDES[self._quote].match(self._held, at)
                at = inside.end() if inside else at
                end = _ENDS[self._quote].match(self._held, at)
                if end is None:
                    return at, None
                at = end.end()
            part = _PART.match(self._held, at)
            self._quote = part["quote"] or "" if part else ""
            if part is None:
                return at, None
            if self._depth == 0 and (part["comma"] or part["close"]):
                return at, at
            self._depth += bool(part["open"]) - bool(part["close"])
            at = part.end()


class _NamedValue(Value):
    def end(self) -> str:
        return as_json(self._text.strip())


def as_json(text: str) -> str:
    """Write a value as JSON; what is neither JSON nor one of these forms is a text."""
    written = _TOKEN.sub(_as_token, text)
    try:
        json.loads(written, parse_constant=refuse)
    except (ValueError, RecursionError):
        written = json.dumps(text, ensure_ascii=False)
    return written.encode(errors="backslashreplace").decode()  # half a surrogate pair


def _as_token(match: re.Match[str]) -> str:
    word = match["word"]
    text = match["text"]
    if match["key"]:
        return json.dumps(word, ensure_ascii=False) + ":"
    if word:
        return _WORDS.get(word, word)
    if text.startswith(_MARK):
        return json.dumps(text[len(_MARK) : -len(_MARK)], ensure_ascii=False)
    body = text[1:-1]
    escaped = re.sub(r"\\.|\"", lambda part: _ESCAPES.get(part[0], part[0]), body, flags=re.DOTALL)
    with contextlib.suppress(ValueError):  # an escape of Python alone stays
        body = json.loads(f'"{escaped}"', strict=False)
    return json.dumps(body, ensure_ascii=False)


def python_rules(rule: str, schema: Object) -> list[str]:
    ways = {}
    for name, value in (schema.get("properties") or {}).items():
        texts = texts_of(resolved(value, schema))
        options = [json.dumps(json.dumps(text, ensure_ascii=False)) for text in texts]
        if types_of(value, schema) == {"boolean"}:
            options = ['"True"', '"False"']
        ways[name] = " | ".join(options) or json_rule(value, schema)
    return _named_rules(rule, schema, ways, "=", ", ")


def gemma_rules(rule: str, schema: Object) -> list[str]:
    """Write the rules of arguments in Gemma 4's form; what is in lists and objects is free."""
    mark = json.dumps(_MARK)
    by_type = {"string": f"{mark} {rule}text", "array": f"{rule}list", "object": f"{rule}object"}
    pair = rf'/[^\W\d][\w.-]*/ ":" {rule}any'
    scalar = json_rule({"type": ["boolean", "null", "number"]}, {})
    ways = {}
    properties = schema.get("properties") or {}
    for name in sorted(properties, key=str.lower):  # as the template lists them
        value = resolved(properties[name], schema)
        types = types_of(value, schema)
        options = [json.dumps(_MARK + text + _MARK) for text in texts_of(value)]
        if not options:
            options = [way for json_type, way in by_type.items() if json_type in types]
            if plain := sorted(types - {*by_type}):
                narrowed = value if value.get("type") == plain[0] else {"type": plain}
                options.append(json_rule(narrowed, schema))
        ways[name] = " | ".join(options) or f"{rule}any"
    return [
        *_named_rules(rule, schema, ways, ":", ","),
        rf"{rule}text[lazy]: /(.|\n)*{re.escape(_MARK)}/",
        f"{rule}any: {scalar} | {' | '.join(by_type.values())}",
        f'{rule}list: "[" ({rule}any ("," {rule}any)*)? "]"',
        f'{rule}object: "{{" ({pair} ("," {pair})*)? "}}"',
    ]


def _named_rules(
    rule: str, schema: Object, ways: Mapping[str, str], assign: str, comma: str
) -> list[str]:
    """Write the rules of named values, of which those that are not required may be left out.

    ways  name -> how its value is written

    RULEfromN are those from the N-th on, RULEmoreN the same behind a comma.
    """
    n = len(ways)
    rules = [f"{rule}: {rule}from0", f'{rule}from{n}: ""', f'{rule}more{n}: ""']
    for i, (name, way) in enumerate(ways.items()):
        argument = f"{json.dumps(name + assign)} ({way}) {rule}more{i + 1}"
        is_required = name in (schema.get("required") or [])
        later = "" if is_required else f" | {rule}from{i + 1}"
        rules.append(f"{rule}from{i}: {argument}{later}")
        later = "" if is_required else f" | {rule}more{i + 1}"
        rules.append(f"{rule}more{i}: {json.dumps(comma)} {argument}{later}")
    return rules
