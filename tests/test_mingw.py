"""Our native sources use nothing that GCC for Windows warns of; nobody has run them there."""

import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = shutil.which("x86_64-w64-mingw32-g++-posix")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
SETS = {"qaflora-cpu-avx2": AVX2, "qaflora-cpu-avx512": AVX512}
INCLUDES = ("src", "include", "ggml/include", "ggml/src")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="x86_64-w64-mingw32-g++-posix is not installed")
def test_native_sources_compile_for_windows(checkout: Path, llama_cpp_source: Path) -> None:
    own = checkout / "patches" / "src"
    includes = [f"-I{own}", *(f"-isystem{llama_cpp_source / part}" for part in INCLUDES)]
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Wcast-qual", "-Wvla", "-Werror"]
    defines = ["LLAMA_SHARED", "GGML_SHARED", "_WIN32_WINNT=0x0A00", 'QAFLORA_BUILD_INFO="x"']
    words = [COMPILER, "-std=c++17", "-fsyntax-only", *warnings, *includes]
    words += [f"-D{name}" for name in defines]
    for path in sorted(own.glob("*.cpp")):
        flags = SETS.get(path.stem, [])
        done = subprocess.run([*words, *flags, path], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
