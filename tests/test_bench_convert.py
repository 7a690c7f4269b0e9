"""The benchmark of conversion runs, and conversion keeps within the memory that it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_peak_memory_is_little_more_than_the_output_buffer(checkout: Path, outtype: str) -> None:
    """One layer of the shapes of an 8B model, rank 64, in a process without torch."""
    script = checkout / "benchmarks" / "convert.py"
    command = [sys.executable, script, "--layers", "1", "--runs", "1", "--outtype", outtype]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["largest_pair_bytes"] == 2 * 64 * (4096 + 14336)
    assert result["adapter_bytes"] > 2 * 64 * 81920
    assert result["output_bytes"] > (64 * 81920 if outtype == "q8_0" else 2 * 64 * 81920)
    assert result["peak_bytes"] > result["floor_bytes"] > 1e7
    assert result["pairs_beyond_buffer"] <= 1.5
