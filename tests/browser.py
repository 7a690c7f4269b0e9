"""A headless Chromium, driven over WebDriver with the standard library alone."""

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patience import PATIENCE_S

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run "
    "--disable-component-update --disable-sync --hide-scrollbars --disable-dev-shm-usage"
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's name for a reference


def missing() -> str:
    """Why there is no browser to test with; empty when there is one."""
    if not (shutil.which("chromium") or shutil.which("chromium-browser")):
        return "chromium is not installed"
    return "" if shutil.which("chromedriver") else "chromedriver is not installed"


class Browser:
    """One window. Every call waits for the page to have done it."""

    def __init__(self, address: str, profile: Path) -> None:
        binary = shutil.which("chromium") or shutil.which("chromium-browser")
        options = {"binary": binary, "args": [*FLAGS.split(), f"--user-data-dir={profile}"]}
        always = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        wanted = {"alwaysMatch": always}
        self._address = address
        value = self._send("POST", "/session", {"capabilities": wanted})
        self._session = f"/session/{value['sessionId']}"

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data=data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise RuntimeError(json.load(error)["value"]["message"]) from error

    def send(self, method: str, path: str, body: Any = None) -> Any:
        return self._send(method, self._session + path, body)

    def open(self, page: Path | str, width: int = 1000, height: int = 800) -> None:
        """Open a file or an address."""
        self.send("POST", "/window/rect", {"width": width, "height": height})
        self.send("POST", "/url", {"url": page if isinstance(page, str) else page.as_uri()})

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of Chromium's own protocol."""
        return self.send("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def reset(self) -> None:
        """As it was when it was new, but for what pages have kept."""
        self.open("about:blank")
        self.command("Emulation.clearDeviceMetricsOverride")
        self.prefer(is_dark=False)
        self.log()

    def prefer(self, *, is_dark: bool) -> None:
        """What the user's system says of light and dark."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])

    def until(self, script: str, *args: Any) -> Any:
        """Wait until a script gives something that counts as true."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := self.run(script, *args)):
            assert time.monotonic() < deadline, script
            time.sleep(0.02)
        return found

    def run(self, script: str, *args: Any) -> Any:
        return self.send("POST", "/execute/sync", {"script": script, "args": args})

    def find(self, selector: str) -> dict[str, str]:
        query = {"using": "css selector", "value": selector}
        found: dict[str, str] = self.send("POST", "/element", query)
        return found

    def point(self, selector: str) -> None:
        """Move the mouse to the middle of an element."""
        origin = self.find(selector)
        step = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": origin}
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}}
        self.send("POST", "/actions", {"actions": [{**mouse, "actions": [step]}]})

    def press(self, *keys: str) -> None:
        """Press keys one after the other: letters, or WebDriver's code points for others."""
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        keys = {"type": "key", "id": "keys", "actions": steps}
        self.send("POST", "/actions", {"actions": [keys]})

    def log(self) -> list[str]:
        """What the console said since the last call, policy violations included."""
        return [entry["message"] for entry in self.send("POST", "/se/log", {"type": "browser"})]

    def close(self) -> None:
        self.send("DELETE", "")


def started(n_more: int = 4) -> tuple[subprocess.Popen[str], str]:
    """Start chromedriver on a free port, which another program may take before it does."""
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    said = ""
    for line in driver.stdout or ():
        if found := re.search(r"successfully on port (\d+)", line):
            return driver, found[1]
        said += line
    assert n_more, said
    return started(n_more - 1)


@contextlib.contextmanager
def browser(place: Path) -> Iterator[Browser]:
    """Start chromedriver, and a browser with a new profile below `place`."""
    driver, port = started()
    try:
        window = Browser(f"http://127.0.0.1:{port}", place / "profile")
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(timeout=PATIENCE_S)
        driver.stdout.close()
