"""Adapters' own matrices, applied to the inputs of the base's attention."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import cache
from typing import Any, BinaryIO

import numpy as np

from qaflora_edge.arrays import F32, F64
from qaflora_edge.errors import StrategyError
from qaflora_edge.formats.adapter import AdapterInfo, read_pair
from qaflora_edge.formats.inputs import open_input, reading
from qaflora_edge.weighing.numbers import softmax
from qaflora_edge.weighing.strategy import KINDS, QUERIES, Routing

_limiting = threading.Lock()  # limits are the whole process's


@cache
def _thread_pools() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@contextmanager
def _on_one_thread() -> Iterator[None]:
    """Keep BLAS to one thread: OpenBLAS's others spin, and keep cores from the next decode."""
    with _limiting, _thread_pools().limit(limits=1, user_api="blas"):
        yield


def _common(infos: Sequence[AdapterInfo], layer: int, kinds: Sequence[str]) -> list[str]:
    common = []
    for kind in kinds:
        name = f"blk.{layer}.{kind}.weight"
        if all(name in info.ranks for info in infos):
            common.append(name)
    return common


def _matrix(a: F32, b: F32, scale: float) -> F64:
    """Give a module as P [n, n_embd] with |P x| = |scale B A x| for every x; n is at most rank."""
    wide_a = np.asarray(a, np.float64)
    wide_b = np.asarray(b, np.float64)
    r = np.linalg.qr(wide_b, mode="r")  # B = QR, and |QRx| = |Rx|
    return np.asarray(scale * (r @ wide_a))


def _direction(matrix: F64) -> F64:
    """Give the unit vector v with the largest |P v|, up to its sign: [1, n_embd]."""
    _, _, right = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(right[:1])


class AttentionInputs:
    """Read attention projections that all adapters adapt, for `arrow` and `spectr`.

    routing   "arrow": one direction of each module; "spectr": all, with their scales

    Raises StrategyError when the adapters have no such module in common.
    """

    @_on_one_thread()
    def __init__(self, infos: Sequence[AdapterInfo], n_layer: int, routing: Routing) -> None:
        self._modules: dict[int, list[list[F64]]] = {}  # layer -> module -> adapter -> [n, n_embd]
        for layer in range(n_layer):
            for name in _common(infos, layer, KINDS):
                matrices = [_matrix(*read_pair(info, name)) for info in infos]
                if routing == "arrow":
                    matrices = list(map(_direction, matrices))
                self._modules.setdefault(layer, []).append(matrices)
        if not self._modules:
            raise StrategyError(
                f"Strategy {routing} compares what adapters read at the attention's projections, "
                f"but no block has one ({', '.join(KINDS)}) that all of them adapt; use another "
                "strategy."
            )
        self._n_layer = n_layer
        self._n_adapter = len(infos)

    @_on_one_thread()
    def sums(self, inputs: F32) -> F64:
        """Sum each layer's weights and their measure over tokens.

        inputs   [n_token, n_layer, n_embd]  x of the projections
        returns  float64 [2, n_adapter, n_layer], means over a layer's modules; a layer without any
                 gets the mean over the others
        """
        sums = np.zeros((2, self._n_adapter, self._n_layer))
        weights, measure = sums
        for layer, modules in self._modules.items():
            x = inputs[:, layer].astype(np.float64)  # [n_token, n_embd]
            n_module = len(modules)
            for matrices in modules:
                rows = []
                for matrix in matrices:
                    output = x @ matrix.T
                    rows.append(np.linalg.norm(output, axis=1))
                sizes = np.stack(rows)  # [n_adapter, n_token]
                shares = softmax(sizes)
                weights[:, layer] += shares.sum(axis=1) / n_module
                measure[:, layer] += sizes.sum(axis=1) / n_module
        read = list(self._modules)
        others = [layer for layer in range(self._n_layer) if layer not in self._modules]
        sums[:, :, others] = sums[:, :, read].mean(axis=2, keepdims=True)
        return sums


class AttentionSizes:
    """Read one adapter's modules q, k and v that are not all 0, for `two-place`.

    Its sizes do not depend on other adapters, so that typical ones can be stored.
    """

    @_on_one_thread()
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
        for name in _common([info], layer, KINDS):
            matrix = _matrix(*read_pair(info, name, file))
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


@_on_one_thread()
def sums_of(adapters: Sequence[AttentionSizes], inputs: F32, threads: Executor) -> list[F64]:
    """Sum for each adapter, in parallel threads."""
    return list(threads.map(lambda adapter: adapter.sums(inputs), adapters))


class QueryProjections:
    """Read the query projection of the last block that all adapters adapt, for `norm`.

    Raises StrategyError when there is no such block.
    """

    @_on_one_thread()
    def __init__(self, infos: Sequence[AdapterInfo], n_layer: int) -> None:
        common = []
        for layer in range(n_layer):
            for name in _common(infos, layer, QUERIES):
                common.append((layer, name))
        if not common:
            queries = set(QUERIES)
            lacking = [str(info.path) for info in infos if queries.isdisjoint(info.targets)]
            raise StrategyError(
                "Strategy norm compares what adapters add to one query projection, but no block's "
                f"is adapted by all of them ({', '.join(lacking) or 'they adapt different blocks'})"
                "; use another strategy."
            )
        self._layer, name = common[-1]
        self._matrices = [_matrix(*read_pair(info, name)) for info in infos]

    @_on_one_thread()
    def norms(self, inputs: F32) -> F64:
        """Compute |scale B A x| of each adapter: float64 [n_adapter].

        inputs  [n_layer, n_embd]  x at every layer
        """
        x = inputs[self._layer].astype(np.float64)
        sizes = [np.linalg.norm(matrix @ x) for matrix in self._matrices]
        return np.array(sizes)
