"""qaflora compare"""

import io
import json
import sys

import numpy as np
import pytest
from bundles import TinyBundle, qaflora, said_by
from click.testing import Result
from rich.cells import cell_len

from qaflora_edge import Engine
from qaflora_edge.cli.compare import Answer, expand, table
from qaflora_edge.weighing.plan import FusionWeights, Plan

PROMPT = "the thing on a ring"
EVIL = "<script>alert(1)</script>\x1b[2J\x1b]0;title\x07<img src=x onerror=alert(1)>"


def compare(made: TinyBundle, *args: object, stdin: str | None = None) -> Result:
    return qaflora("compare", made.folder, *args, "--max-tokens", 6, stdin=stdin)


def test_answers_are_those_of_the_strategies(made) -> None:
    shown = json.loads(compare(made, PROMPT, "--json", "--parallel", 1).stdout)
    assert shown["prompt"] == PROMPT
    names = [answer["strategy"] for answer in shown["answers"]]
    assert names == ["qa-flora", "base", "single:math", "single:es"]
    with Engine(made.folder) as engine:
        tokens = engine.chat_tokens([{"role": "user", "content": PROMPT}])
        for answer in shown["answers"]:
            own = engine.generate(tokens, weights=answer["strategy"], max_tokens=6)
            assert answer["text"] == own.text()
            assert np.allclose(answer["fusion"]["weights"], own.fusion.weights, atol=1e-6)


def test_table_has_each_strategy_with_its_mix_and_answer(made) -> None:
    result = compare(made, PROMPT, "--strategies", "base,single,manual:math=1,es=0.5,static")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [line.strip() for line in result.stdout.splitlines()]
    starts = [line.split("  ")[0] for line in lines]
    order = ["base", "single:math", "single:es", "manual:math=1,es=0", "static"]
    places = [next(i for i, s in enumerate(starts) if s.startswith(way)) for way in order]
    assert places == sorted(places)
    assert starts[places[0] + 1] == "base"
    assert starts[places[-1] + 1 : places[-1] + 3] == ["math ×0.5", "es ×0.5"]
    assert result.stdout.count("[cut at the limit of tokens]") == 5


@pytest.mark.parametrize(
    ("ways", "expected"),
    [
        ("base", ["base"]),
        ("single", ["single:math", "single:es"]),
        ("single:es, single,base,base", ["single:es", "single:math", "base"]),
        ("manual:math=1,es=.5,spectr:top=2", ["manual:math=1,es=.5", "spectr:top=2"]),
    ],
)
def test_list_of_strategies(ways, expected) -> None:
    assert expand(ways, ("math", "es")) == expected


def test_unknown_strategy_fails_before_any_answer(made) -> None:
    stderr = said_by(compare(made, PROMPT, "--strategies", "base,nice"), 1)
    assert stderr.startswith("Error: Strategy 'nice' is not known")


def answer(text: str) -> Answer:
    weights = np.full((2, 3), 0.5, dtype=np.float32)
    fusion = FusionWeights(("math", EVIL), Plan.mix(weights), "qa-flora")
    return "qa-flora", fusion, {"text": text, "finish_reason": "stop"}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [20, 80])
def test_table_fits_and_lets_no_control_character_out(encoding, width, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    word = "W" * 50 + "!"
    shown = table([answer(EVIL), answer(word), answer(" \n")], width)
    assert not [char for char in shown if ord(char) < 32 and char != "\n"]
    assert all(cell_len(line) <= width for line in shown.splitlines())
    assert shown.count("W") == 50  # folded, nothing cut
    assert width < 80 or "(nothing)" in shown
    if encoding == "ascii":
        assert shown.isascii()
