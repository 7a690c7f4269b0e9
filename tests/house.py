"""Measure the house: lines of each package, modules, and what `import Engine` loads."""

import ast
import json
import sys
from pathlib import Path

PACKAGE = "qaflora_edge"


def figures(checkout: Path) -> dict[str, int]:
    """Name of a figure -> its value in this checkout."""
    files = sorted((checkout / PACKAGE).rglob("*.py"))
    found: dict[str, int] = {}
    for path in files:
        part = path.relative_to(checkout / PACKAGE).parts
        name = part[0] if len(part) > 1 else "."
        found[name] = found.get(name, 0) + n_line(path)
    engine = closure(checkout, f"{PACKAGE}.engine")
    return found | {
        "lines of the package": sum(map(n_line, files)),
        "modules": len(files),
        "modules that Engine imports": len(engine),
        "lines that Engine imports": sum(map(n_line, engine)),
        "lines of tests": sum(map(n_line, (checkout / "tests").rglob("*.py"))),
    }


def n_line(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def closure(checkout: Path, start: str) -> set[Path]:
    """Files that importing a module loads; imports in functions and for types are not followed."""
    found: set[Path] = set()
    todo = [start]
    while todo:
        name = todo.pop()
        stem = checkout / name.replace(".", "/")
        path = next(
            (p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.is_file()), None
        )
        if path is None or path in found:
            continue
        found.add(path)
        todo += [each for each in _imported(ast.parse(path.read_text("utf-8")).body)]
        todo += [name.rpartition(".")[0]] if "." in name else []
    return found


def _imported(body: list[ast.stmt]) -> set[str]:
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            names |= _imported(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            names |= _imported(node.body)
    return {name for name in names if name.split(".")[0] == PACKAGE}


if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    now = figures(checkout)
    if "--lower" in sys.argv:  # after a change that made something smaller
        budgets = json.loads((checkout / "tests" / "house.json").read_text("utf-8"))
        lower = {name: min(value, budgets.get(name, 0)) for name, value in now.items()}
        (checkout / "tests" / "house.json").write_text(json.dumps(lower, indent=1) + "\n", "utf-8")
    budgets = json.loads((checkout / "tests" / "house.json").read_text("utf-8"))
    for name in sorted(now, key=lambda name: -now[name]):
        over = "  over" if now[name] > budgets.get(name, 0) else ""
        print(f"{name:30} {now[name]:8,} {budgets.get(name, 0):8,}{over}")
