"""Chat templates out of a file: jinja with bounded work.

A template is a program by whoever made the file. It sees only the conversation: jinja's immutable
sandbox, and of filters, methods and functions only those named here. It ends: every step of a loop,
every operation, call and piece of output is paid for out of one budget, by the size of what it
handles, before it is done.
"""

import json
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from datetime import datetime
from functools import lru_cache
from types import CodeType
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import meta, nodes
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from qaflora_edge.chat.budget import MAX_DEPTH, Budget, TemplateLimit, size

MAX_TEMPLATE = 1 << 16  # characters of a template
MAX_WORK = 500_000  # steps and characters, beside WORK_PER_INPUT for each that comes in
WORK_PER_INPUT = 100
MAX_INPUT = 1 << 26  # characters of a conversation
MAX_INTEGER = 1 << 63
_MAX_INDENT = 16


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILTERS = _words(
    """abs capitalize dictsort e escape float groupby int items list lower map max min reject
    rejectattr reverse round safe select selectattr sort string striptags sum title trim unique
    upper wordcount"""
)
_FREE_FILTERS = _words("count d default first last length")  # they make nothing
_COMPARING_TESTS = _words("!= < <= == > >= eq equalto ge greaterthan gt in le lessthan lt ne")
_VIEWS = (KeysView, ValuesView, ItemsView)
_METHODS: dict[type, frozenset[str]] = {
    str: _words(
        """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit
        islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix
        removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith
        strip swapcase title upper"""
    ),
    dict: _words("copy get items keys values"),
    list: _words("copy count index"),
    tuple: _words("count index"),
    LoopContext: _words(
        """cycle changed depth depth0 first index index0 last length nextitem previtem revindex
        revindex0"""
    ),
}


class TemplateRefused(Exception):
    """A template's own raise_exception."""


def render(template: str, *, bos_token: str, eos_token: str, **variables: Any) -> str:
    """The text of a conversation under a template.

    variables  messages and what else the template may read: JSON values

    Raises TemplateLimit, or whatever else the template leads to: jinja's errors, ValueError, ...
    """
    if len(template) > MAX_TEMPLATE:
        raise TemplateLimit(f"it has {len(template)} characters, expected at most {MAX_TEMPLATE}")
    environment = _Environment(MAX_WORK + WORK_PER_INPUT * size(variables, MAX_INPUT))
    program = jinja2.Template.from_code(environment, _compiled(template), environment.globals)
    names = {"bos_token": bos_token, "eos_token": eos_token, "add_generation_prompt": True}
    return "".join(program.generate({**names, **variables}))


@lru_cache(maxsize=8)
def _compiled(template: str) -> CodeType:
    """What every environment makes of a template: its budget is for what is computed later."""
    return _Environment(0).compile(template)


@lru_cache(maxsize=8)
def literal_text(template: str) -> str:
    """All text that a template itself may write, its pieces apart by U+0000."""
    tree = _Environment(0).parse(template)
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join(texts)


def variables(template: str) -> set[str]:
    """Names that a template reads from outside."""
    return meta.find_undeclared_variables(_Environment(0).parse(template))


class _Generation(jinja2.ext.Extension):
    """{% generation %}, with which transformers marks what an assistant said."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own way)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """One rendering: an environment with a budget."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, work: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed while a template is compiled
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=self._written,
        )
        self._budget, self._depth = Budget(work), 0
        tests: dict[str, Any] = self.tests
        tests |= {name: self._paid(tests[name]) for name in _COMPARING_TESTS}
        filters = {name: self._paid(self.filters[name]) for name in _FILTERS}
        self.filters = {name: self.filters[name] for name in _FREE_FILTERS} | filters
        self.filters |= {
            "tojson": self._to_json,
            "replace": self._replace,
            "indent": self._indent,
            "join": self._join,
            _STEPS: self._steps_filter,
            _SEEN: self._seen_filter,
            _CONCAT: self._concat_filter,
        }
        self.globals = {
            "range": self._range,
            "namespace": self.globals["namespace"],
            "dict": dict,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    @jinja2.pass_context
    def _written(self, _: Any, value: Any) -> Any:
        return value if isinstance(value, Undefined) else self._budget.text(value)

    @jinja2.pass_context
    def _steps_filter(self, _: Any, iterable: Any) -> Iterator[Any]:
        return self._budget.steps(iterable)

    @jinja2.pass_context
    def _seen_filter(self, _: Any, value: Any) -> Any:
        return self._budget.seen(value)

    @jinja2.pass_context
    def _concat_filter(self, _: Any, *parts: Any) -> str:
        return "".join(map(self._budget.text, parts))

    # what a template is made of

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _with_payments(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._budget.seen(left)
        self._budget.seen(right)
        if operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
                    self._budget.spend(max(0, count) * self._budget.size(sequence))
        if operator == "%" and isinstance(left, str) and not _is_plain_format(left):
            raise TemplateLimit("a format with a width, expected %s, %d, %r, %i or %f")
        if operator == "**" and not (isinstance(right, (int, float)) and abs(right) <= 64):
            raise TemplateLimit("a power above 64")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and abs(result) > MAX_INTEGER:
            raise TemplateLimit("an integer of more than 64 bits")
        self._budget.seen(result)
        return result

    def wrap_str_format(self, value: Any) -> None:
        """No str.format: it is not among the methods."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        return any(isinstance(obj, kind) and attr in names for kind, names in _METHODS.items())

    def call(self, context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(called, (Macro, LoopContext)):
            return self._call_macro(context, called, *args, **kwargs)
        for value in (*args, *kwargs.values()):
            self._budget.seen(value)
        owner = getattr(called, "__self__", None)
        if isinstance(owner, str):
            self._budget.seen(owner)
            if called.__name__ == "replace":
                self._pay_replace(owner, *args)
            if called.__name__ == "join":
                args = (self._joined_parts(owner, *args),)
        result = super().call(context, called, *args, **kwargs)
        if isinstance(owner, dict) and called.__name__ == "get":
            return result  # nothing was made
        return self._budget.seen(list(result) if isinstance(result, _VIEWS) else result)

    def _call_macro(self, context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        self._budget.spend(1)
        if isinstance(called, LoopContext):
            args = (self._budget.steps(args[0]), *args[1:])
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise TemplateLimit(f"more than {MAX_DEPTH} macros in each other")
        try:
            return super().call(context, called, *args, **kwargs)
        finally:
            self._depth -= 1

    # filters and functions

    def _paid(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that pays for what goes in and for what comes out."""
        passed = getattr(function, "jinja_pass_arg", None)

        @jinja2.pass_context
        def paid(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(value, Iterator):
                value = list(self._budget.steps(value))
            for each in (value, *args, *kwargs.values()):
                self._budget.seen(each)
            first = {"context": context, "eval_context": context.eval_ctx, "environment": self}
            name = passed.name if passed is not None else ""
            result = function(*([first[name]] if name else []), value, *args, **kwargs)
            if isinstance(result, Iterator):
                result = list(self._budget.steps(result))
            return self._budget.seen(result)

        return paid

    @jinja2.pass_context
    def _to_json(
        self,
        _: Any,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As transformers has it: nothing is escaped for HTML."""
        indent = self._check_indent(indent)
        self._budget.spend(self._budget.size(value) * (1 + MAX_DEPTH * indent if indent else 1))
        text = json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        self._budget.spend(len(text))
        return text

    def _check_indent(self, indent: Any) -> Any:
        if indent is not None and not (isinstance(indent, int) and 0 <= indent <= _MAX_INDENT):
            raise TemplateLimit(f"an indent of {indent!r}, expected 0 to {_MAX_INDENT}")
        return indent

    @jinja2.pass_context
    def _indent(
        self, _: Any, value: Any, width: int = 4, first: bool = False, blank: bool = False
    ) -> str:
        lines = self._budget.text(value).split("\n")
        self._budget.spend(len(lines) * (self._check_indent(width) or 0))
        margin = " " * width
        rest = [margin + line if line or blank else line for line in lines[1:]]
        return "\n".join([margin + lines[0] if first else lines[0], *rest])

    def _pay_replace(self, text: str, old: str = "", new: str = "", *_: Any) -> None:
        self._budget.spend((len(text) // max(1, len(old)) + 1) * len(new))

    @jinja2.pass_context
    def _replace(self, _: Any, value: Any, old: str, new: str, count: int | None = None) -> str:
        text, old, new = self._budget.text(value), self._budget.text(old), self._budget.text(new)
        self._pay_replace(text, old, new)
        return text.replace(old, new, -1 if count is None else count)

    def _joined_parts(self, separator: str, parts: Any) -> list[str]:
        found = list(self._budget.steps(parts))
        self._budget.spend(len(found) * len(separator))
        self._budget.seen(found)
        return found

    @jinja2.pass_context
    def _join(self, _: Any, value: Any, d: str = "", attribute: Any = None) -> str:
        parts = list(self._budget.steps(value))
        if attribute is not None:
            parts = [self.getitem(part, attribute) for part in parts]
        self._budget.spend(len(parts) * len(d))
        return str(d).join(map(self._budget.text, parts))

    def _range(self, *bounds: int) -> list[int]:
        numbers = range(*bounds)
        self._budget.spend(len(numbers))
        return list(numbers)


_STEPS, _SEEN, _CONCAT = "the steps", "the seen", "the concat"  # no template can write these


def _with_payments(tree: nodes.Template) -> nodes.Template:
    """Let loops, comparisons, slices, ~ and literal text pass through filters that pay for them."""
    environment: Any = tree.environment

    def through(name: str, value: Any, *more: nodes.Expr) -> nodes.Filter:
        made = nodes.Filter(value, name, list(more), [], None, None)
        made.set_lineno(value.lineno or 1)
        made.set_environment(environment)
        return made

    for loop in tree.find_all(nodes.For):
        loop.iter = through(_STEPS, loop.iter)
    for comparison in tree.find_all(nodes.Compare):
        comparison.expr = through(_SEEN, comparison.expr)
        for operand in comparison.ops:
            operand.expr = through(_SEEN, operand.expr)
    for output in tree.find_all(nodes.Output):
        output.nodes = [
            through(_SEEN, nodes.Const(node.data, lineno=node.lineno, environment=environment))
            if isinstance(node, nodes.TemplateData)
            else node
            for node in output.nodes
        ]
    for piece in tree.find_all(nodes.Getitem):
        if isinstance(piece.arg, nodes.Slice):
            piece.node = through(_SEEN, piece.node)
    for parent in reversed([tree, *tree.find_all(nodes.Node)]):  # what is inside comes first
        for field, value in parent.iter_fields():
            if isinstance(value, nodes.Concat):
                setattr(parent, field, through(_CONCAT, *value.nodes))
            elif isinstance(value, list):
                value[:] = [
                    through(_CONCAT, *each.nodes) if isinstance(each, nodes.Concat) else each
                    for each in value
                ]
    return tree


def _is_plain_format(text: str) -> bool:
    rest = text.replace("%%", "").split("%")
    return all(part[:1] in ("s", "d", "r", "i", "f") and part for part in rest[1:])


def _raise_exception(message: str) -> None:
    raise TemplateRefused(message)


def _strftime_now(form: str) -> str:
    if len(form) > 100 or any(char.isdigit() for char in form):
        raise TemplateLimit("a date format that is long or has widths")
    return datetime.now().strftime(form)
