"""The table of packages in CONTRIBUTING is the package, and imports point upwards in it only."""

import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from bundles import make_bundle, rewrite
from layout import cycle, imports, module_paths, table_rows
from patience import python

CHECKOUT = Path(__file__).resolve().parents[1]
EVERY = module_paths(CHECKOUT / "qaflora_edge")
CLI = {name: path for name, path in EVERY.items() if name.split(".")[0] == "cli"}
ROWS = table_rows((CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}
# (importer, imported): upward imports that are still there. Remove lines, never add one.
STILL: set[tuple[str, str]] = set()


def test_table_has_every_package_once() -> None:
    packages = {name.split(".")[0] for name in EVERY}
    assert sorted(LEVEL) == sorted(packages)
    assert sum(map(len, ROWS)) == len(LEVEL)


@pytest.mark.parametrize("name", EVERY)
def test_module_imports_what_stands_above_it(name) -> None:
    package = name.split(".")[0]
    found = {item.split(".")[0] for item in imports(EVERY[name])} & LEVEL.keys()
    upward = {(package, other) for other in found if LEVEL[other] > LEVEL[package]}
    assert upward - STILL == set()


def test_no_module_of_the_command_line_leads_back_to_itself() -> None:
    """Imports point down there too: one command may use what another one shares, not both ways."""
    graph = {name: imports(path) - {name} for name, path in CLI.items()}
    assert cycle(graph) == []


def test_what_is_imported_is_a_dependency() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = (project["dependencies"], *project["optional-dependencies"].values())
    named = {re.split(r"[\[<>=;]", line)[0] for group in groups for line in group}
    # In those of starlette, uvicorn, jinja2 and openai.
    named |= {"anyio", "h11", "markupsafe", "pydantic"}
    text = "\n".join(path.read_text(encoding="utf-8") for path in EVERY.values())
    roots = set(re.findall(r"^ *(?:import|from) (\w+)(?:\.\w+)*(?: import | as |$)", text, re.M))
    origins = packages_distributions()
    found = {
        origins.get(root, [root])[0].lower().replace("_", "-")
        for root in roots - sys.stdlib_module_names - {"qaflora_edge"}
    }
    assert found - named == set()


def test_import_of_the_package_is_quick_and_loads_no_library() -> None:
    """CPU time, which other work on the machine hardly changes; the start of Python is not it.

    On a slow machine the limit is relative to that start.
    """
    code = (
        "import sys, time\n"
        "before = time.process_time()\n"
        "import qaflora_edge\n"
        "print(before, time.process_time() - before, {'numpy', 'llama_cpp'} & {*sys.modules})\n"
    )
    times = []
    for _ in range(3):
        done = python("-c", code)
        start, seconds, loaded = done.stdout.split()
        assert loaded == "set()"
        times.append(float(seconds) / max(0.1, 5 * float(start)))
    assert min(times) < 1


def test_a_first_chat_loads_few_modules(tmp_path) -> None:
    """Under two-place, as `demo` has it."""
    folder = make_bundle(tmp_path, calibrate=True).folder
    rewrite(folder, lambda raw: raw["fusion"].update(strategy="two-place"))
    code = (
        "import sys\n"
        "from qaflora_edge import Engine\n"
        "with Engine(sys.argv[1]) as engine:\n"
        "    engine.chat([{'role': 'user', 'content': 'the thing'}], max_tokens=1)\n"
        "print(*(name for name in sys.modules if name.split('.')[0] == 'qaflora_edge'))\n"
    )
    done = python("-c", code, folder)
    modules = done.stdout.split()
    assert "qaflora_edge.dialects.openai_chat" in modules
    assert len(modules) <= 57
    assert not {"qaflora_edge.peft", "qaflora_edge.convert"} & set(modules)
