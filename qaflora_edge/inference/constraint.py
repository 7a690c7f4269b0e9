"""Grammars and JSON schemas that an answer follows: which tokens may come next."""

import json
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.backend.model import Model
from qaflora_edge.errors import BackendError, GrammarError, OptionError
from qaflora_edge.grammar import checked_schema, gbnf_to_lark

if TYPE_CHECKING:  # llguidance takes 80 ms to import
    from llguidance import LLMatcher, LLTokenizer

MAX_STEPS = 2_000_000  # of the parser, for one mask: about 0.1 s
MAX_SECONDS = 2.0  # for compiling
STACK_BYTES = 16 << 20  # llguidance recurses; threads of Windows have 1 MiB
_STACK_SIZE = threading.Lock()


class Grammar(str):
    """Mark a checked grammar in llguidance's notation; any other text is taken for GBNF.

    source  how messages call it, such as "The grammar list.gbnf"
    """

    source: str

    def __new__(cls, text: str, source: str) -> "Grammar":
        grammar = super().__new__(cls, text)
        grammar.source = source
        return grammar


def gbnf_grammar(text: str, *, source: str = "The grammar") -> Grammar:
    """Compile a GBNF text with the start `root`. Raises GrammarError."""
    return lark_grammar(gbnf_to_lark(text, source=source), source)


def schema_grammar(schema: Any, *, source: str = "The JSON schema") -> Grammar:
    """Compile a JSON schema.

    schema  as json.loads gives it; True or {} takes any value

    Raises GrammarError for a schema that is malformed or cannot be followed.
    """
    return lark_grammar(_json_grammar(checked_schema(schema, source=source)), source)


def framed_grammar(forms: Sequence[tuple[str, Any, str]], *, source: str) -> Grammar:
    """Compile what begins and ends with given texts: any of (before, JSON schema, after).

    Keywords that cannot be followed are left out. Raises GrammarError as schema_grammar does.
    """
    lark = f"start: {' | '.join(f'form{i}' for i in range(len(forms)))}\n"
    for i, (before, schema, after) in enumerate(forms):
        checked = checked_schema(schema, source=source, is_lenient=True)
        lark_grammar(_json_grammar(checked), source)
        lark += f"form{i}: {json.dumps(before)} body{i} {json.dumps(after)}\n"
        lark += f"body{i}: %json {json.dumps(checked)}\n"
    return Grammar(lark, source)


def either_grammar(form: Grammar, other: Grammar) -> Grammar:
    """Join two grammars: a text follows `form`, or each of its lines follows `other`.

    form  of schema_grammar; other  of framed_grammar
    """
    (schema,) = json.loads(form)["grammars"]
    grammars = [
        {"lark_grammar": 'start: @form | @other ("\\n" @other)*'},
        {"name": "form", **schema},
        {"name": "other", "lark_grammar": other},
    ]
    return Grammar(json.dumps({"grammars": grammars}), f"{form.source} or {other.source.lower()}")


def chosen_grammar(
    grammar: str | None, json_schema: Mapping[str, Any] | bool | None = None
) -> Grammar:
    """Compile GBNF text or a JSON schema; a Grammar is given back."""
    if grammar is not None and json_schema is not None:
        raise OptionError(
            "Options grammar and a JSON schema are both given; give one or the other."
        )
    if json_schema is not None:
        return schema_grammar(json_schema)
    if isinstance(grammar, Grammar):
        return grammar
    if not isinstance(grammar, str):
        raise OptionError(f"Option grammar is {grammar!r}, expected GBNF text or None.", "grammar")
    return gbnf_grammar(grammar)


class Constraint:
    """Follow one answer in its grammar.

    Raises GrammarError for a grammar that llguidance does not take.
    """

    def __init__(self, model: Model, grammar: Grammar) -> None:
        self._source = grammar.source
        self._tokenizer = _tokenizer(model)
        self._matcher = _matcher(self._tokenizer, grammar, grammar.source)
        self._check()

    def mask(self) -> NDArray[np.uint32]:
        """Compute uint32 [ceil(n_vocab / 32)]: bit i % 32 of word i // 32 lets token i follow."""
        mask = np.zeros((int(self._tokenizer.vocab_size) + 31) // 32, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()
        if not self.can_end():  # llguidance lets an answer end where it finds no way on
            for token in self._tokenizer.eos_tokens:
                mask[token // 32] &= ~np.uint32(1 << token % 32)
        return mask

    def accept(self, token: int) -> None:
        """Advance by a token that the mask allows."""
        self._matcher.consume_token(token)
        self._check()

    def can_end(self) -> bool:
        """Tell whether the answer so far is whole."""
        return self._matcher.is_accepting()

    def may_begin(self, text: str) -> bool:
        """Tell whether what follows may begin with a text."""
        tokens = self._tokenizer.tokenize_str(text)
        return self._matcher.validate_tokens(tokens) == len(tokens)

    def _check(self) -> None:
        if self._matcher.is_error() and not _is_dead(self._matcher):
            raise GrammarError(
                f"{self._source} cannot be followed here: {_said(self._matcher.get_error())}. "
                "Write it more simply."
            )


class _Vocabulary:
    """Give a base's vocabulary as llguidance asks for it (_tokenizer.py TokenizerWrapper).

    Tokens that write nothing, end an answer, or write U+0000 (which llama.cpp's own grammars never
    take) are special: no grammar takes them for their text.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, model: Model, ends: Sequence[int]) -> None:
        self.tokens = [model.piece(token) for token in range(model.n_vocab)]
        self.eos_token_id = ends[0]
        pieces = enumerate(self.tokens)
        self.special_token_ids = [
            token for token, piece in pieces if not piece or b"\0" in piece or token in ends
        ]
        self._model = weakref.ref(model)
        self._written = {text: token for token, text in model.written.items()}
        self._parts = re.compile(f"({'|'.join(map(re.escape, self._written)) or '(?!)'})")

    def __call__(self, text: str) -> list[int]:
        model = self._model()
        assert model is not None
        found = []
        for run in filter(None, self._parts.split(text)):
            token = self._written.get(run)
            found += model.tokenize_inside(run) if token is None else [token]
        return found


_tokenizers: "weakref.WeakKeyDictionary[Model, LLTokenizer]" = weakref.WeakKeyDictionary()


def _tokenizer(model: Model) -> "LLTokenizer":
    from llguidance import LLTokenizer

    if model not in _tokenizers:
        ends = [token for token in range(model.n_vocab) if model.is_end(token)]
        if not ends:
            raise BackendError(
                f"The base {model.path} has no token that ends an answer, expected one, without "
                "which no answer follows a grammar to its end; leave the grammar out."
            )
        vocabulary: Any = _Vocabulary(model, ends)
        _tokenizers[model] = LLTokenizer(vocabulary, eos_token=ends)
    return _tokenizers[model]


@cache
def _bytes_tokenizer() -> "LLTokenizer":
    """Make a tokenizer with a token for each byte: for checks without a base."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _matcher(tokenizer: "LLTokenizer", text: str, source: str) -> "LLMatcher":
    """Compile a grammar in a thread with a large stack. Raises GrammarError after the deadline."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(step_max_items=MAX_STEPS, verbose_errors=False)
    made: Future[LLMatcher] = Future()

    def compile_grammar() -> None:
        try:
            made.set_result(LLMatcher(tokenizer, text, log_level=0, limits=limits))
        except BaseException as error:  # a panic of the library is no Exception
            made.set_exception(error)

    with _STACK_SIZE:
        before = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=compile_grammar, daemon=True).start()
        finally:
            threading.stack_size(before)
    try:
        return made.result(MAX_SECONDS)
    except TimeoutError:
        reason = f"it takes more than {MAX_SECONDS:.0f} s to compile"
    except BaseException as error:
        reason = f"llguidance failed ({_said(str(error))})"
    raise GrammarError(f"{source} cannot be followed: {reason}. Write it more simply.")


def _json_grammar(schema: Mapping[str, Any]) -> str:
    return json.dumps({"grammars": [{"json_schema": schema}]})


def lark_grammar(text: str, source: str) -> Grammar:
    """Compile a grammar in llguidance's notation. Raises GrammarError as schema_grammar does."""
    matcher = _matcher(_bytes_tokenizer(), text, source)
    mask = b"" if matcher.is_error() else matcher.compute_bitmask()
    if any(mask[:32]) or matcher.is_accepting():
        return Grammar(text, source)
    is_empty = mask and (_is_dead(matcher) or not matcher.is_error())
    reason = "nothing can be written under it" if is_empty else _said(matcher.get_error())
    raise GrammarError(
        f"{source} cannot be followed: {reason}. Correct it, or write it more simply."
    )


def _is_dead(matcher: "LLMatcher") -> bool:
    """Tell whether no text leads to an end: the message begins with the reason's name."""
    return matcher.get_error().startswith("NoExtension")


def _said(error: str) -> str:
    text = " ".join(error.split("\n<state>")[0].split())
    return text if len(text) <= 200 else f"{text[:197]}..."
