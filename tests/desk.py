"""The page of the server in a window of Chromium, used as somebody uses it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from browser import Browser, missing
from scripted_server import Script, app, served

NEEDS_CHROMIUM = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]
ENTER, ESCAPE, SHIFT, TAB = "\ue007", "\ue00c", "\ue008", "\ue004"
LEFT, UP, RIGHT, DOWN = "\ue012", "\ue013", "\ue014", "\ue015"
QUESTION = "How many are left?"
ANSWER = """\
There are **42** rolls.

1. bake
2. sell

```python
print(42)
```

| a | b |
|---|--:|
| 1 | 2 |"""
LONG = "\n\n".join(f"Paragraph {i} of a long answer, with some words in it." for i in range(120))


@dataclass
class Desk:
    """A window on the page, and what the server behind it says."""

    window: Browser
    script: Script
    address: str

    def open(self, width: int = 1100, height: int = 800) -> None:
        """The page in a window of some size; its address is new, so that nothing is kept of it."""
        self.window.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.reload()

    def reload(self) -> None:
        self.window.open(self.address)
        self.window.until("return document.querySelectorAll('#bundle option').length")

    def type(self, text: str) -> None:
        self.window.run("document.getElementById('question').focus()")
        self.window.command("Input.insertText", text=text)

    def ask(self, text: str = QUESTION) -> None:
        self.type(text)
        self.window.press(ENTER)
        self.wait()

    def ask_again(self, strategy: str) -> None:
        """Ask for a version of the last answer under a strategy, by the name that is shown."""
        self.window.run(
            "[...document.querySelectorAll('.another')].at(-1).click();"
            "[...document.querySelectorAll('.versions .choices:not([hidden]) .chip')]"
            ".find(e => e.textContent === arguments[0]).click()",
            strategy,
        )
        self.wait()

    def wait(self) -> None:
        self.window.until(
            "return document.getElementById('send').title === 'Send' "
            "&& document.querySelectorAll('.answer').length "
            "&& !document.querySelector('[aria-busy=true]')"
        )

    def wait_for_texts(self) -> None:
        """Until every answer of a chat that was opened is laid out."""
        self.window.until(
            "return [...document.querySelectorAll('.markdown')].every(e => e.innerText.trim())"
        )

    def set(self, selector: str, value: Any) -> None:
        """Give a field another value, as a user does."""
        self.window.run(
            "const [selector, value] = arguments, field = document.querySelector(selector);"
            "field.focus(); if (field.type === 'checkbox') { field.click(); return; }"
            "field.value = value; field.dispatchEvent(new Event('input', {bubbles: true}));"
            "field.dispatchEvent(new Event('change', {bubbles: true}));",
            selector,
            value,
        )

    def click(self, selector: str) -> None:
        self.window.run("document.querySelector(arguments[0]).click()", selector)

    def kept(self, n: int = 1) -> list[dict[str, Any]]:
        """The chats in the browser's database, once there are n."""
        self.window.run("window.kept = undefined")  # of an earlier call
        self.window.until(
            "const open = indexedDB.open('qaflora'); open.onsuccess = () => {"
            " const all = open.result.transaction('chats').objectStore('chats').getAll();"
            " all.onsuccess = () => { window.kept = all.result; open.result.close(); }; };"
            "return window.kept?.length === arguments[0]",
            n,
        )
        found: list[dict[str, Any]] = self.window.run("return window.kept")
        return found

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.window.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", selector
        )
        return found

    def text(self, selector: str) -> str:
        [found] = self.texts(selector)
        return found


@contextlib.contextmanager
def desk_at(window: Browser, width: int = 1100) -> Iterator[Desk]:
    """A page that is opened for the first time, on a server of its own."""
    script = Script(answers={QUESTION: ANSWER, "long": LONG})
    with served(app(script)) as address:
        made = Desk(window, script, address)
        window.log()  # of whom was here before
        made.open(width)
        yield made
        window.open("about:blank")  # streams that are still open would keep the server
