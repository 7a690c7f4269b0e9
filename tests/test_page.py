"""The page of the server as it is sent, and its Markdown."""

import base64
import hashlib
import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle
from markdown_it import MarkdownIt
from scripted_server import Script, app
from serving import client_of
from starlette.testclient import TestClient

from qaflora_edge.server import page

PARTS = Path(page.__file__).parent / "parts"
needs_node = pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")


class Page(HTMLParser):
    """Tags with their attributes; `parts` are a tag without a text, or the last tag and a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.parts.append((tag, None))

    def handle_data(self, data: str) -> None:
        self.parts.append((self.tags[-1][0] if self.tags else "", data))


@pytest.fixture
def client() -> TestClient:
    return TestClient(app(Script()))


def test_page_is_one_small_text_that_asks_for_nothing(client) -> None:
    reply = client.get("/")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert len(reply.content) < 300_000  # Temml has 168,000 of them
    for tag, attributes in Page(reply.text).tags:
        assert tag not in ("img", "iframe", "object", "embed", "base")
        assert not {"src", "action", "srcset", "style"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
        href = attributes.get("href") or "#"
        assert href.startswith(("#", "data:image/svg+xml,"))
    addresses = set(re.findall(r"https?://[^\s\"'`)<]+", reply.text))
    names = ("2000/svg", "1998/Math/MathML")  # which nobody looks up
    assert addresses == {f"http://www.w3.org/{name}" for name in names}


def test_policy_allows_the_one_script_and_the_one_style_of_the_page(client) -> None:
    reply = client.get("/")
    rows = map(str.split, reply.headers["content-security-policy"].split(";"))
    hashes = {
        tag: "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for tag, text in Page(reply.text).parts
        if tag in ("script", "style") and text and text.strip()
        if not text.startswith("{")  # the strategies' helps, which are no script
    }
    assert {name: values for name, *values in rows} == {
        "default-src": ["'none'"],
        "script-src": [hashes["script"]],
        "style-src": [hashes["style"]],
        "connect-src": ["'self'"],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
        "require-trusted-types-for": ["'script'"],
        "trusted-types": ["'none'"],
    }
    assert reply.headers["referrer-policy"] == "no-referrer"


def in_node(code: str, value: Any) -> Any:
    """What a line of JavaScript makes of `value`, with the page's own Markdown."""
    source = (PARTS / "markdown.js").read_text("utf-8")
    read = "const value = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
    program = f"{source}\n{read}\nconsole.log(JSON.stringify({code}))"
    command = ["node", "-e", program]
    done = subprocess.run(command, input=json.dumps(value), capture_output=True, text=True)
    assert done.stderr == ""
    return json.loads(done.stdout)


ANSWER = """\
# One

Some *soft*, **strong**, ~~gone~~ `code`, [a page](https://example.org/x) and
a second row with ***both*** and **one *in* the other**.

3. three
4. four

   with more

- a
- b
  - c
    and d

> said
> > twice

| n | name |
|--:|:----:|
| 1 | `x` |

```python
def add(a, b):  # adds
    return "1" + 2
```

***

The end."""


def outline(node: Any) -> list[str]:
    if isinstance(node, str):
        return [" ".join(node.split())] if node.strip() else []
    tags = {"pre": ["<pre>", "<code>"], "link": ["<a>"]}.get(node[0], [f"<{node[0]}>"])
    return [*tags, *(item for child in node[2] for item in outline(child))]


@needs_node
def test_an_answer_has_the_elements_that_markdown_it_finds() -> None:
    """Another parser is the oracle, where our rules of stars and backslashes do not differ."""
    parser = MarkdownIt("commonmark", {"breaks": True}).enable(["table", "strikethrough"])
    texts = [ANSWER, "- a\n\n- b", "a\n- b\n2. c", "1) a\n2) b", "> a\nb\n\nc", "~~~\na\n\n b"]
    found = in_node("value.map(markdownNodes)", texts)
    for text, nodes in zip(texts, found, strict=True):
        parts = Page(parser.render(text)).parts
        expected = [f"<{tag}>" if said is None else " ".join(said.split()) for tag, said in parts]
        assert [item for node in nodes for item in outline(node)] == [*filter(None, expected)]


@needs_node
@pytest.mark.parametrize(
    "text",
    [
        *("2*3*4", "__init__", "a_b_c", "5 * 3 *x", r"\(x \\ \[y", "a*b*", "** a**"),
        *("[a](javascript:alert(1))", "[a](/x)", "[a](//x.y)", "<https://x.y>", "![a](/x)"),
        *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[a]: https://x.y"),
    ],
)
def test_what_is_no_markup_keeps_every_sign(text) -> None:
    assert in_node("markdownNodes(value)", text) == [["p", {}, [text]]]


@needs_node
def test_latex_is_drawn_where_all_of_it_is_known() -> None:
    """Each line of formulas.txt has a text, and whether its formula is drawn; `¶` ends a line."""
    lines = Path(__file__).with_name("formulas.txt").read_text("utf-8")
    pairs = [line.replace("¶", "\n").split("\t") for line in lines.splitlines()]
    temml = json.dumps(str(PARTS.parent / "vendor" / "temml.min.js"))
    draw = f"const temml = new Function(require('fs').readFileSync({temml}) + '; return temml')();"
    draw = (
        f"(() => {{ {draw}"
        + """
        const drawn = ([, { latex, isDisplay }, [source]]) => {
            try {
                temml.renderToString(latex, { displayMode: isDisplay, throwOnError: true });
                return isDisplay ? "in a block" : "in a line";
            } catch {
                return source;
            }
        };
        return value.map(([text]) => markdownNodes(text).map(
            ([, , nodes]) => nodes.map(node => node[0] === "math" ? drawn(node) : node)));
    })()"""
    )
    for (source, expected), [nodes] in zip(pairs, in_node(draw, pairs), strict=True):
        how = "in a block" if source[:2] in (r"\[", "$$") else "in a line"
        assert "".join(nodes) == (how if expected else source)


@needs_node
def test_an_answer_that_arrives_in_parts_has_the_nodes_of_the_whole() -> None:
    chance = random.Random(0)
    words = ["a", "*b*", "**", "`", "`c`", "[d](http://e)", "<i>", "1.", "-", "#", "|", "2*3*4"]
    words += ["$x$", "$", "\\(y\\)", "\\]"]
    begins = ["", "", "# ", "- ", "1. ", "  - ", "> ", "| a | b |\n|---|---|\n| ", "```\n", "    "]
    begins += ["\\[\n", "$$\n"]
    texts = [ANSWER]
    for _ in range(100):
        rows = [
            chance.choice(begins) + " ".join(chance.choices(words, k=chance.randint(0, 6)))
            for _ in range(chance.randint(1, 14))
        ]
        texts.append(chance.choice(["\n", "\n\n"]).join(rows))
    in_parts = """value.map(text => {
        const found = [];
        let rest = "";
        for (const sign of text) {
            const rows = rowsOf(rest + sign), n = settledRows(rows);
            found.push(...blocksOf(rows.slice(0, n)).map(block => block.node));
            rest = rows.slice(n).join("\\n");
        }
        return [...found, ...markdownNodes(rest)];
    })"""
    assert in_node(in_parts, texts) == in_node("value.map(markdownNodes)", texts)


@needs_node
def test_no_text_takes_longer_than_its_length_explains() -> None:
    patterns = [
        *("[", "[a](", "**a", "_a_", ">", "- ", "|", "~~", "a\n", "\\(", "*a_ ", "`` ` ", "*a b_ "),
        *("$", "$a ", "$a$", "\\[", "\\(\\frac{", "\\(^\\)", "$$a$$$", "\\[\\left(\\]\n"),
        *("|a|\n|-|\n", "  \n- a\n", "**k *l m* n** "),
    ]
    seconds = """value.map(pattern => [3000, 48000].map(n => {
        const start = performance.now();
        markdownNodes(pattern.repeat(n / pattern.length));
        return (performance.now() - start) / 1000;
    }))"""
    for pattern, (short, long) in zip(patterns, in_node(seconds, patterns), strict=True):
        assert long < 0.5 + 40 * short, pattern


def test_the_real_server_has_the_page_which_needs_no_key(tmp_path) -> None:
    with client_of(make_bundle(tmp_path).folder, api_key="secret") as client:
        assert client.get("/").content == page.page()[0]
