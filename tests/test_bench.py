"""qaflora bench"""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiny
from bundles import TinyBundle, make_bundle
from click.testing import CliRunner, Result

from qaflora_edge.bench.memory import measure_memory
from qaflora_edge.bench.rig import Prompts, Rig, prefill
from qaflora_edge.cli import main
from qaflora_edge.engine import Engine
from qaflora_edge.errors import BackendError

SMALL = ("--repeat", "3", "--prompt-tokens", "40,20", "--max-tokens", "6", "--threads", "1")
SIZES = ("--k", "1,3", "--callers", "3,1")
FACTS = ("llama_n_ctx", "llama_n_batch", "llama_n_seq_max", "llama_n_threads")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return make_bundle(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    base = tiny.write_tiny_base(tmp_path_factory.mktemp("rig") / "base.gguf")
    paths = [
        tiny.write_tiny_adapter(base.path.with_name(f"{seed}.gguf"), base, seed=seed).path
        for seed in range(2)
    ]
    options = {"threads": 1, "kv_type": "f32", "flash_attn": False}
    with Rig(base.path, paths, placing={}, options=options) as rig:
        yield rig


@pytest.fixture(scope="module")
def shown(made: TinyBundle) -> dict[str, Any]:
    """All parts as --json prints them; 3 adapters are one more than the bundle has."""
    result = bench(made, *SMALL, *SIZES, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    shown: dict[str, Any] = json.loads(result.stdout)
    return shown


def bench(made: TinyBundle, *args: str) -> Result:
    return CliRunner().invoke(main, ["bench", str(made.folder), *args])


def runs(shown: dict[str, Any], part: str, key: str, **facts: object) -> list[float]:
    (row,) = [row for row in shown[part] if all(row[name] == facts[name] for name in facts)]
    return [run[key] for run in row["runs"]]


@pytest.mark.slow
@pytest.mark.parametrize("length", [20, 40])
def test_ratios_of_decode_are_taken_within_a_round(shown: dict[str, Any], length: int) -> None:
    key = "decode_tokens_per_second"
    own, stock, base = (
        runs(shown, "decode", key, prompt_tokens=length, contestant=who, k=k)
        for who, k in (("ours", 3), ("stock", 3), ("base", 0))
    )
    (row,) = [
        r
        for r in shown["decode"]
        if (r["prompt_tokens"], r["contestant"], r["k"]) == (length, "ours", 3)
    ]
    pairs = {"of_stock": zip(own, stock, strict=True), "of_base": zip(own, base, strict=True)}
    for name, both in pairs.items():
        assert row[f"decode_{name}"]["median"] == pytest.approx(median(a / b for a, b in both))


@pytest.mark.slow
def test_stock_and_ours_compute_the_same(shown: dict[str, Any]) -> None:
    """Logits have a spread of 3; F16 keys and values, and sums in another order."""
    found = [row["logits_difference"] for row in shown["decode"] if row["contestant"] == "ours"]
    assert len(found) == 4
    assert max(found) < 2e-2


@pytest.mark.slow
def test_first_token_is_compared_with_the_prefill_of_its_round(shown: dict[str, Any]) -> None:
    methods = {row["method"] for row in shown["ttft"]}
    assert {"plain", "qa-flora", "static"} <= methods
    for row in shown["ttft"]:
        plain = runs(shown, "ttft", "ttft_ms", prompt_tokens=row["prompt_tokens"], method="plain")
        own = [run["ttft_ms"] for run in row["runs"]]
        pairs = zip(own, plain, strict=True)
        assert row["of_plain"]["median"] == pytest.approx(median(a / b for a, b in pairs))


@pytest.mark.slow
def test_no_first_token_is_had_from_a_prompt_read_before(made: TinyBundle) -> None:
    call = mock.patch.object(Engine, "generate", autospec=True, side_effect=Engine.generate)
    with call as generate:
        bench(made, "--only", "ttft", *SMALL)
    read = [tuple(each.args[1]) for each in generate.call_args_list]
    assert len(set(read)) == len(read) > 0


@pytest.mark.slow
def test_callers_are_compared_with_one_and_with_the_base(shown: dict[str, Any]) -> None:
    key = "tokens_per_second"
    (row,) = [row for row in shown["callers"] if (row["callers"], row["way"]) == (3, "ours")]
    own = [run[key] for run in row["runs"]]
    for name, other in (("of_one", (1, "ours")), ("of_base", (3, "base"))):
        others = runs(shown, "callers", key, callers=other[0], way=other[1])
        pairs = zip(own, others, strict=True)
        assert row[name]["median"] == pytest.approx(median(a / b for a, b in pairs))


@pytest.mark.slow
def test_memory_has_the_files_in_it(shown: dict[str, Any], made: TinyBundle) -> None:
    memory = shown["memory"]
    assert made.base.path.stat().st_size + memory["adapters_bytes"] < memory["peak_bytes"]


@pytest.mark.slow
def test_table_to_read(made: TinyBundle) -> None:
    result = bench(made, *SMALL, *SIZES)
    assert (result.exit_code, result.stderr) == (0, "")
    for text in ("adapters: math (rank 4, F16), es (rank 8, F32)", "ours k=3", "stock k=3",
                 "first token, prompt 40 tokens", "  3 ours", "peak memory"):  # fmt: skip
        assert text in result.stdout
    alone = bench(made, *SMALL, *SIZES, "--only", "memory")
    assert "peak memory" in alone.stdout
    assert "callers" not in alone.stdout


def test_stock_context_has_the_parameters_of_ours(rig: Rig) -> None:
    lib = rig.model._lib
    for name in FACTS:
        contexts = (rig.base(300), rig.stock(5, 300), rig.ours(5, 300))
        assert len({int(getattr(lib, name)(each._pointer)) for each in contexts}) == 1, name


def test_stock_scales_do_what_our_weights_do(rig: Rig) -> None:
    base, stock, ours = rig.base(300), rig.stock(3, 300), rig.ours(3, 300)
    for context in (base, stock, ours):
        prefill(context, [5, 6, 7, 8])
    # Logits have a spread of 3; sums in another order.
    np.testing.assert_allclose(stock.logits(), ours.logits(), atol=1e-4)
    assert np.abs(base.logits() - ours.logits()).max() > 1e-2


def test_no_prompt_begins_with_another(rig: Rig) -> None:
    prompts, again = Prompts(rig.model, seed=0), Prompts(rig.model, seed=0)
    drawn = [prompts.draw(n) for n in (40, 700, 40)]
    assert [len(tokens) for tokens in drawn] == [40, 700, 40]
    assert len({tuple(tokens[:8]) for tokens in drawn}) == 3
    assert again.draw(40) == drawn[0]


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        (("--k", "0"), 2, "'0' is not a list of numbers from 1 to 255."),
        (("--only", "speed"), 2, "'speed' is not one of decode, ttft, callers, memory."),
        (("--max-tokens", "1"), 1, "Option --max-tokens is 1, expected at least 2: decoding is "
         "measured after the first token. Raise it."),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(
    made: TinyBundle, args: tuple[str, ...], code: int, expected: str
) -> None:
    result = bench(made, *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert expected in result.stderr


def test_failed_run_of_memory_is_told(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"ended with code 1, expected 0; it said: Cannot open"):
        measure_memory(tmp_path / "no", [1, 2], 1, {"n_ctx": 64})
