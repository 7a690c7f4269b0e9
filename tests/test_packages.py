"""Recipes of package managers ask for what pyproject.toml asks for."""

import base64
import hashlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import qaflora_edge
from qaflora_edge.backend import library


def bounds(requirements: list[str]) -> dict[str, str]:
    """Name -> versions, without a marker."""
    found = {}
    for text in requirements:
        name, versions = re.findall(r"([\w-]+)([^;]*)", text)[0]
        found[name.replace("_", "-")] = versions.strip()
    return found


@pytest.fixture
def wanted(checkout) -> dict[str, dict[str, str]]:
    """Versions that a build and a run with the server need."""
    pyproject = tomllib.loads((checkout / "pyproject.toml").read_text("utf-8"))
    project = pyproject["project"]
    run = project["dependencies"] + project["optional-dependencies"]["server"]
    run.append(f"python {project['requires-python']}")
    return {"host": bounds(pyproject["build-system"]["requires"]), "run": bounds(run)}


def test_recipe_of_conda(checkout, wanted) -> None:
    recipe = yaml.safe_load((checkout / "packages" / "recipe.yaml").read_text("utf-8"))
    assert recipe["context"]["version"] == qaflora_edge.__version__
    assert bounds(recipe["requirements"]["run"]) == wanted["run"]
    host = bounds(recipe["requirements"]["host"])
    assert host == wanted["host"] | {"python": "", "pip": ""}  # pip is always there, and new


def test_derivation_of_nix(checkout, wanted) -> None:
    text = (checkout / "packages" / "package.nix").read_text("utf-8")
    build, run = text.partition("buildPythonApplication")[2].split("dependencies = [")
    assert {*re.findall(r"^    ([\w-]+)$", build, re.MULTILINE)} >= wanted["host"].keys()
    names = {*re.findall(r"^    ([\w-]+)$", run, re.MULTILINE)}
    assert names | {"python"} == wanted["run"].keys()


LOCKED = re.compile(
    r"^([a-z0-9-]+)==(\S+)(?: ; .*?)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE
)
BINDING = "llama-cpp-python"  # patches/UPSTREAM has its hash


def locked(path: Path) -> dict[str, list[str]]:
    """Name -> versions; each line of the file belongs to one, and each has hashes."""
    text = path.read_text("utf-8")
    assert LOCKED.sub("", text).strip() == ""
    found: dict[str, list[str]] = {}
    for name, version, _ in LOCKED.findall(text):
        found.setdefault(name, []).append(version)
    return found


@pytest.mark.parametrize(
    ("file", "extras"),
    [("requirements.lock", ["server", "test"]), ("packages/container.lock", ["server"])],
)
def test_a_lock_has_what_is_asked_for(checkout, file, extras) -> None:
    project = tomllib.loads((checkout / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    versions = locked(checkout / file)
    for requirement in map(Requirement, wanted):
        if requirement.name != BINDING:
            fitting = [*requirement.specifier.filter(versions[requirement.name])]
            assert fitting == versions[requirement.name], requirement.name


@pytest.mark.parametrize("name", ["uvicorn", "h11"])
def test_the_newest_series_that_we_derive_from_is_locked(checkout, name, wanted) -> None:
    """Tests run with the lock: the newest that is allowed passes, and the next is not allowed."""
    (version,) = locked(checkout / "requirements.lock")[name]
    first, second, *_ = map(int, version.split("."))
    allowed = Requirement(f"{name}{wanted['run'][name]}").specifier
    assert version in allowed
    assert f"{first}.{second + 1}.0" not in allowed


def test_actions_are_named_by_commit(checkout) -> None:
    for path in (checkout / ".github" / "workflows").glob("*.yml"):
        used = re.findall(r"uses: (\S+)", path.read_text("utf-8"))
        assert used
        assert [name for name in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name)] == []


def test_licences_of_others_come_with_the_library() -> None:
    folder = library.library_dir().parent / "licenses"
    holders = {
        "llama.cpp.txt": "The ggml authors",
        "jsonhpp.txt": "Niels Lohmann",
        "sgemm.txt": "Mozilla Foundation",
    }
    for name, holder in holders.items():
        text = (folder / name).read_text("utf-8")
        assert holder in text
        assert "Permission is hereby granted" in text


def write_wheel(path: Path, requirement: str, **files: str) -> Path:
    """Write a pure wheel of version 1.0: distribution and requirement, names with __ for /."""
    name = path.name.partition("-")[0]
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: {requirement}\n"
    with zipfile.ZipFile(path, "w") as archive:
        for place, text in files.items():
            archive.writestr(place.replace("__", "/") + ".py", text)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: x\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_a_wheel_with_its_binding_needs_no_other_file(checkout, tmp_path) -> None:
    wheel = write_wheel(tmp_path / "ours-1.0-x.whl", "llama-cpp-python==1.0", ours__a="A = 1")
    names = {"llama_cpp__llama_cpp": "B = 2", "llama_cpp__server__app": "C = 3"}
    binding = write_wheel(tmp_path / "bound-1.0-x.whl", "typing-extensions>=4.5.0", **names)
    script = checkout / "packages" / "with_binding.py"
    subprocess.run([sys.executable, script, wheel, binding], check=True)
    with zipfile.ZipFile(wheel) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert texts["qaflora_edge/binding/llama_cpp/llama_cpp.py"] == "B = 2"
    assert texts["ours/a.py"] == "A = 1"
    assert "Requires-Dist: typing-extensions>=4.5.0\n" in texts["ours-1.0.dist-info/METADATA"]
    assert not [text for text in texts.values() if "llama-cpp-python" in text]
    assert "server" not in " ".join(texts)
    record = texts.pop("ours-1.0.dist-info/RECORD")
    for name, text in texts.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name},sha256={digest.rstrip('=')},{len(text.encode())}\n" in record
