"""Find and load the patched library; declare what it adds to llama.cpp; keep its errors.

llama_cpp reads LLAMA_CPP_LIB_PATH once, when it is imported, and binds every symbol then. So
this module sets the variable, imports llama_cpp, and refuses a library without our ABI.
"""

import contextlib
import ctypes
import os
import platform
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Self

from qaflora_edge.errors import LibraryError
from qaflora_edge.formats import defer

_LIBRARY_NAMES = {"win32": "llama.dll", "darwin": "libllama.dylib"}
_LIBRARY_NAME = _LIBRARY_NAMES.get(sys.platform, "libllama.so")
ABI_VERSION = 9
CONTEXT_PROBE, CONTEXT_DIFFERENTIAL = 1, 2
CAPTURE = {"last": 0, "mean": 1, "inputs": 2, "none": 3}
LENS = {"raw": 0, "norm": 1}
DEVICE_CPU, DEVICE_GPU, DEVICE_INTEGRATED_GPU = 0, 1, 2  # enum ggml_backend_dev_type
_M_MMAP_THRESHOLD, _LARGE_BYTE = -3, 1 << 20  # malloc.h
_LOG_LEVEL_ERROR = 4  # ggml.h GGML_LOG_LEVEL_ERROR
_errors: deque[str] = deque(maxlen=4)
_log_callback: Any = None
_INSTALL_ADVICE = "reinstall qaflora-edge (pip install --force-reinstall --no-deps qaflora-edge)"

_INT, _LONG, _SIZE = ctypes.c_int32, ctypes.c_int64, ctypes.c_size_t
_HANDLE, _ARRAY, _TEXT = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p
_TEXTS = ctypes.POINTER(_TEXT)
_SIZES = ctypes.POINTER(_SIZE)
# What each function of qaflora.h returns, and what it takes.
Prototype = tuple[Any, list[Any]]
_PROTOTYPES: dict[str, Prototype] = {
    "abi_version": (_INT, []),
    "build_info": (_TEXT, []),
    "last_error": (_TEXT, []),
    "has_products": (_INT, []),
    "has_attention": (_INT, [_HANDLE]),
    "vocab_attributes": (None, [_HANDLE, _INT, _ARRAY]),
    "pack_init": (_HANDLE, [_HANDLE, _TEXTS, _INT, _INT]),
    "pack_free": (None, [_HANDLE]),
    "pack_first_layer": (_INT, [_HANDLE, _INT]),
    "pack_n_alike": (_INT, [_HANDLE]),
    "context_init": (_HANDLE, [_HANDLE, _HANDLE, _HANDLE, ctypes.c_uint32]),
    "decode": (_INT, [_HANDLE, _HANDLE]),
    "set_weights": (_INT, [_HANDLE, _INT, _ARRAY, _LONG]),
    "capture_begin": (_INT, [_HANDLE, _INT]),
    "get_states": (_INT, [_HANDLE, _INT, _ARRAY, _LONG]),
    "get_inputs": (_INT, [_HANDLE, _INT, _ARRAY, _LONG]),
    "divergence": (_INT, [_HANDLE, _INT, _INT, _ARRAY, _ARRAY, _ARRAY]),
    "project": (_INT, [_HANDLE, _INT, _ARRAY, _ARRAY]),
}
_GGML: dict[str, Prototype] = {
    "load_all_from_path": (None, [_TEXT]),
    "reg_count": (_SIZE, []),
    "reg_by_name": (_HANDLE, [_TEXT]),
    "reg_get_proc_address": (_HANDLE, [_HANDLE, _TEXT]),
    "reg_dev_count": (_SIZE, [_HANDLE]),
    "reg_dev_get": (_HANDLE, [_HANDLE, _SIZE]),
    "dev_count": (_SIZE, []),
    "dev_get": (_HANDLE, [_SIZE]),
    "dev_type": (_INT, [_HANDLE]),
    "dev_name": (_TEXT, [_HANDLE]),
    "dev_description": (_TEXT, [_HANDLE]),
    "dev_memory": (None, [_HANDLE, _SIZES, _SIZES]),
    "dev_by_type": (_HANDLE, [_INT]),
    "dev_init": (_HANDLE, [_HANDLE, _TEXT]),
    "free": (None, [_HANDLE]),
    "cpu_buffer_type": (_HANDLE, []),
}


BINDING = Path(__file__).parents[1] / "binding"  # in wheels of a release: packages/with_binding.py


def library_dir() -> Path:
    """Find the folder of the patched library: QAFLORA_LIB_PATH, else the package's lib/.

    A source checkout has none: there it is that of the package that is installed beside it.
    """
    if override := os.environ.get("QAFLORA_LIB_PATH"):
        return Path(override)
    beside = Path(__file__).parents[1] / "lib"
    if not beside.is_dir():
        from importlib.metadata import PackageNotFoundError, distribution  # slow to import

        with contextlib.suppress(PackageNotFoundError):
            located = distribution("qaflora-edge").locate_file("qaflora_edge/lib")
            installed = Path(str(located))
            return installed if installed.is_dir() else beside
    return beside


def _import_binding(folder: Path) -> ModuleType:
    if BINDING.is_dir():
        sys.path.insert(0, str(BINDING))
    try:
        defer("llama_cpp", _keep_log)  # its classes take 60 ms, and set a log of their own
        with _variables(LLAMA_CPP_LIB_PATH=str(folder)):
            return import_module("llama_cpp.llama_cpp")
    except (ImportError, RuntimeError, AttributeError, OSError) as err:
        raise LibraryError(
            f"The native library {folder / _LIBRARY_NAME} cannot be loaded by llama-cpp-python "
            f"({err}); {_INSTALL_ADVICE} and its dependencies, or set QAFLORA_LIB_PATH to the "
            "folder that holds it."
        ) from err
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(BINDING))


@contextlib.contextmanager
def _variables(**values: str | None) -> Iterator[None]:
    """Set or remove variables that a library reads once, as it is loaded; put them back after."""
    before = {name: os.environ.get(name) for name in values}
    _set_variables(values)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@cache
def ggml_of(lib: ctypes.CDLL) -> SimpleNamespace:
    """Declare functions of ggml's registry of backends, without `ggml_backend_`."""
    libs = [lib]
    if sys.platform == "win32":  # a library gives its own functions only
        names = ("ggml.dll", "ggml-base.dll")
        libs = [ctypes.CDLL(str(Path(lib._name).with_name(name))) for name in names]
    return _declare(_GGML, "ggml_backend_", *libs)


def _load_backends(lib: ctypes.CDLL, folder: Path) -> None:
    """Load the backends that are files: of the CPU's, the best that this processor can run.

    llama.cpp 0c1e5709, ggml_backend_load_best, would look in the current folder as well.
    """
    ggml = ggml_of(lib)
    if ggml.reg_count():  # this build has them linked
        return
    with _variables(GGML_BACKEND_PATH=None):
        ggml.load_all_from_path(os.fsencode(folder))
    if not ggml.dev_by_type(DEVICE_CPU):
        names = sorted(path.name for path in folder.glob("*ggml-cpu*")) or ["none"]
        raise LibraryError(
            f"No CPU backend of {folder} can be loaded on this processor "
            f"({platform.machine()}); there are: {', '.join(names)}. Expected one that it can run; "
            f"{_INSTALL_ADVICE}."
        )


def _declare(
    prototypes: Mapping[str, Prototype], prefix: str, *libs: ctypes.CDLL
) -> SimpleNamespace:
    """Declare functions of the first library that has each, under their names without prefix."""
    functions = SimpleNamespace()
    for name, (restype, argtypes) in prototypes.items():
        having = [lib for lib in libs if hasattr(lib, prefix + name)]
        lib = having[0] if having else libs[0]
        function = getattr(lib, prefix + name)
        function.restype = restype
        function.argtypes = argtypes
        setattr(functions, name, function)
    return functions


@cache
def load() -> tuple[ModuleType, SimpleNamespace]:
    """Load the library once per process, and keep its log off the terminal.

    returns  (llama_cpp.llama_cpp, our functions without their qaflora_ prefix)

    Raises LibraryError when the library is missing, stock, of another ABI version, or without a CPU
    backend for this processor; it names the file that was loaded.
    """
    folder = library_dir()
    binding = _import_binding(folder)
    loaded = binding._lib._name
    found = getattr(binding._lib, "qaflora_abi_version", lambda: "none (a stock llama.cpp)")()
    if found != ABI_VERSION:
        raise LibraryError(
            f"{loaded} has qaflora_abi_version {found}, expected {ABI_VERSION}. If llama_cpp was "
            f"imported before qaflora_edge, import qaflora_edge's Engine first; else "
            f"{_INSTALL_ADVICE}."
        )
    _keep_log()
    # Large blocks go back when they are freed: glibc would learn to keep those of up to 32 MiB.
    glibc("mallopt", _M_MMAP_THRESHOLD, _LARGE_BYTE)
    _load_backends(binding._lib, folder.absolute())
    binding.llama_backend_init()
    return binding, _declare(_PROTOTYPES, "qaflora_", binding._lib)


def last_error() -> str:
    """Give our library's message of the last failure on this thread."""
    _, functions = load()
    return str(functions.last_error(), "utf-8", "replace")


def _keep_log() -> None:
    global _log_callback
    binding = import_module("llama_cpp.llama_cpp")

    def keep_errors(level: int, text: bytes, _: object) -> None:
        if level == _LOG_LEVEL_ERROR:
            _errors.append(text.decode("utf-8", "replace").strip())

    _log_callback = binding.llama_log_callback(keep_errors)
    binding.llama_log_set(_log_callback, None)


def logged(*ours: str) -> str:
    """Give our reasons and then llama.cpp's of the last failure."""
    return "; ".join([*ours, *_errors]) or "no reason given"


def forget_logged() -> None:
    _errors.clear()


def default_threads() -> int:
    """Count the cores that this process may use, and no more than OMP_NUM_THREADS says."""
    if hasattr(os, "sched_getaffinity"):
        n_core = len(os.sched_getaffinity(0))
    else:
        n_core = os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    limit = int(asked) if asked.isdecimal() else n_core
    return max(1, min(n_core, limit))


def glibc(name: str, *arguments: int) -> None:
    """Call a function of glibc, where there is one."""
    if sys.platform == "linux" and (function := getattr(ctypes.CDLL(None), name, None)):
        function(*arguments)


class Handle:
    """Free a resource of the library once, by close().

    There is no __del__: a garbage collector may take a model before its contexts.
    """

    _pointer: Any = None

    def close(self) -> None:
        """Free it. A second call does nothing."""
        if self._pointer is not None:
            pointer = self._pointer
            self._pointer = None
            self._free(pointer)

    def _free(self, pointer: Any) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stop:
    """Flag set by one thread and read by another: between tokens, and inside llama_decode.

    llama.cpp asks its abort callback before every node of a graph. A Python function would wait for
    the interpreter's lock each time; strlen of a buffer that is empty or "\\1" needs none.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(2)

    @property
    def is_set(self) -> bool:
        return self._buffer.raw[0] != 0

    def set(self) -> None:
        """End native work that watches the flag."""
        self._buffer[0] = b"\1"

    def clear(self) -> None:
        self._buffer[0] = b"\0"

    def watch(self, lib: Any, context: Any) -> None:
        """Let a llama_context end its work once the flag is set; both live as long as each other.

        Backends without abort callbacks (CUDA, Vulkan) end with their micro-batch.
        """
        name = "ucrtbase" if sys.platform == "win32" else None
        libc = ctypes.CDLL(name)
        callback = ctypes.cast(libc.strlen, lib.ggml_abort_callback)
        lib.llama_set_abort_callback(context, callback, ctypes.addressof(self._buffer))
