"""Calls of tools, as bases write them: formats, grammars, and calls read out of answers."""

import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qaflora_edge.ask import Sampling, Tools
from qaflora_edge.errors import OptionError
from qaflora_edge.formats.inputs import Json, Object
from qaflora_edge.grammar import moved_schema
from qaflora_edge.inference.constraint import (
    Grammar,
    chosen_grammar,
    either_grammar,
    framed_grammar,
    schema_grammar,
)
from qaflora_edge.prompt import call_arguments
from qaflora_edge.prompt.template import literal_text

CallPart = dict[str, Any]  # a call, or more of its arguments, as OpenAI streams it

_FENCES = ("```json", "```\n{", "```{")
_BARE = '{"name"'
_DECODER = json.JSONDecoder()
# What ends a call, or stands between two.
_CLOSERS = re.compile(
    r'(?:[\s\]},;]|"id"\s*:\s*"\w*"|```(?!json)|</function>|</tool_call>|<tool_call\|>'
    r"|<\|/tool_call\|>|<\|tool_call_end\|>)*"
)

# Small bases write calls so, whatever they are shown.
_PLAIN = r'```(?:json)?\s*(?=\{)|\A\s*(?=\{\s*"name")'
# The head of a call in JSON, up to its arguments, where they come last.
_JSON_HEAD = re.compile(
    r"(?:<tool_call>|<\|python_tag\|>|```(?:json)?"
    r"|(?:\[TOOL_CALLS\]|<\|tool_call\|>|<\|tool_call_start\|>|functools)\s*\[?)?\s*"
    r'\{\s*"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class CallFormat(NamedTuple):
    """Say how a base writes calls.

    sign        what only chat templates with this format write
    marks       what a call begins with in an answer; small bases leave it out
    begin, end  texts around a call; {name} is the tool's
    arguments   the field of the arguments beside `name`; "" where no field holds them
    before      finds what stands before what may be a call
    head        matches a call up to its arguments
    n_id        characters of a call's id, where templates count them
    reader      follows arguments that are no object of JSON
    rules       writes their grammar, as call_arguments.tool_grammar asks for it
    is_in_system  whether the template reads the tools in the system's message
    """

    sign: str
    marks: tuple[str, ...]
    begin: str
    end: str
    arguments: str
    before: re.Pattern[str]
    head: re.Pattern[str] = _JSON_HEAD
    n_id: int = 0
    reader: type[call_arguments.TagArguments] | None = None
    rules: Callable[[str, Object], list[str]] | None = None
    is_in_system: bool = False

    def written(self, calls: Sequence[Object]) -> str:
        """Write calls as the base does, for templates that leave them out."""
        text = ""
        for function in (call["function"] for call in calls):
            name = function["name"]
            arguments = function.get("arguments") or {}
            written: Any = (
                {"name": name, self.arguments: arguments} if self.arguments else arguments
            )
            body = json.dumps(written, ensure_ascii=False)
            if self.reader:
                pairs = arguments.items()
                body = ", ".join(f"{key}={json.dumps(value)}" for key, value in pairs)
            text += self.begin.replace("{name}", name) + body + self.end
        return text


_MISTRAL = r"\[TOOL_CALLS\]\s*"
_NAMED = r"(?P<name>[^][{}]+)(?:\[CALL_ID\](?P<id>\w+))?\[ARGS\]\s*(?=\{)"
_FUNCTION = r"(?:<tool_call>\s*)?<function=(?P<name>[^<>\n]+)>"
# Of templates with a form of their own, which mark calls as Hermes does.
_OTHERS = ("<function=", "<arg_key>")
_XML = CallFormat(  # Qwen3-Coder, Qwen3.5
    "<tool_call>\n<function=",
    ("<tool_call>", "<function="),
    "<tool_call>\n<function={name}>\n",
    "</function>\n</tool_call>",
    "",
    re.compile(rf"{_FUNCTION}|{_PLAIN}"),
    re.compile(_FUNCTION),
    reader=call_arguments.TagArguments,
    rules=call_arguments.tag_rules,
)
_NAMED_CALL = r"\s*(?P<name>[\w.-]+)"


def _json_form(sign: str, marks: tuple[str, ...], begin: str, end: str, **more: Any) -> CallFormat:
    any_mark = "|".join(re.escape(mark.rstrip("[")) for mark in marks)
    before = re.compile(rf"(?:{any_mark})\s*(?=[\[{{])|{_PLAIN}")
    return CallFormat(sign, marks, begin, end, "arguments", before, **more)


# The first whose sign is in a template is the template's.
FORMATS = (
    _json_form("<tool_call>", ("<tool_call>",), "<tool_call>\n", "\n</tool_call>"),  # Qwen, Hermes
    CallFormat(  # Mistral since 2025
        "[ARGS]",
        ("[TOOL_CALLS]",),
        "[TOOL_CALLS]{name}[ARGS]",
        "",
        "",
        re.compile(rf"{_MISTRAL}{_NAMED}|{_PLAIN}"),
        re.compile(_MISTRAL + _NAMED),
        n_id=9,
    ),
    _json_form("[TOOL_CALLS]", ("[TOOL_CALLS]",), "[TOOL_CALLS][", "]", n_id=9),  # Mistral before
    CallFormat(  # Llama 3
        '{"name": function name, "parameters":',
        ("<|python_tag|>",),
        "<|python_tag|>",
        "",
        "parameters",
        re.compile(rf"(?:<\|python_tag\|>|(?<=;))\s*(?=\{{)|{_PLAIN}"),
    ),
    _XML,
    # Granite 3
    _json_form("respond only with <|tool_call|>", ("<|tool_call|>",), "<|tool_call|>[", "]"),
    CallFormat(  # LFM2
        "List of tools: ",
        ("<|tool_call_start|>",),
        "<|tool_call_start|>[{name}(",
        ")]<|tool_call_end|>",
        "",
        re.compile(rf"<\|tool_call_start\|>\s*\[{_NAMED_CALL}\(|{_PLAIN}"),
        re.compile(rf"(?:<\|tool_call_start\|>\s*\[)?{_NAMED_CALL}\("),
        reader=call_arguments.NamedArguments,
        rules=call_arguments.python_rules,
    ),
    CallFormat(  # Gemma 4
        "<|tool_call>call:",
        ("<|tool_call>",),
        "<|tool_call>call:{name}{",
        "}<tool_call|>",
        "",
        re.compile(rf"<\|tool_call>\s*call:{_NAMED_CALL}\{{|{_PLAIN}"),
        re.compile(rf"(?:<\|tool_call>)?\s*call:{_NAMED_CALL}\{{"),
        reader=call_arguments.NamedArguments,
        rules=call_arguments.gemma_rules,
    ),
    _json_form(  # Phi-4-mini, whose documents have both marks
        "<|/tool|>",
        ("<|tool_call|>", "functools["),
        "<|tool_call|>[",
        "]<|/tool_call|>",
        is_in_system=True,
    ),
)


def call_format(template: str | None) -> CallFormat | None:
    """Return the format of a chat template's calls; None where it has none, or is malformed."""
    literal = literal_text(template or "")
    if _XML.sign in literal:
        return _XML
    if any(mark in literal for mark in _OTHERS):
        return None
    return next((style for style in FORMATS if style.sign in literal), None)


@dataclass(frozen=True)
class Calls:
    """Know the tools that a base was told of, and how it calls them."""

    tools: Tools
    format: CallFormat

    @property
    def stop(self) -> tuple[str, ...]:
        """Give a text that ends the first call, where the second is not waited for."""
        at = self.format.end.rfind("<")
        return (self.format.end[at:],) if self.tools.is_single and at >= 0 else ()

    def grammar(self, tools: Sequence[Object]) -> Grammar:
        """Make the grammar of one call of one of these tools, with arguments by its schema."""
        begin = self.format.begin
        end = self.format.end
        if self.format.rules:
            return call_arguments.tool_grammar(begin, end, tools, self.format.rules)
        field = self.format.arguments
        forms = []
        calls = []
        for i, tool in enumerate(tools):
            name = tool["function"]["name"]
            parameters = tool["function"].get("parameters") or {"type": "object"}
            pointer = f"#/anyOf/{i}/properties/{field}" if field else "#"
            parameters = moved_schema(parameters, pointer)
            forms.append((begin.replace("{name}", name), parameters, end))
            fields = {"name": {"const": name}, field: parameters}
            calls.append({"type": "object", "properties": fields, "required": [*fields]})
        if field:
            forms = [(begin, {"anyOf": calls}, end)]
        return framed_grammar(forms, source="The parameters of tools")

    def begins(self, text: str) -> bool:
        """Tell whether an answer that begins so begins with a call."""
        begun = "".join(text.split())
        begun = begun.removeprefix("```json").removeprefix("```")
        marks = ["".join(mark.split()) for mark in self.format.marks]
        return begun.startswith((*marks, _BARE))

    def read(self, pieces: Iterable[str]) -> Iterator[str | CallPart]:
        """Yield an answer's text until a call begins, then calls as they are written.

        The first part of a call has its id and name, the others more of its arguments' text. Calls
        of tools that nobody offered, and text after a call, come last. A cut call ends where it is.
        """
        reader = _Reader(self)
        for piece in pieces:
            yield from reader.feed(piece)
        yield from reader.end()

    def parse(self, text: str) -> tuple[str, list[Json]]:
        """Give a whole answer without its calls, and the calls; one that is cut stays text."""
        rest = ""
        calls: list[Json] = []
        reader = _Reader(self)
        for part in (*reader.feed(text), *reader.end()):
            if isinstance(part, str):
                rest += part
            else:
                add_part(calls, part)
        if reader.unfinished:
            rest += reader.unfinished
            calls.pop()
        return (rest.strip(), calls) if calls else (rest, calls)

    def late(self, text: str) -> tuple[str, list[Json]]:
        """Split what was held until the end: text, and calls; one that is no JSON stays text.

        Without a mark before it, JSON is a call if it has the name of a tool and arguments.
        """
        calls: list[Json] = []
        rest = ""
        at = 0
        while match := self.format.before.search(text, at):
            calls_here, end = self._decoded(text, match)
            if calls_here:
                rest += text[at : match.start()]
                calls += calls_here
                at = closed(text, end)
            else:
                rest += text[at : match.end() + 1]
                at = match.end() + 1
        return rest + text[at:], calls

    def _decoded(self, text: str, match: re.Match[str]) -> tuple[list[Json], int]:
        groups = match.groupdict()
        name = groups.get("name")
        try:
            if name and self.format.reader:
                reader = self.format.reader(self.parameters(name))
                arguments, rest = reader.feed(text[match.end() :])
                value = json.loads(arguments)  # no JSON where the call is cut
                end = len(text) - len(rest or "")
            else:
                value, end = _DECODER.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            return [], match.end()
        if name:
            value = {"name": name.strip(), "arguments": value, "id": groups.get("id")}
        is_marked = self.format.marks[0] in match[0]
        written = value if isinstance(value, list) else [value]
        made = [self._call(call, is_marked=is_marked) for call in written]
        return [call for call in made if call] if all(made) else [], end

    def parameters(self, name: str) -> Any:
        """Give the schema of a tool's arguments; {} where it has none."""
        functions = (tool["function"] for tool in self.tools.offered)
        return next((f.get("parameters") or {} for f in functions if f["name"] == name), {})

    def offers(self, name: str) -> bool:
        return any(tool["function"]["name"] == name for tool in self.tools.offered)

    def _call(self, call: Any, *, is_marked: bool) -> Json | None:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        arguments = call.get("arguments", call.get("parameters"))
        if not is_marked and not (self.offers(call["name"]) and isinstance(arguments, dict)):
            return None
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments or {}, ensure_ascii=False)
        return self.call(call["name"], arguments, call.get("id"))

    def call(self, name: str, arguments: str, call_id: Any = None) -> Json:
        """Write a call in OpenAI's shape; an id that the template would not take is replaced."""
        n_id = self.format.n_id
        if not (isinstance(call_id, str) and len(call_id) == n_id):
            call_id = uuid.uuid4().hex[:n_id] if n_id else f"call_{uuid.uuid4().hex}"
        function = {"name": name, "arguments": arguments}
        return {"id": call_id, "type": "function", "function": function}


def closed(text: str, at: int) -> int:
    """Tell where what ends a call ends."""
    match = _CLOSERS.match(text, at)
    return match.end() if match else at


def add_part(calls: list[Json], part: CallPart) -> None:
    if part["index"] == len(calls):
        call = {name: value for name, value in part.items() if name != "index"}
        call["function"] = dict(part["function"])
        calls.append(call)
    else:
        calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]


class _JsonArguments:
    """Follow arguments that are an object of JSON."""

    def __init__(self) -> None:
        self._text = ""

    def feed(self, piece: str) -> tuple[str, str | None]:
        """Give more of the arguments, and what follows them; None: they go on."""
        self._text += piece
        if "}" not in piece:
            return piece, None
        try:
            _, end = _DECODER.raw_decode(self._text)
        except (ValueError, RecursionError):
            return piece, None
        n_here = len(piece) - (len(self._text) - end)
        return piece[:n_here], piece[n_here:]


class _Reader:
    """Read one answer: its text until a call begins, then calls as they are written."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._held = ""
        self._is_start = True
        self._n_call = 0  # that have begun
        self._open: _JsonArguments | call_arguments.TagArguments | None = None
        self.unfinished = ""  # the text of a call that has begun

    def feed(self, piece: str) -> Iterator[str | CallPart]:
        self._held += piece
        if self._n_call == 0 and (text := self._plain()):
            yield text
        while self._held:
            if self._open is None:
                head = self._begun()
                if head is None:
                    return
                yield head
            else:
                arguments, rest = self._open.feed(self._held)
                self.unfinished += self._held
                self._held = rest or ""
                if arguments:
                    yield {"index": self._n_call - 1, "function": {"arguments": arguments}}
                if rest is not None:
                    self._open = None
                    self.unfinished = ""

    def end(self) -> Iterator[str | CallPart]:
        """Yield what was held: the rest of the text, and calls that were not known as such."""
        held = self._held
        if self._n_call:
            held = held[closed(held, 0) :]
        rest, calls = self._calls.late(held)
        if rest and not (self._n_call and rest.isspace()):
            yield rest
        if self._calls.tools.is_single:
            calls = calls[: 1 - self._n_call]
        for index, call in enumerate(calls, self._n_call):
            yield {"index": index} | call

    def _plain(self) -> str:
        held = self._held
        if self._is_start and _BARE.startswith("".join(held[:64].split())[: len(_BARE)]):
            return ""
        self._is_start = False
        at = next((at for at in range(len(held)) if self._may_begin(at)), len(held))
        self._held = held[at:]
        return held[:at]

    def _may_begin(self, at: int) -> bool:
        """Tell whether a place begins with what a call begins with, or could with more text."""
        marks = (*self._calls.format.marks, *_FENCES)
        held = self._held
        return any(held.startswith(mark, at) or mark.startswith(held[at:]) for mark in marks)

    def _begun(self) -> CallPart | None:
        calls = self._calls
        if self._n_call and calls.tools.is_single:
            return None
        start = closed(self._held, 0) if self._n_call else 0
        heads = (calls.format.head, _JSON_HEAD)
        match = next(filter(None, (head.match(self._held, start) for head in heads)), None)
        name = match["name"].strip() if match else ""
        if match is None or not calls.offers(name):
            return None
        reader = None if match.re is _JSON_HEAD else calls.format.reader
        self._open = reader(calls.parameters(name)) if reader else _JsonArguments()
        self.unfinished = self._held[: match.end()]
        self._held = self._held[match.end() :]
        index = self._n_call
        self._n_call += 1
        return {"index": index} | calls.call(name, "", match.groupdict().get("id"))


def calls_of(template: str | None, tools: Tools | None) -> Calls | None:
    """Say how a base with this chat template calls tools; None: it cannot, as far as we know."""
    style = call_format(template) if tools else None
    return Calls(tools, style) if tools and style else None


def bound(sampling: Sampling, json_schema: Object | bool | None, calls: Calls | None) -> Sampling:
    """Bind an answer to its grammar, to a JSON schema, or to a call of tools."""
    grammar = _grammar(sampling.grammar, json_schema, calls)
    stop = sampling.stop if calls is None else (*sampling.stop, *calls.stop)
    return replace(sampling, grammar=grammar, stop=stop)


def _grammar(grammar: str | None, json_schema: Any, calls: Calls | None) -> Grammar | None:
    required = calls.tools.required if calls else ()
    if grammar is None and json_schema is None:
        return calls.grammar(required) if calls and required else None
    if required:
        raise OptionError(
            "Options tool_choice and grammar or response_format are given, expected one of them; "
            "leave the others out.",
            "tool_choice",
        )
    if calls and grammar is None:
        return either_grammar(schema_grammar(json_schema), calls.grammar(calls.tools.offered))
    return chosen_grammar(grammar, json_schema)
