"""Adapters that are chosen on the page, in a real browser and a real server."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from desk import NEEDS_CHROMIUM, Desk
from scripted_server import Script
from serving import listening
from tiny import write_tiny_adapter

from qaflora_edge.server.uploads import MAX_UPLOAD_BYTES

pytestmark = NEEDS_CHROMIUM


@dataclass
class Chooser:
    """The page's file input; `place` is the folder that uploads lie in."""

    desk: Desk
    place: Path

    def choose(self, path: Path) -> None:
        element = next(iter(self.desk.window.find("#file-input").values()))
        self.desk.window.send("POST", f"/element/{element}/value", {"text": str(path)})

    def until(self, part: str, text: str) -> str:
        """What a part of the page says, once it has a text in it."""
        self.desk.window.until(
            "const part = document.getElementById(arguments[0]);"
            "return !part.hidden && part.textContent.includes(arguments[1])",
            part,
            text,
        )
        return self.desk.text(f"#{part}")


@pytest.fixture
def chooser(made, window, tmp_path) -> Iterator[Chooser]:
    place = tmp_path / "uploads"
    place.mkdir()
    with listening(made.folder, adapters=place, hosts=frozenset({"127.0.0.1"})) as address:
        desk = Desk(window, Script(answers={}), f"{address}/")
        desk.open()
        window.run("document.getElementById('file-input').hidden = false")
        yield Chooser(desk, place)


@pytest.fixture
def adapter(made, tmp_path) -> Path:
    return write_tiny_adapter(tmp_path / "müsli 1.gguf", made.base, seed=6).path


def test_a_refused_file_may_be_chosen_again_once_it_is_mended(chooser, adapter) -> None:
    data = adapter.read_bytes()
    adapter.write_bytes(data[:500])
    chooser.choose(adapter)
    said = chooser.until("trouble", "The file is truncated")
    assert said.startswith("Cannot read musli-1.gguf: ")  # not where it lies
    assert list(chooser.place.iterdir()) == []
    adapter.write_bytes(data)
    chooser.choose(adapter)
    chooser.until("work", "musli-1 takes part")


def test_a_file_that_is_chosen_while_another_is_added_comes_after_it(chooser, adapter) -> None:
    broken = adapter.with_name("broken.gguf")
    broken.write_bytes(b"<b>" * 999)
    chooser.choose(broken)
    chooser.choose(adapter)
    chooser.until("work", "takes part")
    assert "its beginning is b'<b><'" in chooser.desk.text("#trouble")


def test_a_file_that_is_too_large_is_not_sent(chooser, adapter) -> None:
    os.truncate(adapter, MAX_UPLOAD_BYTES + 1)
    chooser.choose(adapter)
    chooser.until("trouble", "müsli 1.gguf has more than 1 GiB.")
    sent = "return performance.getEntriesByType('resource').filter(e => e.name.includes('upload'))"
    assert chooser.desk.window.run(sent) == []
