"""docs/evaluation.md is what `make eval-report` makes of the results that are kept."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from qaflora_edge.cli import main

MAX_BYTES = 8_000_000


@pytest.mark.slow
def test_page_is_that_of_the_results(checkout: Path, tmp_path: Path) -> None:
    """Byte for byte. The order of files is that of make's `sort`."""
    results = sorted((checkout / "benchmarks/results").glob("*.jsonl*"), key=lambda path: path.name)
    if not results:
        pytest.skip("benchmarks/results/ has no results yet")
    page = tmp_path / "evaluation.md"
    prose = checkout / "benchmarks/evaluation.md"
    arguments = [*map(str, results), "--markdown", str(page), "--prose", str(prose)]
    done = CliRunner().invoke(main, ["report", *arguments])
    assert (done.exit_code, done.stderr) == (0, "")
    assert page.read_bytes() == (checkout / "docs/evaluation.md").read_bytes()
    assert [path.name for path in results if path.stat().st_size > MAX_BYTES] == []
