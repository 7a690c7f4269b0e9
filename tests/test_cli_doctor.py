"""qaflora doctor"""

import json
import os
import subprocess
import sys
from pathlib import Path

from bundles import qaflora

from qaflora_edge import __version__
from qaflora_edge.backend import library as native


def test_report_of_a_sound_installation() -> None:
    result = qaflora("doctor", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    library = report["library"]
    assert library["ok"] is True
    assert Path(library["file"]).parent == native.library_dir()
    assert library["abi_version"] == native.ABI_VERSION
    assert library["build_info"]
    assert "CPU" in library["features"]
    assert "CPU" in {device["type"] for device in library["devices"]}
    assert all(device["memory_total_bytes"] > 0 for device in library["devices"])
    assert report["versions"]["qaflora-edge"] == __version__
    assert report["versions"]["llama-cpp-python"]


def test_report_to_read() -> None:
    result = qaflora("doctor")
    assert result.exit_code == 0
    assert f"ABI              {native.ABI_VERSION}\n" in result.stdout
    assert "device     " in result.stdout
    assert result.stdout.splitlines()[-1].startswith("All is well: ")


def test_missing_library_is_told_beside_the_rest(tmp_path: Path) -> None:
    # A process of its own: a library that was loaded once stays loaded.
    environment = {**os.environ, "QAFLORA_LIB_PATH": str(tmp_path)}
    for flag in ([], ["--json"]):
        result = subprocess.run(
            [sys.executable, "-m", "qaflora_edge", "doctor", *flag],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert result.returncode == 1
        assert result.stderr.startswith(f"Error: The native library {tmp_path}")
        assert result.stderr.count("\n") == 1
        assert __version__ in result.stdout
    report = json.loads(result.stdout)
    assert report["library"]["ok"] is False
    assert report["library"]["folder"] == str(tmp_path)
    assert report["versions"]["qaflora-edge"] == __version__
