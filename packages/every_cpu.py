"""One wheel on many processors: which of its files each loads, and whether all answer alike.

    python packages/every_cpu.py PYTHON...     each backend that this processor runs, alone
    python packages/every_cpu.py PYTHON... --cpu MODEL...     each of qemu-user's processors

PYTHON is the command of a Python that has the wheel; with --cpu it is one that qemu-user runs, such
as `qemu-x86_64 python`. The first answer is what others are compared with. Prints a table; fails
where a processor stops, or answers otherwise.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tiny import write_tiny_adapter, write_tiny_base

ANSWER = Path(__file__).with_name("one_answer.py")
# Weights are up to 1, logits up to 10. In F32 sums are in another order and exponentials
# activations rounded to 8 bits, and what falls on the other side of a step is 1/127 of the largest.
LIMITS = {"weights": 1e-3, "logits": 5e-3, "quantised": 0.3}
FOLDER = "from qaflora_edge.backend.library import library_dir; print(library_dir())"

CLEAN = {"PATH": "/usr/bin:/bin", "PYTHONSAFEPATH": "1"}  # the installed package, not the checkout
Case = tuple[str, list[str], dict[str, str]]


def alone(python: list[str], room: Path) -> Iterator[Case]:
    """Each file of ggml's CPU backend, without the others."""
    words = [*python, "-c", FOLDER]
    done = subprocess.run(words, env=CLEAN, capture_output=True, text=True, check=True)
    installed = Path(done.stdout.strip())
    for path in sorted(installed.glob("libggml-cpu-*")):
        folder = room / path.stem
        shutil.copytree(installed, folder, ignore=shutil.ignore_patterns("libggml-cpu-*"))
        shutil.copy(path, folder)
        yield path.stem.removeprefix("libggml-cpu-"), python, {"QAFLORA_LIB_PATH": str(folder)}


def emulated(python: list[str], models: list[str]) -> Iterator[Case]:
    for model in models:
        yield model, python, {"QEMU_CPU": model}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", nargs="+")
    parser.add_argument("--cpu", nargs="+")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        base = write_tiny_base(room / "base.gguf")
        words = [str(base.path), str(write_tiny_base(room / "q8_0.gguf", dtype="q8_0").path)]
        for seed in (1, 2, 3):
            path = room / f"{seed}.gguf"
            write_tiny_adapter(path, base, rank=8, seed=seed, outtype="f16")
            words.append(f"a{seed}={path}")
        cases = alone(options.python, room)
        if options.cpu:
            cases = emulated(options.python, options.cpu)
        return compare(cases, words)


def compare(cases: Iterator[Case], words: list[str]) -> int:
    print("| processor | backend | kernels of adapters | weights | logits | Q8_0 logits | tokens |")
    print("|---|---|---|---|---|---|---|")
    first, n_bad = None, 0
    for name, python, environment in cases:
        done = subprocess.run(
            [*python, str(ANSWER), *words], env=CLEAN | environment, capture_output=True, text=True
        )
        if "QAFLORA_LIB_PATH" in environment and "No CPU backend of" in done.stderr:
            print(f"| {name} | not on this processor | | | | | |", flush=True)
            continue
        if done.returncode:
            n_bad += 1
            print(
                f"| {name} | **exit {done.returncode}** {done.stderr[-300:]!r} | | | | | |",
                flush=True,
            )
            continue
        answer = json.loads(done.stdout)
        first = first or answer
        apart = {key: float(np.abs(np.subtract(answer[key], first[key])).max()) for key in LIMITS}
        is_same = answer["tokens"] == first["tokens"]
        n_bad += not is_same or any(apart[key] > limit for key, limit in LIMITS.items())
        figures = " | ".join(f"{apart[key]:.1e}" for key in LIMITS)
        tokens = "the same" if is_same else "**others**"
        print(
            f"| {name} | {answer['backend']} | {answer['kernels']} | {figures} | {tokens} |",
            flush=True,
        )
    return 1 if n_bad or first is None else 0


if __name__ == "__main__":
    sys.exit(main())
