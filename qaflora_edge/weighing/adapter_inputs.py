"""Adapters' own matrices, applied to the inputs of the base's attention."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import cache
from typing import Any, BinaryIO

import numpy as np

from qaflora_edge.arrays import F32, F64
from qaflora_edge.formats.adapter import AdapterInfo, read_pair
from qaflora_edge.formats.inputs import open_input, reading
from qaflora_edge.weighing.strategy import KINDS

_limiting = threading.Lock()  # limits are the whole process's


@cache
def _thread_pools() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Keep BLAS to one thread: OpenBLAS's others spin, and keep cores from the next decode."""
    with _limiting, _thread_pools().limit(limits=1, user_api="blas"):
        yield


def shared_modules(infos: Sequence[AdapterInfo], layer: int, modules: Sequence[str]) -> list[str]:
    """Name those of some modules in a layer that all adapters adapt."""
    common = []
    for module in modules:
        name = f"blk.{layer}.{module}.weight"
        if all(name in info.ranks for info in infos):
            common.append(name)
    return common


def module_matrix(a: F32, b: F32, scale: float) -> F64:
    """Give a module as P [n, n_embd] with |P x| = |scale B A x| for every x; n is at most rank."""
    wide_a = np.asarray(a, np.float64)
    wide_b = np.asarray(b, np.float64)
    r = np.linalg.qr(wide_b, mode="r")  # B = QR, and |QRx| = |Rx|
    return np.asarray(scale * (r @ wide_a))


class AttentionSizes:
    """Read one adapter's modules q, k and v that are not all 0, for `two-place`.

    Its sizes do not depend on other adapters, so that typical ones can be stored.
    """

    @on_one_thread()
    def __init__(self, info: AdapterInfo, n_layer: int) -> None:
        self._n_layer = n_layer
        # layer -> its modules' matrices side by side [n_embd, n], where each begins
        self._matrices: dict[int, tuple[F32, list[int]]] = {}
        self._layers: list[int] = []  # of each module
        with reading(info.path), open_input(info.path) as file:
            for layer in range(n_layer):
                self._add_layer(layer, info, file)

    def _add_layer(self, layer: int, info: AdapterInfo, file: BinaryIO) -> None:
        matrices = []
        starts = []
        n_row = 0
        for name in shared_modules([info], layer, KINDS):
            matrix = module_matrix(*read_pair(info, name, file))
            if matrix.any():
                matrices.append(matrix)
                starts.append(n_row)
                n_row += len(matrix)
        if matrices:
            side_by_side = np.concatenate(matrices).T
            self._matrices[layer] = (side_by_side.astype(np.float32, order="C"), starts)
            self._layers += [layer] * len(matrices)

    def sums(self, inputs: F32) -> F64:
        """Sum |scale B A x| of each module over tokens: float64 [n_module].

        inputs  [n_token, n_layer, n_embd]  x of the projections
        """
        sums = []
        for layer, (matrix, starts) in self._matrices.items():
            squares = np.square(inputs[:, layer] @ matrix)  # [n_token, n]
            of_modules = np.add.reduceat(squares, starts, axis=1)  # [n_token, modules of the layer]
            sizes = np.sqrt(of_modules).sum(axis=0, dtype=np.float64)
            sums += sizes.tolist()
        return np.array(sums)

    def of_layers(self, sizes: F64) -> F64:
        """Take the geometric mean of each layer's modules: [n_module] -> [n_layer], or 0."""
        layers = np.array(self._layers)
        means = np.zeros(self._n_layer)
        with np.errstate(divide="ignore"):  # a module that adds nothing
            logs = np.log(sizes)
        for layer in self._matrices:
            means[layer] = np.exp(logs[layers == layer].mean())
        return means


@on_one_thread()
def sums_of(adapters: Sequence[AttentionSizes], inputs: F32, threads: Executor) -> list[F64]:
    """Sum for each adapter, in parallel threads."""
    return list(threads.map(lambda adapter: adapter.sums(inputs), adapters))
