"""qaflora doctor"""

import json
from pathlib import Path

import pytest
from bundles import qaflora
from patience import python

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


@pytest.mark.parametrize(
    ("kernels", "verdict"),
    [
        ("avx2", "tokens are guessed for bases in Q4_0, Q4_1, Q5_0, Q8_0, Q4_K, Q5_K and Q6_K"),
        ("ggml", "no tokens are guessed, as these do not multiply one row and several alike"),
    ],
)
def test_kernels_and_whether_they_allow_guesses_are_told(monkeypatch, kernels, verdict) -> None:
    monkeypatch.setenv("QAFLORA_CPU_KERNELS", kernels)
    library = json.loads(qaflora("doctor", "--json").stdout)["library"]
    if library["kernels"] is None:
        pytest.skip("this processor lacks them")
    assert (library["kernels"], library["guesses"]) == (kernels, kernels != "ggml")
    assert f"\nkernels          {kernels}; {verdict}\n" in qaflora("doctor").stdout


def test_missing_library_is_told_beside_the_rest(tmp_path) -> None:
    # A process of its own: a library that was loaded once stays loaded.
    environment = {"QAFLORA_LIB_PATH": str(tmp_path)}
    for flag in ([], ["--json"]):
        result = python("-m", "qaflora_edge", "doctor", *flag, env=environment)
        assert result.returncode == 1
        assert result.stderr.startswith(f"Error: The native library {tmp_path}")
        assert result.stderr.count("\n") == 1
        assert __version__ in result.stdout
    report = json.loads(result.stdout)
    assert report["library"]["ok"] is False
    assert report["library"]["folder"] == str(tmp_path)
    assert report["versions"]["qaflora-edge"] == __version__
