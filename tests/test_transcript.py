"""The first hour in docs/quickstart.md: typed anew, its stable parts are those of the page."""

import os

import pytest
import transcript

from qaflora_edge.formats.names import pulled_model


def check(shown: str) -> None:
    outputs = transcript.outputs(shown)
    assert list(outputs) == [step.command for step in transcript.STEPS]
    for step in transcript.STEPS:
        missing = [text for text in step.stable if text not in outputs[step.command]]
        assert not missing, f"{step.command}:\n{outputs[step.command]}"


def test_page_has_every_step() -> None:
    found = transcript.BLOCK.search(transcript.PAGE.read_text(encoding="utf-8"))
    check(found[1])


@pytest.mark.slow
def test_typed_in_a_clone_it_shows_the_same(tmp_path) -> None:
    demo = transcript.DEMO["QWEN" if "QAFLORA_TEST_DEMO" in os.environ else "SMALL"]
    if pulled_model(demo.base) is None:
        pytest.skip(f"{demo.base} was not pulled")
    check(transcript.type_all(transcript.make_clone(tmp_path, demo.bundle)))
