"""Failures one after the other: memory, system calls, what a crash loses. Each ends in words."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import file_calls
import pytest
import tiny
from bundles import make_bundle, rewrite
from patience import python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="calls are replaced as Linux allows it"),
]
TESTS = Path(__file__).parent


def preloaded(place: Path, source: str) -> str:
    """Compile a library that is loaded before all others."""
    path = TESTS / "native" / source
    compiler = "g++" if path.suffix == ".cpp" else "gcc"
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    library = place / f"{path.stem}.so"
    flags = ["-O1", "-shared", "-fPIC", "-o", library]
    subprocess.run([compiler, *flags, path, "-ldl"], check=True)
    return str(library)


def counted(program: str, *words: object, **env: str) -> dict[str, dict[str, int]]:
    """Run a program of tests/ and give the counts that it prints."""
    places = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = python(TESTS / program, *words, env={"PYTHONPATH": os.pathsep.join(places), **env})
    assert result.returncode == 0, result.stderr[-3000:]
    counts: dict[str, dict[str, int]] = json.loads(result.stdout)
    return counts


def test_each_piece_of_memory_of_our_native_code(tmp_path) -> None:
    """The call fails and says why; the next one computes the same numbers as ever."""
    library = preloaded(tmp_path, "short_of_memory.cpp")
    counts = counted("short_of_memory.py", tmp_path, LD_PRELOAD=library)
    assert min(counts["failed"].values()) > 5
    assert sum(counts["failed"].values()) > 500


@pytest.mark.parametrize("action", file_calls.ACTIONS)
def test_each_call_that_writes_and_each_crash(tmp_path, action) -> None:
    """The old file is there, or the new one; what a crash lost is refused with a reason."""
    start = tmp_path / "start"
    start.mkdir()
    made = make_bundle(start, n_layer=1)
    tiny.write_tiny_peft(made.peft, made.base, targets=("q_proj",), layers=(0,), rank=2)
    made.base.path.rename(made.folder / "base.gguf")
    rewrite(made.folder, lambda raw: raw["base"].update(file="base.gguf"))
    file_calls.save(start, "old")
    (start / "out.gguf").write_bytes((start / "es.gguf").read_bytes())
    (tmp_path / "place").mkdir()
    env = {
        "LD_PRELOAD": preloaded(tmp_path, "file_calls.c"),
        "QAFLORA_CACHE": str(tmp_path / "cache"),
    }
    counts = counted("file_calls.py", start, tmp_path / "place", action, **env)[action]
    assert counts["calls"] >= counts["told"] > 5
    assert counts["lost"] == counts["calls"]


SHORT = """
import resource, sys
from qaflora_edge import Engine, QafloraError
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.formats.base import read_base

model = Model(read_base(sys.argv[1]))
Pack(model, [])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (int(sys.argv[3]) << 20), hard))
try:
    with Engine(sys.argv[2], threads=1, n_ctx=256) as engine:
        engine.generate("hi", max_tokens=2).text()
    print("answered")
except (QafloraError, MemoryError) as error:
    print("told:", error)
"""


def test_short_memory_ends_no_process(tmp_path) -> None:
    """With ever more of it an Engine fails in words, and at last answers."""
    made = make_bundle(tmp_path, n_layer=1)
    said = []
    for n_mib in (40, 80, 110, 140, 200, 2000):
        env = {"MALLOC_ARENA_MAX": "1"}
        done = python("-W", "ignore", "-c", SHORT, made.base.path, made.folder, n_mib, env=env)
        assert done.returncode == 0, (n_mib, done.stderr[-2000:])
        said.append(done.stdout.partition(":")[0].strip())
    assert said[0] == "told"
    assert said[-1] == "answered"


MANY_FILES = """
import resource, sys
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.errors import BackendError
from qaflora_edge.formats.base import read_base

with Model(read_base(sys.argv[1])) as model:
    Pack(model, []).close()  # what it reads once is read
    held = [open(sys.argv[1]) for _ in range(3)]
    most = max(file.fileno() for file in held) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for n_free in (0, 1, 2):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most + n_free, hard))
        try:
            Pack(model, [sys.argv[2]] * 8)
        except BackendError as error:
            print(error)
"""


def test_too_many_open_files_are_told(tmp_path) -> None:
    base = tiny.write_tiny_base(tmp_path / "base.gguf")
    adapter = tiny.write_tiny_adapter(tmp_path / "a.gguf", base)
    result = python("-W", "ignore", "-c", MANY_FILES, base.path, adapter.path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert all("Too many open files" in line for line in lines), lines
