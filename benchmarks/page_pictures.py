"""Make the pictures of the page in docs/images: a mix that is opened, and two versions.

    python benchmarks/page_pictures.py http://127.0.0.1:8080/

It asks `qaflora serve demo`, and needs chromium and chromedriver.
"""

import argparse
import base64
import sys
import tempfile
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "tests"))

from browser import Browser, browser  # noqa: E402
from desk import Desk  # noqa: E402
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


def take(window: Browser, name: str) -> None:
    """Write what the window shows, but for the speed, which is that of a busy machine."""
    window.run(
        "document.activeElement.blur(); document.getElementById('panel').scrollTo(0, 0);"
        "for (const each of document.querySelectorAll('.foot .facts')) each.hidden = true"
    )
    metrics: dict[str, Any] = window.run("return {width: innerWidth, height: innerHeight}")
    clip = {"x": 0, "y": window.run("return scrollY"), "scale": 1.5, **metrics}
    picture = window.command("Page.captureScreenshot", format="png", clip=clip)
    (IMAGES / name).write_bytes(base64.b64decode(picture["data"]))


def take_versions(window: Browser, address: str, width: int, height: int, name: str) -> None:
    """Picture an answer of the mix and one of the base, side by side or one above the other."""
    desk = show(window, address, width, height)
    desk.set("#max-tokens", "80")
    desk.ask(FACT)
    desk.ask_again("base")
    window.run("scrollTo(0, 0)")
    take(window, name)


def main(address: str) -> None:
    with tempfile.TemporaryDirectory() as place, browser(Path(place)) as window:
        for name, is_dark in (("light", False), ("dark", True)):
            desk = show(window, address, 1100, 800, is_dark=is_dark)
            desk.ask(SUM)
            desk.click("button.mix")
            take(window, f"page-{name}.png")
        take_versions(window, address, 1100, 620, "versions-light.png")
        take_versions(window, address, 390, 844, "versions-phone.png")
        show(window, address, 390, 844)
        take(window, "page-phone.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("address", metavar="URL")
    main(parser.parse_args().address)
