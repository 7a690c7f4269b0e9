"""Rows with matrices of the base, by the kernels of processors that are emulated."""

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from test_compilers import ARM_SETS
from tiny import F32

CROSS = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
# in the order of qaflora-cpu.h enum qaflora_matrix_type, after one for all others
TYPES = ["", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0"]
# where a block has its F16 scales, if not at 0 alone
SCALES = {"Q4_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
N_OUT, N_IN = 7, 512  # outputs that fill no tile
PROCESSORS = {"max": "i8mm", "neoverse-n1": "dotprod", "cortex-a72": "neon"}


@pytest.fixture(scope="module")
def program(tmp_path_factory, checkout, llama_cpp_source) -> Path:
    for name in (CROSS, EMULATOR):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    own = checkout / "patches" / "src"
    folder = tmp_path_factory.mktemp("products")
    paths = [checkout / "tests" / "native" / "products.cpp"]
    paths += [own / "qaflora-cpu.cpp", own / "qaflora-error.cpp"]
    paths += [x for x in own.glob("*.cpp") if "qaflora-cpu-isa.h" in x.read_text("utf-8")]
    parts = ("include", "ggml/include")
    words = [CROSS, "-std=c++17", "-O1", f"-I{own}", *(f"-I{llama_cpp_source / x}" for x in parts)]
    for path in paths:
        flags = ARM_SETS.get(path.stem, [])
        subprocess.run([*words, *flags, "-c", path], check=True, cwd=folder)
    objects = folder.glob("*.o")
    subprocess.run([CROSS, "-static", *objects, "-o", folder / "products"], check=True)
    return folder / "products"


def random_matrix(rng: np.random.Generator, name: str) -> NDArray[np.uint8]:
    """Blocks of random bits, with scales of about 0.01."""
    n_block, n_byte = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (N_OUT, N_IN // n_block, n_byte), np.uint8)
    for at in SCALES.get(name, [0]):
        scales = rng.uniform(-0.02, 0.02, blocks.shape[:2]).astype(np.float16)
        blocks[:, :, at : at + 2] = scales[:, :, None].view(np.uint8)
    return blocks.reshape(N_OUT, -1)


def products(program: Path, cpu: str, cases: list[tuple[str, NDArray[np.uint8], F32]]) -> list[F32]:
    """Multiply each matrix of a type with its rows on a processor, with kernels that it has."""
    asked = b""
    for name, matrix, rows in cases:
        asked += struct.pack("<5q", TYPES.index(name), N_OUT, N_IN, len(rows), matrix.size)
        asked += matrix.tobytes() + rows.tobytes()
    done = subprocess.run(
        [EMULATOR, "-cpu", cpu, program],
        input=asked,
        capture_output=True,
        check=True,
        env={"QAFLORA_CPU_KERNELS": PROCESSORS[cpu]},
    )
    assert done.stderr.decode().strip() == PROCESSORS[cpu]
    answer = np.frombuffer(done.stdout, np.float32).reshape(-1, N_OUT)
    return np.split(answer, np.cumsum([len(rows) for *_, rows in cases])[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["max", "neoverse-n1"])
@pytest.mark.parametrize("name", TYPES[1:])
def test_rows_alone_and_together_are_the_products_of_neon(program, name, cpu) -> None:
    rng = np.random.default_rng(2)
    matrix = random_matrix(rng, name)
    rows = rng.standard_normal((19, N_IN)).astype(np.float32)  # more than a tile has
    rows[3] = 0.0
    cases = [(name, matrix, rows[:n]) for n in (19, *range(8, 0, -1))]
    answers = products(program, cpu, cases)
    values = dequantize(matrix, GGMLQuantizationType[name]).astype(np.float64)
    # rows are rounded to 127 steps of the largest number of a block
    blocks = rows.reshape(19, -1, 32)
    steps = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    rounded = np.rint(blocks / np.where(steps == 0, 1, steps)) * steps
    expected = rounded.reshape(rows.shape) @ values.T
    np.testing.assert_allclose(answers[0], expected, rtol=1e-3, atol=1e-3)
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0][: len(answer)])


@pytest.mark.slow
@pytest.mark.parametrize("cpu", PROCESSORS)
def test_a_processor_gets_the_most_that_it_has_by_default(program, cpu) -> None:
    done = subprocess.run(
        [EMULATOR, "-cpu", cpu, program], input=b"", capture_output=True, check=True, env={}
    )
    assert done.stderr.decode().strip() == PROCESSORS[cpu]
