"""The pin, and the tool that makes the patched source: strict, atomic, never fooled."""

import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import filelock
import platformdirs
import pytest
from patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
PIN = tomllib.loads((ROOT / "patches" / "UPSTREAM").read_text())
TEXT = "".join(f"line {number}\n" for number in range(1, 31))
PATCH = """\
Subject: Call the hook

Why: a test

diff --git a/src/a.cpp b/src/a.cpp
--- a/src/a.cpp
+++ b/src/a.cpp
@@ -9,5 +9,6 @@ somewhere
 line 9
 line 10
 line 11
+hook();
 line 12
 line 13
"""


class Project:
    """A small checkout: its own patches, archive and cache, and the real tool."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.patches = folder / "patches"
        self.cache = folder / "cache"
        self.archive = folder / "up_stream-1.0.tar.gz"
        self.patches.mkdir(parents=True)
        for name in ("prepare.py", "strict.py"):
            (self.patches / name).write_bytes((ROOT / "patches" / name).read_bytes())
        (folder / "qaflora_edge" / "formats").mkdir(parents=True)
        for part in ("qaflora_edge", "qaflora_edge/formats"):
            for source in (ROOT / part).glob("*.py"):
                (folder / part / source.name).write_bytes(source.read_bytes())
        self.write_archive({"CMakeLists.txt": "project(x)\n", "src/a.cpp": TEXT})
        self.write_patch(PATCH)

    def write_archive(self, members: dict[str, str]) -> None:
        with tarfile.open(self.archive, "w:gz") as tar:
            for name, text in {"include/llama.h": "", **members}.items():
                member = tarfile.TarInfo(f"up_stream-1.0/vendor/llama.cpp/{name}")
                member.size, member.mtime = len(text), 1_000_000_000
                tar.addfile(member, io.BytesIO(text.encode()))
        self.write_pin(sha256(self.archive.read_bytes()).hexdigest())

    @property
    def needed(self) -> Path:
        """With -S and this folder alone, the tool has what a build requires and nothing else."""
        folder = self.folder / "needed"
        if not folder.is_dir():
            folder.mkdir()
            for module in (filelock, platformdirs):
                source = Path(module.__file__).parent
                (folder / source.name).symlink_to(source, target_is_directory=True)
        return folder

    def git_tree(self) -> str:
        """Hash what the archive has of llama.cpp with git itself."""
        with tempfile.TemporaryDirectory() as name, tarfile.open(self.archive) as tar:
            tar.extractall(name, filter="data")
            (folder,) = Path(name).glob("up_stream-*/vendor/llama.cpp")
            for words in ("init -q", "add -A -f", "write-tree"):
                tree = subprocess.check_output(["git", *words.split()], cwd=folder, text=True)
        return tree.strip()

    def write_pin(self, archive_sha256: str, tree: str = "") -> None:
        (self.patches / "UPSTREAM").write_text(
            'package = "up-stream"\nversion = "1.0"\n'
            f'archive_sha256 = "{archive_sha256}"\n'
            'llama_cpp_path = "vendor/llama.cpp"\nllama_cpp_commit = "0123456789ab"\n'
            f'llama_cpp_tree = "{tree or self.git_tree()}"\n'
        )

    def write_patch(self, text: str) -> None:
        (self.patches / "0001-hook.patch").write_text(text)
        (self.patches / "series").write_text("# applied in this order\n0001-hook.patch\n")

    def run(
        self, *words: str, script: str = "prepare.py", **env: str
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", str(self.patches / script), *words]
        env = {
            "PYTHONPATH": str(self.needed),
            "PATH": os.environ["PATH"],
            "QAFLORA_CACHE": str(self.cache),
            "QAFLORA_SOURCE_ARCHIVE": str(self.archive),
        } | env
        return subprocess.run(
            command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=PATIENCE_S
        )

    def prepare(self, **env: str) -> Path:
        result = self.run(**env)
        assert result.returncode == 0, result.stderr
        return Path(result.stdout.strip())

    def failure(self, **env: str) -> str:
        result = self.run(**env)
        assert result.returncode == 1, result.stderr
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        left = list((self.cache / "sources").glob("llama.cpp-*")) if self.cache.exists() else []
        assert left == []
        return result.stderr.strip()


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path / "project")


def test_pin_is_the_binding_that_pyproject_asks_for_and_that_is_installed() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = [
        text for text in pyproject["project"]["dependencies"] if text.startswith("llama-cpp-python")
    ]
    assert requirements == [f"{PIN['package']}=={PIN['version']}"]
    assert version(PIN["package"]) == PIN["version"]


def test_pin_stands_in_no_other_file_than_upstream_and_the_patch_headers() -> None:
    files = [ROOT / "CMakeLists.txt", ROOT / "Makefile", *(ROOT / "patches").glob("*.py")]
    for path in files:
        for value in (PIN["version"], PIN["llama_cpp_commit"][:8], PIN["archive_sha256"][:8]):
            assert value not in path.read_text(), f"{path} repeats {value}"


def test_every_patch_is_in_the_series_and_has_a_complete_header() -> None:
    series = (ROOT / "patches" / "series").read_text().split()
    patches = sorted((ROOT / "patches").glob("*.patch"))
    assert series == [patch.name for patch in patches]
    for patch in patches:
        header = patch.read_text().partition("diff --git")[0]
        for name in ("Why", "Forwarded", "Touches", "Proof", "Remove-when", "Last-checked"):
            assert re.search(rf"^{name}: \S", header, re.MULTILINE), f"{patch.name} lacks {name}"
        assert PIN["llama_cpp_commit"] in header


def test_the_call_sites_of_our_hooks_only_add_lines() -> None:
    patch = ROOT / "patches" / "0001-call-qaflora-hooks.patch"
    body = patch.read_text().partition("diff --git")[2]
    assert re.findall(r"^-(?!-- a/).*", body, re.MULTILINE) == []


SOURCES = sorted((ROOT / "patches" / "src").iterdir())


def table_of_sources() -> list[str]:
    """The files of src/ without their endings, top to bottom as README has them."""
    readme = (ROOT / "patches" / "README.md").read_text(encoding="utf-8")
    table = readme.split("## The files of `src/`")[1].split("\n\n")[2]
    rows = [line.split("|")[1] for line in table.splitlines()]
    return [name for row in rows for name in re.findall(r"`([a-z0-9-]+)`", row)]


def test_every_source_stands_in_the_table_once() -> None:
    assert sorted(table_of_sources()) == sorted({path.stem for path in SOURCES})


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_source_includes_only_what_stands_above_it(path) -> None:
    """A header and the source of its name are one; so no circle is possible."""
    order = table_of_sources()
    text = path.read_text(encoding="utf-8")
    included = set(re.findall(r'#include "(qaflora[a-z0-9-]*)\.h"', text))
    assert included <= {*order[: order.index(path.stem) + 1]}
    assert len(text.splitlines()) <= 400


def test_prepare_gives_a_patched_tree_and_keeps_it(project) -> None:
    tree = project.prepare()
    lines = (tree / "src" / "a.cpp").read_text().splitlines()
    assert lines[11] == "hook();"
    assert "\n".join(lines[:11] + lines[12:]) + "\n" == TEXT
    assert (tree / "CMakeLists.txt").stat().st_mtime == 1_000_000_000
    before = (tree / "src" / "a.cpp").stat().st_mtime_ns
    assert project.prepare() == tree
    assert (tree / "src" / "a.cpp").stat().st_mtime_ns == before
    assert [path.name for path in tree.parent.iterdir()] == [tree.name]


def test_a_changed_patch_gets_a_tree_of_its_own(project) -> None:
    first = project.prepare()
    project.write_patch(PATCH.replace("hook();", "other_hook();"))
    second = project.prepare()
    assert first != second
    assert "other_hook();" in (second / "src" / "a.cpp").read_text()
    assert "other_hook();" not in (first / "src" / "a.cpp").read_text()


def test_a_source_archive_holds_the_patched_source(project) -> None:
    """Neither git nor the release is needed there; a changed patch needs both."""
    made = project.run("--vendor")
    assert (made.stdout.strip(), made.stderr) == (str(project.folder / "llama.cpp"), "")
    nothing = {"QAFLORA_SOURCE_ARCHIVE": "/nowhere", "QAFLORA_CACHE": "/nowhere", "PATH": ""}
    tree = project.prepare(**nothing)
    assert tree == project.folder / "llama.cpp"
    assert "hook();" in (tree / "src" / "a.cpp").read_text()
    project.write_patch(PATCH.replace("hook();", "other_hook();"))
    assert project.prepare() != tree


@pytest.mark.slow
@pytest.mark.parametrize("change", ["edit", "remove", "add"])
def test_a_tree_that_was_changed_by_hand_is_refused(project, change) -> None:
    tree = project.prepare()
    path = tree / "src" / ("new.cpp" if change == "add" else "a.cpp")
    if change == "remove":
        path.unlink()
    else:
        path.write_text("changed\n")
    result = project.run()
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.strip() == (
        f"patches/prepare.py: The prepared source {tree} was changed after it was made: 1 files "
        f"differ from the stamp, the first is src/{path.name}. Expected it untouched. Put your "
        "change into a patch, then delete that folder and try again."
    )


def test_a_hunk_that_fits_elsewhere_is_refused(project) -> None:
    project.write_patch(PATCH.replace("@@ -9,5 +9,6 @@", "@@ -7,5 +7,6 @@"))
    assert project.failure() == (
        f"patches/prepare.py: The patch {project.patches / '0001-hook.patch'} does not fit "
        "src/a.cpp: line 7 is 'line 7', expected 'line 9'. A hunk that fits elsewhere or nearly "
        "is refused; make the patch again on the pinned source."
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("line 10\n", "line ten\n", "line 10 is 'line 10', expected 'line ten'"),
        ("src/a.cpp", "src/none.cpp", "edits src/none.cpp, which llama.cpp does not have"),
        ("b/src/a.cpp\n@@", "b/../a.cpp\n@@", "names 'b/../a.cpp'; expected b/ and a path"),
        (" line 13\n", "", "ends inside the hunk"),
        ("--- a/", "new file mode 100644\n--- a/", "expected edits in place only"),
        (PATCH.partition("@@")[1] + PATCH.partition("@@")[2], "", "names a file without a hunk"),
        (PATCH, "only words\n", "changes nothing"),
    ],
)
def test_other_patches_that_do_not_fit_are_refused(project, old, new, message) -> None:
    assert old in PATCH
    project.write_patch(PATCH.replace(old, new))
    assert message in project.failure()


def test_another_source_is_refused_by_its_tree(project) -> None:
    project.write_pin("0" * 64, "0" * 40)
    assert project.failure() == (
        f"patches/prepare.py: The source archive {project.archive} has another llama.cpp than "
        f"01234567: git hashes what a build reads to {project.git_tree()}, expected {'0' * 40}. "
        "Set QAFLORA_SOURCE_ARCHIVE to the right file or unset it."
    )


def test_any_archive_with_the_pinned_tree_is_taken(project) -> None:
    project.write_pin("0" * 64)
    assert (project.prepare() / "src" / "a.cpp").is_file()


@pytest.mark.parametrize("attack", ["climb", "link", "device"])
def test_an_archive_that_leads_out_is_refused(project, attack) -> None:
    root = "up_stream-1.0/vendor/llama.cpp"
    with tarfile.open(project.archive, "w:gz") as tar:
        name = f"{root}/src/../../../../escaped" if attack == "climb" else f"{root}/src/a.cpp"
        member = tarfile.TarInfo(name)
        if attack == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        elif attack == "device":
            member.type = tarfile.CHRTYPE
        tar.addfile(member, io.BytesIO(b""))
        tar.addfile(tarfile.TarInfo(f"{root}/include/llama.h"), io.BytesIO(b""))
    project.write_pin(sha256(project.archive.read_bytes()).hexdigest(), "0" * 40)
    message = project.failure()
    assert "which leads out of" in message or "is neither a plain file nor a folder" in message
    assert not list(project.folder.rglob("escaped"))


def test_an_archive_without_llama_cpp_is_refused(project) -> None:
    project.write_archive({"src/a.cpp": TEXT})
    assert "has no up_stream-1.0/vendor/llama.cpp/CMakeLists.txt" in project.failure()
