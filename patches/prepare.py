"""Prepare the patched source of llama.cpp and print the folder it lies in.

    python patches/prepare.py             the patched source
    python patches/prepare.py --archive   only the archive of the binding, checked
    python patches/prepare.py --vendor    a copy in llama.cpp/ beside patches/, for a source archive

The pinned source archive is fetched, checked, unpacked into a pristine folder, and patched there.
QAFLORA_SOURCE_ARCHIVE names any other archive with the pinned llama.cpp, such as one that git made:
what a build reads has to have the pinned tree, as git hashes it. The folder's name is a hash of the
pin and of every patch, so a changed patch never meets an old tree; a folder that was edited by hand
is refused.
Needs git, pip and platformdirs; only platformdirs where llama.cpp/ holds the patched source.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

PATCHES = Path(__file__).resolve().parent
sys.path.insert(0, str(PATCHES.parent))
sys.path.insert(0, str(PATCHES))

import strict  # noqa: E402
from strict import PrepareError  # noqa: E402

from qaflora_edge.errors import QafloraError  # noqa: E402
from qaflora_edge.files import cache_dir, write_text_atomic  # noqa: E402

STAMP = ".qaflora-stamp.json"
# What a build of the libraries reads; tests, tools, models and documents stay in the archive.
WANTED = ("CMakeLists.txt", "LICENSE", "cmake", "ggml", "include", "licenses", "src", "vendor")
MAX_TREE_BYTES = 512 << 20
MAX_TREE_FILES = 20_000
HEADER = PurePosixPath("include/llama.h")  # of llama.cpp, by which it is found in an archive


@dataclass(frozen=True)
class Pin:
    """What `patches/UPSTREAM` says."""

    package: str
    version: str
    archive_sha256: str
    llama_cpp_path: str
    llama_cpp_commit: str
    llama_cpp_tree: str = field(repr=False)  # of WANTED; in tree_key the archive says as much

    @property
    def archive_name(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}.tar.gz"

    @property
    def root(self) -> PurePosixPath:
        """The folder of llama.cpp in the archive."""
        return PurePosixPath(self.archive_name.removesuffix(".tar.gz")) / self.llama_cpp_path


def read_pin(patches: Path = PATCHES) -> Pin:
    """Read the pin. Raises PrepareError when it is missing or incomplete."""
    path = patches / "UPSTREAM"
    try:
        return Pin(**tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise PrepareError(
            f"Cannot read the pin {path}: {error}. Expected TOML with exactly the fields "
            f"{', '.join(Pin.__annotations__)}. Restore the file from the repository."
        ) from error


def read_series(patches: Path = PATCHES) -> list[Path]:
    """List the patches in the order in which they are applied."""
    series = patches / "series"
    try:
        lines = series.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PrepareError(
            f"Cannot read {series}: {error.strerror}. Restore the file from the repository."
        ) from error
    names = [name for line in lines if (name := line.partition("#")[0].strip())]
    for name in names:
        if not (patches / name).is_file():
            raise PrepareError(
                f"{series} names {name}, but there is no such patch beside it. "
                "Add the patch or take its line out."
            )
    return [patches / name for name in names]


def tree_key(pin: Pin, series: list[Path]) -> str:
    """Hash everything that decides what the prepared tree contains."""
    digest = hashlib.sha256(repr((pin, WANTED)).encode())
    for patch in series:
        digest.update(f"\0{patch.name}\0".encode() + patch.read_bytes())
    return digest.hexdigest()


def find_archive(pin: Pin, cache: Path) -> Path:
    """Give the checked source archive: the caller's, the cached one, or a fresh download."""
    if given := os.environ.get("QAFLORA_SOURCE_ARCHIVE"):
        check_archive(pin, Path(given), "Set QAFLORA_SOURCE_ARCHIVE to the right file or unset it.")
        return Path(given)
    archive = cache / "sources" / pin.archive_name
    if archive.is_file() and sha256_file(archive) == pin.archive_sha256:
        return archive
    download_archive(pin, archive)
    return archive


def sha256_file(path: Path) -> str:
    """Hash a file with what is there before anything is installed. Raises PrepareError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PrepareError(f"The file {path} cannot be read: {error.strerror}.") from error


def check_archive(pin: Pin, archive: Path, advice: str) -> None:
    """Raise PrepareError unless the archive is the pinned one."""
    found = sha256_file(archive)
    if found != pin.archive_sha256:
        raise PrepareError(
            f"The source archive {archive} is not {pin.package} {pin.version}: its sha256 is "
            f"{found}, expected {pin.archive_sha256}. {advice}"
        )


def download_archive(pin: Pin, archive: Path) -> None:
    """Fetch the source archive with pip, check it, and only then give it its name."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=archive.parent) as folder:
        fetched = fetch_release(pin, Path(folder))
        check_archive(pin, fetched, "Nothing was built. Check where pip takes packages from.")
        os.replace(fetched, archive)


def fetch_release(pin: Pin, folder: Path) -> Path:
    """Fetch the source archive with pip, whatever is in it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", pin.package, "--dest", str(folder)]
    if importlib.util.find_spec("scikit_build_core"):
        # pip asks the package for its metadata; this spares it a build environment.
        command.append("--no-build-isolation")
    result = subprocess.run([*command, f"{pin.package}=={pin.version}"])
    fetched = folder / pin.archive_name
    if result.returncode != 0 or not fetched.is_file():
        raise PrepareError(
            f"Could not fetch the source archive {pin.archive_name} of llama.cpp: "
            f"'{' '.join(command)} {pin.package}=={pin.version}' gave exit code "
            f"{result.returncode} and no such file; its own message is above. Check the "
            "network, or set QAFLORA_SOURCE_ARCHIVE to a copy of the archive."
        )
    return fetched


def extract(
    root: PurePosixPath, archive: Path, tree: Path, wanted: tuple[str, ...] = WANTED
) -> None:
    """Unpack the wanted part of llama.cpp, which lies at `root`, into the empty folder `tree`."""
    n_file = 0
    n_bytes = 0
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if not name.is_relative_to(root) or member.isdir():
                continue
            relative = name.relative_to(root)
            if not relative.parts or relative.parts[0] not in wanted:
                continue
            n_file += 1
            n_bytes += member.size
            reason = unsafe_reason(member, name, n_file, n_bytes)
            if reason:
                raise PrepareError(
                    f"The source archive {archive} holds {member.name!r}, which {reason}. "
                    "Nothing was built. Fetch the archive again."
                )
            write_member(tar, member, tree / relative)
    if not (tree / "CMakeLists.txt").is_file():
        raise PrepareError(
            f"The source archive {archive} has no {root}/CMakeLists.txt; expected llama.cpp "
            "there. Correct llama_cpp_path in patches/UPSTREAM."
        )


def find_root(archive: Path) -> PurePosixPath:
    """Find the folder of the one llama.cpp in an archive."""
    with tarfile.open(archive, "r:gz") as tar:
        names = [PurePosixPath(name) for name in tar.getnames()]
    roots = [name.parents[1] for name in names if name.parts[-2:] == HEADER.parts]
    if len(roots) != 1:
        raise PrepareError(
            f"The archive {archive} has {len(roots)} files {HEADER}, expected one, of llama.cpp. "
            "Give a source archive of llama.cpp, or of a package that holds one."
        )
    return roots[0]


def check_tree(pin: Pin, tree: Path, archive: Path) -> None:
    """Raise PrepareError unless the unpacked source is the pinned one."""
    digest = strict.git_hash(tree)
    if digest != pin.llama_cpp_tree:
        raise PrepareError(
            f"The source archive {archive} has another llama.cpp than {pin.llama_cpp_commit[:8]}: "
            f"git hashes what a build reads to {digest}, expected {pin.llama_cpp_tree}. Set "
            "QAFLORA_SOURCE_ARCHIVE to the right file or unset it."
        )


def unsafe_reason(
    member: tarfile.TarInfo, name: PurePosixPath, n_file: int, n_bytes: int
) -> str | None:
    """Say what is wrong with a member of the archive, if anything is."""
    if not member.isreg():
        return "is neither a plain file nor a folder"
    if name.is_absolute() or ".." in name.parts or "\\" in member.name:
        return "leads out of the folder it is unpacked into"
    if n_file > MAX_TREE_FILES or n_bytes > MAX_TREE_BYTES:
        return f"is over the limit of {MAX_TREE_FILES} files or {MAX_TREE_BYTES} bytes"
    return None


def write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Write one member, with its own time so that a tree made again rebuilds nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = tar.extractfile(member)
    assert content is not None  # it is a plain file
    with content, path.open("xb") as file:
        shutil.copyfileobj(content, file)
    os.utime(path, (member.mtime, member.mtime))


def hash_tree(tree: Path) -> dict[str, str]:
    """Hash every file of a tree but the stamp: path -> sha256."""
    paths = sorted(path for path in tree.rglob("*") if path.is_file() and path.name != STAMP)
    return {path.relative_to(tree).as_posix(): sha256_file(path) for path in paths}


def is_prepared(tree: Path, key: str) -> bool:
    """Tell whether a finished tree is there; refuse one that was changed since."""
    try:
        stamp = json.loads((tree / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if stamp.get("key") != key:
        return False
    recorded, found = stamp["files"], hash_tree(tree)
    changed = sorted(
        name for name in recorded.keys() | found if recorded.get(name) != found.get(name)
    )
    if changed:
        raise PrepareError(
            f"The prepared source {tree} was changed after it was made: {len(changed)} files "
            f"differ from the stamp, the first is {changed[0]}. Expected it untouched. Put your "
            "change into a patch, then delete that folder and try again."
        )
    return True


def prepare(cache: Path | None = None, patches: Path = PATCHES) -> Path:
    """Give the folder of the patched source, making it if needed."""
    cache = cache_dir() if cache is None else cache
    pin, series = read_pin(patches), read_series(patches)
    key = tree_key(pin, series)
    if is_prepared(vendored := patches.parent / "llama.cpp", key):
        return vendored
    tree = cache / "sources" / f"llama.cpp-{pin.llama_cpp_commit[:8]}-{key[:16]}"
    if not is_prepared(tree, key):
        given = os.environ.get("QAFLORA_SOURCE_ARCHIVE")
        archive = Path(given) if given else find_archive(pin, cache)
        tree.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=tree.parent) as folder:
            fresh = Path(folder) / "llama.cpp"
            make_tree(pin, series, key, archive, fresh)
            publish(fresh, tree, key)
    return tree


def vendor() -> Path:
    """Copy the patched source to llama.cpp/ beside patches/, for a source archive."""
    tree, target = prepare(), PATCHES.parent / "llama.cpp"
    if tree != target:
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as folder:
            fresh = Path(folder) / "llama.cpp"
            shutil.copytree(tree, fresh)
            publish(fresh, target, tree_key(read_pin(), read_series()))
    return target


def make_tree(pin: Pin, series: list[Path], key: str, archive: Path, fresh: Path) -> None:
    """Unpack, patch and stamp a tree in a folder that nobody else uses."""
    fresh.mkdir()
    extract(find_root(archive), archive, fresh)
    check_tree(pin, fresh, archive)
    for patch in series:
        strict.apply(patch, fresh)
    stamp = {"key": key, "patches": [patch.name for patch in series], "files": hash_tree(fresh)}
    write_text_atomic(fresh / STAMP, json.dumps(stamp, indent=0, sort_keys=True) + "\n")


def publish(fresh: Path, tree: Path, key: str) -> None:
    """Move a finished tree to its name; another process may have been first."""
    if tree.exists() and not is_prepared(tree, key):
        os.replace(tree, fresh.with_name("unfinished"))  # goes with the temporary folder
    try:
        os.replace(fresh, tree)
    except OSError:
        if not is_prepared(tree, key):
            raise


def main(arguments: list[str]) -> int:
    """Print what was asked for; on failure say why on stderr and return 1."""
    wanted = {
        (): prepare,
        ("--archive",): lambda: find_archive(read_pin(), cache_dir()),
        ("--vendor",): vendor,
    }
    if tuple(arguments) not in wanted:
        print("usage: python patches/prepare.py [--archive | --vendor]", file=sys.stderr)
        return 2
    try:
        print(wanted[tuple(arguments)]())
    except (PrepareError, QafloraError) as error:
        print(f"patches/prepare.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
