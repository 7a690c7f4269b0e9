"""Recipes of package managers ask for what pyproject.toml asks for."""

import re
import tomllib

import pytest
import yaml

import qaflora_edge


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
