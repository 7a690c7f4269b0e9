"""relay's rule on adapters that did not choose it: benchmarks/zoo/held-out, beside demo-small's.

Whom the rule takes is compared, not what they write: texts differ between processors.
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from qaflora_edge import Engine
from qaflora_edge.cli import main

pytestmark = pytest.mark.skipif("QAFLORA_TEST_ZOO" not in os.environ, reason="make test-zoo")
BASE = "qwen2.5-coder-0.5b-instruct"


@pytest.fixture(scope="module")
def bundle(checkout, tmp_path_factory) -> Path:
    """Six adapters of the shop and six held-out ones, measured."""
    place = tmp_path_factory.mktemp("zoo") / "twelve"
    arguments = ["bundle", "create", str(place), "--base", BASE]
    for folder in ("models/demo-small", "benchmarks/zoo/held-out"):
        for adapter in sorted((checkout / folder / "adapters").glob("*.gguf")):
            arguments += ["--adapter", str(adapter)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return place


def test_who_knows_or_gives_a_form_is_found_among_twelve(bundle, checkout) -> None:
    """57 of 66 on an Intel Xeon without AMX; half of a kind, and 50 of all, must be."""
    lines = (checkout / "benchmarks/zoo/held-out/questions.jsonl").read_text("utf-8").splitlines()
    asked: Counter[str] = Counter()
    found: Counter[str] = Counter()
    with Engine(bundle, n_ctx=1024) as engine:
        for line in lines:
            question = json.loads(line)
            fusion = engine.weights(question["messages"], strategy="relay")
            taken = {*fusion.chosen}
            if fusion.plan.drafting is not None:
                taken.add(fusion.plan.drafting.knower)
            asked[question["group"]] += 1
            found[question["group"]] += question["adapter"] in (taken or {"base"})
    assert all(2 * found[group] >= n for group, n in asked.items()), (found, asked)
    assert 4 * found.total() >= 3 * asked.total(), (found, asked)
