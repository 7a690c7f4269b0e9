"""Devices: layers on workers, which are other machines or processes, and on GPUs; and memory.

A worker is llama.cpp's RPC backend: it lends its memory and computes the layers that lie there.
Custom operations stay here, for their parameters are addresses of this process (patches/0004).
"""

import contextlib
import ctypes
import math
import os
import re
import socket
import struct
import threading
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from qaflora_edge.backend import library
from qaflora_edge.backend.batch import n_ubatch
from qaflora_edge.config import MAX_CTX
from qaflora_edge.errors import LibraryError, WorkerError, wrong_option

if TYPE_CHECKING:
    from qaflora_edge.backend.model import Model
    from qaflora_edge.formats.gguf import GgufHeader

MAX_WORKERS = 16  # ggml-rpc.h GGML_RPC_MAX_SERVERS
GREETING_S = 5  # a worker answers at once, unless it serves another client
_ENDPOINT = re.compile(r"[^:]+:(?P<port>[0-9]{1,5})")
_MAX_DEVICES = 16  # llama_max_devices()
_ENDS = b"^(token_embd|output)"  # names of tensors; a head that is tied has the embedding's
_SIZE, _HANDLE, _TEXT = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p
_RPC: dict[str, tuple[Any, list[Any]]] = {
    "add_server": (_HANDLE, [_TEXT]),
    "start_server": (None, [_TEXT, _TEXT, _SIZE, _SIZE, ctypes.POINTER(_HANDLE)]),
}
# llama.cpp 0c1e5709, ggml-rpc.cpp rpc_msg_hello_req and rpc_msg_hello_rsp; the last 24 bytes of
# both are the build (patches/0004)
_HELLO = struct.pack("<BQ24x", 14, 24)
_HELLO_ANSWER = struct.Struct("<Q3Bx24s")  # size; version; build


class _BufferOverride(ctypes.Structure):
    """struct llama_model_tensor_buft_override."""

    _fields_ = [("pattern", _TEXT), ("buft", _HANDLE)]


def ggml() -> SimpleNamespace:
    return library.ggml_of(library.load()[0]._lib)


@cache
def rpc() -> SimpleNamespace:
    """Declare functions of the RPC backend, without `ggml_backend_rpc_`."""
    reg = ggml().reg_by_name(b"RPC")
    if not reg:
        raise LibraryError(
            f"The native library in {library.library_dir()} has no RPC backend, expected "
            "libggml-rpc; build it without -DGGML_RPC=off."
        )
    functions = SimpleNamespace()
    for name, (restype, argtypes) in _RPC.items():
        address = ggml().reg_get_proc_address(reg, f"ggml_backend_rpc_{name}".encode())
        setattr(functions, name, ctypes.CFUNCTYPE(restype, *argtypes)(address))
    return functions


def gpus() -> list[int]:
    """List the GPUs of this machine; integrated ones where there is no other."""
    registry = ggml()
    by_type: dict[int, list[int]] = {library.DEVICE_GPU: [], library.DEVICE_INTEGRATED_GPU: []}
    for index in range(registry.dev_count()):
        device = registry.dev_get(index)
        device_type = registry.dev_type(device)
        if device_type in by_type:
            by_type[device_type].append(device)
    return by_type[library.DEVICE_GPU] or by_type[library.DEVICE_INTEGRATED_GPU]


def endpoints(text: str) -> tuple[str, ...]:
    """Read the workers that --rpc names. Raises OptionError."""
    workers = tuple(worker.strip() for worker in text.split(","))
    is_right = len(set(workers)) == len(workers) <= MAX_WORKERS
    for worker in workers:
        match = _ENDPOINT.fullmatch(worker)
        if match is None or not 0 < int(match["port"]) < 1 << 16:
            is_right = False
    if not is_right:
        expected = f"up to {MAX_WORKERS} different workers as HOST:PORT with commas between them"
        raise wrong_option("rpc", text, f"{expected}, each with a name or an IPv4 address")
    return workers


def read_shares(text: str, n_device: int) -> list[float]:
    """Read --tensor-split: how many layers each device gets, relative to the others."""
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    are_right = any(shares) and all(0 <= share < math.inf for share in shares)
    if len(shares) != n_device or not are_right:
        expected = f"{n_device} numbers from 0 up with commas between them, not all 0"
        devices = "one for each worker of --rpc, then one for each GPU of this machine"
        raise wrong_option("tensor_split", text, f"{expected}: {devices}")
    return shares


def check_timeout() -> None:
    """Check QAFLORA_RPC_TIMEOUT: seconds without a byte of a worker that is waited for; 0: no end.

    Raises OptionError.
    """
    text = os.environ.get("QAFLORA_RPC_TIMEOUT", "")
    if text and not re.fullmatch("[0-9]{1,6}", text):
        expected = "a whole number of seconds from 0 to 999999"
        raise wrong_option("QAFLORA_RPC_TIMEOUT", text, expected)


def build() -> str:
    """Name this build as workers do: a part of the pin's commit, and of the hash of our sources."""
    _, functions = library.load()
    info = functions.build_info().decode("utf-8", "replace")
    commit, _, patches = info.removeprefix("llama.cpp ").partition(", patches ")
    return f"{commit[:10]}-{patches}"


def check_worker(endpoint: str) -> None:
    """Say HELLO to a worker, and compare its build with ours. Raises WorkerError."""
    host, _, port = endpoint.partition(":")
    answer = b""
    why = "nothing answers there"
    try:
        with socket.create_connection((host, int(port)), GREETING_S) as connection:
            why = "it does not answer as a worker: it serves another client, or is something else"
            connection.sendall(_HELLO)
            while received := connection.recv(_HELLO_ANSWER.size - len(answer)):
                answer += received
    except OSError:
        pass
    if len(answer) == _HELLO_ANSWER.size:
        *_, raw_build = _HELLO_ANSWER.unpack(answer)
        its_build = raw_build.rstrip(b"\0").decode("utf-8", "replace")
        if its_build == build():
            return
        why = f"it is of the build {its_build!r}, expected {build()!r}"
    raise WorkerError(
        f"The worker {endpoint} cannot be used: {why}. Start `qaflora worker` of this version "
        "there."
    )


# A worker serves one client at a time: who is connected already does not ask it who it is.
_connecting = threading.RLock()  # a garbage collector may close one in the middle
_n_user: Counter[str] = Counter()


class Workers(library.Handle):
    """Connect to the workers that --rpc names, or to none.

    devices  ggml_backend_dev_t of all their devices, in their order

    A worker that is lost later ends the process (patches/src/qaflora-rpc.cpp).
    Raises WorkerError for one that cannot be used, OptionError for a wrong text or time limit.
    """

    def __init__(self, text: str | None) -> None:
        self.devices: list[int] = []
        self._pointer: list[int] = []  # a backend for each device keeps its connection
        self._endpoints: list[str] = []
        if text is None:
            return
        check_timeout()
        try:
            for endpoint in endpoints(text):
                self._open(endpoint)
        except BaseException:
            self.close()
            raise

    def _open(self, endpoint: str) -> None:
        with _connecting:
            if not _n_user[endpoint]:
                check_worker(endpoint)
            _n_user[endpoint] += 1
            self._endpoints.append(endpoint)
        reg = rpc().add_server(endpoint.encode())
        n_device = ggml().reg_dev_count(reg) if reg else 0
        for i in range(n_device):
            device = ggml().reg_dev_get(reg, i)
            self.devices.append(device)
            self._pointer.append(ggml().dev_init(device, None))

    def _free(self, pointer: Any) -> None:
        for backend in pointer:
            ggml().free(backend)
        with _connecting:
            for endpoint in self._endpoints:
                _n_user[endpoint] -= 1


def place(params: Any, workers: Workers, gpu_layers: int | None, tensor_split: str | None) -> bool:
    """Write where layers go into llama_model_params; tell whether any layer is on a device.

    The head and the embedding stay here where there are workers, and with them the lens.
    """
    devices = [*workers.devices, *gpus()]
    if tensor_split is not None:
        split = read_shares(tensor_split, len(devices))
        params.tensor_split = (ctypes.c_float * _MAX_DEVICES)(*split)
    if gpu_layers is not None:
        # llama.cpp 0c1e5709, llama-model.cpp load_tensors: the head is the first of them
        params.n_gpu_layers = gpu_layers + (bool(workers.devices) and gpu_layers > 0)
    if workers.devices:
        chosen = (_HANDLE * (len(devices) + 1))(*devices)
        here = (_BufferOverride * 2)(_BufferOverride(_ENDS, ggml().cpu_buffer_type()))
        params.devices = ctypes.cast(chosen, _HANDLE)
        params.tensor_buft_overrides = ctypes.cast(here, _HANDLE)
        params._kept = chosen, here
    return bool(devices) and gpu_layers != 0


def serve(host: str, port: int, *, cache: Path | None, threads: int) -> None:
    """Lend the GPUs, or the CPU, to one client after the other; returns if it cannot listen.

    cache  folder for large tensors that clients sent, or None
    """
    devices = gpus() or [ggml().dev_by_type(library.DEVICE_CPU)]
    array = (_HANDLE * len(devices))(*devices)
    path = None if cache is None else os.fsencode(cache)
    start = rpc().start_server
    binding, _ = library.load()
    binding.llama_log_set(binding.llama_log_callback(), None)  # to stderr
    start(f"{host}:{port}".encode(), path, threads, len(devices), array)


_VALUE_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}
_N_CTX_SAFE = 4096  # tokens that a context without a limit has in any case


def automatic_ctx(model: "Model", base: "GgufHeader", kv_type: str, n_seq: int) -> int:
    """Choose the most tokens of a sequence where nobody limits them.

    These are as many as the base was trained for. Half of the memory that the base leaves free
    has to hold the KV states of all sequences and of the probe, and a chunk's attention scores.
    """
    n_train = model.n_ctx_train or _N_CTX_SAFE
    if any("rope_factors_long" in name for name in base.tensors):
        # llama.cpp 0c1e5709, get_rope_factors: a larger context computes other positions
        n_orig = base.metadata.get(f"{base.architecture}.rope.scaling.original_context_length")
        if isinstance(n_orig, int):
            n_train = min(n_train, n_orig)
    n_value = 0  # of a token's keys and values
    for name, tensor in base.tensors.items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        if module in ("attn_k", "attn_v"):
            n_value += tensor.shape[0]
        elif module == "attn_qkv":
            n_value += tensor.shape[0] - base.n_embd
    kv_bytes = n_value * _VALUE_BYTES[kv_type]
    score_bytes = 0 if model.has_attention else 4 * model.n_head * n_ubatch()
    token_bytes = (n_seq + 1) * kv_bytes + score_bytes
    free_bytes = _free_bytes() - base.path.stat().st_size
    n_fit = free_bytes / 2 / max(1, token_bytes)
    return min(n_train, max(_N_CTX_SAFE, int(n_fit)), MAX_CTX)


def _free_bytes() -> int:
    """Estimate the memory that this process may still take; a container's limit counts."""
    group = Path("/sys/fs/cgroup")
    n_left = MAX_CTX << 30  # no limit
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit either
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        n_left = limit - used
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                kib = int(line.split()[1])
                return min(n_left, kib << 10)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # Windows
        return 4 << 30
