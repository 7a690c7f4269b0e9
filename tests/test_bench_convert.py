"""The benchmark of conversion runs, and conversion keeps within the memory that it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    "options",
    [["--outtype", "f16"], ["--outtype", "q8_0", "--verify", "--modules", "mlp.down_proj"]],
)
def test_peak_memory_is_little_more_than_header_and_buffer(
    checkout: Path, options: list[str]
) -> None:
    """One layer of the shapes of an 8B model, rank 64, in a process without torch."""
    script = checkout / "benchmarks" / "convert.py"
    command = [sys.executable, script, "--layers", "1", "--runs", "1", *options]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["largest_pair_bytes"] == 2 * 64 * (4096 + 14336)
    n_value = 64 * (18432 if "mlp.down_proj" in options else 81920)
    assert result["adapter_bytes"] > 2 * n_value
    assert result["output_bytes"] > (1 if "q8_0" in options else 2) * n_value
    assert result["peak_bytes"] > result["floor_bytes"] > 1e7
    assert result["pairs_beyond"] <= (4 if "--verify" in options else 2)
