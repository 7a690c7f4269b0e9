"""A wheel for another system, emulated: logits under adapters against the installed library's.

    PYTHONPATH=tests python packages/cross.py windows WHEEL
    PYTHONPATH=tests python packages/cross.py aarch64 WHEEL ROOT MODEL...

Compiles tests/native/logits.c for both systems. Runs the other one under wine, or under qemu-user
as each MODEL of processor with the C library in the folder ROOT. Prints a table; fails where logits
differ, or where that system cannot load the libraries.
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
SYSTEMS = {
    "windows": ("x86_64-w64-mingw32-gcc-posix", "{}.dll"),
    "aarch64": ("aarch64-linux-gnu-gcc", "lib{}.so"),
}
PARTS = ("llama", "ggml", "ggml-base")
# Of base and adapters in these types. Logits are up to 10: in F32 compilers order sums differently;
# of 8 bits, what falls on the other side of a rounding step is 1/127 of the largest.
LIMITS = {("f32", "f32", "f32", "f32"): 1e-5, ("q8_0", "f32", "f16", "q8_0"): 0.3}
ENVIRONMENT = {
    "WINEDEBUG": "-all",
    "WINEDLLOVERRIDES": "mscoree,mshtml=",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def build(compiler: str, folder: Path, name: str, program: Path) -> None:
    """Compile the program with the libraries that lie in a folder."""
    prepare = [sys.executable, CHECKOUT / "patches" / "prepare.py"]
    done = subprocess.run(prepare, capture_output=True, text=True, check=True)
    source = Path(done.stdout.strip())
    includes = (CHECKOUT / "patches" / "src", source / "include", source / "ggml" / "include")
    words = [compiler, "-O1", "-Wall", "-Wextra", "-Werror", *(f"-I{path}" for path in includes)]
    words += [PROGRAM, "-o", program, *(folder / name.format(part) for part in PARTS)]
    if name.endswith(".so"):
        words += [f"-Wl,-rpath,{folder}", f"-Wl,-rpath-link,{folder}"]
    subprocess.run(words, check=True)


def logits(words: list[str | Path], kernels: str, **environment: str) -> np.ndarray:
    """Logits [n_vocab] that the program prints with these kernels of adapters."""
    env = os.environ | ENVIRONMENT | environment | {"QAFLORA_CPU_KERNELS": kernels}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{words} with the kernels {kernels} ended with {done.returncode}: {done.stderr}")
    return np.array(done.stdout.split(), np.float32)


def runs(system: str, rest: list[str]) -> dict[str, tuple[list[str], str, str]]:
    """Case -> what runs a program of that system, its kernels of adapters, and this system's."""
    if system == "aarch64":
        root, *models = rest
        words = {model: ["qemu-aarch64", "-cpu", model, "-L", root] for model in models}
        return {model: (words[model], "", PLAIN_KERNELS) for model in models}  # the best it has
    flags = Path("/proc/cpuinfo").read_text("utf-8").replace("_", "").split()
    more = [each for each in MORE_KERNELS if f"{each}f" in flags or each in flags]
    return {each: (["wine"], each, each) for each in (PLAIN_KERNELS, *more)}


def main() -> int:
    system, wheel, *rest = sys.argv[1:]
    compiler, name = SYSTEMS[system]
    is_alike = True
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        prefix = {"WINEPREFIX": str(room / "wine")}
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(room)
        ours, theirs = library_dir(), room / "qaflora_edge" / "lib"
        program = theirs / "logits.exe"  # beside the libraries, where Windows looks for them
        build("cc", ours, "lib{}.so", room / "logits")
        build(compiler, theirs, name, program)
        print("| base | case | largest logit | difference |\n|---|---|---|---|")
        for (dtype, *outtypes), limit in LIMITS.items():
            base = write_tiny_base(room / f"{dtype}.gguf", dtype=dtype)
            files = [base.path]
            for seed, outtype in enumerate(outtypes):
                path = room / f"{dtype}-{seed}.gguf"
                files.append(
                    write_tiny_adapter(path, base, rank=8, seed=seed, outtype=outtype).path
                )
            for case, (words, kernels, own) in runs(system, rest).items():
                here = logits([room / "logits", ours, *files], own)
                there = logits([*words, program, theirs, *files], kernels, **prefix)
                difference = float(np.abs(here - there).max())
                is_alike &= difference <= limit
                largest = np.abs(here).max()
                print(f"| {dtype} | {case} | {largest:.2f} | {difference:.1e} |", flush=True)
        if system == "windows":
            subprocess.run(["wineserver", "--wait"], env=os.environ | prefix, check=True)
    return 0 if is_alike else 1


if __name__ == "__main__":
    sys.exit(main())
