"""Our native sources, as compilers for other systems see them: without a warning."""

import shutil
import subprocess

import pytest

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
X86_SETS = {
    "qaflora-cpu-avx2": AVX2,
    "qaflora-cpu-avx512": AVX512,
    "qaflora-cpu-avxvnni": [*AVX2, "-mavxvnni"],
    "qaflora-cpu-avx512vnni": [*AVX512, "-mavx512vnni"],
}
ARM_SETS = {
    "qaflora-cpu-dotprod": ["-march=armv8.2-a+dotprod"],
    "qaflora-cpu-i8mm": ["-march=armv8.2-a+dotprod+i8mm"],
}
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wcast-qual", "-Wvla", "-Werror"]
DEFINES = ["LLAMA_SHARED", "GGML_SHARED", 'QAFLORA_BUILD_INFO="x"', 'QAFLORA_RPC_BUILD="x"']
INCLUDES = ("src", "include", "ggml/include", "ggml/src")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "defines", "sets"),
    [
        ("x86_64-w64-mingw32-g++-posix", ["_WIN32_WINNT=0x0A00"], X86_SETS),  # Windows
        ("clang++-19 --target=x86_64-w64-mingw32", ["_WIN32_WINNT=0x0A00"], X86_SETS),
        ("aarch64-linux-gnu-g++", [], ARM_SETS),
    ],
)
def test_native_sources_compile(compiler, defines, sets, checkout, llama_cpp_source) -> None:
    if shutil.which(compiler.split()[0]) is None:
        pytest.skip(f"{compiler} is not installed")
    own = checkout / "patches" / "src"
    words = [*compiler.split(), "-x", "c++", "-std=c++17", "-fsyntax-only", *WARNINGS, f"-I{own}"]
    words += [f"-isystem{llama_cpp_source / part}" for part in INCLUDES]
    words += [f"-D{name}" for name in (*DEFINES, *defines)]
    joined = []
    for path in sorted(own.glob("*.cpp")):
        text = path.read_text(encoding="utf-8")
        if "#define QAFLORA_ISA" in text:  # it names what it includes
            compile_text([*words, *sets.get(path.stem, [])], text)
        else:
            joined.append(f'#include "{path.name}"\n')
    compile_text(words, "".join(joined))  # at once: headers of llama.cpp take the longest


def compile_text(words: list[str], text: str) -> None:
    done = subprocess.run([*words, "-"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
