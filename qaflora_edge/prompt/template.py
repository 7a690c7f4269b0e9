"""Chat templates out of a file: jinja's sandbox with bounded work.

A template is a program by whoever made the file. It sees only the conversation, and only the
filters, methods and functions named here. Each step and each value that it makes is paid for out
of one budget, by its size. Whatever may multiply a text is paid for before it is done.
"""

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache, wraps
from types import CodeType
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 5.0  # of the thread
MAX_TEMPLATE = 1 << 16  # characters of a template
MAX_WORK = 500_000  # steps and characters, and WORK_PER_INPUT for each that comes in
WORK_PER_INPUT = 100
MAX_INPUT = 1 << 26  # characters of a conversation
MAX_DEPTH = 40  # lists in lists
MAX_INTEGER = 1 << 63

_FILTERS = frozenset(
    """abs capitalize count dictsort e escape float groupby indent int items join length list lower
    map max min reject rejectattr replace reverse round safe select selectattr sort string sum title
    tojson trim unique upper""".split()  # noqa: SIM905
)
_FREE_FILTERS = frozenset({"d", "default", "first", "last"})  # they make nothing
_MULTIPLYING = frozenset({"*", "replace", "join", "indent", "tojson"})
_FILTERS_OF_EACH = frozenset({"map", "reject", "rejectattr", "select", "selectattr"})
_ATTRIBUTES = frozenset(
    """capitalize count endswith find index isalnum isalpha isascii isdigit islower isnumeric
    isspace isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex
    rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
    copy get items keys values
    changed cycle depth depth0 first index0 last length nextitem previtem revindex
    revindex0""".split()  # noqa: SIM905  (of texts, of lists and objects, of `loop`)
)


class TemplateLimit(Exception):
    """A template asks for more than it is given."""


def render(template: str, *, bos_token: str, eos_token: str, **variables: Any) -> str:
    """Write a conversation under a template.

    variables  messages and what else the template may read: JSON values

    Raises TemplateLimit, or whatever else the template leads to: jinja's errors, ValueError, ...
    """
    if len(template) > MAX_TEMPLATE:
        raise TemplateLimit(f"it has {len(template)} characters, expected at most {MAX_TEMPLATE}")
    n_input = _size(variables, MAX_INPUT)
    environment = _Environment(MAX_WORK + WORK_PER_INPUT * n_input)
    program = jinja2.Template.from_code(environment, _compiled(template), environment.globals)
    variables.setdefault("add_generation_prompt", True)
    pieces = program.generate(bos_token=bos_token, eos_token=eos_token, **variables)
    return "".join(pieces)


@lru_cache(maxsize=8)
def _compiled(template: str) -> CodeType:
    return _Environment(0).compile(template)


@lru_cache(maxsize=8)
def literal_text(template: str) -> str:
    """Join all texts that a template may write, with U+0000 between them; "" if it is malformed."""
    try:
        constants = _Environment(0).parse(template).find_all(nodes.Const)
    except Exception:  # rendering says why
        return ""
    values = [constant.value for constant in constants]
    return "\0".join(value for value in values if isinstance(value, str))


def _size(value: Any, most: int, depth: int = 0) -> int:
    """Count the characters and parts of a value when written out: shared parts count each time.

    Raises TemplateLimit above `most`, where lists are too deep in each other, and for a namespace,
    which may hold namespaces without any such limit.
    """
    if isinstance(value, str):
        return 1 + len(value)
    if isinstance(value, Namespace):
        raise TemplateLimit("a namespace as a value")
    if not isinstance(value, Collection):
        return 1
    if depth > MAX_DEPTH:
        raise TemplateLimit(f"more than {MAX_DEPTH} lists or objects in each other")
    total = 1
    items = value
    if isinstance(value, Mapping):
        items = (*value, *value.values())
    for inner in items:
        total += _size(inner, most - total, depth + 1)
        if total > most:
            raise TemplateLimit("more text or more steps than a conversation needs")
    return total


class _Generation(jinja2.ext.Extension):
    """{% generation %}, with which transformers marks what an assistant said."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own way)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_STEPS = "the steps"
_PAID = "the paid"  # filters that no template can name


class _Payments(NodeTransformer):
    """Adds filters that pay where no method of an environment is called."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment

    def _through(self, name: str, value: Any) -> nodes.Filter:
        made = nodes.Filter(value, name, [], [], None, None, lineno=value.lineno or 1)
        made.set_environment(self._environment)
        return made

    def visit(self, node: nodes.Node, *_: Any, **__: Any) -> Any:
        self.generic_visit(node)
        match node:
            case nodes.For(recursive=True):
                raise TemplateLimit("a recursive loop")
            case nodes.For():
                node.iter = self._through(_STEPS, node.iter)
            case nodes.Compare():
                node.expr = self._through(_PAID, node.expr)
                for operand in node.ops:
                    operand.expr = self._through(_PAID, operand.expr)
            case nodes.Concat():
                return self._through("join", nodes.List(node.nodes, lineno=node.lineno))
            case nodes.Tuple(ctx="store"):
                pass  # names that a loop or {% set %} gives values to
            case nodes.List() | nodes.Tuple() | nodes.Dict() | nodes.Getitem(arg=nodes.Slice()):
                return self._through(_PAID, node)
            case nodes.TemplateData():
                return nodes.Const(node.data, lineno=node.lineno, environment=self._environment)
        return node


class _Environment(ImmutableSandboxedEnvironment):
    """The environment of one rendering.

    work  steps and characters that it may handle
    """

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self, work: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed while a template is compiled
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=jinja2.pass_context(lambda _, value: str(self._paid(value))),
        )
        self._work = work
        self._end = time.thread_time() + MAX_SECONDS
        all_filters = self.filters | {"tojson": _to_json}
        self.filters = {name: all_filters[name] for name in _FREE_FILTERS}
        for name in _FILTERS:
            self.filters[name] = self._priced(name, all_filters[name])
        self.filters[_STEPS] = jinja2.pass_context(lambda _, items: self._steps(items))
        self.filters[_PAID] = jinja2.pass_context(lambda _, value: self._paid(value))
        self.globals = {
            "range": lambda *bounds: list(self._steps(range(*bounds))),
            "namespace": Namespace,
            "dict": dict,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Payments(self).visit(super()._parse(source, name, filename))
        return tree

    def _spend(self, n: int) -> None:
        self._work -= n
        if self._work < 0:
            raise TemplateLimit("more text or more steps than a conversation needs")
        if time.thread_time() > self._end:
            raise TemplateLimit(f"more than {MAX_SECONDS:.0f} seconds")

    def _paid(self, value: Any) -> Any:
        self._spend(_size(value, max(0, self._work)))
        return value

    def _steps(self, iterable: Iterable[Any]) -> Iterator[Any]:
        for item in iterable:
            self._spend(1)
            yield item

    def _pay(self, name: str, values: list[Any]) -> None:
        """Pay for a text that is made by multiplying: for the product of what it is made of."""
        if name not in _MULTIPLYING:
            return
        left = max(0, self._work)
        sizes = []
        for value in values:
            size = abs(value) if isinstance(value, int) else _size(value, left)
            sizes.append(size)
        first, *others = sizes
        self._spend(first * sum(others))

    def _priced(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # The place of the value; a context or environment may come before.
        at = int(hasattr(function, "jinja_pass_arg"))

        @wraps(function)
        def priced(*args: Any, **kwargs: Any) -> Any:
            values = list(args)
            self._pay(name, [*values[at:], *kwargs.values()])
            if name in _FILTERS_OF_EACH:
                values[at] = self._steps(values[at])
            result = function(*values, **kwargs)
            if isinstance(result, Iterator):
                result = list(result)
            return self._paid(result)

        return priced

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        are_numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "*" and not are_numbers:
            self._pay(operator, [left, right])
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        if operator == "**":
            raise TemplateLimit("a power")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and abs(result) > MAX_INTEGER:
            raise TemplateLimit("an integer of more than 64 bits")
        return self._paid(result)

    def wrap_str_format(self, value: Any) -> None:
        """Leave str.format out: it is not among the methods."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        return isinstance(obj, (str, dict, list, tuple, LoopContext)) and attr in _ATTRIBUTES

    def call(self, context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        name = getattr(called, "__name__", "")
        owner = getattr(called, "__self__", None)
        if isinstance(owner, str):
            self._pay(name, [owner, *args, *kwargs.values()])
        result = super().call(context, called, *args, **kwargs)
        if name == "get" or isinstance(result, Namespace):
            return result  # nothing was made
        return self._paid(result)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
    **_: Any,
) -> str:
    """Write JSON as transformers does: nothing is escaped for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _check_format(text: str) -> None:
    _, *behind = text.replace("%%", "").split("%")
    for code in behind:
        if not code.startswith(("s", "d", "r", "i", "f")):
            raise TemplateLimit("a format with a width, expected %s, %d, %r, %i or %f")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 100 or any(char.isdigit() for char in form):
        raise TemplateLimit("a date format that is long or has widths")
    return datetime.now().strftime(form)
