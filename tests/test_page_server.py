"""The page on a real server with a tiny model: what it shows is what the Engine alone says."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import NEEDS_CHROMIUM, Desk
from scripted_server import Script
from serving import ENGINE, listening

from qaflora_edge import Engine
from qaflora_edge.show import reason_rows, who_spoke

pytestmark = NEEDS_CHROMIUM

QUESTION = "the thing?"
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def desk(window, calibrated, tmp_path) -> Iterator[Desk]:
    with listening(calibrated.folder, adapters=tmp_path) as address:
        made = Desk(window, Script(), f"{address}/")
        window.log()
        made.open()
        made.set("#max-tokens", "12")
        made.set("#temperature", "0")
        yield made
        window.open("about:blank")


def test_text_and_weights_are_those_of_the_engine_alone(desk, calibrated) -> None:
    with Engine(calibrated.folder, **ENGINE) as engine:  # type: ignore[arg-type]
        for n, strategy in enumerate(("", "spectr"), 1):
            fusion = engine.weights(engine.chat_tokens(MESSAGES), strategy=strategy or None)
            answer = engine.chat(MESSAGES, weights=strategy or None, max_tokens=12, temperature=0)
            desk.set("#strategy", strategy)
            desk.click("#new")
            desk.ask(QUESTION)
            kept = max(desk.kept(n), key=lambda chat: chat["time"])["turns"][0]
            [choice] = answer["choices"]
            assert kept["answers"][0]["text"] == choice["message"]["content"]
            assert kept["answers"][0]["state"] == choice["finish_reason"]
            assert kept["answers"][0]["fusion"]["layers"] == {
                name: pytest.approx(row.tolist(), abs=1e-6)
                for name, row in zip(fusion.adapters, fusion.weights, strict=True)
            }
            desk.click("button.mix")
            assert desk.window.run(
                "return [...document.querySelectorAll('.cell')].map(e => e.title)"
            ) == [
                f"{name}, layer {layer}: weight {weight:.3f}"
                for name, row in zip(fusion.adapters, fusion.weights, strict=True)
                for layer, weight in enumerate(row.tolist())
            ]
        for strategy in ("two-place", "static"):
            fusion = engine.weights(MESSAGES, strategy=strategy)
            desk.set("#strategy", strategy)
            desk.click("#new")
            desk.ask(QUESTION)
            spoke = " · ".join(text.replace("\n", " ") for text in desk.texts(".mix .entry"))
            assert spoke == who_spoke(fusion)
            desk.click("button.mix")
            rows = "return [...document.querySelectorAll('.reasons tr')].map(r => "
            rows += "[...r.children].map(cell => cell.textContent))"
            assert desk.window.run(rows) == reason_rows(fusion)
            assert desk.texts(".why, .cell") == [fusion.because] * bool(fusion.because)
    assert desk.window.log() == []


def test_an_edited_answer_goes_on_as_that_of_the_engine_alone(desk, calibrated) -> None:
    desk.set("#strategy", "spectr")
    desk.ask(QUESTION)
    desk.click("[title='Edit the answer']")
    desk.set(".answer textarea", "The thing is")
    desk.click(".editor .main")
    desk.click(".more")
    desk.wait()
    [answer] = desk.kept()[0]["turns"][0]["answers"]
    messages = [*MESSAGES, {"role": "assistant", "content": "The thing is"}]
    rows = [answer["fusion"]["layers"][name] for name in ("math", "es")]
    with Engine(calibrated.folder, **ENGINE) as engine:  # type: ignore[arg-type]
        more = engine.chat(messages, weights=rows, max_tokens=12, temperature=0)
    assert answer["text"] == "The thing is" + more["choices"][0]["message"]["content"]
    assert desk.window.log() == []


def test_adapters_that_are_dropped_take_part(desk, calibrated) -> None:
    def drop(path: Path, selector: str) -> str:
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            desk.window.command("Input.dispatchDragEvent", type=kind, data=data, x=300, y=300)
        shown = f"const found = document.querySelector('{selector}'); return !found.hidden"
        desk.window.until(f"{shown} && !/^Adding/.test(found.textContent)")
        return desk.text(selector)

    assert drop(calibrated.peft, "#work") == "peft takes part from the next question on."
    assert desk.texts("#empty .entry") == ["math", "es", "peft"]
    desk.ask(QUESTION)
    fusion = desk.kept()[0]["turns"][0]["answers"][0]["fusion"]
    assert {*fusion["layers"]} == {"math", "es", "peft"}
    assert "'es' is taken already" in drop(calibrated.adapter.path, "#trouble")
    assert "bundle is no adapter. Drop a PEFT folder" in drop(calibrated.folder, "#trouble")
    for _ in range(2):  # the second press means it
        desk.click("[aria-label='Remove es']")
    removed = "return document.getElementById('work-text').textContent === 'es is removed.'"
    desk.window.until(removed)
    assert desk.texts(".adapters bdi") == ["math", "peft"]
