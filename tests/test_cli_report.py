"""`qaflora report`: tables, pages and documents out of files of results."""

import gzip
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from made_results import N_LAYER, PAIRS, drawn, header, record, write
from markdown_it import MarkdownIt

from qaflora_edge.cli import main
from qaflora_edge.evaluation.cells import Cell
from qaflora_edge.evaluation.summary import coherence, mean_layers, profiles

SHARES = {"base": 0.1, "single:math": 0.3, "single:es": 0.2, "static": 0.3, "qa-flora": 0.6}
EVIL = "<script>alert(1)</script>|`*_[x](http://evil.example)\u202e\x1b[2J"


def report(*args: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, args)])


@pytest.fixture
def made(tmp_path: Path) -> Path:
    head = header(strategies=list(SHARES))
    return write(tmp_path / "six.jsonl", head, drawn(SHARES, head))


def evil(path: Path) -> Path:
    """A file in which every text that is shown is hostile."""
    head = header(
        [(EVIL, "exact", None, None)],
        [EVIL],
        n_item=2,
        bundle=EVIL,
        base={"name": EVIL, "sha256": EVIL},
        machine=EVIL,
        version=EVIL,
        options={EVIL: EVIL},
    )
    records = [
        record(
            *(EVIL, item, strategy, float(item)),
            answer=EVIL,
            question=EVIL,
            expected={EVIL: [EVIL]},
            weights={EVIL: 0.5},
            layers=[[0.5] * (N_LAYER - 1) + [0.7]],
        )
        for item in range(2)
        for strategy in ("static", EVIL)
    ]
    return write(path, head, records)


def tables(markdown: str) -> list[list[list[str]]]:
    """The rows of each table of a page, as a reader of Markdown sees them."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level > 3:
            text = "".join(child.content for child in token.children or [])
            found[-1][-1].append(text)
    return found


def test_table_is_shown_without_options(made: Path) -> None:
    result = report(made)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [task for task, *_ in PAIRS if f"\n{task}: " in f"\n{result.stdout}"] == [
        task for task, *_ in PAIRS
    ]


def test_a_packed_file_says_the_same(made: Path, tmp_path: Path) -> None:
    packed = tmp_path / "six.jsonl.gz"
    packed.write_bytes(gzip.compress(made.read_bytes()))
    assert report(packed).stdout == report(made).stdout


def test_json_has_every_number(made: Path) -> None:
    [section] = json.loads(report(made, "--json").stdout)["sections"]
    assert [task["task"] for task in section["tasks"]] == [name for name, *_ in PAIRS]
    lines = {line["strategy"]: line for line in section["tasks"][0]["strategies"]}
    records = [json.loads(line) for line in made.read_text().splitlines()[1:]]
    scores = [
        (each["score"], other["score"])
        for each in records
        for other in records
        if (each["task"], each["strategy"]) == ("math_es", "qa-flora")
        and (other["task"], other["item"], other["strategy"]) == ("math_es", each["item"], "static")
    ]
    mine, static = np.array(scores).T
    assert lines["qa-flora"]["score"]["value"] == pytest.approx(100 * mine.mean())
    assert lines["qa-flora"]["over_static"]["value"] == pytest.approx(100 * (mine - static).mean())
    assert lines["static"]["over_static"] is None
    verdict = next(each for each in section["verdicts"] if each["strategy"] == "qa-flora")
    assert verdict["n_cell"] == 2


def test_markdown_has_scores_differences_costs_and_layers(made: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert report(made, "--markdown", page).exit_code == 0
    text = page.read_text(encoding="utf-8")
    found = tables(text)
    [points] = [rows for rows in found if rows[0] == ["", "math_es", "math_ru", "mean"]]
    shown = json.loads(report(made, "--json").stdout)["sections"][0]["tasks"][:2]
    values = [
        next(line for line in task["strategies"] if line["strategy"] == "qa-flora")["score"][
            "value"
        ]
        for task in shown
    ]
    row = next(row for row in points if row[0] == "qa-flora")
    assert row[1:] == [f"{value:.1f}" for value in (*values, np.mean(values))]
    assert points[-1] == ["items", "12", "12", ""]
    assert "**" in text
    [verdicts] = [rows for rows in found if rows[0][-1].startswith("5 points over static")]
    assert [row[0] for row in verdicts[1:]] == ["base", "qa-flora"]
    [layers] = [rows for rows in found if rows[0][1:3] == ["adapter of the", "first third"]]
    assert [row[:2] for row in layers[1:]] == [["qa-flora", "domain"], ["qa-flora", "language"]]
    assert [row[-1] for row in layers[1:]] == ["1, 2", "1, 2"]  # maths twice, Spanish twice
    assert text.count("<summary>qa-flora, by task</summary>") == 1


@pytest.mark.slow
def test_pages_of_equal_files_are_equal_in_any_process(made: Path, tmp_path: Path) -> None:
    pages = []
    for number in range(2):
        page, document = tmp_path / f"{number}.html", tmp_path / f"{number}.md"
        words = ["report", str(made), "--html", str(page), "--markdown", str(document)]
        environment = {**os.environ, "PYTHONHASHSEED": str(number)}
        subprocess.run([sys.executable, "-m", "qaflora_edge", *words], env=environment, check=True)
        pages.append((page.read_bytes(), document.read_bytes()))
    assert pages[0] == pages[1]


def test_prose_stands_around_the_tables(made: Path, tmp_path: Path) -> None:
    alone, page, prose = (tmp_path / name for name in ("alone.md", "page.md", "prose.md"))
    report(made, "--markdown", alone)
    assert alone.read_text().startswith("## six: tiny, 4 adapters")
    prose.write_text("# Before\n\n<!-- results -->\n\nAfter.\n")
    report(made, "--markdown", page, "--prose", prose)
    assert page.read_text() == f"# Before\n\n{alone.read_text().rstrip()}\n\nAfter.\n"
    prose.write_text("# Before\n")
    report(made, "--markdown", page, "--prose", prose)
    assert page.read_text() == f"# Before\n\n{alone.read_text()}"


def test_no_text_of_a_file_is_markdown(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert report(evil(tmp_path / "evil.jsonl"), "--markdown", page).exit_code == 0
    text = page.read_text(encoding="utf-8")
    kinds = {
        child.type
        for token in MarkdownIt("commonmark").enable("table").parse(text)
        for child in token.children or []
    }
    assert kinds <= {"text", "strong_open", "strong_close", "text_special"}
    blocks = [each for each in MarkdownIt("commonmark").parse(text) if each.type == "html_block"]
    assert [block.content.split("\n")[0] for block in blocks] == ["<details>", "</details>"]
    assert blocks[0].content.count("<") == 3
    assert not {"\u202e", "\x1b"} & set(text)
    names = {row[0] for rows in tables(text) for row in rows}
    assert any(name.startswith("<script>alert(1)</script>|`*_[x](http") for name in names)


class Page(HTMLParser):
    """What a page has: elements with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.answers: list[str] = []  # texts of the elements of this class
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if dict(attrs).get("class") == "answer":
            self.answers.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.elements and self.elements[-1][1].get("class") == "answer":
            self.answers[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.elements.append((f"/{tag}", {}))

    def count(self, tag: str, kind: str = "") -> int:
        return sum(
            name == tag and (not kind or kind in (attrs.get("class") or "").split())
            for name, attrs in self.elements
        )


def html(tmp_path: Path, *files: Path) -> Page:
    page = tmp_path / "page.html"
    assert report(*files, "--html", page).exit_code == 0
    return Page(page.read_text(encoding="utf-8"))


def test_html_has_every_item_with_every_answer(made: Path, tmp_path: Path) -> None:
    page = html(tmp_path, made)
    assert page.count("details", "item") == 3 * 12
    for item in range(12):
        expected = [f"How many is {item}?", str(item), *(f"{name} says {item}" for name in SHARES)]
        assert [page.answers.count(text) for text in expected] == [3] * len(expected)
    assert page.count("table", "matrix") == 2  # of tasks in points, and in nats
    assert page.count("svg", "map") == 3  # that of qa-flora: others weigh all layers alike


def test_html_asks_nobody(made: Path, tmp_path: Path) -> None:
    page = html(tmp_path, made)
    for _, attrs in page.elements:
        assert not {"src", "href", "style", "onclick", "onload", "action"} & attrs.keys()
    [policy] = [
        attrs["content"]
        for tag, attrs in page.elements
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert re.fullmatch(
        r"default-src 'none'; style-src 'sha256-[^' ]+'; script-src 'sha256-[^' ]+'; "
        r"base-uri 'none'; form-action 'none'",
        policy,
    )
    assert page.count("script") == page.count("style") == 1


def test_choices_and_code_say_more(tmp_path: Path) -> None:
    head = header([("pick", "choice", None, None), ("code", "code", None, None)], [], n_item=1)
    records = [
        record("pick", 0, "base", 1.0, score_sum=0.0, score_mean=1.0),
        record("code", 0, "base", 0.0, failure="it ran out of time", isolated=["network"]),
    ]
    path, document = write(tmp_path / "a.jsonl", head, records), tmp_path / "a.md"
    page = html(tmp_path, path)
    assert "it ran out of time" in page.text
    assert "code was kept fromnetwork" in page.text  # two cells of a table
    assert report(path, "--markdown", document).exit_code == 0
    found = tables(document.read_text(encoding="utf-8"))
    assert ["code was kept from", "network"] in found[0]
    [pick] = [rows for rows in found if "by sum" in rows[0]]
    assert [pick[1][pick[0].index(name)] for name in ("by sum", "by mean")] == ["0.0", "100.0"]


@pytest.mark.slow
def test_many_adapters_stand_against_few(made: Path, tmp_path: Path) -> None:
    head = header(PAIRS[:1], ["math", "es"])
    few = write(tmp_path / "pair.jsonl", head, drawn(SHARES, head, seed=1))
    document = tmp_path / "a.md"
    page = html(tmp_path, made, few)
    assert page.count("table", "loaded") == 1
    assert "Against the same tasks with 2 adapters loaded" in page.text
    assert report(made, few, "--markdown", document).exit_code == 0
    loaded = json.loads(report(made, few, "--json").stdout)["sections"][0]["loaded"]
    [rows] = [
        rows
        for rows in tables(document.read_text(encoding="utf-8"))
        if rows[0] == ["", "tasks", "better by", "worst", "in"]
    ]
    assert [row[0] for row in rows[1:]] == ["static", "qa-flora"]
    shown = report(made, few).stdout
    for row, each in zip(rows[1:], loaded, strict=True):
        assert row[2].startswith(f"{each['gain']['value']:+.1f} (")
        assert row[2] in shown


def test_equal_answers_stand_once(tmp_path: Path) -> None:
    head = header([("t", "exact", None, None)], ["math"], n_item=1)
    records = [
        record("t", 0, strategy, 1.0, answer=answer, weights={"math": 1.0})
        for strategy, answer in (("static", "same"), ("base", "other"), ("qa-flora", "same"))
    ]
    page = html(tmp_path, write(tmp_path / "a.jsonl", head, records))
    assert page.count("div", "given") == 2
    assert page.count("table", "matrix") == 0  # of one task
    assert sorted(page.answers) == ["0", "How many is 0?", "other", "same"]


def test_no_text_of_a_file_is_html(tmp_path: Path) -> None:
    page = html(tmp_path, evil(tmp_path / "evil.jsonl"))
    assert page.count("script") == 1
    assert page.count("a") == page.count("img") == 0
    assert "<script>alert(1)</script>|`*_" in page.text
    assert not {"\u202e", "\x1b"} & set(page.text)


def test_profiles_are_mean_weights_of_the_adapters_a_task_names() -> None:
    names = ("math", "es", "ru")

    def cell(name: str, language: str, weights: list[list[float]]) -> Cell:
        task = {"name": name, "metric": "number", "language": language, "domain": "math"}
        rows = [record(name, item, "qa-flora", 1.0, layers=weights) for item in range(2)]
        rows[1]["layers"] = (np.array(weights) + 0.2).tolist()
        return Cell(task, names, {"qa-flora": dict(enumerate(rows))})

    rising = [[0.0, 0.1, 0.2], [0.3, 0.2, 0.3], [0.5, 0.4, 0.1]]
    falling = [[0.2, 0.1, 0.0], [0.3, 0.2, 0.3], [0.1, 0.4, 0.5]]
    cells = [cell("a", "es", rising), cell("b", "ru", falling), cell("c", "fr", rising)]
    assert np.allclose(mean_layers(cells[0], "qa-flora"), np.array(rising) + 0.1)
    assert mean_layers(cells[0], "static") is None
    found = profiles(cells, "qa-flora")
    assert [each.cell.name for each in found] == ["a", "b"]  # no adapter is named like fr
    assert np.allclose(found[1].by_role["language"], np.array(falling[2]) + 0.1)
    domain, language = coherence(found, "domain"), coherence(found, "language")
    assert (domain.n_same, domain.n_other, domain.same) == (1, 0, pytest.approx(-1.0))
    expected = np.corrcoef(rising[1], falling[2])[0, 1]
    assert (language.n_same, language.other) == (0, pytest.approx(expected))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "No such file or directory. Give a file that `qaflora eval -o` has written."),
        (b"no gzip", "Not a gzipped file (b'no'). Give a file"),
        (gzip.compress(b"x" * 999)[:-12], "it is no whole gzip file ("),
    ],
    ids=["none", "other", "cut"],
)
def test_a_packed_file_that_is_none_is_refused(
    data: bytes | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl.gz"
    if data is not None:
        path.write_bytes(data)
    result = report(path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"Cannot read {path}: " in result.stderr
    assert said in result.stderr


def test_nothing_is_written_of_files_that_disagree(tmp_path: Path) -> None:
    head = header(PAIRS[:1], ["math", "es"])
    weights: dict[str, Any] = {"weights": {"math": 0.5, "es": 0.5}}
    files = [
        write(tmp_path / f"{s}.jsonl", head, [record("math_es", 0, "static", s, **weights)])
        for s in (1.0, 0.0)
    ]
    page = tmp_path / "page.html"
    result = report(*files, "--html", page)
    assert result.exit_code == 1
    assert "the score of item 0 of math_es under static is 0.0, and 1.0 in a file" in result.stderr
    assert not page.exists()


FAILED = {"weights": {}, "error": "too long", "answer": None}
MIXED = {"weights": {"math": -1.0, "es": 1e30}, "layers": [[-1.0] * N_LAYER, [1e30] * N_LAYER]}


@pytest.mark.parametrize(
    ("tasks", "records"),
    [
        ([], []),
        (PAIRS[:1], []),
        (PAIRS[:1], [record("math_es", item, "static", None, **FAILED) for item in range(3)]),
        (PAIRS[:1], [record("math_es", 0, "static", 0.5, **MIXED)]),
        (PAIRS[:1], [record("math_es", item, "qa-flora", 1.0, **MIXED) for item in range(3)]),
    ],
    ids=["no tasks", "no results", "all failed", "one", "any weights"],
)
def test_little_is_shown_as_it_is(
    tasks: list[tuple[str, str, str, str]], records: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", header(tasks, ["math", "es"]), records)
    for words in ([], ["--json"], ["--html", tmp_path / "a.html"], ["--markdown", tmp_path / "m"]):
        result = report(path, *words)
        assert (result.exit_code, result.stderr) == (0, "")
    assert "six: tiny, 2 adapters loaded" in (tmp_path / "m").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("metric", "score", "expected"),
    [
        ("number", 1.5, "0 to 1 for the metric number"),
        ("number", -1, "0 to 1 for the metric number"),
        ("loss", 1e300, "0 to 10000 for the metric loss"),
    ],
)
def test_a_score_that_none_can_have_is_refused(
    metric: str, score: float, expected: str, tmp_path: Path
) -> None:
    head = header([("t", metric, None, None)], ["math"])
    path = tmp_path / "a.jsonl"
    write(path, head, [record("t", 0, "static", score, weights={"math": 1.0})])
    result = report(path)
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: Cannot use {path}, line 2: score is {score}, expected {expected}. Give a file "
        "that `qaflora eval -o` has written.\n"
    )


def test_prose_alone_is_wrong_usage(made: Path) -> None:
    result = report(made, "--prose", made)
    assert result.exit_code == 2
    assert "--prose is part of a page: give it with --markdown FILE." in result.stderr
