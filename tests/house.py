"""Measure the house: size and density, what `import Engine` loads, and the words of the docs."""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

PACKAGE = "qaflora_edge"
LONG = 35  # words; no sentence for people has more
LIMITS = {
    "lines of the package": 25_000,
    "tokens a line of code": 9.3,
    "modules": 140,
    "modules that Engine imports": 45,
    "lines that Engine imports": 8_000,
    "lines of tests": 28_000,
    "lines of the page": 2_400,
    "lines that patches add": 340,
    "lines of patches/src": 5_600,
    "words of README": 900,
    "words of CONTRIBUTING": 900,
    "words of docs": 26_000,
    "pages of docs": 17,
    "long sentences of README": 0,
    "long sentences of docs": 0,
    "mean words of a sentence": 18,
}
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def figures(checkout: Path) -> dict[str, float]:
    """Name of a figure -> its value in this checkout."""
    files = sorted((checkout / PACKAGE).rglob("*.py"))
    engine = closure(checkout, f"{PACKAGE}.engine")
    page = [
        path
        for path in (checkout / PACKAGE / "server/page").rglob("*")
        if path.suffix in {".js", ".css", ".html"}
    ]
    native = [path for path in (checkout / "patches/src").rglob("*") if path.is_file()]
    return {
        "lines of the package": sum(map(n_line, files)),
        "tokens a line of code": density(files),
        "modules": len(files),
        "modules that Engine imports": len(engine),
        "lines that Engine imports": sum(map(n_line, engine)),
        "lines of tests": sum(map(n_line, (checkout / "tests").rglob("*.py"))),
        "lines of the page": sum(map(n_line, page)),
        "lines that patches add": sum(map(n_added, (checkout / "patches").glob("*.patch"))),
        "lines of patches/src": sum(map(n_line, native)),
        **words(checkout),
    }


def density(files: list[Path]) -> float:
    """Tokens a line of code of some files, to one decimal place."""
    counts = [n_token(path) for path in files]
    n_all = sum(tokens for tokens, _ in counts)
    return round(n_all / sum(lines for _, lines in counts), 1)


def n_token(path: Path) -> tuple[int, int]:
    """Tokens of code without comments and docstrings, and the lines that have one."""
    text = path.read_text("utf-8")
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            prose.update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = [
        token.start[0]
        for token in tokens
        if token.type not in LAYOUT and token.start[0] not in prose
    ]
    return len(lines), len({*lines})


def n_added(patch: Path) -> int:
    lines = patch.read_text("utf-8").splitlines()
    return sum(line.startswith("+") and not line.startswith("+++") for line in lines)


def words(checkout: Path) -> dict[str, int]:
    """Figures of README and docs/; docs/README.md, the index, is no page."""
    pages = list((checkout / "docs").glob("*.md"))
    texts = {"docs": pages, "README": [checkout / "README.md"]}
    guide = (checkout / "CONTRIBUTING.md").read_text("utf-8")
    found = {"pages of docs": len(pages) - 1, "words of CONTRIBUTING": len(guide.split())}
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
    checkout = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).resolve().parents[1]
    for name, value in figures(checkout).items():
        over = "  over" if value > LIMITS[name] else ""
        print(f"{name:30} {value:8,} {LIMITS[name]:8,}{over}")
