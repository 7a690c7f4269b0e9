"""The package's modules and what they import, read from their source."""

import ast
import re
from pathlib import Path

PACKAGE = "qaflora_edge"


def module_paths(package: Path) -> dict[str, Path]:
    """Name -> file of every module, as `formats.inputs`; a folder's own as `bench`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if parts and not parts[-1].startswith("__"):
            found[".".join(parts)] = path
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Names that lead back to the first of them, or nothing where there is no such way.

    graph  name -> the names that it leads to
    """
    done: set[str] = set()

    def walk(way: list[str]) -> list[str]:
        for name in sorted(graph[way[-1]] & graph.keys()):
            if name in way:
                return [*way[way.index(name) :], name]
            if name not in done and (found := walk([*way, name])):
                return found
        done.add(way[-1])
        return []

    return next((found for name in sorted(graph) if (found := walk([name]))), [])


def imports(path: Path) -> set[str]:
    """What a module imports of the package when it runs, at its top or later: dotted names."""
    found: set[str] = set()
    for node in _running(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            head, _, rest = node.module.partition(".")
            if head == PACKAGE:
                # A name may be a module of a folder or something in a module; both are given.
                found |= {rest} if rest else set()
                found |= {f"{rest}.{alias.name}".lstrip(".") for alias in node.names}
        elif isinstance(node, ast.Import):
            names = (alias.name.partition(".") for alias in node.names)
            found |= {rest for head, _, rest in names if head == PACKAGE and rest}
    return found


def _running(tree: ast.AST) -> list[ast.AST]:
    """Every node outside `if TYPE_CHECKING:`, whose imports never run."""
    found = []
    for node in ast.iter_child_nodes(tree):
        is_checking = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if not is_checking:
            found += [node, *_running(node)]
    return found


def table_rows(contributing: str) -> list[list[str]]:
    """Packages and root modules of each row of the table in CONTRIBUTING, top to bottom."""
    table = contributing.split("| package | what it holds |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [re.findall(r"`([a-z_]+)/?`", row) for row in rows]
