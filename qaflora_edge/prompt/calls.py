"""Calls of tools, as bases write them: formats, grammars, and calls read out of answers."""

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qaflora_edge.ask import Sampling, Tools
from qaflora_edge.errors import OptionError
from qaflora_edge.inference.constraint import (
    Grammar,
    chosen_grammar,
    either_grammar,
    framed_grammar,
    schema_grammar,
)
from qaflora_edge.prompt.template import literal_text

_FENCES = ("```json", "```\n{", "```{")
_BARE = '{"name"'
_AFTER = re.compile(r"\s*(?:</tool_call>|;|```|\Z|(?=\[TOOL_CALLS\]))")
_DECODER = json.JSONDecoder()

# Small bases write calls so, whatever they are shown.
_PLAIN = r'```(?:json)?\s*(?=\{)|\A\s*(?=\{\s*"name")'


class CallFormat(NamedTuple):
    """Say how a base writes calls.

    sign        what only chat templates with this format write
    mark        what a call begins with in an answer; small bases leave it out
    begin, end  texts around the JSON of a call; {name} is the tool's
    arguments   the field of the arguments beside `name`; "" where they are all of the JSON
    before      finds what stands before JSON that may be a call
    n_id        characters of a call's id, where templates count them
    """

    sign: str
    mark: str
    begin: str
    end: str
    arguments: str
    before: re.Pattern[str]
    n_id: int = 0


_MISTRAL = r"\[TOOL_CALLS\]\s*"
_NAMED = r"(?P<name>[^][{}]+)(?:\[CALL_ID\](?P<id>\w+))?\[ARGS\]\s*(?=\{)"
_XML = ("<function=", "<arg_key>")  # of templates that mark calls as Hermes does
# The first whose sign is in a template is the template's.
FORMATS = (
    CallFormat(  # Hermes, Qwen
        *("<tool_call>", "<tool_call>", "<tool_call>\n", "\n</tool_call>", "arguments"),
        re.compile(rf"<tool_call>\s*(?=\{{)|{_PLAIN}"),
    ),
    CallFormat(  # Mistral since 2025
        *("[ARGS]", "[TOOL_CALLS]", "[TOOL_CALLS]{name}[ARGS]", "", ""),
        re.compile(rf"{_MISTRAL}{_NAMED}|{_PLAIN}"),
        n_id=9,
    ),
    CallFormat(  # Mistral before
        *("[TOOL_CALLS]", "[TOOL_CALLS]", "[TOOL_CALLS][", "]", "arguments"),
        re.compile(rf"{_MISTRAL}(?=\[)|{_PLAIN}"),
        n_id=9,
    ),
    CallFormat(  # Llama 3
        *('{"name": function name, "parameters":', "<|python_tag|>", "", "", "parameters"),
        re.compile(rf"(?:<\|python_tag\|>|(?<=;))\s*(?=\{{)|{_PLAIN}"),
    ),
)


def call_format(template: str | None) -> CallFormat | None:
    """Return the format of a chat template's calls; None where it has none, or is malformed."""
    literal = literal_text(template or "")
    if any(mark in literal for mark in _XML):
        return None
    return next((style for style in FORMATS if style.sign in literal), None)


def _moved(schema: Any, place: str) -> Any:
    """Point the references of a schema, from `#` on, to its place in a larger schema."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved


@dataclass(frozen=True)
class Calls:
    """Know the tools that a base was told of, and how it calls them."""

    tools: Tools
    format: CallFormat

    @property
    def stop(self) -> tuple[str, ...]:
        """Give a text that ends the first call, where the second is not waited for."""
        has_end = self.tools.is_single and len(self.format.end) > 1
        return (self.format.end.strip(),) if has_end else ()

    def grammar(self, tools: Sequence[Mapping[str, Any]]) -> Grammar:
        """Make the grammar of one call of one of these tools, with arguments by its schema."""
        begin = self.format.begin
        end = self.format.end
        field = self.format.arguments
        forms = []
        calls = []
        for i, tool in enumerate(tools):
            name = tool["function"]["name"]
            parameters = tool["function"].get("parameters") or {"type": "object"}
            place = f"#/anyOf/{i}/properties/{field}" if field else "#"
            try:
                parameters = _moved(parameters, place)
            except RecursionError as error:
                raise OptionError(
                    "Option tools has parameters of too many levels, expected fewer; use $defs.",
                    "tools",
                ) from error
            forms.append((begin.replace("{name}", name), parameters, end))
            fields = {"name": {"const": name}, field: parameters}
            calls.append({"type": "object", "properties": fields, "required": [*fields]})
        if field:
            forms = [(begin, {"anyOf": calls}, end)]
        return framed_grammar(forms, source="The parameters of tools")

    def shown(self, pieces: Iterable[str], calls: list[dict[str, Any]]) -> Iterator[str]:
        """Yield an answer's text until a call begins; at the end add the calls to a list."""
        held = ""
        is_start = True
        for piece in pieces:
            held += piece
            if is_start and _BARE.startswith("".join(held[:64].split())[: len(_BARE)]):
                continue
            is_start = False
            at = next((at for at in range(len(held)) if self._may_begin(held, at)), len(held))
            if at:
                yield held[:at]
            held = held[at:]
        rest, last_calls = self.parse(held)
        calls += last_calls
        if rest:
            yield rest

    def _may_begin(self, text: str, at: int) -> bool:
        """Tell whether a place begins with what a call begins with, or could with more text."""
        marks = (self.format.mark, *_FENCES)
        return any(text.startswith(mark, at) or mark.startswith(text[at:]) for mark in marks)

    def parse(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Give an answer without its tool calls, and the calls; a call that is no JSON stays text.

        Without a mark before it, JSON is a call if it has the name of a tool and arguments.
        """
        calls: list[dict[str, Any]] = []
        rest = ""
        at = 0
        while match := self.format.before.search(text, at):
            made, end = self._decoded(text, match)
            after = _AFTER.match(text, end)
            if made and after:
                rest += text[at : match.start()]
                calls = calls + made
                at = after.end()
            else:
                rest = rest + text[at : match.end() + 1]
                at = match.end() + 1
        rest += text[at:]
        return (rest.strip(), calls[:1] if self.tools.is_single else calls) if calls else (rest, [])

    def _decoded(self, text: str, match: re.Match[str]) -> tuple[list[dict[str, Any]], int]:
        """Read the JSON behind a match: calls, or none, and where it ends."""
        try:
            value, end = _DECODER.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            return [], match.end()
        groups = match.groupdict()
        if groups.get("name"):
            value = {"name": groups["name"].strip(), "arguments": value, "id": groups["id"]}
        is_marked = self.format.mark in match[0]
        written = value if isinstance(value, list) else [value]
        made = [self._call(call, is_marked=is_marked) for call in written]
        return [call for call in made if call] if all(made) else [], end

    def _call(self, call: Any, *, is_marked: bool) -> dict[str, Any] | None:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        arguments = call.get("arguments", call.get("parameters"))
        names = [tool["function"]["name"] for tool in self.tools.offered]
        if not is_marked and not (call["name"] in names and isinstance(arguments, dict)):
            return None
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments or {}, ensure_ascii=False)
        n_id = self.format.n_id
        own_id = call.get("id")
        if not (isinstance(own_id, str) and len(own_id) == n_id):
            own_id = uuid.uuid4().hex[:n_id] if n_id else f"call_{uuid.uuid4().hex}"
        function = {"name": call["name"], "arguments": arguments}
        return {"id": own_id, "type": "function", "function": function}


def calls_of(template: str | None, tools: Tools | None) -> Calls | None:
    """Say how a base with this chat template calls tools; None: it cannot, as far as we know."""
    style = call_format(template) if tools else None
    return Calls(tools, style) if tools and style else None


def bound(
    sampling: Sampling, json_schema: Mapping[str, Any] | bool | None, calls: Calls | None
) -> Sampling:
    """Bind an answer to its grammar, to a JSON schema, or to a call of tools.

    Raises OptionError for a form of its own beside a call that is required.
    """
    grammar = _grammar(sampling.grammar, json_schema, calls)
    stop = sampling.stop if calls is None else (*sampling.stop, *calls.stop)
    return replace(sampling, grammar=grammar, stop=stop)


def _grammar(grammar: str | None, json_schema: Any, calls: Calls | None) -> Grammar | None:
    """Choose what an answer follows; with a schema and free tools either."""
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
