"""Measure the house: size and density, what `import Engine` loads, and the words of the docs."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable
from pathlib import Path

PACKAGE = "qaflora_edge"
LONG = 35  # words; no sentence for people has more
ROOM = 1.05  # the tests allow so many times a budget: who adds an option need not delete one first
BUDGETS = {
    "tokens of code of the package": 182_000,
    "lines of its longest module": 500,
    "tokens a line of code": 8.5,
    "modules": 140,
    "modules that Engine imports": 45,
    "tokens that Engine imports": 45_000,
    "tokens of code of tests": 235_000,
    "lines of the page": 2_600,
    "lines that patches add": 250,
    "lines of patches/src": 5_800,
    "words of README": 900,
    "words of CONTRIBUTING": 900,
    "words of docs": 26_000,
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
    engine = imported(f"{PACKAGE}.engine")
    page = [
        path
        for path in (checkout / PACKAGE / "server/page").rglob("*")
        if path.suffix in {".js", ".css", ".html"}
    ]
    native = [path for path in (checkout / "patches/src").rglob("*") if path.is_file()]
    n_token, n_line_of_code = n_token_and_line(files)
    return {
        "tokens of code of the package": n_token,
        "lines of its longest module": max(map(n_line, files)),
        "tokens a line of code": round(n_token / n_line_of_code, 1),
        "modules": len(files),
        "modules that Engine imports": len(engine),
        "tokens that Engine imports": n_token_and_line(engine)[0],
        "tokens of code of tests": n_token_and_line((checkout / "tests").rglob("*.py"))[0],
        "lines of the page": sum(map(n_line, page)),
        "lines that patches add": sum(map(n_added, (checkout / "patches").glob("*.patch"))),
        "lines of patches/src": sum(map(n_line, native)),
        **words(checkout),
    }


def n_token_and_line(paths: Iterable[Path]) -> tuple[int, int]:
    """Tokens of code in some files, and the lines that have one."""
    counts = [n_token(path) for path in paths]
    return sum(tokens for tokens, _ in counts), sum(lines for _, lines in counts)


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
    """Figures of README, CONTRIBUTING and docs/."""
    pages = list((checkout / "docs").glob("*.md"))
    texts = {"docs": pages, "README": [checkout / "README.md"]}
    guide = (checkout / "CONTRIBUTING.md").read_text("utf-8")
    found = {"words of CONTRIBUTING": len(guide.split())}
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


def imported(module: str) -> set[Path]:
    """Files of the package that a process has loaded once it has imported a module."""
    code = (
        f"import sys, {module}\n"
        f"modules = [name for name in sys.modules if name.split('.')[0] == '{PACKAGE}']\n"
        "print(*(sys.modules[name].__file__ for name in modules), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {Path(line) for line in done.stdout.splitlines()}


if __name__ == "__main__":
    checkout = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).resolve().parents[1]
    for name, value in figures(checkout).items():
        over = "  over" if value > BUDGETS[name] else ""
        print(f"{name:30} {value:8,} {BUDGETS[name]:8,}{over}")
