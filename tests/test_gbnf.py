"""GBNF grammars: refused with the place, or followed as llama.cpp's own sampler follows it."""

import ctypes
import json
import random
import time

import llguidance
import numpy as np
import pytest
from refusals import refused
from test_json_schema import allowed, ends_in_bounded_time
from tiny import write_tiny_base

from qaflora_edge import Engine
from qaflora_edge.backend.model import Model
from qaflora_edge.errors import GrammarError
from qaflora_edge.inference import constraint
from qaflora_edge.inference.constraint import Constraint, gbnf_grammar

GOOD = [
    'root ::= "yes" | "no"',
    "root ::= [a-z]+ # a word\n",
    'root ::= item ("," item)*\nitem ::= [^,"\\\\] | "\\x41" | "\\u00e9" | "\\U0001F389"',
    'root ::= (\n  a |\n  b\n)\na ::= "a"{2,3}\nb ::= .{2}',
    "root ::= [-+]? [0-9]{1,}\r\n\r\n",
    'root ::= ("a" | "b" root)?',
    'root ::= "a"{0} ("b" | "c"){0,0} [de]+ x{0}\nx ::= "f"',
]
ARITHMETIC = """\
root  ::= (expr "=" ws term "\\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws # llguidance's own converter swallows the newline with these spaces
num   ::= [0-9]+ ws
ws    ::= [ \\t\\n]*
"""
GOOD += [ARITHMETIC, 'root ::= [a-c&&.~~]{2} "&&" start? [+\\-]\nstart ::= "\\-" | "\\]" | "/"']
BAD = [
    ("", "there is no rule 'root', expected root ::= ..., the start"),
    ("\nroot ::= [a] )", r"Expected name at line 2, '\nroot ::= [a] ' ^ ')\n'"),
    ('root ::= "a', "Unexpected end of input at line 2"),
    ('root ::= "\\uD800"', "found \\uD800, expected a character of Unicode"),
    ("root ::= " + "(" * 9000, "maximum recursion depth exceeded"),
]


def test_sentencepiece_puts_no_space_before_a_text(tmp_path) -> None:
    base = write_tiny_base(tmp_path / "base.gguf", spm=True)
    with Engine(base=base.path) as engine:
        for text in ("foo bar", " a", "\nb"):
            grammar = f"root ::= {json.dumps(text)}"
            assert engine.generate("the", grammar=grammar).text() == text


class Native:
    """llama.cpp's own sampler of grammars, which shares no code with ours."""

    def __init__(self, model: Model, text: str) -> None:
        self._lib, self._n_vocab = model._lib, model.n_vocab
        self._pointer = self._lib.llama_sampler_init_grammar(model.vocab, text.encode(), b"root")
        assert self._pointer, text

    def allowed(self) -> list[int]:
        kind = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        rows = np.zeros(self._n_vocab, kind)
        rows["id"] = np.arange(self._n_vocab)
        array = self._lib.llama_token_data_array(
            data=rows.ctypes.data_as(ctypes.POINTER(self._lib.llama_token_data)),
            size=len(rows),
            selected=-1,
            sorted=False,
        )
        self._lib.llama_sampler_apply(self._pointer, ctypes.byref(array))
        return np.flatnonzero(np.isfinite(rows["logit"])).tolist()

    def accept(self, token: int) -> None:
        self._lib.llama_sampler_accept(self._pointer, token)

    def close(self) -> None:
        self._lib.llama_sampler_free(self._pointer)


def check_same(model: Model, text: str, seed: int) -> int:
    """At each step of a text by chance both allow the same; gives the number of steps."""
    ours, native = Constraint(model, gbnf_grammar(text)), Native(model, text)
    chance = random.Random(seed)
    control = {token for token in range(model.n_vocab) if not model.piece(token)}
    ends = {token for token in range(model.n_vocab) if model.is_end(token)}
    n = 0
    for n in range(40):
        found, expected = set(allowed(model, ours)), set(native.allowed())
        # llama.cpp takes control tokens for their text; bytes that begin no character too.
        lead = {token for token in expected - found if model.piece(token)[:1] >= b"\x80"}
        assert found == expected - (control - ends) - lead, (text, n)
        assert bool(found & ends) == ours.can_end()
        choices = sorted(found - ends)
        if not choices:
            break
        token = chance.choice(choices)
        ours.accept(token)
        native.accept(token)
    native.close()
    return n


@pytest.mark.parametrize("text", GOOD)
def test_good_grammars_are_followed_as_llama_cpp_does(model, text) -> None:
    assert sum(check_same(model, text, seed) for seed in range(4)) > 3


def draw_rule(chance: random.Random, depth: int, names: list[str]) -> str:
    """Alternatives that begin with a character: nothing here is left-recursive."""
    items = ['"a"', '"ab"', '"b"', "[a-c]", "[^a]", ".", '"é"', "[à-ü]", '"aab"', '""']
    options = []
    for _ in range(chance.choice([1, 1, 2, 3])):
        parts = [chance.choice(items[:9])]
        for _ in range(chance.randrange(3)):
            part = chance.choice([*items, *names])
            if depth < 2 and chance.random() < 0.3:
                part = f"({draw_rule(chance, depth + 1, names)})"
            if part != '""' and part not in names:
                part += chance.choice(["", "", "*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}"])
            parts.append(part)
        options.append(" ".join(parts))
    return " | ".join(options)


@pytest.mark.parametrize("seed", range(3))
def test_grammars_by_chance_are_followed_as_llama_cpp_does(model, seed) -> None:
    chance = random.Random(seed)
    for _ in range(10):
        names = ["x", "y-1"]
        rules = {name: draw_rule(chance, 0, names) for name in ["root", *names]}
        text = "".join(f"{name} ::= {rule}\n" for name, rule in rules.items())
        for walk in range(3):
            check_same(model, text, walk)


@pytest.mark.parametrize(("text", "reason"), BAD)
def test_bad_grammar_is_refused_with_its_place(text, reason) -> None:
    told = refused(GrammarError, gbnf_grammar, text, source="The grammar x.gbnf")
    assert told.startswith(f"The grammar x.gbnf cannot be read: {reason}")
    assert told.endswith("; correct it there.")


def _chain(n: int, rule: str = "r{}") -> str:
    rules = "".join(f"r{i} ::= {rule.format(i + 1)}\n" for i in range(n))
    return f'root ::= r0\n{rules}r{n} ::= "x"'


HOSTILE = [
    _chain(60, "r{0} r{0}"),
    _chain(98),
    "root ::= " + "(" * 95 + '"a" root? ' + ")?" * 95,
    "root ::= " + '"a"{0,2000} ' * 300,
    "root ::= " + '("a"* "a"*)*' * 50,
    "root ::= (" + "|".join(f'"{i}"' for i in range(7000)) + ")*",
    "root ::= .{0,2000} .{0,2000} .{0,2000}",
    'root ::= "a" root root | "b" | ""',
]


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_grammars_end_in_bounded_time(model, text) -> None:
    def follow() -> None:
        follows = Constraint(model, gbnf_grammar(text))
        for _ in range(50):
            tokens = [token for token in allowed(model, follows) if not model.is_end(token)]
            if not tokens:
                break
            follows.accept(int(tokens[0]))

    ends_in_bounded_time(follow)


@pytest.mark.parametrize("is_recursive", [False, True])
def test_long_chains_never_reach_the_compiler(is_recursive) -> None:
    """A chain of 865 rules overflows a stack of 2 MiB, and ends the process."""
    text = _chain(98) + " r0" * is_recursive
    gbnf_grammar(text)
    for text in (_chain(110) + " r0" * is_recursive, _chain(20, "((((((r{}))))))")):
        with pytest.raises(GrammarError, match="more than 100 parts in each other at r"):
            gbnf_grammar(text)
    with pytest.raises(GrammarError, match="has 65537 characters, expected at most 65536"):
        gbnf_grammar("#" * (2**16 + 1))


def test_compiling_ends_at_a_deadline(monkeypatch) -> None:
    def slow(*_: object, **__: object) -> None:
        time.sleep(1)

    monkeypatch.setattr(constraint, "MAX_SECONDS", 0.01)
    monkeypatch.setattr(llguidance, "LLMatcher", slow)
    assert refused(GrammarError, gbnf_grammar, 'root ::= "a"') == (
        "The grammar cannot be followed: it takes more than 0 s to compile. Write it more simply."
    )
