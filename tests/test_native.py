"""Which library is loaded, and what is refused. Each case has a process of its own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from qaflora_edge.backend import library as native

LOAD = """
from qaflora_edge.backend import library as native
from qaflora_edge.errors import LibraryError
try:
    native.load()
except LibraryError as err:
    print("refused:", err)
else:
    print("loaded")
"""


def ran(*words: str, env: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True)


def run(code: str, **environment: str) -> str:
    done = ran("-W", "error", "-c", code, env={**os.environ, **environment})
    return done.stdout.strip()


@pytest.fixture
def library(tmp_path) -> Path:
    """A copy of the installed library's folder, to be damaged."""
    folder = tmp_path / "lib"
    shutil.copytree(native.library_dir(), folder)
    return folder


def test_patched_library_is_loaded() -> None:
    assert run(LOAD) == "loaded"
    _, functions = native.load()
    assert functions.abi_version() == native.ABI_VERSION


def test_stock_library_is_refused_by_name(library) -> None:
    """A stock library exports every function but ours."""
    path = library / native._LIBRARY_NAME
    data = path.read_bytes()
    assert b"qaflora_abi_version" in data
    path.unlink()  # never write into a file that a link may share
    path.write_bytes(data.replace(b"qaflora_abi_version", b"nobody__abi_version"))
    said = run(LOAD, QAFLORA_LIB_PATH=str(library))
    expected = f"none (a stock llama.cpp), expected {native.ABI_VERSION}. If llama_cpp was"
    assert said.startswith(f"refused: {path} has qaflora_abi_version {expected}")


def test_another_abi_version_is_refused_by_name() -> None:
    code = LOAD.replace("try:", "native.ABI_VERSION += 1\ntry:")
    path = native.library_dir() / native._LIBRARY_NAME
    found = native.ABI_VERSION
    expected = f"refused: {path} has qaflora_abi_version {found}, expected {found + 1}."
    assert run(code).startswith(expected)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_missing_library_and_a_file_that_is_none_are_named(tmp_path, is_there) -> None:
    path = tmp_path / native._LIBRARY_NAME
    if is_there:
        path.write_bytes(b"not a library")
    said = run(LOAD, QAFLORA_LIB_PATH=str(tmp_path))
    assert said.startswith(f"refused: The native library {path} cannot be loaded")
    assert "or set QAFLORA_LIB_PATH to the folder that holds it." in said


@pytest.fixture
def backends(library) -> list[Path]:
    """The files of ggml's CPU backend in that copy, one for each kind of processor."""
    paths = sorted(path for path in library.iterdir() if "ggml-cpu-" in path.name)
    if not paths:
        pytest.skip("the library was built for one processor")
    return paths


MAPPED = """
import sys
from pathlib import Path
lines = Path("/proc/self/maps").read_text().splitlines() if sys.platform == "linux" else []
print(*sorted({line.split()[-1] for line in lines if "ggml-cpu" in line}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what is loaded")
def test_backends_are_loaded_from_the_package_only(
    library, backends, tmp_path, monkeypatch
) -> None:
    """Neither the current folder's nor the one that a variable names; and nothing is said of it."""
    here = tmp_path / "here"
    here.mkdir()
    for path in backends:
        shutil.copy(path, here)
    monkeypatch.chdir(here)
    monkeypatch.setenv("QAFLORA_LIB_PATH", str(library))
    monkeypatch.setenv("GGML_BACKEND_PATH", str(here / backends[0].name))
    done = ran("-P", "-c", LOAD + MAPPED)
    word, loaded = done.stdout.splitlines()
    assert (word, done.stderr) == ("loaded", "")
    assert Path(loaded) in backends


def test_library_without_a_backend_for_this_processor_is_refused(library, backends) -> None:
    for path in backends:
        path.unlink()
    said = run(LOAD, QAFLORA_LIB_PATH=str(library))
    failure = f"refused: No CPU backend of {library} can be loaded on this processor ("
    assert said.startswith(failure)
    assert "); there are: none. Expected one that it can run; reinstall qaflora-edge" in said


def test_packages_run_once_somebody_needs_them() -> None:
    """Importing Engine runs neither gguf nor llama_cpp; both are whole for who imports them."""
    more = """
import sys
assert not {"yaml", "llama_cpp.llama"} & set(sys.modules)
import gguf, llama_cpp
from llama_cpp import Llama
assert llama_cpp.llama_cpp is sys.modules["llama_cpp.llama_cpp"]
assert gguf.quants and gguf.GGUFWriter and llama_cpp.__version__ and Llama
"""
    ran("-c", LOAD + more)
