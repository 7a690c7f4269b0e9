"""Chat templates are programs out of a file: they see little, and they end."""
# ruff: noqa: E501  (a table of templates and what they write)

import time
import tracemalloc

import jinja2
import pytest
from jinja2.sandbox import SecurityError
from tiny import write_tiny_base

from qaflora_edge.ask import Chat
from qaflora_edge.backend.model import Model
from qaflora_edge.errors import ChatTemplateError
from qaflora_edge.formats.base import read_base
from qaflora_edge.prompt import template as chat_template
from qaflora_edge.prompt.template import TemplateLimit, render
from qaflora_edge.prompt.tokens import chat_tokens

MESSAGES = [
    {"role": "system", "content": " be kind "},
    {"role": "user", "content": "hi <b>"},
    {"role": "assistant", "content": "<think>x</think>yo"},
    {"role": "user", "content": "bye"},
]


def rendered(template: str, **more: object) -> str:
    return render(template, bos_token="<s>", eos_token="</s>", messages=MESSAGES, **more)


# fmt: off
GOOD = [
    ("{{ bos_token }}{{ messages | length }}{{ eos_token }}", "<s>4</s>"),
    ("{{ messages[0].content | trim }}|{{ messages[0]['content'].strip() }}", "be kind|be kind"),
    ("{% for m in messages[1:] %}{{ loop.index0 }}{{ m.role }} {% endfor %}", "0user 1assistant 2user "),
    ("{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x ~ m.role[0] %}"
     "{% endfor %}{{ ns.x }}", "suau"),
    ("{{ messages[2].content.split('</think>')[-1] }}", "yo"),
    ("{{ {'ä': [1, None, '<']} | tojson }}", '{"ä": [1, null, "<"]}'),
    ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
    ("{% macro f(x, y='!') %}{{ x }}{{ y }}{% endmacro %}{{ f('a') }}{{ f('b', y='?') }}", "a!b?"),
    ("{% if messages[0].role == 'system' and tools is not defined %}yes{% endif %}", "yes"),
    ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('+') }}",
     "hi <b>+bye"),
    ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}.{% endfor %}", "..."),
    ("{% generation %}said{% endgeneration %}", "said"),
    ("{% for k, v in {'b': 2, 'a': 1} | dictsort %}{{ k }}{{ v }}{% endfor %}", "a1b2"),
    ("{% for k, v in {'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}{{ {'a': 3}.get('a') }}", "b23"),
    ("{{ 'a%sb' % 3 }}{{ 'x' * 3 }}{{ 7 // 2 }}{{ 'q' in 'aq' }}", "a3bxxx3True"),
    ("{{ messages[::-1][0].content }}{{ range(3) | list }}{{ missing }}", "bye[0, 1, 2]"),
    ("{{ 'a\nb' | indent(2) }}{{ 'aXa' | replace('X', '-') }}", "a\n  ba-a"),
    ("{{ strftime_now('%Y')[:2] }}", time.strftime("%Y")[:2]),
    ("{% for m in messages %}\n  {%- if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n"
     "{% endfor %}", "hi <b>\nbye\n"),
    ("{{ messages[1].content is string }}{{ messages is iterable }}{{ 1 is number }}", "TrueTrueTrue"),
]
# fmt: on


@pytest.mark.parametrize(("template", "text"), GOOD)
def test_what_templates_use_works(template, text) -> None:
    assert rendered(template) == text


BIG = "{% set ns = namespace(x='aaaaaaaa', y=['a'], z=['a'], n=3) %}{% for i in range(60) %}"
HOSTILE = [
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}"
    "{% endfor %}{% endfor %}",
    "{{ 'a' * 1000000000 }}",
    "{{ 9**9**9 }}",
    BIG + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    BIG + "{% set ns.x = ns.x.replace('a', 'aaaa') %}{% endfor %}",
    BIG + "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.y | tojson }}",
    BIG + "{% set ns.y = [ns.y, ns.y] %}{% set ns.z = [ns.z, ns.z] %}{% endfor %}"
    "{{ ns.y == ns.z }}",
    BIG + "{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "{% set x %}{% for i in range(100000) %}" + "y" * 50000 + "{% endfor %}{% endset %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'a\nb' | indent(1000000000) }}",
    "{{ range(90000) | tojson(separators=('x' * 90000, '')) }}",
    "{{ ('x' * 90000) | replace(new='y' * 90000, old='x') }}",
    "{% set n = namespace(a=1) %}" + "{% set n = namespace(a=n, b=n) %}" * 40 + "{{ n }}",
    "{% set r = range(90000) %}{% if r" + " == r" * 9000 + " %}{% endif %}",
    "{% set r = {'a': 'x' * 90000} %}" + "{{ r.items() }}" * 3000,
    "{{ strftime_now('%1000000000Y') }}",
    "{% set big = 'x' * 100000 %}{% for i in range(100000) %}{{ 'y' in big }}{% endfor %}",
    "{% set big = range(100000) %}{{ [" + "big[:], " * 300 + "] | length }}",
    "{% set x = 'a' * 400000 %}{{ [" + "(x ~ x), " * 300 + "] | length }}",
    "{% for i in range(9000) %}{{ 'ab' | list | select('in', 'x' * 100000) | list }}{% endfor %}",
    "{{ dict.fromkeys(range(10**9)) }}",
    "{{ range(90000) | join('x' * 90000, attribute='real') }}",
    "x" * 70000,
]


@pytest.mark.slow
@pytest.mark.parametrize("template", HOSTILE)
def test_hostile_template_is_stopped_soon(template) -> None:
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises((TemplateLimit, RecursionError)):
            rendered(template)
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 100  # 2 s, on a slow machine; tracing is slow too


def test_time_that_others_take_is_not_a_templates(monkeypatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(chat_template, "_strftime_now", lambda _: time.sleep(0.4))
    assert rendered("{{ strftime_now('%Y') }}{{ 1 + 1 }}") == "None2"


def test_a_template_is_compiled_once(monkeypatch) -> None:
    template = "{% if messages %}{{ 3 * 14 }}{% endif %}"
    assert rendered(template) == "42"
    monkeypatch.setattr(jinja2.Environment, "compile", None)
    assert rendered(template) == "42"
    with pytest.raises(TypeError):
        rendered(template + "!")


@pytest.mark.parametrize(
    "template",
    [
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ 'a'.center(1000000000) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ messages.append(1) }}",
        "{{ messages | groupby('__class__') }}",
    ],
)
def test_methods_that_no_template_needs_are_out_of_reach(template) -> None:
    with pytest.raises((SecurityError, jinja2.UndefinedError)):
        rendered(template)


def test_nothing_is_computed_while_a_template_is_compiled() -> None:
    """Behind a condition that is false, nothing of this is ever run."""
    assert rendered("{% if false %}{{ 'a' * 10000000000 }}{{ 9**9**9 }}{% endif %}-") == "-"


def test_long_conversations_have_room() -> None:
    messages = [
        {"role": role, "content": "word " * 200}
        for _ in range(300)
        for role in ("user", "assistant")
    ]
    template = (
        "{% for m in messages %}{% if loop.index0 == messages | length - 1 %}!{% endif %}"
        "<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}"
    )
    text = render(template, bos_token="", eos_token="", messages=messages)
    assert text.count("word") == 120_000


REFUSALS = [
    ("{{ raise_exception('roles must alternate!') }}", "roles must alternate!"),
    ("{{ 'a' * 1000000000 }}", "more text or more steps than a conversation needs"),
    ("{% if %}", "line 1: Expected an expression, got 'end of statement block'"),
    ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "too many expressions in each other"),
    ("{{ messages | attr('__class__') }}", "line 1: No filter named 'attr'"),
]


@pytest.mark.parametrize(("template", "reason"), REFUSALS)
def test_refusal_is_told_with_its_reason(tmp_path, template, reason) -> None:
    base = write_tiny_base(tmp_path / "base.gguf", chat_template=template)
    with Model(read_base(base.path)) as model, pytest.raises(ChatTemplateError) as caught:
        chat_tokens(model, Chat(MESSAGES))
    assert str(caught.value) == (
        f"The chat template of base.gguf refused the conversation: {reason}. "
        "Give the prompt as plain text (--raw-prompt), or change the messages."
    )


@pytest.mark.slow
def test_templates_agree_with_transformers(smollm2) -> None:
    """The same text as transformers' own environment makes."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with Model(read_base(smollm2)) as model:
        templates = [model.chat_template, *(template for template, _ in GOOD)]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for template in templates:
        for messages in (MESSAGES, MESSAGES[1:2] * 3):
            try:
                expected, _ = render_jinja_template(
                    [messages], chat_template=template, add_generation_prompt=True, **names
                )
            except jinja2.UndefinedError:
                continue  # a row of the table that reads a third message
            assert render(template, messages=messages, tools=None, **names) == expected[0]
