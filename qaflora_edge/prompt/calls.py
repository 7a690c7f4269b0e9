"""Calls of tools, as bases write them: one table of formats."""

import re
from typing import NamedTuple

from qaflora_edge.prompt.template import literal_text

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
    return next((each for each in FORMATS if each.sign in literal), None)
