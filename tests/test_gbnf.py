"""GBNF: refused with its place, or followed as llama.cpp's own sampler follows it."""

import ctypes
import random
import time
from collections.abc import Iterator

import numpy as np
import pytest
from test_json_schema import allowed
from tiny import write_tiny_base

from qaflora_edge.backend.model import Model
from qaflora_edge.errors import GrammarError
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
BAD = [
    ("", 1, 1, "there is no rule 'root'; add root ::= ..., the start."),
    ('a ::= "x"', 1, 1, "there is no rule 'root'; add root ::= ..., the start."),
    ("root = x", 1, 6, "found '='; expected ::= after the name 'root'."),
    ("root ::= x", 1, 10, "the rule 'x' is not defined; add x ::= ...."),
    ("\n_ ::= x", 2, 1, "found '_'; expected the name of a rule (a-z, 0-9, -)."),
    ('root ::= "a', 1, 10, 'a " is not closed; add ".'),
    ("root ::= [a", 1, 10, "a [ is not closed; add ]."),
    ("root ::= [^]", 1, 10, "a class of no characters; expected at least one."),
    ("root ::= (a", 1, 12, "found the end; expected an item, | or )."),
    ('root ::= "a" )', 1, 14, "found ')'; expected an item, | or the end of the line."),
    ("root ::= *", 1, 10, "found '*'; expected an item before it."),
    ('root ::= "" +', 1, 13, "found '+'; expected an item before it."),
    ('root ::= "a"{x}', 1, 14, "found 'x'; expected a number, as in {2} or {2,5}."),
    ('root ::= "a"{1;', 1, 15, "found ';'; expected , or }."),
    ('root ::= "a"{3,2}', 1, 13, "at least 3 and at most 2; expected least <= most."),
    ('root ::= "a"{0,2001}', 1, 13, "2001 repetitions; expected at most 2000."),
    ('root ::= "a\\x00"', 1, 12, "U+0000; expected what a base writes."),
    ("root ::= [b-a]", 1, 10, "the range 'b' to 'a'; expected first <= last."),
    ('root ::= "\\uD800"', 1, 11, "\\uD800; expected a character of Unicode."),
    ('root ::= "\\q"', 1, 11, "the escape \\q; expected \\ and one of t r n"),
    ('root ::= "\\x4"', 1, 11, "\\x; expected 2 hex digits after it."),
    ("root ::= <think>", 1, 10, "found '<'; tokens in grammars are not supported."),
    ('root ::= "a\0"', 1, 12, "found '\\x00'; expected text that UTF-8 can write."),
    ('root ::= "a\ud800"', 1, 12, "found '\\ud800'; expected text that UTF-8 can write."),
    ('root ::= "a"\nroot ::= "b"', 2, 1, "the rule 'root' is defined twice; keep one of them."),
    ("root ::= " + "(" * 70, 1, 74, "more than 64 groups in each other; name some."),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    base = write_tiny_base(tmp_path_factory.mktemp("gbnf") / "base.gguf")
    with Model(base.path) as model:
        yield model


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
    ours, native, chance = Constraint(model, gbnf_grammar(text)), Native(model, text), seed
    chance_of = random.Random(chance)
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
        token = chance_of.choice(choices)
        ours.accept(token)
        native.accept(token)
    native.close()
    return n


@pytest.mark.parametrize("text", GOOD)
def test_good_grammars_are_followed_as_llama_cpp_does(model: Model, text: str) -> None:
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


@pytest.mark.parametrize("seed", range(8))
def test_grammars_by_chance_are_followed_as_llama_cpp_does(model: Model, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(10):
        names = ["x", "y-1"]
        rules = {name: draw_rule(chance, 0, names) for name in ["root", *names]}
        text = "".join(f"{name} ::= {rule}\n" for name, rule in rules.items())
        for walk in range(3):
            check_same(model, text, walk)


@pytest.mark.parametrize(("text", "line", "column", "rest"), BAD)
def test_bad_grammar_is_refused_with_its_place(
    text: str, line: int, column: int, rest: str
) -> None:
    with pytest.raises(GrammarError) as caught:
        gbnf_grammar(text, source="The grammar x.gbnf")
    start = f"The grammar x.gbnf, line {line}, column {column}: {rest}"
    assert str(caught.value).startswith(start)


@pytest.mark.parametrize(
    "text",
    [
        'root ::= root "a" | "b"',
        'root ::= a\na ::= b "x"\nb ::= root | "y"',
        'root ::= ("a"?)* "b"',
        # llama.cpp takes these two, and never returns
        'root ::= a root "x" | "y"\na ::= b\nb ::= ""',
        'root ::= a root "x" | "y"\na ::= b b\nb ::= "z"?',
    ],
)
def test_left_recursion_is_followed(model: Model, text: str) -> None:
    """llama.cpp refuses it, or goes round in a circle."""
    chance, n_whole = random.Random(1), 0
    for _ in range(20):
        constraint = Constraint(model, gbnf_grammar(text))
        for _ in range(30):
            token = int(chance.choice(allowed(model, constraint)))
            if model.is_end(token):
                n_whole += 1
                break
            constraint.accept(token)
    assert n_whole > 5


def test_grammar_under_which_nothing_is_written_is_refused() -> None:
    with pytest.raises(GrammarError) as caught:
        gbnf_grammar("root ::= root", source="The grammar x.gbnf")
    assert str(caught.value) == (
        "The grammar x.gbnf cannot be followed: nothing can be written under it. Write it more "
        "simply."
    )


HOSTILE = [
    "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(9000)) + 'r9000 ::= "x"',
    "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(9000)) + 'r9000 ::= "x" r0',
    "root ::= r0\n"
    + "".join(f"r{i} ::= {'(' * 60}r{i + 1}{')' * 60}\n" for i in range(15))
    + 'r15 ::= "x"',
    "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} | r{i + 1}\n" for i in range(60)) + 'r60 ::= "x"',
    "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(60)) + 'r60 ::= "x"?',
    "root ::= " + '"a"{0,2000} ' * 300,
    "root ::= " + "(" * 20 + '"a"' + "{0,2000})" * 20,
    "root ::= " + '("a"* "a"*)*' * 50,
    "root ::= (" + "|".join(f'"{i}"' for i in range(30_000)) + ")*",
    "root ::= .{0,2000} .{0,2000} .{0,2000}",
    'root ::= "a" root root | "b" | ""',
]


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_grammars_end_in_bounded_time(model: Model, text: str) -> None:
    start = time.process_time()
    try:
        constraint = Constraint(model, gbnf_grammar(text))
        for _ in range(50):
            tokens = [token for token in allowed(model, constraint) if not model.is_end(token)]
            if not tokens:
                break
            constraint.accept(int(tokens[0]))
    except GrammarError:
        pass
    assert time.process_time() - start < 60


def test_a_grammar_that_is_too_long_is_refused() -> None:
    with pytest.raises(GrammarError, match="has 1048577 characters, expected at most 1048576"):
        gbnf_grammar("#" * (2**20 + 1))


@pytest.mark.slow
def test_what_is_let_through_is_taken(model: Model, capfd: pytest.CaptureFixture[str]) -> None:
    """Grammars by chance, mostly broken: no message of the library, no refusal but ours."""
    draw = random.Random(3)
    parts = ["root", "a", "::=", '"x"', '""', "[a-c]", "[^x]", "(", ")", "|", "*", "?", "{2}"]
    parts += ["{0,3}", "\n", " ", "#c", ".", "root ::= ", "\na ::= "]
    taken = 0
    for _ in range(300):
        chosen = draw.choices(parts, k=draw.randrange(1, 12))
        text = "root ::= " + " ".join(chosen) + '\na ::= "k"'
        try:
            grammar = gbnf_grammar(text)
        except GrammarError:
            continue
        Constraint(model, grammar)
        taken += 1
    assert taken > 9
    assert capfd.readouterr() == ("", "")
