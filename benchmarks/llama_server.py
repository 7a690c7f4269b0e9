"""Build llama.cpp's own llama-server, without our patches, from the archive that our build takes.

    python benchmarks/llama_server.py FOLDER

Prints where it lies. What is built is not built again. CMAKE_ARGS are those of the package.
"""

import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath

CHECKOUT = Path(__file__).resolve().parents[1]
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF "
    "-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF "
    "-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_NUMBER=1 "
    "-DLLAMA_BUILD_COMMIT=pinned"
)


def unpack(folder: Path) -> Path:
    """The pristine source of llama.cpp in a folder, unpacked where it is not there whole."""
    source, done = folder / "source", folder / "unpacked"
    prepare = [sys.executable, str(CHECKOUT / "patches" / "prepare.py"), "--archive"]
    archive = subprocess.run(prepare, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    if not done.is_file() or done.read_text(encoding="utf-8") != archive:
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if parts[1:3] == ("vendor", "llama.cpp") and len(parts) > 3:
                    member.name = str(PurePosixPath(*parts[3:]))
                    tar.extract(member, source, filter="data")
        done.write_text(archive, encoding="utf-8")
    return source


def build(folder: Path) -> Path:
    """The path of llama-server, built in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target = unpack(folder), folder / "build"
    options = [*shlex.split(OPTIONS), *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
    configure = ["cmake", "-S", str(source), "-B", str(target), *options]
    make = ["cmake", "--build", str(target), "--parallel", str(os.cpu_count() or 1)]
    for command in (configure, [*make, "--target", "llama-server"]):
        subprocess.run(command, check=True, stdout=sys.stderr)
    return target / "bin" / "llama-server"


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
