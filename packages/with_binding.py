"""Put the binding of llama.cpp into a wheel of this package: `pip install FILE` needs no compiler.

    python packages/with_binding.py WHEEL BINDING_WHEEL

The binding, llama-cpp-python, is pure Python. The package index has its source alone, and building
that compiles another llama.cpp. Its modules and licence go to qaflora_edge/binding/, where
backend.library looks first. The wheel is replaced, and asks for what the binding needs instead.
"""

import base64
import hashlib
import os
import re
import sys
import zipfile
from pathlib import Path

PLACE = "qaflora_edge/binding/"
REQUIREMENT = re.compile(r"^Requires-Dist: llama-cpp-python\b.*$", re.MULTILINE)
NEEDED = re.compile(r"^Requires-Dist: typing-extensions\b.*$", re.MULTILINE)
LEFT_OUT = ("llama_cpp/server/", "bin/", "lib/")  # a server, and where a library would be


def contents(wheel: Path) -> dict[str, tuple[zipfile.ZipInfo, bytes]]:
    """Read the files of a wheel: name -> its entry and data, without folders."""
    with zipfile.ZipFile(wheel) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        return {entry.filename: (entry, archive.read(entry)) for entry in entries}


def only(names: "dict[str, tuple[zipfile.ZipInfo, bytes]]", end: str) -> str:
    """Name the one file that ends so. Ends the process where there is none, or another."""
    found = [name for name in names if name.endswith(end)]
    if len(found) != 1:
        sys.exit(f"A wheel has {len(found)} files {end}, expected one.")
    return found[0]


def record_line(name: str, data: bytes) -> str:
    """Write a line of RECORD: name, digest and size."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}\n"


def main(wheel: Path, binding: Path) -> None:
    """Replace a wheel by one that holds the binding."""
    files = contents(wheel)
    bound = contents(binding)
    needed = NEEDED.search(bound[only(bound, ".dist-info/METADATA")][1].decode())
    metadata = only(files, ".dist-info/METADATA")
    entry, data = files[metadata]
    text, n_replaced = REQUIREMENT.subn(needed[0] if needed else "", data.decode())
    if not needed or n_replaced != 1:
        sys.exit(f"{wheel.name} asks for no llama-cpp-python, or that for no typing-extensions.")
    files[metadata] = entry, text.encode()
    for name, (entry, data) in bound.items():
        if not name.startswith(LEFT_OUT) and not name.endswith("/RECORD"):
            entry.filename = PLACE + name
            files[PLACE + name] = entry, data
    record = only(files, ".dist-info/RECORD")
    lines = [record_line(name, data) for name, (_, data) in files.items() if name != record]
    files[record] = files[record][0], "".join([*lines, f"{record},,\n"]).encode()
    written = wheel.with_suffix(".part")
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in files.values():
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    os.replace(written, wheel)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
