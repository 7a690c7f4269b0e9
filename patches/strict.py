"""Apply one patch exactly, or not at all.

`git apply` does the work. It may skip a patch in silence (inside another repository), and it
moves a hunk that does not fit its line numbers, so the patch is read here too: before and after,
every hunk's lines must stand at exactly the place that the hunk names.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class PrepareError(Exception):
    """The patched source cannot be made; the message says why and what to do."""


@dataclass
class Hunk:
    """One block of a patch, as the lines before and after; line numbers count from 1."""

    old_start: int
    new_start: int
    old: list[bytes] = field(default_factory=list)
    new: list[bytes] = field(default_factory=list)


def read_patch(patch: Path) -> dict[str, list[Hunk]]:
    """Read a patch that edits files in place: path -> hunks.

    Raises PrepareError for anything else (new, deleted, renamed or binary files).
    """
    files: dict[str, list[Hunk]] = {}
    lines = iter(patch.read_bytes().splitlines(keepends=True))
    name = None
    for line in lines:
        if line.startswith(b"diff --git "):
            name = None
        elif line.startswith(
            (b"rename ", b"new file", b"deleted file", b"GIT binary", b"old mode")
        ):
            raise _bad_patch(patch, f"has {line.decode().strip()!r}; expected edits in place only")
        elif line.startswith(b"+++ "):
            name = _target(patch, line)
            files[name] = []
        elif match := HUNK.match(line):
            if name is None:
                raise _bad_patch(patch, "has a hunk without a file name before it")
            files[name].append(_read_hunk(patch, match, lines))
    if not files or not all(files.values()):
        raise _bad_patch(patch, "changes nothing, or names a file without a hunk")
    return files


def _target(patch: Path, line: bytes) -> str:
    target = line[4:].split(b"\t")[0].strip().decode()
    path = PurePosixPath(target.removeprefix("b/"))
    if not target.startswith("b/") or ".." in path.parts or path.is_absolute():
        raise _bad_patch(patch, f"names {target!r}; expected b/ and a path inside llama.cpp")
    return str(path)


def _read_hunk(patch: Path, match: re.Match[bytes], lines: Iterator[bytes]) -> Hunk:
    n_old, n_new = (int(match[group] or 1) for group in (2, 4))
    hunk = Hunk(int(match[1]), int(match[3]))
    while len(hunk.old) < n_old or len(hunk.new) < n_new:
        line = next(lines, b"")
        if line[:1] not in (b" ", b"+", b"-"):
            raise _bad_patch(patch, f"ends inside the hunk {match[0].decode()!r}")
        if line[:1] != b"+":
            hunk.old.append(line[1:])
        if line[:1] != b"-":
            hunk.new.append(line[1:])
    return hunk


def _bad_patch(patch: Path, problem: str) -> PrepareError:
    return PrepareError(f"The patch {patch} {problem}. Make it again with 'git diff'.")


def apply(patch: Path, tree: Path) -> None:
    """Apply a patch to a tree. Raises PrepareError unless every hunk lands where it says."""
    files = read_patch(patch)
    before = {name: _read_lines(patch, tree, name) for name in files}
    for name, hunks in files.items():
        for hunk in hunks:
            _check_lines(patch, name, before[name], hunk.old_start, hunk.old)
    _git_apply(patch, tree)
    for name, hunks in files.items():
        after = _read_lines(patch, tree, name)
        for hunk in hunks:
            _check_lines(patch, name, after, hunk.new_start, hunk.new)
        n_added = sum(len(hunk.new) - len(hunk.old) for hunk in hunks)
        if len(after) != len(before[name]) + n_added:
            raise PrepareError(
                f"Applying {patch} to {name} gave {len(after)} lines, expected "
                f"{len(before[name]) + n_added}. Report this together with 'git --version'."
            )
    _git_apply(patch, tree, "--reverse", "--check")


def _read_lines(patch: Path, tree: Path, name: str) -> list[bytes]:
    try:
        return (tree / name).read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise PrepareError(
            f"The patch {patch} edits {name}, which llama.cpp does not have at this pin "
            f"({error.strerror}). Make the patch again on the pinned source."
        ) from error


def _check_lines(
    patch: Path, name: str, lines: list[bytes], start: int, wanted: list[bytes]
) -> None:
    for number, line in enumerate(wanted, start):
        found = lines[number - 1] if number <= len(lines) else b"(end of file)"
        if found != line:
            raise PrepareError(
                f"The patch {patch} does not fit {name}: line {number} is {_show(found)}, "
                f"expected {_show(line)}. A hunk that fits elsewhere or nearly is refused; make "
                "the patch again on the pinned source."
            )


def _show(line: bytes) -> str:
    return repr(line.decode("utf-8", "replace").strip()[:80])


def git_environment(tree: Path) -> dict[str, str]:
    """For git in `tree`: a repository above, or a user's settings, must not change what it does."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return env | {
        "GIT_CEILING_DIRECTORIES": str(tree.resolve().parent),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
    }


def git_hash(tree: Path) -> str:
    """Hash a folder as git hashes the tree of a commit; nothing is left in it."""
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", f"--git-dir={folder}", f"--work-tree={tree.resolve()}"]
        settings = ["-c", "core.autocrlf=false", "-c", "core.fileMode=false"]
        for words in (["init", "--quiet"], [*settings, "add", "--all", "--force"], ["write-tree"]):
            done = subprocess.run(
                [*git, *words],
                cwd=tree,
                env=git_environment(tree),
                capture_output=True,
                text=True,
                check=True,
            )
    return done.stdout.strip()


def _git_apply(patch: Path, tree: Path, *options: str) -> None:
    tree = tree.resolve()
    command = ["git", "apply", "--whitespace=nowarn", *options, str(patch.resolve())]
    try:
        result = subprocess.run(
            command, cwd=tree, env=git_environment(tree), capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise PrepareError(
            "Cannot apply the patches: the command 'git' was not found. Install git and try again."
        ) from error
    if result.returncode != 0:
        raise PrepareError(
            f"'{' '.join(command)}' failed in {tree} with exit code {result.returncode}: "
            f"{result.stderr.strip()}. Make the patch again on the pinned source."
        )
