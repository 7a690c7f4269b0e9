"""qaflora bench"""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from bundles import TinyBundle, make_bundle
from click.testing import CliRunner, Result

from qaflora_edge.cli import main

PARTS = (
    *("decode", "change", "ttft", "probe", "turn", "system"),
    *("callers", "pause", "memory"),
)
SMALL = (
    *("--repeat", "3", "--prompt-tokens", "40", "--max-tokens", "6", "--ctx", "64"),
    *("--k", "1,3", "--turn-tokens", "40,8", "--threads", "1"),
    *(
        "--system-tokens",
        "70,8",
        "--callers",
        "3,1",
        "--question-tokens",
        "200",
        "--probe-tokens",
        "20,70",
    ),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return make_bundle(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def shown(made: TinyBundle) -> dict[str, Any]:
    """What --json prints of all parts, at two lengths; 3 adapters are one more than there are."""
    result = bench(made, *SMALL, "--prompt-tokens", "20", "--probe-k", "3", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    shown: dict[str, Any] = json.loads(result.stdout)
    return shown


def bench(made: TinyBundle, *args: str) -> Result:
    return CliRunner().invoke(main, ["bench", str(made.folder), *args])


def rows(shown: dict[str, Any], part: str, **facts: object) -> list[dict[str, Any]]:
    return [row for row in shown[part] if all(row[key] == facts[key] for key in facts)]


@pytest.mark.slow
def test_json_says_what_was_measured_where(shown: dict[str, Any], made: TinyBundle) -> None:
    assert (shown["adapters"], shown["repeat"], shown["threads"]) == (["math", "es"], 3, 1)
    assert (shown["prompt_tokens"], shown["max_tokens"], shown["k"]) == ([40, 20], 6, [1, 3])
    assert shown["parts"] == list(PARTS)
    assert shown["base_file"]["size_bytes"] == made.base.path.stat().st_size
    assert [file["rank"] for file in shown["adapter_files"]] == [4, 8]
    assert [file["types"] for file in shown["adapter_files"]] == [["F16"], ["F32"]]
    assert shown["machine"]["cpu"]
    assert shown["library"]["ok"]
    assert shown["versions"]["qaflora-edge"]


@pytest.mark.slow
def test_decode_rows_follow_from_their_runs(shown: dict[str, Any]) -> None:
    whos = [("base", 0), ("stock", 1), ("ours", 1), ("stock", 3), ("ours", 3)]
    found = [(row["prompt_tokens"], row["contestant"], row["k"]) for row in shown["decode"]]
    assert found == [(length, *who) for length in (40, 20) for who in whos]
    for row in shown["decode"]:
        assert [run["n_decoded"] for run in row["runs"]] == [6, 6, 6]
        for what, n_token in (("decode", 6), ("prefill", row["prompt_tokens"])):
            key = f"{what}_tokens_per_second"
            speeds = [1e3 * n_token / run[f"{what}_ms"] for run in row["runs"]]
            assert row[key]["median"] == pytest.approx(median(speeds))
            assert (row[key]["min"], row[key]["max"]) == pytest.approx((min(speeds), max(speeds)))


@pytest.mark.slow
def test_ratios_are_quotients_within_a_round(shown: dict[str, Any]) -> None:
    for row in rows(shown, "decode", contestant="ours"):
        length = row["prompt_tokens"]
        (base,) = rows(shown, "decode", contestant="base", prompt_tokens=length)
        (stock,) = rows(shown, "decode", contestant="stock", prompt_tokens=length, k=row["k"])
        for what in ("decode", "prefill"):
            for name, other in (("base", base), ("stock", stock)):
                quotients = [
                    theirs[f"{what}_ms"] / own[f"{what}_ms"]
                    for own, theirs in zip(row["runs"], other["runs"], strict=True)
                ]
                assert row[f"{what}_of_{name}"]["median"] == pytest.approx(median(quotients))
    for row in shown["ttft"]:
        (plain,) = rows(shown, "ttft", method="plain", prompt_tokens=row["prompt_tokens"])
        if row is not plain:
            pairs = zip(row["runs"], plain["runs"], strict=True)
            quotients = [own["ttft_ms"] / other["ttft_ms"] for own, other in pairs]
            assert row["of_plain"]["median"] == pytest.approx(median(quotients))


@pytest.mark.slow
def test_stock_and_ours_compute_the_same(shown: dict[str, Any]) -> None:
    # F32 weights, logits of a spread of 3; the KV cache is F16, whose rounding is 5e-4.
    for row in rows(shown, "decode", contestant="ours"):
        assert 0 < row["logits_difference"] < 2e-2


@pytest.mark.slow
def test_new_weights_build_no_graph(shown: dict[str, Any]) -> None:
    whos = [(row["contestant"], row["k"]) for row in shown["change"]]
    assert whos == [("stock", 1), ("ours", 1), ("stock", 3), ("ours", 3)]
    for row in shown["change"]:
        n_change = row["n_change"] * len(row["runs"])
        assert row["n_graph_built"] == (n_change if row["contestant"] == "stock" else 0)
        for run in row["runs"]:
            assert run["extra_ms"] == pytest.approx(run["changed_ms"] - run["plain_ms"])
            assert run["cost_ms"] == pytest.approx(run["set_ms"] + run["extra_ms"])


@pytest.mark.slow
def test_first_token_is_probe_and_prefill(shown: dict[str, Any]) -> None:
    methods = ["plain", "qa-flora", "cosine", "norm", "two-place", "base alone"]
    assert [row["method"] for row in rows(shown, "ttft", prompt_tokens=20)] == methods
    for row in shown["ttft"]:
        assert row["k"] == (0 if row["method"] == "plain" else 3)
        for run in row["runs"]:
            if row["method"] == "plain":
                continue
            assert run["ttft_ms"] == pytest.approx(run["probe_ms"] + run["prefill_ms"])
            split = run["forward_ms"] + run["lens_ms"] + run["divergence_ms"]
            assert 0 < split <= run["probe_ms"]
            assert (run["divergence_ms"] > 0) == (row["method"] == "qa-flora")


@pytest.mark.slow
def test_probe_is_compared_with_the_prefill_of_its_round(shown: dict[str, Any]) -> None:
    found = [(row["prompt_tokens"], row["k"]) for row in shown["probe"]]
    assert found == [(length, k) for length in (20, 70) for k in (1, 3)]
    for row in shown["probe"]:
        for what in ("probe", "fused"):
            quotients = [run[f"{what}_ms"] / run["prefill_ms"] for run in row["runs"]]
            assert row[f"{what}_of_plain"]["median"] == pytest.approx(median(quotients))
        for run in row["runs"]:
            assert 0 < run["forward_ms"] < run["probe_ms"]


@pytest.mark.slow
def test_second_turn_weighs_as_afresh(shown: dict[str, Any]) -> None:
    (row,) = shown["turn"]
    assert (row["history_tokens"], row["new_tokens"], row["k"]) == (40, 8, 3)
    quotients = [run["turn_ms"] / run["fresh_ms"] for run in row["runs"]]
    assert row["of_fresh"]["median"] == pytest.approx(median(quotients))
    assert row["deviation_worst"] == 0


@pytest.mark.slow
def test_a_question_behind_a_system_prompt(shown: dict[str, Any]) -> None:
    (row,) = shown["system"]
    assert (row["system_tokens"], row["new_tokens"], row["k"]) == (70, 8, 3)
    assert len(row["runs"]) == 3
    for run in row["runs"]:
        assert run["ttft_ms"] == pytest.approx(run["probe_ms"] + run["prefill_ms"])
    quotients = [run["ttft_ms"] / run["plain_ms"] for run in row["runs"]]
    assert row["ttft_of_plain"]["median"] == pytest.approx(median(quotients))


@pytest.mark.slow
def test_callers_are_compared_within_a_round(shown: dict[str, Any]) -> None:
    ways = ["base", "bare C", "generate_many", "threads"]
    found = [(row["callers"], row["way"]) for row in shown["callers"]]
    assert found == [(n, way) for n in (3, 1) for way in ways]
    key = "tokens_per_second"

    def speeds(n: int, way: str) -> list[float]:
        (row,) = rows(shown, "callers", callers=n, way=way)
        return [run[key] for run in row["runs"]]

    for row in shown["callers"]:
        n, way = row["callers"], row["way"]
        assert row[key]["median"] == pytest.approx(median(speeds(n, way)))
        others = {"of_one": (1, way), "of_base": (n, "base"), "of_bare": (n, "bare C")}
        missing = {"base": {"of_base", "of_bare"}, "bare C": {"of_bare"}}.get(way, set())
        assert not missing & set(row)
        for name in set(others) - missing:
            pairs = zip(speeds(n, way), speeds(*others[name]), strict=True)
            assert row[name]["median"] == pytest.approx(median(a / b for a, b in pairs))


@pytest.mark.slow
def test_callers_are_counted_while_all_are_decoded(shown: dict[str, Any]) -> None:
    for row in shown["callers"]:
        for run in row["runs"]:
            assert run["n_decoded"] % row["callers"] == 0
            # --max-tokens 6, of which prefill chose the first; prompts fit one step
            assert 0 < run["n_decoded"] <= 5 * row["callers"]
            speed = 1e3 * run["n_decoded"] / run["decode_ms"]
            assert run["tokens_per_second"] == pytest.approx(speed)
    for row in rows(shown, "callers", way="bare C"):
        assert [run["n_decoded"] for run in row["runs"]] == [5 * row["callers"]] * 3


@pytest.mark.slow
def test_a_pause_is_told_in_micro_batches(shown: dict[str, Any]) -> None:
    (row,) = shown["pause"]
    assert (row["k"], row["question_tokens"]) == (3, 200)
    for run in row["runs"]:
        longer_ms = max(run["probe_ubatch_ms"], run["prefill_ubatch_ms"])
        assert run["of_ubatch"] == pytest.approx(run["pause_ms"] / longer_ms)
        assert run["alone_ms"] > 0
        assert 0 < run["pause_ms"] < run["question_ms"]
        # 200 tokens of the base and three adapters in micro-batches of 256 rows: 64 of each
        assert run["n_decoded"] >= 200 // 64


@pytest.mark.slow
def test_memory_is_split_into_its_parts(shown: dict[str, Any], made: TinyBundle) -> None:
    memory = shown["memory"]
    parts = [memory[f"{part}_bytes"] for part in ("base", "kv_main", "kv_probe", "adapters")]
    assert memory["peak_bytes"] == sum(parts) + memory["excess_bytes"]
    assert 0 < memory["python_bytes"] < memory["peak_bytes"]
    assert memory["base_bytes"] == made.base.path.stat().st_size
    # F16 keys and values of 256 cells, which is llama.cpp's step; saved ones add 8 to 12 bytes.
    base = made.base
    exact = 256 * base.n_layer * 2 * 2 * base.n_head_kv * base.n_head_dim
    assert exact < memory["kv_main_bytes"] <= exact + 256 * 12
    assert memory["kv_probe_bytes"] == 3 * memory["kv_main_bytes"]  # base and two adapters


@pytest.mark.slow
def test_table_to_read(made: TinyBundle) -> None:
    result = bench(made, *SMALL, "--probe-k", "1")
    assert (result.exit_code, result.stderr) == (0, "")
    for text in (
        "tiny llama 0, 0.",
        "adapters: math (rank 4, F16), es (rank 8, F32)",
        "medians of 3 interleaved runs",
        "k > 2: the bundle's adapters are loaded again, each copy for itself",
        "prompt 40 tokens",
        "stock k=3",
        "ours k=3",
        "new weights",
        "time to first token, prompt 40 tokens, 1 adapter\n",
        "exact weights",
        "70 tokens, k=3",
        "second turn of a chat, 40 tokens of history and 8 new, 1 adapter\n",
        "question of 8 tokens behind a system prompt of 70 that was probed before, 1 adapter\n",
        "callers at once, 1 adapter, a mix each\n",
        "  3 generate_many",
        "longest wait for a token while another's 200 tokens are probed and read, 1 adapter\n",
        "peak memory",
    ):
        assert text in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()[4:]) <= 110


def test_only_the_parts_asked_for(made: TinyBundle) -> None:
    result = bench(made, *SMALL, "--only", "turn,change", "--json")
    shown = json.loads(result.stdout)
    assert shown["parts"] == ["change", "turn"]
    assert not {"decode", "ttft", "callers", "pause", "memory"} & set(shown)


@pytest.mark.parametrize("n_prompt", ["400", "335"])
def test_a_pause_has_room_for_a_prompt_beside_the_question(made: TinyBundle, n_prompt: str) -> None:
    args = ("--prompt-tokens", n_prompt, "--ctx", "512", "--question-tokens", "20")
    result = bench(made, *args, "--repeat", "1", "--max-tokens", "1", "--only", "pause", "--json")
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)["pause"]
    assert all(run["pause_ms"] > 0 for run in row["runs"])


def test_callers_need_two_tokens(made: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = (
        "Error: Option --max-tokens is 1, expected at least 2: decoding is measured, that of "
        "callers behind their first token. Raise it.\n"
    )
    result = bench(made, "--only", "callers", "--max-tokens", "1")
    assert (result.exit_code, result.stderr) == (1, expected)
    monkeypatch.setenv("QAFLORA_MAX_TOKENS", "1")
    assert bench(made).stderr == expected


def test_callers_that_are_never_decoded_together_are_told(made: TinyBundle) -> None:
    args = ("--callers", "16", "--prompt-tokens", "400", "--max-tokens", "2")
    result = bench(made, *args, "--only", "callers", "--repeat", "1")
    assert result.exit_code == 1
    assert (
        "The part callers found an answer of 2 tokens that ended before all of 16 callers had "
        "begun, expected that all are decoded together. Raise --max-tokens, "
    ) in result.stderr


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--k", "0"), "'--k': '0' is not a list of numbers from 1 to 255."),
        (("--k", "1,x"), "'--k': '1,x' is not a list of numbers from 1 to 255."),
        (("--k", ""), "'--k': '' is not a list of numbers from 1 to 255."),
        (("--k", "256"), "'--k': '256' is not a list of numbers from 1 to 255."),
        (("--turn-tokens", "300"), "'--turn-tokens': '300' has 1 numbers, expected 2."),
        (
            ("--only", "decode,speed"),
            "'--only': 'speed' is not one of decode, change, ttft, probe, turn, system, "
            "callers, pause, memory.",
        ),
    ],
)
def test_wrong_usage_is_told(made: TinyBundle, args: tuple[str, ...], expected: str) -> None:
    result = bench(made, *SMALL, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith(f"Error: Invalid value for {expected}\n")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            ("--ctx", "45"),
            "Option --ctx is 45, expected at least 46: 40 tokens of prompt and 6 of answer. "
            "Raise --ctx, or lower --prompt-tokens or --max-tokens.",
        ),
        (
            ("--turn-tokens", "60,5"),
            "Option --ctx is 64, expected at least 65: 60 tokens of a chat and 5 of its next "
            "message. Raise --ctx, lower --turn-tokens, or leave out turn with --only.",
        ),
        (
            ("--max-tokens", "0", "--only", "decode"),
            "Option --max-tokens is 0, expected at least 1: decoding is measured, that of callers "
            "behind their first token. Raise it.",
        ),
    ],
)
def test_option_out_of_range_is_told(
    made: TinyBundle, args: tuple[str, ...], expected: str
) -> None:
    result = bench(made, *SMALL, *args)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {expected}\n"


def test_strategy_that_cannot_be_followed_is_told(made: TinyBundle) -> None:
    result = bench(made, *SMALL, "--strategy", "calibrated")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: The run whose memory is measured ended with code 1, expected 0; it said: Strategy "
        "calibrated needs typical divergences, missing for math, es with lens norm; measure "
        "them with `qaflora bundle calibrate DIR`. Try the same options with `qaflora run`.\n"
    )


def test_no_bundle_is_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "there is no file bundle.json" in result.stderr
