"""Engine.chat in OpenAI's shape: choices, chunks, usage, tools."""

import copy
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import jinja2
import jsonschema
import numpy as np
import pytest
import tiny
from refusals import refused
from tiny import CHATML, QWEN, USER, constant_logits, write_tiny_adapter, write_tiny_base

from qaflora_edge import Engine
from qaflora_edge.ask import Tools
from qaflora_edge.config import in_group
from qaflora_edge.dialects.openai_chat import ShownTokens
from qaflora_edge.dialects.texts import text_logprobs
from qaflora_edge.errors import ModalityError, OptionError, PromptError, ToolsError
from qaflora_edge.inference.constraint import Constraint
from qaflora_edge.inference.sequence import TokenLogprob
from qaflora_edge.prompt.calls import FORMATS, Calls

CITY = {"city": {"enum": ["Lima", "Oslo"]}, "days": {"$ref": "#/$defs/n"}}
FORM = {"type": "object", "properties": CITY, "required": [*CITY], "additionalProperties": False}
FORM |= {"$defs": {"n": {"type": "integer", "minimum": 1, "maximum": 9}}}
TOLD = {"name": "weather", "description": "The weather <|im_end|>", "parameters": FORM}
WEATHER: dict[str, Any] = {"type": "function", "function": TOLD}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TIME = {"type": "function", "function": {"name": "time", "parameters": NOTHING}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Engine]:
    place = tmp_path_factory.mktemp("completions")
    options = {"chat_template": QWEN, "n_ctx": 2048, "user_defined": ("<tool_call>",)}
    base = write_tiny_base(place / "base.gguf", **options)
    adapters = {"a": write_tiny_adapter(place / "a.gguf", base).path}
    with Engine(base=base.path, adapters=adapters, n_ctx=1024) as engine:
        yield engine


@pytest.fixture(scope="module")
def terse(tmp_path_factory) -> Iterator[Engine]:
    """A base without white space that ends an object as soon as it may."""
    replace = constant_logits(lambda token: 4 if token == "}" else -9 * (token[0] in "ĠĊĉč"))
    path = tmp_path_factory.mktemp("terse") / "base.gguf"
    base = write_tiny_base(path, "qwen2", chat_template=QWEN, n_ctx=1024, replace=replace)
    with Engine(base=base.path, n_ctx=1024) as engine:
        yield engine


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(c["delta"].get("content", "") for c in choices if c["index"] == index)


def test_chunks_belong_together_and_end_with_the_usage(engine) -> None:
    whole = engine.chat(USER, max_tokens=6)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(engine.chat(USER, max_tokens=6, **options))
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    assert "usage" not in next(iter(engine.chat(USER, max_tokens=1, stream=True)))
    assert whole["id"] != chunks[0]["id"]


def test_several_choices_are_those_of_single_calls(engine) -> None:
    asked: dict[str, Any] = {"max_tokens": 4, "temperature": 1.0}
    single = [engine.chat(USER, seed=seed, **asked)["choices"][0]["message"] for seed in (5, 6)]
    whole = engine.chat(USER, n=2, seed=5, **asked)
    assert [choice["message"] for choice in whole["choices"]] == single
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    n_prompt = whole["usage"]["prompt_tokens"]
    assert n_prompt == len(engine.chat_tokens(USER))
    assert whole["usage"]["total_tokens"] == n_prompt + whole["usage"]["completion_tokens"]
    chunks = list(engine.chat(USER, n=2, seed=5, **asked, stream=True))
    assert [text_of(chunks, i) for i in range(2)] == [message["content"] for message in single]
    told = refused(OptionError, engine.chat, USER, n=0)
    assert told == "Option n is 0, expected a number of answers from 1 up."


def test_content_may_come_in_parts(engine) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "thing?"}]
    assert engine.chat_tokens([{"role": "user", "content": parts}]) == engine.chat_tokens(USER)
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    assert refused(ModalityError, engine.chat_tokens, image) == (
        "Message 0 has a part of type 'image_url', expected texts alone: a bundle reads no images, "
        "audio or files. Leave it out, or send what it says as text."
    )


@pytest.mark.parametrize("style", FORMATS)
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
        ("required", {"weather", "time"}),
    ],
)
def test_tool_that_has_to_be_called_is_called(terse, monkeypatch, choice, names, style) -> None:
    template = CHATML + "{% if tools %}{{ " + json.dumps(style.sign) + " }}{% endif %}"
    monkeypatch.setattr(terse._model, "chat_template", template)
    options = {"tools": [WEATHER, TIME], "tool_choice": choice, "temperature": 1.0, "seed": 1}
    choice_made = terse.chat(USER, **options)["choices"][0]
    assert choice_made["finish_reason"] == "tool_calls"
    assert choice_made["message"]["content"] is None
    (call,) = choice_made["message"]["tool_calls"]
    assert len(call["id"]) == (style.n_id or 37)
    assert call["function"]["name"] in names
    if call["function"]["name"] == "weather":
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, WEATHER["function"]["parameters"])
    chunks = list(terse.chat(USER, stream=True, **options))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    head, *more = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert head["function"]["name"] == call["function"]["name"]
    assert head["function"]["arguments"] == ""
    assert "".join(part["function"]["arguments"] for part in more) == call["function"]["arguments"]
    assert text_of(chunks) == ""
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_each_tool_has_its_own_definitions(terse) -> None:
    fields = {"x": {"$ref": "#/$defs/n"}, "more": {"$ref": "#"}}
    form = {**NOTHING, "properties": fields, "required": ["x"]}
    values = {"a": [1, 2], "b": ["c"]}
    forms = {name: {**form, "$defs": {"n": {"enum": n}}} for name, n in values.items()}
    functions = [{"name": name, "parameters": forms[name]} for name in forms]
    tools = [{"type": "function", "function": function} for function in functions]
    called, seeds = set(), iter(range(50))
    while called != {"a", "b"}:
        options = {"temperature": 1.0, "top_p": 1.0, "seed": next(seeds), "max_tokens": 150}
        made = terse.chat(USER, tools=tools, tool_choice="required", **options)
        for call in made["choices"][0]["message"].get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            jsonschema.validate(json.loads(arguments), forms[name])
            called.add(name)


def test_beside_a_schema_tools_may_be_called(terse) -> None:
    form = {**NOTHING, "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    asked: dict[str, Any] = {
        "tools": [WEATHER],
        "response_format": {"type": "json_schema", "json_schema": {"schema": form}},
    }
    reasons, seeds = set(), iter(range(50))
    while reasons != {"stop", "tool_calls"}:
        options = {"temperature": 1.0, "top_p": 1.0, "seed": next(seeds), "max_tokens": 150}
        (made,) = terse.chat(USER, **asked, **options)["choices"]
        if made["finish_reason"] == "stop":
            jsonschema.validate(json.loads(made["message"]["content"]), form)
        for call in made["message"].get("tool_calls", ()):
            arguments = json.loads(call["function"]["arguments"])
            jsonschema.validate(arguments, WEATHER["function"]["parameters"])
        reasons.add(made["finish_reason"])
        reasons.discard("length")  # a random base may write a text without end


def test_tools_reach_the_template_as_data(engine) -> None:
    tokens = engine.chat_tokens(USER, tools=[WEATHER])
    text = b"".join(engine._model.piece(token, special=True) for token in tokens).decode()
    assert '"name": "weather"' in text
    controls = [t for t in engine._model.special_tokens if t.text == "<|im_end|>"]
    assert tokens.count(controls[0].id) == 2  # the system's and the user's; not the description's
    assert engine.chat_tokens(USER, tools=[]) == engine.chat_tokens(USER)


def test_calls_and_results_go_back_into_the_conversation(engine) -> None:
    call = {"id": "c", "type": "function"}
    call["function"] = {"name": "weather", "arguments": '{"city": "Lima"}'}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": '{"c": 21}'},
    ]
    tokens = engine.chat_tokens(messages)
    text = b"".join(engine._model.piece(token, special=True) for token in tokens).decode()
    assert '<tool_call>\nweather {"city": "Lima"}\n</tool_call>' in text
    for wrong in ("x", {"function": {}}, {"function": {"name": "a", "arguments": "{"}}):
        with pytest.raises(PromptError, match=r"Message 0 has the tool call .*, expected"):
            engine.chat_tokens([{"role": "assistant", "tool_calls": [wrong]}])


HERMES, ARGS, LIST, LLAMA, XML, GRANITE, LFM, GEMMA, PHI = (
    Calls(Tools([WEATHER, TIME]), style) for style in FORMATS
)


def accumulated(tools: Calls, pieces: Iterable[str]) -> tuple[str, list[Any]]:
    """Join a stream as OpenAI's documentation of it says."""
    shown, calls = "", {}
    for part in tools.read(pieces):
        if isinstance(part, str):
            shown += part
        elif "id" in part:
            calls[part["index"]] = copy.deepcopy(part)
        else:
            calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    assert [*calls] == [*range(len(calls))]
    return shown, [*calls.values()]


CALL = '{"name": "time", "arguments": {"é": 1}}'
TAGS = "<function=time>\n<parameter=é>\n1\n</parameter>\n</function>"
PLAIN = '{"name": "time", "parameters": {"é": 1}}'


@pytest.mark.parametrize(
    ("tools", "text", "rest", "names"),
    [
        (HERMES, f"I see.\n<tool_call>\n{CALL}\n</tool_call>\n", "I see.", ["time"]),
        (HERMES, f'<tool_call>{CALL}</tool_call><tool_call>{{"name": "b"}}', "", ["time", "b"]),
        (HERMES, f"I look.\n```json\n{CALL}\n```\n", "I look.", ["time"]),
        (HERMES, f"```{CALL}", "", ["time"]),
        (HERMES, f" {CALL}", "", ["time"]),
        (LIST, f"[TOOL_CALLS] [{CALL}, {CALL}]", "", ["time", "time"]),
        (LIST, f"Yes. [TOOL_CALLS][{CALL}]", "Yes.", ["time"]),
        (ARGS, '[TOOL_CALLS]time[ARGS]{"é": 1}', "", ["time"]),
        (ARGS, "A [TOOL_CALLS]a[CALL_ID]123456789[ARGS]{}[TOOL_CALLS]b[ARGS]{}", "A", ["a", "b"]),
        (LLAMA, f" {PLAIN}", "", ["time"]),
        (LLAMA, f"{PLAIN}; {PLAIN}", "", ["time", "time"]),
        (LLAMA, f"<|python_tag|>{PLAIN.replace('time', 'x')}", "", ["x"]),
        (LLAMA, f"```json\n{PLAIN}\n```", "", ["time"]),
        (LLAMA, f"{PLAIN} is a call", "is a call", ["time"]),
        (HERMES, f"<tool_call>{CALL} or not</tool_call>", "or not</tool_call>", ["time"]),
        (XML, f"I see.\n<tool_call>\n{TAGS}\n</tool_call>", "I see.", ["time"]),
        (XML, f"{TAGS}</tool_call>\n<tool_call>{TAGS}", "", ["time", "time"]),
        (XML, f"<tool_call>{TAGS.replace('time', 'x')}</tool_call>", "", ["x"]),
        (XML, f"```json\n{CALL}\n```", "", ["time"]),
        (GRANITE, f"Yes. <|tool_call|>[{CALL}, {CALL}]", "Yes.", ["time", "time"]),
        (LFM, "<|tool_call_start|>[time(é=1), time()]<|tool_call_end|>", "", ["time", "time"]),
        (LFM, f"<|tool_call_start|>[{CALL}]<|tool_call_end|>", "", ["time"]),
        (GEMMA, "A" + "<|tool_call>call:time{é:1}<tool_call|>" * 2, "A", ["time", "time"]),
        (PHI, f"functools[{CALL}, {CALL}]", "", ["time", "time"]),
    ],
)
def test_calls_are_read_out_of_text(tools, text, rest, names) -> None:
    """Small bases write their calls fenced, whatever the template shows them."""
    found, calls = tools.parse(text)
    assert (found, [call["function"]["name"] for call in calls]) == (rest, names)
    assert json.loads(calls[0]["function"]["arguments"]) in ({"é": 1}, {})
    assert {len(call["id"]) for call in calls} == {tools.format.n_id or 37}
    (first,) = Calls(replace(tools.tools, is_single=True), tools.format).parse(text)[1]
    assert first["function"] == calls[0]["function"]
    for pieces in (text, [text], [text[:3], text[3:]]):
        shown, streamed = accumulated(tools, pieces)
        assert shown.strip() == rest
        assert [each["function"] for each in streamed] == [each["function"] for each in calls]


# As the chat templates of Qwen3-Coder and Qwen3.5 write calls.
TAGGED = (
    "{% for c in m %}<tool_call>\n<function={{ c.name }}>\n{% for k, v in c.arguments|items %}"
    "<parameter={{ k }}>\n{{ v if v is string else v|tojson if v is iterable else v|string }}\n"
    "</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}"
)
VALUES: dict[str, Any] = {
    "s": "1\n",
    "tag": "<parameter=s>\n</parameter>\n</tool_call>",
    "empty": "",
    "n": -3,
    "b": True,
    "maybe": None,
    "either": "5",
    "list": [1, {"a": "</function>"}],
    "unknown": {"k": []},
    "named": "1",
}
TYPES: dict[str, Any] = {
    **{key: {"type": "string"} for key in ("s", "tag", "empty")},
    "n": {"type": "number"},
    "b": {"type": "boolean"},
    "maybe": {"type": ["string", "null"]},
    "either": {"anyOf": [{"type": "string"}, {"type": "object"}]},
    "list": {"type": "array"},
    "named": {"$ref": "#/$defs/names"},
}


@pytest.mark.parametrize("n_letter", [1, 7, 5000])
def test_tags_are_read_as_templates_write_them(n_letter) -> None:
    parameters = {"properties": TYPES, "$defs": {"names": {"enum": ["1", "b"]}}}
    tools = Tools([{"type": "function", "function": {"name": "do", "parameters": parameters}}])
    calls = [{"name": "do", "arguments": arguments} for arguments in (VALUES, {}, {"n": 1})]
    text = jinja2.Template(TAGGED).render(m=calls)
    pieces = [text[at : at + n_letter] for at in range(0, len(text), n_letter)]
    rest, streamed = accumulated(Calls(tools, XML.format), pieces)
    functions = [call["function"] for call in streamed]
    assert [{**f, "arguments": json.loads(f["arguments"])} for f in functions] == calls
    assert rest == ""


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("<function=time><parameter=a>\nx</param", '{"a": "x'),
        ("<function=time><parameter=b>\n[1", '{"b": '),
        ("<function=time><function=time></function>", ""),
        ("<function=time>\n<parameter=a\n>", ""),
        ("<function=time><parameter=b>\nNaN\n</parameter></function>", '{"b": "NaN"}'),
        (
            f"<function=time><parameter=b>{'[' * 9999}</parameter></function>",
            f'{{"b": "{"[" * 9999}"}}',
        ),
    ],
)
def test_tags_that_are_cut_or_hostile(text, arguments) -> None:
    """A cut call is what was written of it: `finish_reason` says so."""
    form = {"properties": {"a": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "time", "parameters": form}}
    calls = Calls(Tools([tool]), XML.format)
    _, (call,) = accumulated(calls, f"<tool_call>{text}")
    assert call["function"]["arguments"] == arguments
    if not arguments.endswith("}"):
        assert calls.parse(text) == (text, [])


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        *((HERMES, text) for text in ("<tool_call>{</tool_call>", "<tool_call>[1]", " plain ")),
        (HERMES, '<tool_call>{"name": 1}'),
        (HERMES, '```{"name": "time", "arguments": null}```'),
        *((HERMES, f"```{text}```") for text in ('json\n{"name": "Ana"}\n', "python\n{}\n", "[1]")),
        (HERMES, CALL.replace("time", "other")),
        *(
            (LIST, text)
            for text in ("[TOOL_CALLS][", '[TOOL_CALLS][{"name": "a"}, 1]', f"As {CALL}")
        ),
        (ARGS, "[TOOL_CALLS]time[ARGS]"),
        *((XML, text) for text in (TAGS.replace("time", "other"), "<tool_call><function=", "<b>")),
        (LLAMA, PLAIN.replace("time", "other")),
        *((LLAMA, text) for text in (f"As {PLAIN}", "{", '{"name": "time"}')),
    ],
)
def test_other_text_is_no_call(tools, text) -> None:
    assert tools.parse(text) == (text, [])
    assert accumulated(tools, text) == (text, [])


def test_text_is_shown_until_a_call_begins() -> None:
    for tools, pieces, shown in (
        (HERMES, ("a <", "b> <tool", "_", 'call>{"name"', ': "x"}</tool_call>'), ["a ", "<b> "]),
        (HERMES, ("a <", "tool", "_cal"), ["a ", "<tool_cal"]),
        (HERMES, ("`", "``", "py\n<", "``"), ["```py\n", "<", "``"]),
        (LIST, ("a [TOOL", "_"), ["a ", "[TOOL_"]),
        (LLAMA, (" ", "a", "{"), [" a", "{"]),
        (HERMES, ("{", "a", "}"), ["{a", "}"]),
        (LLAMA, (" ", "{", "a"), [" {a"]),
    ):
        assert [part for part in tools.read(pieces) if isinstance(part, str)] == shown


MARKED = (
    '{% macro w(v) %}{% if v is string %}<|"|>{{ v }}<|"|>{% elif v is mapping %}{ {%- for k, x '
    "in v|dictsort %}{{ ',' if not loop.first }}{{ k }}:{{ w(x) }}{% endfor -%} }{% elif v is "
    "iterable %}[{% for x in v %}{{ ',' if not loop.first }}{{ w(x) }}{% endfor %}]{% else %}"
    "{{ v|tojson }}{% endif %}{% endmacro %}<|tool_call>call:time{{ w(v) }}<tool_call|>"
)


@pytest.mark.parametrize("n_letter", [1, 7, 5000])
@pytest.mark.parametrize("form", [LFM, GEMMA, PHI, HERMES])
def test_named_arguments_are_read_as_bases_write_them(form, n_letter) -> None:
    calls = [{"function": {"name": "time", "arguments": given}} for given in (VALUES, {})]
    text = form.format.written(calls)
    if form is GEMMA:
        text = jinja2.Template(MARKED).render(v=VALUES) + jinja2.Template(MARKED).render(v={})
    pieces = [text[at : at + n_letter] for at in range(0, len(text), n_letter)]
    rest, streamed = accumulated(form, pieces)
    found = [json.loads(call["function"]["arguments"]) for call in streamed]
    assert (rest, found) == ("", [VALUES, {}])


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("time(a=1, b=[2", '{"a": 1, "b": '),
        ("time(a='x", '{"a": '),
        ("time(a='it's', b=True)", '{"a": "it\'s", "b": true}'),
        ("time(a='\\d\n')", '{"a": "\\\\d\\n"}'),
        ('time(a="\\ud800")', '{"a": "\\ud800"}'),
        (f"time(a={'[' * 9999}{']' * 9999})", f'{{"a": "{"[" * 9999}{"]" * 9999}"}}'),
    ],
)
def test_python_that_is_cut_or_hostile(text, arguments) -> None:
    _, (call,) = accumulated(LFM, f"<|tool_call_start|>[{text}")
    assert call["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    ("form", "arguments", "is_bound"),
    [
        (LFM, 'a=1, b="x", c=True', True),
        (LFM, 'b="x", c=False, e="y"', True),
        (LFM, "a=1", False),
        (GEMMA, 'a:1,b:Qx, "y"Q,f:{g-h:[1,QQ]}', True),
        (GEMMA, "b:QxQ,e:QyQ", True),
        (GEMMA, "b:QxQ,e:QzQ", False),
    ],
)
def test_named_arguments_are_bound_by_the_schema(engine, form, arguments, is_bound) -> None:
    kinds = {"a": "integer", "b": "string", "c": "boolean", "f": "object"}
    fields: dict[str, Any] = {name: {"type": kind} for name, kind in kinds.items()}
    parameters = {"properties": fields | {"e": {"enum": ["x", "y"]}}, "required": ["b"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    constraint = Constraint(engine._model, form.grammar([tool, TIME]))
    begin = form.format.begin.replace("{name}", "f")
    for token in engine.tokenize(begin + arguments.replace("Q", '<|"|>') + form.format.end):
        if not constraint.mask()[token // 32] >> token % 32 & 1:
            break
        constraint.accept(token)
    assert constraint.can_end() is is_bound


SYSTEM_TOOLS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.tools %}<|tool|>{{ m.tools }}"
    "<|/tool|>{% endif %}{% endfor %}"
)


def test_tools_and_calls_stand_where_a_template_reads_them(engine, monkeypatch) -> None:
    monkeypatch.setattr(engine._model, "chat_template", SYSTEM_TOOLS)
    call = {"function": {"name": "time", "arguments": {"a": "b"}}}
    messages = [*USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tokens = engine.chat_tokens([*messages, *USER], tools=[TIME])
    text = b"".join(engine._model.piece(token, special=True) for token in tokens).decode()
    assert text.startswith(f"<|system|><|tool|>[{json.dumps(TIME['function'])}]<|/tool|><|user|>")
    assert '<|tool_call|>[{"name": "time", "arguments": {"a": "b"}}]<|/tool_call|>' in text


@pytest.mark.parametrize("form", [XML, HERMES, LFM, GEMMA])
def test_a_schema_of_tools_may_have_words_of_its_own(form) -> None:
    value = {"type": "string", "optional": True, "uniqueItems": True}
    function = {"name": "f", "parameters": {"properties": {"a": value}, "if": {}}}
    form.grammar([{"type": "function", "function": function}])


def test_fields_of_an_answer_are_attributes(engine) -> None:
    answer = engine.chat(USER, max_tokens=3)
    assert answer.choices[0].message.content == answer["choices"][0]["message"]["content"]
    assert answer.choices[0].message.tool_calls is None
    assert json.loads(json.dumps(answer)) == answer == copy.deepcopy(answer)
    with pytest.raises(AttributeError, match="has no choice, only id, object, created, model"):
        _ = answer.choice
    chunks = list(engine.chat(USER, max_tokens=3, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content


def test_wrong_tools_and_choices_are_refused(engine) -> None:
    assert refused(OptionError, engine.chat, USER, tools=["x"]) == (
        "Option tools has 'x', expected {'type': 'function', 'function': "
        "{'name': ..., 'description': ..., 'parameters': a JSON schema}}."
    )
    assert refused(OptionError, engine.chat, USER, tools=[TIME], tool_choice="always") == (
        "Option tool_choice is 'always', expected auto, none, required, or {'type': 'function', "
        "'function': {'name': ...}} with a name out of: time."
    )
    with pytest.raises(OptionError, match="with a name out of: none is given"):
        engine.chat(USER, tool_choice="required")
    with pytest.raises(OptionError, match="are given, expected one of them; leave"):
        engine.chat(USER, tools=[TIME], tool_choice="required", grammar='root ::= "a"')
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"properties": {"x": deep}}
    tool = {"type": "function", "function": {"name": "deep", "parameters": deep}}
    with pytest.raises(OptionError, match="has parameters of too many levels, expected"):
        engine.chat(USER, tools=[tool], tool_choice="required")
    none = engine.chat(USER, tools=[TIME], tool_choice="none", max_tokens=4)
    assert none["choices"][0]["message"] == engine.chat(USER, max_tokens=4)["choices"][0]["message"]


@pytest.mark.parametrize("spm", [False, True])
def test_control_tokens_of_calls_are_written(tmp_path, monkeypatch, spm) -> None:
    """Mistral's [TOOL_CALLS] is one, without which an answer would be bare JSON."""
    monkeypatch.setattr(tiny, "CONTROLS", (*tiny.CONTROLS, "[TOOL_CALLS]", "[OTHER]"))
    template = CHATML + "{% if tools %}[TOOL_CALLS]{% endif %}"
    base = write_tiny_base(tmp_path / "base.gguf", chat_template=template, n_ctx=1024, spm=spm)
    mark, other = (base.tokens.index(text) for text in ("[TOOL_CALLS]", "[OTHER]"))
    with Engine(base=base.path, n_ctx=1024) as engine:
        assert engine._model.detokenize([mark, other]) == b"[TOOL_CALLS]"
        asked: dict[str, Any] = {"tools": [TIME], "tool_choice": "required", "max_tokens": 200}
        choice = engine.chat(USER, **asked, logprobs=True, logit_bias={mark: 100})["choices"][0]
        assert choice["logprobs"]["content"][0]["token"] == "[TOOL_CALLS]"
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "time"


def test_answer_goes_on_from_a_last_message_of_the_assistant(engine) -> None:
    def spelt_chat(messages: list[Any], **how: Any) -> str:
        tokens = engine.chat_tokens(messages, **how)
        return engine._model.detokenize(tokens, special=True).decode()

    begun = [*USER, {"role": "assistant", "content": "As \ue000<|im_end|>"}]
    tokens = engine.chat_tokens(begun)
    end = engine._model.tokenize("<|im_end|>", add_special=False, parse_special=True)
    assert tokens.count(*end) == 1  # the user's; the assistant's is text
    for how in ({}, {"continue_final_message": True}):
        assert spelt_chat(begun, **how) == spelt_chat(USER) + "As \ue000<|im_end|>"
    turn = spelt_chat(begun, continue_final_message=False)
    assert turn == spelt_chat(begun, add_generation_prompt=True)
    assert turn.endswith("As \ue000<|im_end|><|im_end|>\n<|im_start|>assistant")
    whole = engine.chat(begun, max_tokens=3)["choices"][0]["message"]["content"]
    assert whole == engine.generate(tokens, max_tokens=3).text()
    for messages, how in (
        (USER, {"continue_final_message": True}),
        (begun, {"continue_final_message": True, "add_generation_prompt": True}),
        (USER, {"chat_template_kwargs": 3}),
    ):
        message = f"Option {next(iter(how))} is (True, found|3, expec)"
        with pytest.raises(OptionError, match=message):
            engine.chat(messages, **how)
    with pytest.raises(PromptError, match="Messages 1 and 2 are both the assistant's, expected"):
        engine.chat([*begun, begun[-1]])


def test_templates_take_variables(engine, monkeypatch) -> None:
    said = "{{ tools_in_user_message }}{{ '<think>' if thinks }}{{ word }}"
    template = CHATML.replace("assistant\n", f"assistant\n{said}")
    monkeypatch.setattr(engine._model, "chat_template", template)
    for thinks, word, end in (
        (True, "a", "False<think>a"),
        (False, "<|im_end|>", "False<|im_end|>"),
    ):
        given = {"thinks": thinks, "word": word, "messages": []}
        tokens = engine.chat_tokens(USER, chat_template_kwargs=given)
        text = engine._model.detokenize(tokens, special=True).decode()
        assert text.endswith(f"<|im_start|>assistant\n{end}")
    assert tokens[: len(tokens) - 10] == engine.chat_tokens(USER)  # what a request says is text
    tokens = engine.chat_tokens(USER, add_generation_prompt=False)
    assert engine._model.detokenize(tokens).endswith(b"thing?\n")


@pytest.mark.parametrize("written", ["T", "<tool_call><function="])
def test_template_without_tools_is_refused(engine, monkeypatch, written) -> None:
    template = CHATML + "{% if tools %}" + written + "{% endif %}"
    monkeypatch.setattr(engine._model, "chat_template", template)
    assert refused(ToolsError, engine.chat, USER, tools=[TIME]) == (
        "The chat template of base.gguf has no tools in a form that we read, expected that of "
        "Qwen, Llama 3, Gemma 4, Phi-4-mini, Mistral, Granite, SmolLM3 or LFM2; ask without, or "
        "use such a base."
    )


def test_openais_options_that_change_nothing_are_taken(engine) -> None:
    def text(**options: Any) -> str:
        return str(engine.chat(USER, **options)["choices"][0]["message"]["content"])

    expected = text(max_tokens=4)
    nulls = dict.fromkeys(("temperature", "top_p", "stop", "logprobs", "logit_bias"))
    assert text(max_completion_tokens=4, model="gpt", user="me", **nulls) == expected
    assert text(max_tokens=9, max_completion_tokens=4, frequency_penalty=None) == expected
    hints: dict[str, Any] = {"verbosity": "low", "reasoning_effort": "high", "best_of": 3}
    hints |= {"web_search_options": {}, "prediction": {"type": "content", "content": "a"}}
    assert text(max_tokens=4, **hints) == expected  # this base does not think


def test_a_refused_option_of_completions_is_said_to_be_theirs(client) -> None:
    response = client.post("/v1/completions", json={"prompt": "a", "suffix": "b"})
    assert response.json()["error"]["message"].startswith("Option suffix of completions is 'b'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"modalities": ["audio"]},
            "Option modalities of chat is ['audio'], expected nothing: it cannot be followed here. "
            "Leave it out.",
        ),
        (
            {"logprobs": True, "top_logprobs": 21},
            "Option top_logprobs is 21, expected a number of tokens from 0 to 20.",
        ),
        (
            {"max_token": 3},
            "Option max_token is 3, expected no such option; sampling takes "
            f"{', '.join(in_group('sampling'))}.",
        ),
    ],
)
def test_options_that_cannot_be_followed_are_refused(engine, options, message) -> None:
    assert refused(OptionError, engine.chat, USER, **options) == message


def test_log_probabilities_are_those_of_the_logits(engine) -> None:
    tokens = engine.chat_tokens(USER)
    fusion = engine.weights(tokens)
    options = {"weights": fusion, "max_tokens": 5, "temperature": 1.5, "seed": 3}
    asked = {**options, "logprobs": True, "top_logprobs": 4}
    choice = engine.chat(USER, **asked)["choices"][0]
    text, entries = choice["message"]["content"], choice["logprobs"]["content"]
    assert text == engine.chat(USER, **options)["choices"][0]["message"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode("utf-8", "replace") == text
    assert len(entries) == 5
    for entry in entries:
        logits = engine.logits(tokens, weights=fusion).astype(np.float64)
        log_p = logits - np.logaddexp.reduce(logits)
        order = np.argsort(-log_p)[:4]
        top = entry["top_logprobs"]
        assert [each["logprob"] for each in top] == pytest.approx(log_p[order].tolist(), abs=1e-4)
        assert [bytes(each["bytes"]) for each in top] == [spelt(engine, each) for each in order]
        spellings = {spelt(engine, token): token for token in range(engine.n_vocab)}
        token = spellings[bytes(entry["bytes"])]
        assert entry["logprob"] == pytest.approx(log_p[token], abs=1e-4)
        tokens.append(token)
    chunks = list(engine.chat(USER, stream=True, **asked))
    streamed = [chunk["choices"][0] for chunk in chunks]
    contents = [(each["logprobs"] or {"content": []})["content"] for each in streamed]
    assert [entry for content in contents for entry in content] == entries
    for each, content in zip(streamed, contents, strict=True):
        shown = b"".join(bytes(entry["bytes"]) for entry in content)
        assert shown.decode("utf-8", "replace") == each["delta"].get("content", "")


def spelt(engine: Engine, token: int) -> bytes:
    return engine._model.piece(token, special=True)


def test_log_probabilities_end_before_a_stop_text(tmp_path) -> None:
    replace = constant_logits(lambda token: 9 * (token == "a"))
    base = write_tiny_base(tmp_path / "base.gguf", "qwen2", chat_template=QWEN, replace=replace)
    with Engine(base=base.path) as engine:
        bias = {str(base.tokens.index("b")): 9}
        options = {"max_tokens": 6, "logprobs": True, "logit_bias": bias, "stop": ["b"]}
        choice = engine.chat(USER, **options, temperature=1.0, seed=1)["choices"][0]
        shown = "".join(entry["token"] for entry in choice["logprobs"]["content"])
        assert (shown, choice["finish_reason"]) == (choice["message"]["content"], "stop")


def test_control_tokens_among_others_hide_no_log_probability(tmp_path) -> None:
    replace = constant_logits(lambda token: 9 * (token in ("a", "<|im_start|>")))
    base = write_tiny_base(tmp_path / "base.gguf", "qwen2", chat_template=QWEN, replace=replace)
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 1}
    with Engine(base=base.path) as engine:
        choice = engine.chat(USER, **options, logprobs=True)["choices"][0]
        generation = engine.generate("the", **options, logprobs=0)
        text = generation.text()
        found = text_logprobs(ShownTokens(generation).take(text), 0)
    shown = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert "<|im_start|>" in shown
    assert "".join(shown).replace("<|im_start|>", "") == choice["message"]["content"]
    is_shown = [token == "a" for token in found["tokens"]]
    assert sum(is_shown) == len(text)
    assert found["text_offset"] == [sum(is_shown[:i]) for i in range(len(is_shown))]


def test_offsets_of_characters_of_several_tokens() -> None:
    entries = [TokenLogprob(i, bytes([byte]), -1.0, (), 1) for i, byte in enumerate("語a".encode())]
    assert text_logprobs(entries, 5)["text_offset"] == [5, 5, 5, 6]


def test_bias_decides(tmp_path) -> None:
    """Of two tokens that are alike, and one that is not: the logits are constants."""
    replace = constant_logits(lambda token: {"a": 3.0, "b": 1.0}.get(token, -50.0))
    base = write_tiny_base(tmp_path / "base.gguf", "qwen2", chat_template=QWEN, replace=replace)
    a, b, c = (base.tokens.index(token) for token in "abc")
    with Engine(base=base.path) as engine:
        for bias, expected in (
            ({}, "aaa"),
            ({a: -1.5}, "aaa"),
            ({a: -2.5}, "bbb"),
            ({str(a): -100, str(b): -100, c: 1}, "ccc"),
        ):
            assert engine.generate("the", max_tokens=3, logit_bias=bias).text() == expected
        grammar = "root ::= [ab]{3}"
        answer = engine.generate("the", grammar=grammar, logit_bias={a: -2.5})
        assert answer.text() == "bbb"


def test_one_call_alone_where_parallel_ones_are_refused(tmp_path) -> None:
    call = '<tool_call>{"name": "time"}</tool_call>'
    path = tmp_path / "base.gguf"
    write_tiny_base(path, chat_template=QWEN, n_ctx=1024, user_defined=("<tool_call>",))
    with Engine(base=path, n_ctx=1024) as engine:
        options = {"tools": [TIME], "grammar": f"root ::= {json.dumps(call)} {json.dumps(call)}"}
        for parallel, n_call in ((None, 2), (False, 1)):
            made = engine.chat(USER, parallel_tool_calls=parallel, **options)["choices"][0]
            assert len(made["message"]["tool_calls"]) == n_call
            assert made["finish_reason"] == "tool_calls"
