"""Measure the house: lines of code, what `import Engine` loads, words and sentences of the docs."""

import ast
import json
import re
import sys
from pathlib import Path

PACKAGE = "qaflora_edge"
LONG = 35  # words; no sentence for people has more
# What may be reached again after a figure was smaller; of all else tests/house.json has the most.
LIMITS = {
    "words of README": 900,
    "long sentences of README": 0,
    "words of docs": 26_000,
    "pages of docs": 16,
    "long sentences of docs": 0,
    "mean words of a sentence": 18,
}


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
        **words(checkout),
    }


def budgets(checkout: Path) -> dict[str, int]:
    """Name of a figure -> the most that it may be."""
    kept = json.loads((checkout / "tests" / "house.json").read_text("utf-8"))
    return kept | {name: max(limit, kept.get(name, 0)) for name, limit in LIMITS.items()}


def words(checkout: Path) -> dict[str, int]:
    """Figures of README and docs/; docs/README.md, the index, is no page."""
    pages = list((checkout / "docs").glob("*.md"))
    texts = {"docs": pages, "README": [checkout / "README.md"]}
    found = {"pages of docs": len(pages) - 1}
    counts: list[int] = []
    for name, paths in texts.items():
        text = "\n\n".join(path.read_text("utf-8") for path in paths)
        lengths = [len(each.split()) for each in sentences(text)]
        found[f"words of {name}"] = len(text.split())
        found[f"long sentences of {name}"] = sum(n > LONG for n in lengths)
        counts += lengths
    return found | {"mean words of a sentence": -(-sum(counts) // len(counts))}


def sentences(page: str) -> list[str]:
    """Give the sentences of a page's prose: no blocks, tables, headings and pictures."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page)
    text = re.sub(r"(?m)^(    | *[|#<]).*$", "", text)
    text = re.sub(r"(?m)^ *([*-]|\d+\.) ", "\n\n", text)
    text = re.sub(r"\]\([^)]*\)|[\[\]*]", "", text)
    found = re.split(r"\n\s*\n|(?<=[.!?:])\s+(?=[\"'`(A-Z0-9¿])", text)
    return [" ".join(each.split()) for each in found if each.strip()]


def n_line(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def closure(checkout: Path, start: str) -> set[Path]:
    """Files that importing a module loads; imports in functions and for types are not followed."""
    found: set[Path] = set()
    todo = [start]
    while todo:
        name = todo.pop()
        stem = checkout / name.replace(".", "/")
        path = next(filter(Path.is_file, (stem.with_suffix(".py"), stem / "__init__.py")), None)
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
        most = budgets(checkout)
        lower = {name: min(value, most.get(name, 0)) for name, value in now.items()}
        lower = {name: value for name, value in lower.items() if value > LIMITS.get(name, -1)}
        (checkout / "tests" / "house.json").write_text(json.dumps(lower, indent=1) + "\n", "utf-8")
    most = budgets(checkout)
    for name in sorted(now, key=lambda name: -now[name]):
        over = "  over" if now[name] > most.get(name, 0) else ""
        print(f"{name:30} {now[name]:8,} {most.get(name, 0):8,}{over}")
