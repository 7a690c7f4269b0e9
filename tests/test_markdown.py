"""Markdown as a tree for pages: what each kind becomes, whole or while it arrives."""

import html.parser
import random
from typing import Any

import pytest
from markdown_it import MarkdownIt

from qaflora_edge.markdown.syntax import cut
from qaflora_edge.markdown.tree import KINDS, MAX_LEXED_CHARS, tree

INLINE = {"em", "strong", "s", "code", "br", "link", "span"}
BLOCK = {
    *("p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "hr", "pre"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}

ANSWER = """\
# One

Some *soft*, **strong**, ~~gone~~ `code`, [a page](https://example.org/x) and
a second row.

3. three
4. four

   with more

- a
- b
  - c

> said

| n | name |
|--:|:----:|
| 1 | `x` |

```python
def add(a, b):  # adds
    return "1" + 2
```

***

The end."""


def texts(node: Any) -> str:
    """All letters of a node."""
    return node if isinstance(node, str) else "".join(map(texts, node[2]))


def tags(node: Any) -> set[str]:
    if isinstance(node, str):
        return set()
    return {node[0], *(tag for child in node[2] for tag in tags(child))}


def test_each_kind() -> None:
    assert tree("a *b* **c** ~~d~~ `e`\nf") == [
        [
            *("p", {}),
            [
                *("a ", ["em", {}, ["b"]], " ", ["strong", {}, ["c"]], " "),
                *(["s", {}, ["d"]], " ", ["code", {}, ["e"]], ["br", {}, []], "f"),
            ],
        ]
    ]
    assert tree("## h\n\n***\n\n> q") == [
        ["h2", {}, ["h"]],
        ["hr", {}, []],
        ["blockquote", {}, [["p", {}, ["q"]]]],
    ]
    assert tree("7. a\n8. b") == [["ol", {"start": 7}, [["li", {}, ["a"]], ["li", {}, ["b"]]]]]
    assert tree("- a\n  - b") == [
        ["ul", {}, [["li", {}, ["a", ["ul", {}, [["li", {}, ["b"]]]]]]]],
    ]
    assert tree("| n | m |\n|--:|---|\n| 1 | 2 |") == [
        [
            *("table", {}),
            [
                [
                    *("thead", {}),
                    [
                        [
                            "tr",
                            {},
                            [["th", {"align": "right"}, ["n"]], ["th", {"align": "left"}, ["m"]]],
                        ]
                    ],
                ],
                [
                    *("tbody", {}),
                    [
                        [
                            "tr",
                            {},
                            [["td", {"align": "right"}, ["1"]], ["td", {"align": "left"}, ["2"]]],
                        ]
                    ],
                ],
            ],
        ]
    ]


def test_code_is_coloured_where_its_language_is_known() -> None:
    assert tree('```python\ndef f():\n    return "x", 1  # y\n```') == [
        [
            *("pre", {"lang": "python"}),
            [
                *(["span", {"kind": "keyword"}, ["def"]], " "),
                *(["span", {"kind": "function"}, ["f"]], "():\n    "),
                *(["span", {"kind": "keyword"}, ["return"]], " "),
                *(["span", {"kind": "string"}, ['"x"']], ", "),
                *(["span", {"kind": "number"}, ["1"]], "  "),
                ["span", {"kind": "comment"}, ["# y"]],
            ],
        ]
    ]
    assert tree("```\ndef\n```") == [["pre", {"lang": ""}, ["def"]]]
    assert tree("```nosuch\n\n def\n\n```") == [["pre", {"lang": "nosuch"}, ["\n def\n"]]]
    long = "x = 1\n" * (MAX_LEXED_CHARS // 6 + 1)
    assert tree(f"```python\n{long}```") == [["pre", {"lang": "python"}, [long[:-1]]]]


@pytest.mark.parametrize("language", ["python", "html", "c++", "json", "diff", "bash", "sql"])
def test_colours_change_no_letter_of_code(language: str) -> None:
    code = '  <a b="c">\n\n\t{"k": [1.5, null]} # é\r\n+x\n-y && $z `q` \\ \u2028 select 1'
    [block] = tree(f"~~~~{language}\n{code}\n~~~~")
    assert texts(block) == code.replace("\r\n", "\n")
    kinds = {child[1]["kind"] for child in block[2] if not isinstance(child, str)}
    assert kinds <= {*KINDS}


def test_a_link_is_a_text_with_an_address() -> None:
    assert tree("[a *b*](https://x.y/z?a=1)") == [
        ["p", {}, [["link", {"address": "https://x.y/z?a=1"}, ["a ", ["em", {}, ["b"]]]]]]
    ]
    for text in (
        "[a](javascript:alert(1))",
        "[a](data:text/html,x)",
        "[a](vbscript:x)",
        "[a](/x)",
        "[a](//x.y)",
        "<https://x.y>",
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[a]: https://x.y\n",
    ):
        assert "link" not in tags(["p", {}, tree(text)])
        assert "".join(map(texts, tree(text))) == text.strip()


class Tags(html.parser.HTMLParser):
    """The elements and the letters of HTML, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append(f"<{tag}>")

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.found.append(" ".join(data.split()))


def outline(node: Any) -> list[str]:
    if isinstance(node, str):
        return [" ".join(node.split())] if node.strip() else []
    inside = [item for child in node[2] for item in outline(child)]
    if node[0] == "pre":
        return ["<pre>", "<code>", " ".join(texts(node).split())]
    return [f"<{'a' if node[0] == 'link' else node[0]}>", *inside]


def test_the_tree_has_what_markdown_its_own_html_has() -> None:
    """markdown-it's renderer is the oracle, where our rules of stars and backslashes differ not."""
    page = Tags()
    page.feed(
        MarkdownIt("commonmark", {"breaks": True}).enable(["table", "strikethrough"]).render(ANSWER)
    )
    assert [item for node in tree(ANSWER) for item in outline(node)] == page.found


WORDS = [
    "a",
    "*b*",
    "**",
    "`",
    "`c`",
    "[d](http://e)",
    "<i>",
    "1.",
    "-",
    "#",
    "|",
    "\\(x\\)",
    "2*3*4",
]
BEGINS = [
    "",
    "",
    "# ",
    "- ",
    "1. ",
    "  - ",
    "> ",
    "| a | b |\n|---|---|\n| ",
    "```python\n",
    "    ",
    "***\n",
]


@pytest.mark.parametrize("seed", range(60))
def test_an_answer_that_arrives_in_parts_has_the_tree_of_the_whole(seed: int) -> None:
    chance = random.Random(seed)
    rows = [
        chance.choice(BEGINS) + " ".join(chance.choices(WORDS, k=chance.randint(0, 6)))
        for _ in range(chance.randint(1, 14))
    ]
    text = chance.choice(["\n", "\n\n"]).join(rows) if seed else ANSWER
    for_good, rest = [], ""
    for char in text:
        settled, rest = cut(rest + char)
        for_good += tree(settled)
    assert [*for_good, *tree(rest)] == tree(text)
    assert {tag for node in tree(text) for tag in tags(node)} <= INLINE | BLOCK
