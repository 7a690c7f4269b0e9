"""The wheel for Windows, under wine: logits under three adapters against the installed library's.

    PYTHONPATH=tests python packages/windows.py WHEEL

Compiles tests/native/logits.c for both systems, with mingw-w64's compiler and this system's. Prints
a table; fails where logits differ, or where Windows cannot load the libraries.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from tiny import MORE_KERNELS, PLAIN_KERNELS, write_tiny_adapter, write_tiny_base

from qaflora_edge.backend.library import library_dir

CHECKOUT = Path(__file__).resolve().parents[1]
PROGRAM = CHECKOUT / "tests" / "native" / "logits.c"
# Of base and adapters in these types. Logits are up to 10: in F32 compilers order sums differently;
# of 8 bits, what falls on the other side of a rounding step is 1/127 of the largest.
LIMITS = {("f32", "f32", "f32", "f32"): 1e-5, ("q8_0", "f32", "f16", "q8_0"): 0.3}
WINE = {"WINEDEBUG": "-all", "WINEDLLOVERRIDES": "mscoree,mshtml="}


def build(compiler: str, libraries: list[Path | str], program: Path) -> None:
    prepare = [sys.executable, CHECKOUT / "patches" / "prepare.py"]
    done = subprocess.run(prepare, capture_output=True, text=True, check=True)
    source = Path(done.stdout.strip())
    folders = (CHECKOUT / "patches" / "src", source / "include", source / "ggml" / "include")
    words = [compiler, "-O1", "-Wall", "-Wextra", "-Werror", *(f"-I{path}" for path in folders)]
    subprocess.run([*words, PROGRAM, "-o", program, *libraries], check=True)


def logits(words: list[str], kernels: str, **environment: str) -> np.ndarray:
    """Logits [n_vocab] that the program prints with these kernels of adapters."""
    env = {**os.environ, "QAFLORA_CPU_KERNELS": kernels, **environment}
    done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{words[0]} with the kernels {kernels} ended with {done.returncode}.")
    return np.array(done.stdout.split(), np.float32)


def compare(case: str, limit: float, here: np.ndarray, there: np.ndarray) -> bool:
    """Print a row of the table; tell whether both are alike."""
    difference = float(np.abs(here - there).max())
    print(f"| {case} | {np.abs(here).max():.2f} | {difference:.1e} |", flush=True)
    return difference <= limit


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        with zipfile.ZipFile(sys.argv[1]) as wheel:
            wheel.extractall(room)
        parts = ("llama", "ggml", "ggml-base")
        ours, theirs = library_dir(), room / "qaflora_edge" / "lib"
        libraries = [ours / f"lib{part}.so" for part in parts]
        build("cc", [*libraries, f"-Wl,-rpath,{ours}"], room / "logits")
        libraries = [theirs / f"{part}.dll" for part in parts]
        build(
            "x86_64-w64-mingw32-gcc-posix", libraries, theirs / "logits.exe"
        )  # beside the libraries

        flags = Path("/proc/cpuinfo").read_text("utf-8").replace("avx512_", "avx512").split()
        kernels = [
            PLAIN_KERNELS,
            *(each for each in MORE_KERNELS if f"{each}f" in flags or each in flags),
        ]
        wine = WINE | {"WINEPREFIX": str(room / "wine")}
        print("| base | kernels of adapters | largest logit | difference |\n|---|---|---|---|")
        is_alike = True
        for (dtype, *outtypes), limit in LIMITS.items():
            base = write_tiny_base(room / f"{dtype}.gguf", dtype=dtype)
            files = [str(base.path)]
            for seed, outtype in enumerate(outtypes):
                path = room / f"{dtype}-{seed}.gguf"
                write_tiny_adapter(path, base, rank=8, seed=seed, outtype=outtype)
                files.append(str(path))
            for each in kernels:
                here = logits([str(room / "logits"), str(ours), *files], each)
                words = ["wine", str(theirs / "logits.exe"), str(theirs), *files]
                there = logits(words, each, **wine)
                is_alike &= compare(f"{dtype} | {each}", limit, here, there)
        subprocess.run(["wineserver", "--wait"], env=os.environ | wine, check=True)
    return 0 if is_alike else 1


if __name__ == "__main__":
    sys.exit(main())
