"""qaflora doctor"""

import ctypes
import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import click

from qaflora_edge import __version__
from qaflora_edge.cli.options import command, json_option
from qaflora_edge.cli.output import print_json
from qaflora_edge.errors import LibraryError
from qaflora_edge.formats.inputs import Json

PACKAGES = ("llama-cpp-python", "numpy", "gguf", "huggingface-hub", "click")
# What --guesses auto does: whether kernels multiply a row alone as they do in company.
_GUESSES = {
    True: "tokens are guessed for bases in Q4_0, Q4_1, Q5_0, Q8_0, Q4_K, Q5_K and Q6_K",
    False: "no tokens are guessed, as these do not multiply one row and several alike",
}
DEVICE_TYPES = ("CPU", "GPU", "integrated GPU", "accelerator", "meta")  # ggml_backend_dev_type


@command("qaflora doctor --json")
@json_option()
def doctor(as_json: bool) -> None:
    """Report the library, the devices and the versions.

    Exit code 1, after the report, when the native library is missing or not the right one.
    """
    error: LibraryError | None = None
    try:
        library = library_facts()
    except LibraryError as err:
        error = err
        from qaflora_edge.backend.library import library_dir

        library = {"ok": False, "folder": str(library_dir()), "error": str(err)}
    report = {"library": library} | package_facts()
    if as_json:
        print_json(report)
    else:
        click.echo(_lines(report))
        if error is None:
            processor = "a GPU" if library["gpu_offload"] else "the CPU"
            click.echo(f"All is well: the library fits this version and computes on {processor}.")
    if error is not None:
        raise error


def library_facts() -> Json:
    """What the loaded library says of itself. Raises LibraryError when it cannot be loaded."""
    from qaflora_edge.backend import devices, library

    binding, functions = library.load()
    kernels_name = binding._lib.qaflora_kernels_name
    kernels_name.restype = ctypes.c_char_p
    kernels = kernels_name()
    ggml = devices.ggml()
    return {
        "ok": True,
        "file": str(binding._lib._name),
        "abi_version": functions.abi_version(),
        "build_info": functions.build_info().decode("utf-8", "replace"),
        "devices": [_device(ggml, ggml.dev_get(i)) for i in range(ggml.dev_count())],
        "gpu_offload": bool(devices.gpus()),
        "features": binding.llama_print_system_info().decode("utf-8", "replace").strip(),
        "kernels": kernels.decode() if kernels else None,
        "guesses": bool(functions.has_products()),
    }


def package_facts() -> Json:
    """Versions of qaflora-edge, Python and what it stands on; the machine; the cache."""
    from qaflora_edge.files import cache_dir

    versions = {"qaflora-edge": __version__, "python": platform.python_version()}
    return {
        "versions": versions | {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cache": str(cache_dir()),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        from qaflora_edge.backend.library import BINDING

        inside = importlib.metadata.distributions(name=name, path=[str(BINDING)])
        return next((distribution.version for distribution in inside), None)


def _device(ggml: Any, device: int) -> Json:
    free = ctypes.c_size_t()
    total = ctypes.c_size_t()
    ggml.dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    number = ggml.dev_type(device)
    return {
        "name": ggml.dev_name(device).decode("utf-8", "replace"),
        "description": ggml.dev_description(device).decode("utf-8", "replace"),
        "type": DEVICE_TYPES[number] if 0 <= number < len(DEVICE_TYPES) else str(number),
        "memory_free_bytes": free.value,
        "memory_total_bytes": total.value,
    }


def _lines(report: Json) -> str:
    from qaflora_edge.backend.library import last_error

    library = report["library"]
    rows = [("library", f"not usable, looked for in {library.get('folder')}")]
    if library["ok"]:
        rows = [
            ("library", library["file"]),
            ("ABI", library["abi_version"]),
            ("built from", library["build_info"]),
            ("offload", "to a GPU" if library["gpu_offload"] else "none (a CPU build)"),
        ]
        for device in library["devices"]:
            size = f"{device['memory_total_bytes'] / 1e9:.1f} GB"
            name = f"{device['name']} ({device['type']})"
            rows.append(("device", f"{name}: {device['description']}, {size}"))
        rows.append(("features", library["features"]))
        guesses = _GUESSES[library["guesses"]]
        rows.append(("kernels", f"{library['kernels'] or last_error()}; {guesses}"))
    for name, version in report["versions"].items():
        rows.append((name, version or "not installed"))
    rows.append(("platform", report["platform"]))
    rows.append(("cache", report["cache"]))
    return "\n".join(f"{name:<16} {value}" for name, value in rows)


def cpu_name() -> str:
    """The CPU's own name where Linux tells it, else what Python knows of it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return match[1].strip() if match else platform.processor() or platform.machine()
