"""The page of the server before hostile answers: whatever a model writes stays text."""

import re
from pathlib import Path

import pytest
from desk import NEEDS_CHROMIUM

from qaflora_edge.server import page

pytestmark = NEEDS_CHROMIUM

EVIL = [
    "<script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    "<iframe src=\"javascript:parent.document.title='pwned'\"></iframe>",
    "<style>*{display:none!important}@import url(https://evil.example/x.css);</style>",
    '<meta http-equiv=refresh content="0;url=https://evil.example">',
    "<a href=\"javascript:document.title='pwned'\">x</a>",
    "<math><mtext><table><mglyph><style><img src=x onerror=document.title='pwned'>",
    "</div></main></body><script>document.title='pwned'</script>",
    "[x](javascript:document.title='pwned')",
    "[x](&#106;avascript:document.title='pwned')",
    "[x](https://evil.example/?q=secret)",
    "![x][y]\n\n[y]: https://evil.example/x.png",
    "<https://evil.example/x> https://evil.example/y",
    "```<img src=x onerror=document.title='pwned'>\n<script>document.title='pwned'</script>\n```",
    "| <script>document.title='pwned'</script> | b |\n|---|---|\n"
    "| <img src=x onerror=document.title='pwned'> | [x](javascript:x) |",
    "- <img src=x onerror=document.title='pwned'>\n> <svg/onload=document.title='pwned'>",
    "\\(\\text{<img src=x onerror=document.title='pwned'>}\\) $<style>$ \\[<script>\\]",
    r"\(\href{javascript:document.title='pwned'}{x}\) \(\includegraphics{https://evil.example/y}\)",
    "\u202e<script>\u202c \u0000 \ufeff<img src=x onerror=document.title='pwned'>",
]

# What no answer may be made of.
FOREIGN = (
    ".answer :is(script, style, img, svg:not(.icon), iframe, object, embed, form, input, link,"
    "meta, base, a, video, audio, source, semantics, details:not(.answer > .thought), body,"
    "button:not([title]), [onerror], [onload], [style]:not(.bar *, .grid, .cell, math, math *))"
)


def test_no_part_of_a_hostile_answer_acts(desk) -> None:
    """All in one stream, which shows each half, too; then each alone, as a reload shows them."""
    desk.script.answers["all"] = "\n\n".join(EVIL)
    desk.ask("all")
    [turn] = desk.kept()[0]["turns"]
    turns = [{**turn, "answers": [{**turn["answers"][0], "text": text}]} for text in EVIL]
    keep = "sessionStorage.setItem('chat', JSON.stringify({turns: arguments[0]}))"
    desk.window.run(keep, [turn, *turns])
    desk.reload()
    desk.wait_for_texts()
    assert len(desk.texts(".answer")) == len(EVIL) + 1
    assert desk.window.run("return document.title") == "qaflora"
    assert desk.window.run("return location.href") == desk.address
    found = "return [...document.querySelectorAll(arguments[0])].map(e => e.outerHTML)"
    assert desk.window.run(found, FOREIGN) == []
    assert desk.window.run("return document.querySelectorAll('#send, #question').length") == 2
    asked = desk.window.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in asked if not name.startswith(desk.address)] == []
    assert "evil.example/x.css" in desk.texts(".markdown")[0]  # nothing is hidden either
    # Everywhere a mouse can go, nothing happens.
    desk.window.run(
        "for (const e of document.querySelectorAll('.markdown *:not(button, button *)'))"
        "{ e.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));"
        " e.dispatchEvent(new MouseEvent('click', {bubbles: true})); }"
    )
    assert desk.window.run("return [document.title, location.href]") == ["qaflora", desk.address]
    assert desk.window.log() == []


def temml_formulas() -> list[str]:
    """Each command of Temml with wrong arguments, each word of its that may be an environment."""
    source = (Path(page.__file__).parent / "vendor" / "temml.min.js").read_text("utf-8")
    commands = sorted({*re.findall(r"\\\\([a-zA-Z@]+\*?|[!,:;=>])", source)})
    words = sorted({*re.findall(r'"([a-zA-Z]+\*?)"', source)})
    arguments = ["", "{}{}", r"{a\cr b}", "{a & b}", "_", "'", "{question}"]
    bodies = [r"\\", r"x\label{trouble}", "{c}a&b&c"]
    found = [rf"\{name}{argument}" for name in commands for argument in arguments]
    found += [rf"\begin{{{word}}}{body}\end{{{word}}}" for word in words for body in bodies]
    return found


def test_a_formula_is_drawn_or_shown_as_its_source(desk) -> None:
    """One answer of thousands, of which Temml itself throws at hundreds; then a reload."""
    sources = [f"\\[{formula}\\]" for formula in temml_formulas()]
    sources.append(r"$$\bordermatrix{a\cr b}$$")
    desk.script.answers["all"] = "\n\n".join(sources)
    desk.script.piece_chars = 10**6
    desk.ask("all")
    desk.reload()
    desk.wait_for_texts()
    shown: list[str | None] = desk.window.run(
        "return [...document.querySelectorAll('.markdown p')]"
        ".map(p => p.querySelector('math') ? null : p.textContent)"
    )
    pairs = zip(shown, sources, strict=True)
    assert {text for text, source in pairs if text != source} == {None}  # those that are drawn
    assert shown[-1] == sources[-1]
    assert shown.count(None) > 1000
    assert desk.window.run("return document.querySelectorAll('.markdown :is([id], a)').length") == 0
    assert [line for line in desk.window.log() if "inline style violates" not in line] == []


def test_an_answer_that_cannot_be_drawn_is_plain_text_beside_others(desk) -> None:
    desk.ask()
    [turn] = desk.kept()[0]["turns"]
    [answer] = turn["answers"]
    odd = [
        {**turn, "answers": [{**answer, "text": "*Odd*", "fusion": {"weights": 1, "layers": 2}}]}
    ]
    keep = "sessionStorage.setItem('chat', JSON.stringify({turns: arguments[0]}))"
    desk.window.run(keep, [turn, *odd, turn])
    desk.reload()
    desk.wait_for_texts()
    texts = desk.texts(".markdown")
    assert (len(texts), texts[1], texts[0]) == (3, "Odd", texts[2])
    # The same where drawing a block fails.
    desk.window.run("Object.hasOwn = () => false")
    desk.click(".turn:last-child [title='Edit the answer']")
    desk.set(".turn:last-child .answer textarea", "# *As* it\nis")
    desk.click(".turn:last-child .editor .main")
    assert desk.text(".as-written") == "# *As* it\nis"


def test_hostile_names_and_errors_are_text(desk, monkeypatch) -> None:
    evil = EVIL[1]
    monkeypatch.setattr("scripted_server.ADAPTERS", {evil: (evil, "es")})
    desk.script.key = ""
    desk.open()
    desk.ask()
    desk.click("button.mix")
    desk.script.refusal = (400, evil, {})
    desk.ask(evil)
    assert desk.texts(".note")[-1] == evil
    assert desk.texts(".said")[-1] == evil
    assert desk.window.run("return document.title") == "qaflora"
    assert desk.window.run("return document.querySelectorAll('img').length") == 0
    assert [line for line in desk.window.log() if "status of 400" not in line] == []


def test_the_policy_holds_even_if_the_page_had_a_mistake(desk) -> None:
    desk.ask()
    for mistake in (
        "document.querySelector('.markdown').innerHTML = arguments[0]",
        "document.write(arguments[0])",
        "document.querySelector('.markdown').insertAdjacentHTML('beforeend', arguments[0])",
        "document.createElement('iframe').srcdoc = arguments[0]",
    ):
        with pytest.raises(RuntimeError, match="TrustedHTML"):
            desk.window.run(mistake, EVIL[1])
    desk.window.run(
        "const make = (tag, properties) =>"
        " document.body.append(Object.assign(document.createElement(tag), properties));"
        "make('img', {src: 'https://evil.example/x.png'});"
        "make('iframe', {src: 'https://evil.example'});"
        "make('style', {textContent: 'body { opacity: 0.5; }'});"
    )
    assert desk.window.run("return getComputedStyle(document.body).opacity") == "1"
    assert desk.window.run("return document.title") == "qaflora"
    assert any("Content Security Policy" in line for line in desk.window.log())
