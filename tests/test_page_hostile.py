"""The page of the server before hostile answers: whatever a model writes stays text."""

import pytest
from desk import NEEDS_CHROMIUM

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
