"""Ollama's API, by its own client: the answers are those of OpenAI's API and of an Engine."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import numpy as np
import ollama
import pytest
from bundles import TinyBundle, make_bundle
from serving import ENGINE, client_of, listening
from test_thoughts import CALL, OPENS, TOOL, speaking
from tiny import QWEN, USER

from qaflora_edge.dialects.ollama import chat_messages

OPTIONS = {"num_predict": 12, "temperature": 1.0, "seed": 4, "num_ctx": 2048}
OURS: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 4}
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>")


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> TinyBundle:
    """A bundle over a base with tokens for infill."""
    place = tmp_path_factory.mktemp("ollama")
    return make_bundle(place, chat_template=QWEN, n_ctx=1024, user_defined=FIM)


@pytest.fixture(scope="module")
def url(served) -> Iterator[str]:
    with listening(served.folder) as url:
        yield url


@pytest.fixture(scope="module")
def client(url) -> Iterator[ollama.Client]:
    with ollama.Client(url) as client:
        yield client


def test_models(client, served) -> None:
    whole, base = client.list().models
    assert (whole.model, base.model) == ("tiny:latest", "tiny:base")
    files = [served.base.path, *(served.folder / "adapters").iterdir()]
    assert whole.size == sum(path.stat().st_size for path in files)
    shown = client.show("tiny:latest")
    assert [model.model for model in client.ps().models] == ["tiny:latest"]
    assert shown.capabilities == ["completion", "tools", "insert"]
    assert shown.modelinfo["llama.context_length"] == ENGINE["n_ctx"]


@pytest.mark.parametrize("model", ["tiny", "tiny:latest", "tiny:single:es"])
def test_a_chat(client, alone, model) -> None:
    strategy = "single:es" if "single" in model else None
    expected = alone.chat(USER, weights=strategy, **OURS)
    asked: Any = {"model": model, "messages": USER, "options": OPTIONS}
    found = client.chat(**asked)
    assert found.message.content == expected.choices[0].message.content
    assert found.done_reason == "length"
    assert (found.prompt_eval_count, found.eval_count) == (expected.usage.prompt_tokens, 12)
    assert found.total_duration > found.eval_duration > 0
    *parts, last = client.chat(**asked, stream=True)
    assert "".join(part.message.content for part in parts) == found.message.content
    assert (last.done, last.done_reason, last.eval_count) == (True, "length", 12)


def test_texts(client, alone) -> None:
    asked: Any = {"model": "tiny", "options": OPTIONS}
    turn = client.generate(prompt="the thing?", system="Be short.", **asked)
    told = [{"role": "system", "content": "Be short."}, *USER]
    assert turn.response == alone.chat(told, **OURS).choices[0].message.content
    raw = client.generate(prompt="the <|im_end|> thing", raw=True, **asked)
    assert raw.response == alone.generate("the <|im_end|> thing", parse_special=True, **OURS).text()
    streamed = client.generate(prompt="the thing?", system="Be short.", stream=True, **asked)
    assert "".join(part.response for part in streamed) == turn.response
    for form in ("json", {"type": "array", "items": {"type": "boolean"}}):
        for more in ({}, {"raw": True}):
            wide = {**asked, "options": {**OPTIONS, "num_predict": 200}}
            found = client.generate(prompt="the thing?", format=form, **wide, **more)
            kind = dict if form == "json" else list
            assert found.done_reason == "length" or isinstance(json.loads(found.response), kind)
    for keep_alive, reason in (("5m", "load"), (0, "unload")):
        loaded = client.generate(model="tiny", keep_alive=keep_alive)
        assert (loaded.done_reason, loaded.response) == (reason, "")
        assert bool(client.ps().models) == (reason == "load")
    with pytest.raises(ollama.ResponseError, match="has images, expected text alone"):
        client.generate(prompt="a", images=[b"x"], **asked)


def test_embeddings(client, alone) -> None:
    texts = ["the thing?", "how far is it"]
    found = client.embed("tiny", texts)
    np.testing.assert_array_equal(found.embeddings, [alone.embed(text) for text in texts])
    assert found.prompt_eval_count == sum(len(alone.tokenize(text)) for text in texts)
    assert client.embed("tiny", []).embeddings == []


def test_bodies_as_other_programs_send_them(served) -> None:
    """Null is unset, whole numbers may be floats, and -1 is nobody's wish."""
    options = {"num_predict": 3.0, "seed": 42.0, "top_k": -1, "stop": [""], "repeat_penalty": 0}
    nulls = dict.fromkeys(("stream", "options", "format", "think", "keep_alive", "tools"))
    messages = [{**USER[0], "images": None}]
    weather = {"name": "weather", "description": None, "parameters": None}
    with client_of(served.folder) as http:
        for more in (
            {"options": {**options, "repeat_last_n": 64.0}},
            {**nulls, "options": {"num_predict": 3, "seed": -1}},
            {"tools": [{"type": "function", "function": weather}], "options": {"num_predict": 3}},
        ):
            found = http.post("/api/chat", json={"model": "tiny", "messages": messages, **more})
            assert found.status_code == 200, found.text
            assert json.loads(found.text.splitlines()[-1])["eval_count"] == 3
        assert http.post("/api/show", json={"name": "tiny:latest"}).status_code == 200
        for path, status in (("/api/pull", 404), ("/api/tags", 405), ("/api/embed", 400)):
            refused = http.post(path, json={"model": "tiny"})
            assert refused.status_code == status
            assert isinstance(refused.json()["error"], str)


def test_thoughts_and_calls(tmp_path) -> None:
    words = ("Hm", " <", "/thi", "nk> \n", CALL)
    with listening(speaking(tmp_path, words, OPENS)) as url, ollama.Client(url) as client:
        assert client.show("speaking").capabilities == ["completion", "tools", "thinking"]
        asked: Any = {"model": "speaking", "messages": USER, "tools": [TOOL]}
        whole = client.chat(**asked).message
        assert (whole.thinking, whole.content) == ("Hm", "")
        parts = [part.message for part in client.chat(**asked, stream=True)]
        assert "".join(part.thinking or "" for part in parts) == "Hm"
        for calls in (whole.tool_calls, [c for part in parts for c in part.tool_calls or ()]):
            ((name, arguments),) = [(c.function.name, c.function.arguments) for c in calls or ()]
            assert (name, arguments) == ("time", {})
        with httpx.Client(base_url=url) as http:
            raw = http.post("/api/chat", json={**asked, "stream": False}).json()
        (call,) = raw["message"]["tool_calls"]
        assert call["function"]["index"] == 0
        answered = {"role": "tool", "tool_name": "time", "content": "noon"}
        again = client.chat(model="speaking", messages=[*USER, whole, answered], think=False)
        assert again.message.thinking is None


def test_calls_get_ids() -> None:
    """Some templates, such as Mistral's, ask for nine letters and digits."""
    call = {"function": {"name": "time", "arguments": {}}}
    result = {"role": "tool", "tool_name": "time", "content": "noon"}
    given = [*USER, {"role": "assistant", "tool_calls": [call, call]}, result, result]
    _, said, *results = chat_messages(given)
    ids = [each["id"] for each in said["tool_calls"]]
    assert [each["tool_call_id"] for each in results] == ids
    assert len({*ids}) == 2
    assert all(len(each) == 9 and each.isalnum() for each in ids)


def test_failures_are_texts(client, url) -> None:
    for fields, status, words in (
        ({"model": "other", "messages": USER}, 404, "expected one of tiny, tiny:base."),
        ({"options": {"temperature": -1}}, 400, "The field options.temperature is -1"),
        (
            {"messages": [{**USER[0], "images": ["eA=="]}]},
            501,
            "expected text alone: a bundle reads no",
        ),
        (
            {"messages": [{"role": "user", "content": "the " * 3000}]},
            400,
            "more than the context of 512",
        ),
    ):
        for stream in (False, True):
            with pytest.raises(ollama.ResponseError) as refused:
                list(client.chat(**{"model": "tiny", "messages": USER, "stream": stream, **fields}))
            assert words in refused.value.error
            assert refused.value.status_code == status


def test_infill(client, served, alone) -> None:
    def expected(prompt: str) -> str:
        return alone.generate(prompt, parse_special=True, max_tokens=12).text()

    begin, end, gap, project, file = FIM
    plain = expected(f"{begin}def f({end}):{gap}")
    options = {"num_predict": 12, "temperature": 0}
    found = client.generate("tiny", "def f(", suffix="):", options=options)
    assert found.response == plain
    with client_of(served.folder) as http:
        body = {"input_prefix": "def ", "prompt": "f(", "input_suffix": "):", "n_predict": 12}
        body["temperature"] = 0
        assert http.post("/infill", json=body).json()["content"] == plain
        extra = [{"filename": "a.py", "text": "x = 1", "time": 1764380000000}]
        files = f"{project}project\n{file}a.py\nx = 1\n{file}file\n"
        prompt = f"{files}{begin}def f({end}):{gap}"
        answer = http.post("/infill", json={**body, "input_extra": extra}).json()
        assert answer["tokens_evaluated"] == len(alone.tokenize(prompt, parse_special=True))
        assert answer["content"] == expected(prompt)
        lines = {str(alone.tokenize("\n")[-1]): 100}
        late = {**body, "n_predict": 200, "t_max_predict_ms": 1, "logit_bias": lines}
        assert 0 < http.post("/infill", json=late).json()["tokens_predicted"] < 200
        wrong = http.post("/infill", json={**body, "input_extra": [[None]]}).json()["error"]
        assert (wrong["param"], wrong["code"]) == ("input_extra[0]", "invalid_value")
        # What the context cannot hold: files, then the prefix's beginning and the suffix's end.
        body |= {"input_prefix": "the " * 2000, "input_suffix": ") " * 2000, "input_extra": extra}
        cut = http.post("/infill", json=body).json()
        assert cut["tokens_evaluated"] == ENGINE["n_ctx"] - 128
        cut = http.post("/infill", json={**body, "n_prompt": 100}).json()
        assert cut["tokens_evaluated"] == 100
    with client_of(served.folder, engine={**ENGINE, "n_ctx": 8192}) as http:
        assert http.post("/infill", json=body).json()["tokens_evaluated"] == 4096
        whole = http.post("/infill", json={**body, "n_prompt": 8192}).json()
        assert whole["tokens_evaluated"] > 6000


def test_infill_needs_a_base_for_it(calibrated) -> None:
    with client_of(calibrated.folder) as http:
        error = http.post("/infill", json={"input_prefix": "a"}).json()["error"]
    told = "The base tiny llama 0 has no tokens for infill, expected those"
    assert error["message"].startswith(told)
