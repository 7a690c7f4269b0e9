"""The package's modules and what they import, read from their source."""

import ast
import re
from pathlib import Path

PACKAGE = "qaflora_edge"


def module_paths(package: Path) -> dict[str, Path]:
    """Name -> file of every module beside the command line, which stands below all of them."""
    paths = sorted(package.glob("*.py"))
    return {path.stem: path for path in paths if not path.stem.startswith("__")}


def imports(path: Path) -> set[str]:
    """Modules of the package that a module imports when it runs, at its top or later."""
    found: set[str] = set()
    for node in _running(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            head, _, rest = node.module.partition(".")
            if head == PACKAGE:
                found |= {rest.split(".")[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            found |= {name[1] for name in names if name[0] == PACKAGE and len(name) > 1}
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
    """The modules of each row of the table in CONTRIBUTING, top to bottom."""
    table = contributing.split("| module | what it holds |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [re.findall(r"`([a-z_/]+)`", row) for row in rows]
