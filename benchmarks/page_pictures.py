"""Make the pictures of the page in docs/images: a mix that is opened, and two versions.

    python benchmarks/page_pictures.py http://127.0.0.1:8080/     of `qaflora serve demo`
    python benchmarks/page_pictures.py --states FOLDER            states to look at

The states are of a server with given answers, at 390 and 1,280 pixels, light and dark. Both need
chromium and chromedriver.
"""

import argparse
import base64
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "tests"))

import scripted_server  # noqa: E402
from browser import Browser, browser  # noqa: E402
from desk import ENTER, Desk, desk_at  # noqa: E402
from scripted_server import Script  # noqa: E402

IMAGES = CHECKOUT / "docs/images"
SUM = "En una granja hay 7 gallinas y cada una pone 4 huevos por semana. El granjero se come 9 "
SUM += "huevos. ¿Cuántos huevos quedan?"
FACT = "Answer as JSON: What is the extension of the Cork shop?"


def show(window: Browser, address: str, width: int, height: int, *, is_dark: bool = False) -> Desk:
    """Open the page as new, in a window of some size."""
    window.prefer(is_dark=is_dark)
    window.command("Storage.clearDataForOrigin", origin=address, storageTypes="all")
    window.open(address)
    window.run("sessionStorage.clear()")
    desk = Desk(window, Script(), address)
    desk.open(width, height)
    desk.set("#temperature", "0")
    return desk


def take(window: Browser, path: Path) -> None:
    """Write what the window shows, but for the speed, which is that of a busy machine."""
    window.run(
        "document.activeElement.blur(); document.getElementById('panel').scrollTo(0, 0);"
        "for (const each of document.querySelectorAll('.foot .facts')) each.hidden = true"
    )
    metrics: dict[str, Any] = window.run("return {width: innerWidth, height: innerHeight}")
    clip = {"x": 0, "y": window.run("return scrollY"), "scale": 1.25, **metrics}
    picture = window.command("Page.captureScreenshot", format="png", clip=clip)
    path.write_bytes(base64.b64decode(picture["data"]))


def take_versions(window: Browser, address: str, width: int, height: int, name: str) -> None:
    """Picture an answer of the mix and one of the base, side by side or one above the other."""
    desk = show(window, address, width, height)
    desk.set("#max-tokens", "80")
    desk.ask(FACT)
    desk.ask_again("base")
    window.run("scrollTo(0, 0)")
    take(window, IMAGES / name)


def main(address: str) -> None:
    with tempfile.TemporaryDirectory() as place, browser(Path(place)) as window:
        for name, is_dark in (("light", False), ("dark", True)):
            desk = show(window, address, 1280, 800, is_dark=is_dark)
            desk.ask(SUM)
            desk.click("button.mix")
            take(window, IMAGES / f"page-{name}.png")
        take_versions(window, address, 1100, 620, "versions-light.png")
        take_versions(window, address, 390, 844, "versions-phone.png")
        show(window, address, 390, 844)
        take(window, IMAGES / "page-phone.png")


def begin(desk: Desk) -> None:
    """Before the first question."""


def mix(desk: Desk) -> None:
    desk.ask()
    desk.click("button.mix")


def relay(desk: Desk) -> None:
    """A draft that is written, above an answer whose draft is opened."""
    names = scripted_server.ADAPTERS["demo"]
    weights = dict.fromkeys(names, 0.0) | {"es": 1.0}
    reasons = {"scores": {"answer": 0.5, "question": 1.9}, "thresholds": {"answer": 1.5}}
    why = dict.fromkeys(names, reasons | {"taken_as": ""})
    desk.script.weights = weights
    desk.script.why = {"because": "es writes what math drafts: math is surer of it.", "why": why}
    draft = "There are 12 x 4 - 6 = 42 rolls left when the day ends."
    desk.script.relay = {"knower": "math", "writer": "es", "draft": draft, "draft_tokens": 19}
    desk.ask("¿Cuántos panes quedan?")
    desk.click("button.mix")
    desk.script.pause_s = 0.2
    desk.type("¿Y mañana?")
    desk.window.press(ENTER)
    desk.window.until(
        "return document.querySelector('.turn:last-child .draft').innerText.length > 50"
    )


def versions(desk: Desk) -> None:
    desk.ask()
    desk.ask_again("static")
    desk.click(".another")


def many(desk: Desk) -> None:
    """64 adapters in the settings."""
    desk.set("#adapter-filter", "4")
    is_open = "return document.getElementById('panel').checkVisibility()"
    if not desk.window.run(is_open):
        desk.click("#open-panel")


def chats(desk: Desk) -> None:
    """Kept chats, the last with an answer that was cut."""
    for text in ("Write a letter to the bakery, and be polite", "Plan a week in Lisbon"):
        desk.ask(text)
        desk.click("#new")
    desk.script.answers["Tell me of dragons"] = "Once upon a time a **dragon** lived in the"
    desk.script.reason = "length"
    desk.set("#system", "Tell stories for children.")
    desk.ask("Tell me of dragons")
    is_open = "return document.getElementById('chats').checkVisibility()"
    if not desk.window.run(is_open):
        desk.click("#open-chats")


def edit(desk: Desk) -> None:
    """An answer that is being changed, under a system prompt that is kept."""
    desk.window.run(
        "localStorage.setItem('settings', JSON.stringify("
        "{presets: [{name: 'Short', text: 'Be short.'}], system: 'Be short.'}))"
    )
    desk.reload()
    desk.ask()
    desk.click("[title='Edit the answer']")


MANY = {"demo": ("es", *(f"subject-{i}" for i in range(1, 64)))}
STATES: dict[str, Callable[[Desk], None]] = {
    "begin": begin,
    "mix": mix,
    "relay": relay,
    "versions": versions,
    "many": many,
    "chats": chats,
    "edit": edit,
}


def take_states(folder: Path) -> None:
    """Picture every state of the page at two widths, light and dark."""
    folder.mkdir(parents=True, exist_ok=True)
    few = dict(scripted_server.ADAPTERS)
    with tempfile.TemporaryDirectory() as place, browser(Path(place)) as window:
        for is_dark in (False, True):
            window.prefer(is_dark=is_dark)
            for width in (390, 1280):
                for name, prepare in STATES.items():
                    scripted_server.ADAPTERS.clear()
                    scripted_server.ADAPTERS.update(MANY if name == "many" else few)
                    with desk_at(window, width) as desk:
                        prepare(desk)
                        kind = "dark" if is_dark else "light"
                        take(window, folder / f"{name}-{width}-{kind}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("address", metavar="URL", nargs="?")
    parser.add_argument("--states", metavar="FOLDER", type=Path)
    options = parser.parse_args()
    if options.states:
        take_states(options.states)
    elif options.address:
        main(options.address)
    else:
        parser.error("give a URL, or --states FOLDER")
