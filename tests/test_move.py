"""Moving the pin: patches are merged into another release, and what is left to do is said."""

import hashlib
import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from test_patches import PATCH, ROOT, TEXT, Project

pytestmark = pytest.mark.slow

NEW_COMMIT = "89ab" * 10
HEADER = "int upstream(int);\n"
FOUND_LATER = TEXT.replace("line 3\n", "line 3\nline 3 and a half\n")


class Move(Project):
    """A checkout that has what `move.py` reads, and the archive of the next release."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        shutil.copy(ROOT / "patches" / "move.py", self.patches)
        (self.patches / "src").mkdir()
        (self.patches / "src" / "own.cpp").write_text(
            '#include "up.h"\n// llama.cpp 01234567, a.cpp main\n'
            "int own() { return upstream(1); }\n"
        )
        (folder / "tests").mkdir()
        (folder / "qaflora_edge" / "own.py").write_text("llama_thing()\n")
        (folder / "pyproject.toml").write_text('dependencies = ["up-stream==1.0"]\n')
        self.write_patch(PATCH.replace("Why: a test", "Last-checked: 0123456789ab"))
        write_release(self.archive, "1.0", TEXT)
        self.write_pin(sha256(self.archive))
        self.next = folder / "next.tar.gz"
        self.release()

    def release(self, text: str = FOUND_LATER, **more: str) -> None:
        write_release(self.next, "1.1", text, **more)

    def move(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self.run("1.1", "--archive", str(self.next), *options, script="move.py")

    @property
    def tree(self) -> Path:
        return self.folder / "build" / "move-1.1"

    @property
    def files(self) -> dict[str, str]:
        paths = [*self.patches.glob("*.patch"), self.patches / "UPSTREAM"]
        paths.append(self.folder / "pyproject.toml")
        return {path.name: path.read_text() for path in paths}


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x", "-c", "core.editor=true"]
    command = ["git", *identity, *words]
    return subprocess.check_output(command, cwd=folder, text=True).strip()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_release(
    path: Path,
    version: str,
    text: str,
    header: str = HEADER,
    binding: str = "def llama_thing(): ...",
) -> None:
    members = {"CMakeLists.txt": "project(x)\n", "src/a.cpp": text, "include/up.h": header}
    members["include/llama.h"] = ""
    root = f"up_stream-{version}"
    files = {f"{root}/vendor/llama.cpp/{name}": text for name, text in members.items()}
    files[f"{root}/llama_cpp/llama_cpp.py"] = binding
    files[f"{root}/.git/modules/vendor/llama.cpp/HEAD"] = f"{NEW_COMMIT}\n"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))


@pytest.fixture
def project(tmp_path) -> Move:
    return Move(tmp_path / "project")


def test_a_hunk_on_other_lines_is_moved_and_nothing_is_written_unless_asked(project) -> None:
    before = project.files
    done = project.move()
    assert done.returncode == 0, done.stderr
    tree = git(project.tree, "rev-parse", "new^{tree}")
    assert done.stdout.splitlines() == [
        f"The tree of what is read: {tree}",
        f"up-stream 1.0 to 1.1, llama.cpp 01234567 to 89ab89ab, in {project.tree}",
        "0001-hook.patch: the same on other lines",
        "Upstream changed 1 of the files that we build from or follow.",
        "  0001-hook.patch edits src/a.cpp: +1 -0",
        "  patches/src/own.cpp:2 names a.cpp main: src/a.cpp",
        "The binding has all names that we use.",
        "Our sources compile with its headers.",
    ]
    assert project.files == before


def test_what_is_written_is_what_prepare_takes(project) -> None:
    assert project.move("--write").returncode == 0
    tree = project.prepare(QAFLORA_SOURCE_ARCHIVE=str(project.next))
    patched = FOUND_LATER.replace("line 11\n", "line 11\nhook();\n")
    assert (tree / "src" / "a.cpp").read_text() == patched
    files = project.files
    assert files["pyproject.toml"] == 'dependencies = ["up-stream==1.1"]\n'
    assert f'version = "1.1"\narchive_sha256 = "{sha256(project.next)}"' in files["UPSTREAM"]
    assert f"Last-checked: {NEW_COMMIT}\n" in files["0001-hook.patch"]


def test_a_conflict_is_resolved_in_the_repository_and_the_command_goes_on(project) -> None:
    project.release(TEXT.replace("line 11\n", "line eleven\n"))
    before = project.files
    done = project.move("--write")
    assert done.returncode == 1
    assert done.stderr == (
        f"patches/move.py: 0001-hook.patch conflicts in src/a.cpp. Resolve it in {project.tree} "
        "(git add FILE; git cherry-pick --continue, or --skip where upstream has what it did), "
        "then run this command again.\n"
    )
    assert project.move().stderr == done.stderr
    assert project.files == before
    resolved = TEXT.replace("line 11\n", "line eleven\nhook();\n")
    (project.tree / "src" / "a.cpp").write_text(resolved)
    git(project.tree, "add", "src/a.cpp")
    git(project.tree, "cherry-pick", "--continue")
    done = project.move("--write")
    assert done.returncode == 0, done.stderr
    assert "0001-hook.patch: merged with other lines around it or in it: read it" in done.stdout
    tree = project.prepare(QAFLORA_SOURCE_ARCHIVE=str(project.next))
    assert (tree / "src" / "a.cpp").read_text() == resolved


def test_sources_that_do_not_compile_and_names_that_are_gone_are_told(project) -> None:
    project.release(header="", binding="def llama_other(): ...")
    done = project.move()
    assert done.returncode == 1
    assert "The binding lacks llama_thing\n" in done.stdout
    assert "Our sources do not compile with its headers." in done.stdout
    assert "upstream" in done.stderr


def test_an_archive_and_a_repository_of_llama_cpp_are_one_tree(project) -> None:
    repository, release = project.folder / "llama.cpp", project.folder / "b1.tar.gz"
    (repository / "include").mkdir(parents=True)
    (repository / "src").mkdir()
    files = {"CMakeLists.txt": "x", "include/llama.h": "", "include/up.h": HEADER}
    for name, text in (files | {"src/a.cpp": FOUND_LATER}).items():
        (repository / name).write_text(text)
    for words in (["init"], ["add", "."], ["commit", "-m", "x"]):
        git(repository, *words)
    head = git(repository, "rev-parse", "HEAD")
    git(repository, "archive", "--prefix=b1/llama/", f"--output={release}", "HEAD")
    done = project.run(str(repository), script="move.py")
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stdout.splitlines()
    assert f"llama.cpp 01234567 to {head[:8]}, in " in second
    tree = first.split()[-1]
    done = project.run(str(release), "--tree", tree, script="move.py")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, first)
    done = project.run(str(release), "--tree", head, script="move.py")
    assert f"has the tree {tree}, expected {head}" in done.stderr
