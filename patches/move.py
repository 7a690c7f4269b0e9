"""Carry the patches to another llama.cpp, and say what upstream changed under them.

    python patches/move.py SOURCE              try it: nothing in the checkout changes
    python patches/move.py SOURCE --tree HASH  and refuse any other source
    python patches/move.py VERSION --write     and write the pin and the patches

SOURCE is a release of the binding, whose source archive is fetched (or named with --archive); a
.tar.gz that has llama.cpp in any folder; or a git repository of llama.cpp, of which HEAD is taken.
It is known by the hash that git gives its tree, however it came. In build/move-NAME, a git
repository, the patches are commits on the pinned source and are merged into the new one; what git
cannot merge is resolved there, and the same command goes on. Needs what prepare.py needs, and a C++
compiler.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

import prepare
import strict
from prepare import PATCHES, Pin, sha256_file
from strict import PrepareError

from qaflora_edge.errors import QafloraError
from qaflora_edge.files import cache_dir, write_text_atomic

CHECKOUT = PATCHES.parent
# Beside what a build reads, what comments and conversion follow.
READ = (*prepare.WANTED, "conversion", "convert_lora_to_gguf.py")
INCLUDES = ("src", "include", "ggml/include", "ggml/src")
COMMIT = re.compile(r"[0-9a-f]{40}")
FILE_NAME = re.compile(r"[\w-]+\.(?:cpp|h|c|cu|py)\b")
SETTINGS = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "core.autocrlf=false"]
SETTINGS += ["-c", "core.editor=true", "-c", "merge.conflictStyle=diff3"]


def git(folder: Path, *words: str, may_fail: bool = False) -> str:
    """What git prints in the repository. Raises PrepareError where it fails."""
    done = subprocess.run(
        ["git", *SETTINGS, *words],
        cwd=folder,
        env=strict.git_environment(folder),
        capture_output=True,
    )
    if done.returncode and not may_fail:
        said = done.stderr.decode("utf-8", "replace").strip()
        raise PrepareError(
            f"'git {' '.join(words)}' failed in {folder} with exit code {done.returncode}: {said}. "
            "Delete that folder to begin anew."
        )
    return done.stdout.decode("utf-8", "replace")


@dataclass(frozen=True)
class Source:
    """The llama.cpp that the patches are carried to.

    name     of the folder build/move-NAME
    archive  a .tar.gz that has it in the folder `root`
    commit   of llama.cpp; "" where the archive does not say it
    pin      of a release of the binding: only that can be written
    """

    name: str
    archive: Path
    root: PurePosixPath
    commit: str
    pin: Pin | None = None


def find_source(text: str, archive: Path | None, old: Pin, build: Path) -> Source:
    """Find what a SOURCE names, and fetch the archive of a release. Raises PrepareError."""
    place = Path(text)
    build.mkdir(exist_ok=True)
    if archive is None and place.is_dir():
        return of_repository(place, build)
    if archive is None and place.is_file():
        return of_archive(place)
    release = replace(old, version=text)
    archive = archive or build / release.archive_name
    if not archive.is_file():
        prepare.fetch_release(release, build)
    pin = new_pin(old, text, archive)
    return Source(text, archive, pin.root, pin.llama_cpp_commit, pin)


def of_repository(folder: Path, build: Path) -> Source:
    """Pack HEAD of a git repository of llama.cpp."""
    commit = git(folder, "rev-parse", "HEAD").strip()
    archive = build / f"llama.cpp-{commit[:8]}.tar.gz"
    output = f"--output={archive.resolve()}"
    git(folder, "archive", "--format=tar.gz", "--prefix=llama.cpp/", output, "HEAD")
    return replace(of_archive(archive), commit=commit)


def of_archive(archive: Path) -> Source:
    """Find the one llama.cpp in an archive; git and releases note its commit in the head."""
    root = prepare.find_root(archive)
    with tarfile.open(archive, "r:gz") as tar:
        commit = tar.pax_headers.get("comment", "")
    name = archive.name.removesuffix(".tar.gz")
    return Source(name, archive, root, commit if COMMIT.fullmatch(commit) else "")


def new_pin(old: Pin, version: str, archive: Path) -> Pin:
    """The pin of an archive: the commit is what its repository says of the submodule."""
    name = replace(old, version=version).root.parts[0]
    member = f"{name}/.git/modules/{old.llama_cpp_path}/HEAD"
    with tarfile.open(archive, "r:gz") as tar:
        try:
            file = tar.extractfile(member)
            commit = file.read(100).decode("ascii", "replace").strip() if file else ""
        except KeyError:
            commit = "no such file"
    if not COMMIT.fullmatch(commit):
        raise PrepareError(
            f"The commit of llama.cpp is not in the archive {archive}: {member} is "
            f"{commit!r}, expected 40 hexadecimal digits. "
            f"Check that it is the source archive of {old.package} {version}."
        )
    pin = replace(
        old, version=version, archive_sha256=sha256_file(archive), llama_cpp_commit=commit
    )
    with tempfile.TemporaryDirectory() as folder:
        prepare.extract(pin.root, archive, Path(folder))
        return replace(pin, llama_cpp_tree=strict.git_hash(Path(folder)))


def begin(folder: Path, old: Pin, new: Source) -> None:
    """Make the repository: tags `pinned`, `patched` (each patch a commit), `new`; merge."""
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet")
    prepare.extract(old.root, prepare.find_archive(old, cache_dir()), folder, READ)
    commit(folder, f"{old.package} {old.version}", "pinned")
    for patch in prepare.read_series():
        strict.apply(patch, folder)
        commit(folder, patch.name, "patched")
    git(folder, "checkout", "--quiet", "--detach", "pinned")
    git(folder, "rm", "-r", "--quiet", ".")
    prepare.extract(new.root, new.archive, folder, READ)
    commit(folder, new.name, "new")
    git(folder, "cherry-pick", "pinned..patched", may_fail=True)


def commit(folder: Path, subject: str, tag: str) -> None:
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", subject)
    git(folder, "tag", "--force", tag)


def check_merged(folder: Path) -> None:
    """Raise PrepareError while a patch waits for somebody to resolve it."""
    waiting = git(folder, "rev-parse", "--verify", "--quiet", "CHERRY_PICK_HEAD", may_fail=True)
    if not waiting:
        return
    name = git(folder, "log", "-1", "--format=%s", "CHERRY_PICK_HEAD").strip()
    files = git(folder, "diff", "--name-only", "--diff-filter=U").split()
    where = f"conflicts in {', '.join(files)}" if files else "changes nothing any more"
    raise PrepareError(
        f"{name} {where}. Resolve it in {folder} (git add FILE; git cherry-pick --continue, "
        "or --skip where upstream has what it did), then run this command again."
    )


def diffs(folder: Path, begin: str, end: str) -> dict[str, str]:
    """What each patch between two commits changes: its name -> the diff."""
    commits = git(folder, "log", "--reverse", "--format=%H %s", f"{begin}..{end}").splitlines()
    pairs = [line.split(" ", 1) for line in commits]
    options = ["--abbrev=7", "--no-renames"]
    return {name: git(folder, "diff", *options, f"{digest}^", digest) for digest, name in pairs}


def how_it_moved(before: str, after: str) -> str:
    """Whether a diff is the same, the same on other lines, or another."""

    def without(line: str, diff: str) -> str:
        return re.sub(rf"^{line}.*\n", "", diff, flags=re.MULTILINE)

    before, after = without("index ", before), without("index ", after)
    if before == after:
        return "fits as it is"
    if without("@@ ", before) == without("@@ ", after):
        return "the same on other lines"
    return "merged with other lines around it or in it: read it"


def changed_files(folder: Path) -> dict[str, str]:
    """What upstream changed: path -> '+added -deleted'."""
    table = git(folder, "diff", "--numstat", "--no-renames", "pinned", "new").splitlines()
    rows = [line.split("\t") for line in table]
    return {path: f"+{added} -{deleted}" for added, deleted, path in rows}


def comments(old: Pin) -> list[tuple[str, str]]:
    """Where our code names the pinned commit: place, and the line from there on."""
    short, found = old.llama_cpp_commit[:8], []
    for part in ("patches/src", "qaflora_edge", "tests"):
        for path in sorted((CHECKOUT / part).rglob("*.*")):
            if path.suffix not in (".py", ".cpp", ".h"):
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if short in line:
                    place = f"{path.relative_to(CHECKOUT)}:{number}"
                    found.append((place, line.partition(short)[2].strip(" ,:.")))
    return found


def report_upstream(folder: Path, old: Pin, patches: dict[str, str]) -> None:
    """Print which files that we patch or name in comments changed upstream."""
    changed = changed_files(folder)
    print(f"Upstream changed {len(changed)} of the files that we build from or follow.")
    for name, diff in patches.items():
        for path in re.findall(r"^\+\+\+ b/(.*)", diff, re.MULTILINE):
            print(f"  {name} edits {path}: {changed.get(path, 'not changed')}")
    for place, said in comments(old):
        named = set(FILE_NAME.findall(said))
        touched = [path for path in changed if Path(path).name in named]
        if touched or not named:
            print(f"  {place} names {said or 'the commit'}: {', '.join(touched) or 'look it up'}")


def compile_sources(folder: Path) -> bool:
    """Whether our sources compile with the new headers; the compiler says on stderr why not."""
    own = PATCHES / "src"
    words = [os.environ.get("CXX", "c++"), "-x", "c++", "-std=c++17", "-fsyntax-only", "-Wall"]
    words += [f"-I{own}", *(f"-I{folder / part}" for part in INCLUDES)]
    words += ["-DLLAMA_SHARED", "-DGGML_SHARED", '-DQAFLORA_BUILD_INFO="x"', "-"]
    # Kernels of an instruction set include nothing of llama.cpp.
    paths = [path for path in sorted(own.glob("*.cpp")) if "QAFLORA_ISA" not in path.read_text()]
    text = "".join(f'#include "{path.name}"\n' for path in paths)
    return subprocess.run(words, input=text, text=True).returncode == 0


def missing_names(old: Pin, new: Pin, archive: Path) -> list[str]:
    """Names of the binding that our code uses and the new binding lacks."""

    def binding(pin: Pin, path: Path) -> str:
        member = f"{pin.root.parts[0]}/llama_cpp/llama_cpp.py"
        with tarfile.open(path, "r:gz") as tar:
            file = tar.extractfile(member)
            return file.read().decode("utf-8") if file else ""

    sources = (CHECKOUT / "qaflora_edge").rglob("*.py")
    used = re.findall(r"\bllama_\w+", "".join(path.read_text(encoding="utf-8") for path in sources))
    before = binding(old, prepare.find_archive(old, cache_dir()))
    after = set(re.findall(r"\w+", binding(new, archive)))
    return sorted(set(used) & set(re.findall(r"\w+", before)) - after)


def write(old: Pin, new: Pin, patches: dict[str, str]) -> None:
    """Write the pin, the version that pyproject.toml asks for, and the patches."""
    if missing := [path.name for path in prepare.read_series() if path.name not in patches]:
        raise PrepareError(
            f"{', '.join(missing)} changes nothing on the new source. Delete it, take its line "
            f"out of {PATCHES / 'series'}, and run this command again."
        )
    for name, diff in patches.items():
        header = (PATCHES / name).read_text(encoding="utf-8").partition("diff --git")[0]
        header = header.replace(old.llama_cpp_commit, new.llama_cpp_commit)
        write_text_atomic(PATCHES / name, header + diff)
    edit(
        PATCHES / "UPSTREAM",
        zip(asdict(old).values(), asdict(new).values(), strict=True),
    )
    requirement = f"{old.package}=={old.version}", f"{new.package}=={new.version}"
    edit(CHECKOUT / "pyproject.toml", [requirement])


def edit(path: Path, words: Iterable[tuple[str, str]]) -> None:
    text = path.read_text(encoding="utf-8")
    for before, after in words:
        text = text.replace(f'"{before}"', f'"{after}"')
    write_text_atomic(path, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a release of the binding, a .tar.gz or a git repository")
    parser.add_argument("--archive", type=Path, help="the release's source archive; else fetched")
    parser.add_argument("--tree", help="refuse a source whose tree git does not hash to this")
    parser.add_argument("--write", action="store_true", help="write the pin and the patches")
    options = parser.parse_args()
    try:
        return move(options.source, options.archive, options.tree, options.write)
    except (PrepareError, QafloraError) as error:
        print(f"patches/move.py: {error}", file=sys.stderr)
        return 1


def move(source: str, archive: Path | None, tree: str | None, is_written: bool) -> int:
    """Merge the patches, print what was found, and write if asked; 1 where something is left."""
    old = prepare.read_pin()
    build = CHECKOUT / "build"
    new = find_source(source, archive, old, build)
    if is_written and new.pin is None:
        raise PrepareError(
            f"The pin names a release of {old.package}, and {source} is none: nothing is written. "
            "Leave --write out, or give the release that has this llama.cpp."
        )
    folder = build / f"move-{new.name}"
    if not folder.exists():
        begin(folder, old, new)
    check_tree(folder, tree)
    check_merged(folder)
    patches = diffs(folder, "new", "HEAD")
    commit = new.commit[:8] or "an unknown commit"
    print(f"{old.package} {old.version} to {new.name}, llama.cpp ", end="")
    print(f"{old.llama_cpp_commit[:8]} to {commit}, in {folder}")
    for name, diff in diffs(folder, "pinned", "patched").items():
        print(f"{name}: {how_it_moved(diff, patches[name]) if name in patches else 'not needed'}")
    report_upstream(folder, old, patches)
    missing = missing_names(old, new.pin, new.archive) if new.pin else []
    if missing:
        print(f"The binding lacks {', '.join(missing)}")
    elif new.pin:
        print("The binding has all names that we use.")
    compiles = compile_sources(folder)
    verb = "compile" if compiles else "do not compile"
    print(f"Our sources {verb} with its headers.", flush=True)
    if is_written and new.pin:
        write(old, new.pin, patches)
        print("Written: the pin, pyproject.toml and the patches. Read them, then run make test.")
    return 0 if compiles and not missing else 1


def check_tree(folder: Path, asked: str | None) -> None:
    """Say which tree the new source has. Raises PrepareError where another was asked for."""
    tree = git(folder, "rev-parse", "new^{tree}").strip()
    if asked not in (None, tree):
        raise PrepareError(
            f"The source has the tree {tree}, expected {asked}. Give the source that was asked "
            f"for, and delete {folder}."
        )
    print(f"The tree of what is read: {tree}")


if __name__ == "__main__":
    sys.exit(main())
