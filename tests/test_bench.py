"""qaflora bench"""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import tiny
from bundles import TinyBundle, qaflora
from click.testing import Result

from qaflora_edge.bench import Rig, compared, prefill, take_turns

SMALL = ("--repeat", "3", "--prompt-tokens", "40,20", "--max-tokens", "6", "--threads", "1")
SIZES = ("--k", "1,3", "--only", "decode,ttft")
FACTS = ("llama_n_ctx", "llama_n_batch", "llama_n_seq_max", "llama_n_threads")


@pytest.fixture(scope="module")
def rig(tmp_path_factory) -> Iterator[Rig]:
    base = tiny.write_tiny_base(tmp_path_factory.mktemp("rig") / "base.gguf")
    paths = [adapter.path for adapter in tiny.seeded_adapters(base, 0, 1)]
    options = {"threads": 1, "kv_type": "f32", "flash_attn": False}
    with Rig(base.path, paths, options) as rig:
        yield rig


@pytest.fixture(scope="module")
def shown(calibrated) -> dict[str, Any]:
    """All parts as --json prints them; 3 adapters are one more than the bundle has."""
    result = bench(calibrated, *SMALL, *SIZES, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    shown: dict[str, Any] = json.loads(result.stdout)
    return shown


def bench(made: TinyBundle, *args: str) -> Result:
    return qaflora("bench", made.folder, *args)


def test_contestants_take_turns_and_ratios_are_taken_within_a_round() -> None:
    told: list[tuple[int, int]] = []
    order: list[str] = []

    def run(name: str, ms: list[float], turn: int) -> dict[str, float]:
        order.append(name)
        return {"ms": ms[turn]}

    given: dict[str, list[float]] = {"a": [99, 1, 8, 9], "b": [1, 2, 4, 1]}
    contestants = {name: partial(run, name, ms) for name, ms in given.items()}
    runs = take_turns(contestants, 3, lambda *step: told.append(step))
    assert "".join(order) == "abbaabba"
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    found = compared("ms", runs["a"], of_b=runs["b"])  # without the first round
    assert found["ms"] == {"median": 8, "min": 1, "max": 9}
    assert found["of_b"] == {"median": 2, "min": 0.5, "max": 9}


@pytest.mark.slow
def test_every_part_has_its_contestants(shown) -> None:
    first = shown["ttft"][0]
    assert (first["name"], first["of_plain"]["median"]) == ("plain", 1)
    assert {"qa-flora", "static"} < {row["name"] for row in shown["ttft"]}
    decode = {row["name"]: row for row in shown["decode"]}
    assert decode.keys() == {"base", "stock k=1", "ours k=1", "stock k=3", "ours k=3"}
    assert {"decode_of_base", "prefill_of_stock"} < decode["ours k=3"].keys()
    assert {len(row["runs"]) for part in ("ttft", "decode") for row in shown[part]} == {3}


@pytest.mark.slow
def test_table_to_read(made) -> None:
    result = bench(made, *SMALL, *SIZES)
    assert (result.exit_code, result.stderr) == (0, "")
    for text in ("adapters: math (rank 4, F16), es (rank 8, F32)", "ours k=3", "stock k=3",
                 "ttft, prompt 40 tokens"):  # fmt: skip
        assert text in result.stdout


def test_stock_context_has_the_parameters_of_ours(rig) -> None:
    lib = rig.model._lib
    for name in FACTS:
        contexts = (rig.stock(0, 300), rig.stock(5, 300), rig.ours(5, 300))
        assert len({int(getattr(lib, name)(each._pointer)) for each in contexts}) == 1, name


def test_stock_scales_do_what_our_weights_do(rig) -> None:
    base, stock, ours = rig.stock(0, 300), rig.stock(3, 300), rig.ours(3, 300)
    for context in (base, stock, ours):
        prefill(context, [5, 6, 7, 8])
    # Logits have a spread of 3; sums in another order.
    np.testing.assert_allclose(stock.logits(), ours.logits(), atol=1e-4)
    assert np.abs(base.logits() - ours.logits()).max() > 1e-2


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        (("--k", "0"), 2, "'0' is not a number from 1 to 255."),
        (("--only", "speed"), 2, "is not one of decode, ttft."),
        (("--max-tokens", "1"), 1, "Option --max-tokens is 1, expected at least 2: decoding is "
         "measured after the first token. Raise it."),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(made, args, code, expected) -> None:
    result = bench(made, *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert expected in result.stderr
