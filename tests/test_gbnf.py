"""Grammars are checked before llama.cpp sees them, and agree with what it takes."""

import random
from collections.abc import Iterator

import pytest
from tiny import write_tiny_base

from qaflora_edge.backend.model import Model
from qaflora_edge.errors import GrammarError
from qaflora_edge.grammar.gbnf import check_gbnf
from qaflora_edge.inference.sampler import Sampler
from qaflora_edge.inference.sampling import Sampling

GOOD = [
    'root ::= "yes" | "no"',
    "root ::= [a-z]+ # a word\n",
    'root ::= item ("," item)*\nitem ::= [^,"\\\\] | "\\x41" | "\\u00e9" | "\\U0001F389"',
    'root ::= (\n  a |\n  b\n)\na ::= "a"{2,3}\nb ::= .{2}',
    "root ::= [-+]? [0-9]{1,}\r\n\r\n",
    'root ::= ("a" | "b" root)?',
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
    ('root ::= (("a"{0,50}){50})', 1, 22, "2550 repetitions; expected at most 2000 in all."),
    ('root ::= "\\q"', 1, 11, "the escape \\q; expected \\ and one of t r n"),
    ('root ::= "\\x4"', 1, 11, "\\x; expected 2 hex digits after it."),
    ("root ::= <think>", 1, 10, "found '<'; tokens in grammars are not supported."),
    ('root ::= "a\0"', 1, 12, "found '\\x00'; expected text that UTF-8 can write."),
    ('root ::= "a\ud800"', 1, 12, "found '\\ud800'; expected text that UTF-8 can write."),
    ('root ::= "a"\nroot ::= "b"', 2, 1, "the rule 'root' is defined twice; keep one of them."),
    ("root ::= " + "(" * 70, 1, 74, "more than 64 groups in each other; name some."),
]
LEFT_RECURSIVE = [
    'root ::= root "a" | "b"',
    'root ::= a\na ::= b "x"\nb ::= root | "y"',
    'root ::= ("a"?)*',
    # llama.cpp takes these two, and never returns
    'root ::= a root "x" | "y"\na ::= b\nb ::= ""',
    'root ::= a root "x" | "y"\na ::= b b\nb ::= "z"?',
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    base = write_tiny_base(tmp_path_factory.mktemp("gbnf") / "base.gguf")
    with Model(base.path) as model:
        yield model


@pytest.mark.parametrize("text", GOOD)
def test_good_grammars_are_taken_by_both(model: Model, text: str) -> None:
    Sampler(model, Sampling(grammar=text)).close()


@pytest.mark.parametrize(("text", "line", "column", "rest"), BAD)
def test_bad_grammar_is_refused_with_its_place(
    text: str, line: int, column: int, rest: str
) -> None:
    with pytest.raises(GrammarError) as caught:
        check_gbnf(text, source="The grammar x.gbnf")
    start = f"The grammar x.gbnf, line {line}, column {column}: {rest}"
    assert str(caught.value).startswith(start)


@pytest.mark.parametrize("text", LEFT_RECURSIVE)
def test_left_recursion_is_refused_also_where_it_hides(text: str) -> None:
    with pytest.raises(GrammarError, match="can begin with itself \\(left recursion\\); write"):
        check_gbnf(text)


def test_grammar_that_would_take_the_library_ages_is_refused() -> None:
    doubling = "".join(f"r{i} ::= r{i + 1} | r{i + 1}\n" for i in range(60))
    with pytest.raises(GrammarError, match="too many ways to begin; make the grammar simpler"):
        check_gbnf(f'root ::= r0\n{doubling}r60 ::= "x"')
    with pytest.raises(GrammarError, match=r"more than 20000 rules; make the grammar smaller\."):
        check_gbnf("root ::= " + '"a"{0,2000} ' * 11)
    with pytest.raises(GrammarError, match="has 1048577 characters, expected at most 1048576"):
        check_gbnf("#" * (2**20 + 1))


def test_what_is_let_through_is_taken_by_the_library(
    model: Model, capfd: pytest.CaptureFixture[str]
) -> None:
    """Grammars by chance, mostly broken: no message of the library, no refusal but ours."""
    draw = random.Random(3)
    parts = ["root", "a", "::=", '"x"', '""', "[a-c]", "[^x]", "(", ")", "|", "*", "?", "{2}"]
    parts += ["{0,3}", "\n", " ", "#c", ".", "root ::= ", "\na ::= "]
    taken = 0
    for _ in range(6000):
        chosen = draw.choices(parts, k=draw.randrange(1, 12))
        text = "root ::= " + " ".join(chosen) + '\na ::= "k"'
        try:
            check_gbnf(text)
        except GrammarError:
            continue
        Sampler(model, Sampling(grammar=text)).close()
        taken += 1
    assert taken > 200
    assert capfd.readouterr() == ("", "")
