"""What adapters' own matrices make of what the base's attention reads of a query.

Adapters are given by their files, or as what was read of them before.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from qaflora_edge.arrays import F32, F64
from qaflora_edge.errors import StrategyError
from qaflora_edge.formats.adapter import AdapterInfo, read_adapter_gguf, read_pair
from qaflora_edge.weighing.numbers import softmax
from qaflora_edge.weighing.strategy import KINDS, QUERIES, Reading

P = ParamSpec("P")
T = TypeVar("T")


_limiting = threading.Lock()


@cache
def _thread_pools() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def on_one_thread(function: Callable[P, T]) -> Callable[P, T]:
    """Let no product in a function have threads of BLAS's own.

    OpenBLAS's wait busily once they were woken, and keep their cores from what is decoded next: the
    first token after 100 were summed up took 120 ms in place of 37, with two cores.
    """

    @wraps(function)
    def limited(*args: P.args, **kwargs: P.kwargs) -> T:
        with _limiting:
            with _thread_pools().limit(limits=1, user_api="blas"):
                result = function(*args, **kwargs)
            return result

    return limited


def _info(adapter: Path | AdapterInfo) -> AdapterInfo:
    return adapter if isinstance(adapter, AdapterInfo) else read_adapter_gguf(adapter)


def _common(infos: Sequence[AdapterInfo], layer: int, kinds: Sequence[str]) -> list[str]:
    """Tensors of a layer that all of these adapters adapt."""
    names = (f"blk.{layer}.{kind}.weight" for kind in kinds)
    return [name for name in names if all(name in info.ranks for info in infos)]


def amplified(a: ArrayLike, b: ArrayLike) -> F64:
    """Compute a matrix P with |P x| = |B A x| for every x: float64 [rank, n_in], or of fewer rows.

    a  [rank, n_in]
    b  [n_out, rank]
    """
    _, r = np.linalg.qr(np.asarray(b, np.float64))
    return np.asarray(r @ np.asarray(a, np.float64))


def top_direction(amplified: F64) -> F64:
    """Find the unit vector v with the largest |P v|, up to its sign: float64 [n_in]."""
    return np.asarray(np.linalg.svd(amplified, full_matrices=False)[2][0])


class AttentionInputs:
    """Of the attention's projections that all adapters adapt, for `arrow` and `spectr`.

    reading   "arrow": one direction of each module, "spectr": all of them, with their scales

    Raises StrategyError when the adapters have no such module in common.
    """

    def __init__(
        self, adapters: Sequence[Path | AdapterInfo], n_layer: int, reading: Reading
    ) -> None:
        infos = list(map(_info, adapters))
        self._modules: dict[int, list[list[F64]]] = {}  # layer -> module -> adapter -> [n, n_embd]
        for layer in range(n_layer):
            if common := _common(infos, layer, KINDS):
                self._modules[layer] = [
                    [_read(info, name, reading) for info in infos] for name in common
                ]
        if not self._modules:
            raise StrategyError(
                f"Strategy {reading} compares what adapters read at the attention's projections, "
                f"but no block has one ({', '.join(KINDS)}) that all of them adapt; use another "
                "strategy."
            )
        self._n_layer, self._n_adapter = n_layer, len(infos)

    @on_one_thread
    def sums(self, inputs: F32) -> F64:
        """Sums over tokens of each layer's weights and of what they come from.

        inputs   [n_token, n_layer, n_embd]  x of the projections
        returns  float64 [2, n_adapter, n_layer], means over a layer's modules; a layer without any
                 has the mean over the others
        """
        sums = np.zeros((2, self._n_adapter, self._n_layer))
        for layer, modules in self._modules.items():
            x = inputs[:, layer].astype(np.float64)
            for matrices in modules:
                sizes = np.stack([np.linalg.norm(x @ m.T, axis=1) for m in matrices])
                sums[0, :, layer] += softmax(sizes).sum(axis=1) / len(modules)
                sums[1, :, layer] += sizes.sum(axis=1) / len(modules)
        read = list(self._modules)
        others = [layer for layer in range(self._n_layer) if layer not in self._modules]
        sums[:, :, others] = sums[:, :, read].mean(axis=2, keepdims=True)
        return sums


def _read(info: AdapterInfo, name: str, reading: Reading) -> F64:
    """A matrix [n, n_embd] whose product with x is as long as what the module makes of x."""
    a, b, scale = read_pair(info, name)
    matrix = amplified(a, b)
    return top_direction(matrix)[None] if reading == "arrow" else scale * matrix


class AttentionSizes:
    """Of one adapter's modules q, k and v, those that are not all 0, for `two-place`.

    Other adapters do not matter, so that what is usual of one can be kept.
    """

    def __init__(self, adapter: Path | AdapterInfo, n_layer: int) -> None:
        info = _info(adapter)
        self._n_layer = n_layer
        # layer -> its modules' matrices beside each other [n_embd, n], where each begins
        self._matrices: dict[int, tuple[F32, list[int]]] = {}
        self._layers: list[int] = []  # of each module
        for layer in range(n_layer):
            found = [_read(info, name, "spectr") for name in _common([info], layer, KINDS)]
            matrices = [matrix for matrix in found if matrix.any()]
            if not matrices:
                continue
            starts = np.cumsum([0, *(len(matrix) for matrix in matrices[:-1])]).tolist()
            stacked = np.concatenate(matrices).T.astype(np.float32, order="C")
            self._matrices[layer] = stacked, starts
            self._layers += [layer] * len(matrices)

    def sums(self, inputs: F32) -> F64:
        """Sums over tokens of |scale B A x| of each module: float64 [n_module].

        inputs  [n_token, n_layer, n_embd]  x of the projections
        """
        sums: list[float] = []
        for layer, (matrix, starts) in self._matrices.items():
            squares = np.square(inputs[:, layer] @ matrix)
            sums += np.sqrt(np.add.reduceat(squares, starts, axis=1)).sum(0, np.float64).tolist()
        return np.array(sums)

    def of_layers(self, sizes: F64) -> F64:
        """The geometric mean over each layer's modules: [n_module] -> [n_layer], 0 without any."""
        layers = np.array(self._layers)
        with np.errstate(divide="ignore"):  # a module that adds nothing
            logs = np.log(sizes)
        return np.array(
            [
                np.exp(logs[layers == layer].mean()) if (layers == layer).any() else 0.0
                for layer in range(self._n_layer)
            ]
        )


@on_one_thread
def sums_of(adapters: Sequence[AttentionSizes], inputs: F32, threads: Executor) -> list[F64]:
    """The sums of each adapter, a thread for each as far as there are."""
    return list(threads.map(lambda adapter: adapter.sums(inputs), adapters))


class QueryProjections:
    """Of the query projection of the last block that all adapters adapt, for `norm`.

    Raises StrategyError when there is no such block.
    """

    def __init__(self, adapters: Sequence[Path | AdapterInfo], n_layer: int) -> None:
        infos = list(map(_info, adapters))
        self.layer, name = _last_common(infos, n_layer)
        self._pairs = [read_pair(info, name) for info in infos]

    @on_one_thread
    def norms(self, inputs: F32) -> F64:
        """|scale B A x| of each adapter: float64 [n_adapter].

        inputs  [n_layer, n_embd]  x at every layer
        """
        x = inputs[self.layer].astype(np.float64)
        return np.array(
            [scale * np.linalg.norm(b @ (a @ x)) for a, b, scale in self._pairs], np.float64
        )


def _last_common(infos: Sequence[AdapterInfo], n_layer: int) -> tuple[int, str]:
    for layer in reversed(range(n_layer)):
        for name in _common(infos, layer, QUERIES):
            return layer, name
    lacking = [str(info.path) for info in infos if not {*QUERIES} & {*info.targets}]
    raise StrategyError(
        "Strategy norm compares what adapters add to one query projection, but no block's is "
        f"adapted by all of them ({', '.join(lacking) or 'they adapt different blocks'}); "
        "use another strategy."
    )
