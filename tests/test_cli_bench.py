"""qaflora bench"""

import json
from pathlib import Path

import pytest
from bundles import TinyBundle, make_bundle
from click.testing import CliRunner, Result

from qaflora_edge.cli import main

SMALL = ("--repeat", "2", "--prompt-tokens", "40", "--max-tokens", "6", "--ctx", "64")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return make_bundle(tmp_path_factory.mktemp("bench"))


def bench(made: TinyBundle, *args: str) -> Result:
    return CliRunner().invoke(main, ["bench", str(made.folder), *args])


def test_json_has_medians_of_each_part(made: TinyBundle) -> None:
    result = bench(made, *SMALL, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    shown = json.loads(result.stdout)
    assert (shown["adapters"], shown["repeat"]) == (["math", "es"], 2)
    assert (shown["prompt_tokens"], shown["max_tokens"]) == (40, 6)
    medians = shown["medians"]
    assert set(medians) == {"base", "single", "fused", "probe"}
    for name in ("base", "single", "fused"):
        assert medians[name]["decode_tokens"] == 5  # the first of 6 comes from the prefill
        assert medians[name]["decode_tokens_per_second"] > 0
        assert medians[name]["prefill_tokens_per_second"] > 0
    probe = medians["probe"]
    assert probe["probe_ms"] > 0
    assert probe["states_ms"] > 0


def test_table_to_read(made: TinyBundle) -> None:
    result = bench(made, *SMALL)
    assert result.exit_code == 0
    assert "one adapter (math)" in result.stdout
    assert "2 adapters fused" in result.stdout
    assert "medians of 2 interleaved runs" in result.stdout


def test_too_small_a_context_is_told(made: TinyBundle) -> None:
    result = bench(made, *SMALL[:-1], "45")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: Option --ctx is 45, expected at least 46: 40 tokens of prompt and 6 of answer. "
        "Raise --ctx, or lower --prompt-tokens or --max-tokens.\n"
    )


def test_no_bundle_is_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "there is no file bundle.json" in result.stderr
