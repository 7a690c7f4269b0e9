"""The server's answers: those of an Engine alone, in OpenAI's shapes."""

import json
from typing import Any

import numpy as np
import pytest
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serving import client_of, error_of
from starlette.testclient import TestClient
from tiny import USER

from qaflora_edge.backend.model import Model as Model_

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def events(text: str) -> list[Any]:
    """What a stream holds, as JSON; its end is checked."""
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert found[-1] == "[DONE]"
    return [json.loads(each) for each in found[:-1]]


def answer(client: TestClient, path: str = CHAT, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def failure(client: TestClient, path: str = CHAT, **body: Any) -> tuple[int, dict[str, Any]]:
    response = client.post(path, json=body)
    found = response.json()
    assert list(found) == ["error"]
    assert list(found["error"]) == ["message", "type", "param", "code"]
    return response.status_code, found["error"]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "seed": 7, "n": 3, "stop": ["e", "a"]},
        {"presence_penalty": 2.0, "logit_bias": {"65": 9}, "logprobs": True, "top_logprobs": 3},
        {"response_format": {"type": "json_object"}, "max_tokens": 30},
        {"temperature": None, "stop": None, "user": "me", "store": True, "metadata": {}},
    ],
)
def test_answer_is_that_of_an_engine_alone(client, alone, options) -> None:
    options = {"max_tokens": 12, **options}
    expected = alone.chat(USER, **options)
    found = answer(client, model="tiny", messages=USER, **options)
    assert found["choices"] == expected["choices"]
    assert found["usage"] == expected["usage"]
    ChatCompletion.model_validate(found, strict=True)

    body = {"model": "tiny", "messages": USER, "stream": True, **options}
    response = client.post(CHAT, json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = events(response.text)
    chunks = [chunk for chunk in chunks if "draft" not in chunk.get("fusion", {})]
    wanted = list(alone.chat(USER, stream=True, **options))
    assert [chunk["choices"] for chunk in chunks] == [chunk["choices"] for chunk in wanted]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_progress_of_the_prompt_is_told_if_asked(client, alone, path) -> None:
    text = "how far is it " * 20 + path
    messages = [{"role": "user", "content": text}]
    is_chat = path == CHAT
    prompt = {"messages": messages} if is_chat else {"prompt": text}
    n_token = len(alone.chat_tokens(messages) if is_chat else alone.tokenize(text))
    body = {"model": "tiny", "max_tokens": 4, "n": 2, "stream": True, **prompt}
    chunks = events(client.post(path, json={**body, "return_progress": True}).text)
    told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    plain = events(client.post(path, json=body).text)
    assert [chunk["choices"] for chunk in chunks[len(told) :]] == [c["choices"] for c in plain]
    assert {each["total"] for each in told} == {n_token}
    for stage in ("weighing", "reading"):
        done = [each["processed"] for each in told if each["stage"] == stage]
        assert done == sorted(set(done)) != []
    assert (told[-1]["stage"], told[-1]["processed"]) == ("reading", n_token)


def test_usage_ends_a_stream_that_asks_for_it(client) -> None:
    body = {"model": "tiny", "messages": USER, "max_tokens": 4, "stream": True}
    response = client.post(CHAT, json={**body, "stream_options": {"include_usage": True}})
    first, *others, last = events(response.text)
    assert {chunk["usage"] for chunk in (first, *others)} == {None}
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert {"probe_ms", "prefill_ms", "decode_ms", "tokens_per_second"} < set(last["timings"])
    assert first["fusion"] == last["fusion"]
    mix = first["fusion"]["weights"].items()
    assert response.headers["x-fusion"] == ",".join(f"{name}={mean:.2f}" for name, mean in mix)
    ChatCompletionChunk.model_validate(last, strict=True)
    assert not any("fusion" in chunk for chunk in others)
    plain = events(client.post(CHAT, json=body).text)
    assert not any("usage" in chunk for chunk in plain)


def test_the_mix_is_told(client, alone) -> None:
    fusion = alone.weights(alone.chat_tokens(USER), strategy="calibrated")
    means = {
        name: round(float(row.mean()), 6)
        for name, row in zip(fusion.adapters, fusion.weights, strict=True)
    }
    asked = {"model": "tiny:calibrated", "messages": USER, "max_tokens": 1}
    response = client.post(CHAT, json=asked)
    told = response.json()["fusion"]
    assert told.pop("probe_ms") > 0
    assert told == {"strategy": "calibrated", "weights": means}
    assert response.headers["x-fusion"] == ",".join(f"{n}={means[n]:.2f}" for n in means)
    assert response.json()["model"] == "tiny:calibrated"

    layers = answer(client, **asked, fusion={"return": "layers"})["fusion"]["layers"]
    assert np.array_equal(np.float32([layers["math"], layers["es"]]), fusion.weights)

    asked["model"] = "tiny:two-place"
    told = answer(client, **asked, fusion={"return": "why"})["fusion"]
    expected = alone.weights(USER, strategy="two-place").why_dict()
    assert {key: told[key] for key in told.keys() - {"strategy", "probe_ms", "weights"}} == expected

    response = client.post(CHAT, json={**asked, "fusion": {"return": "none"}})
    assert "fusion" not in response.json()
    assert "x-fusion" not in response.headers


@pytest.mark.parametrize(
    ("body", "strategy", "weights"),
    [
        ({"fusion": {"strategy": "single:es"}}, "single:es", {"math": 0, "es": 1}),
        ({"model": "tiny:base"}, "base", {"math": 0, "es": 0}),
        ({"fusion": {"adapters": ["es"]}}, "qa-flora", {"es": 1}),
        ({"fusion": {"weights": {"math": 0.75}}}, "manual:math=0.75", {"math": 0.75, "es": 0}),
        ({"fusion": {"weights": [[1] * 3, [0, 0.5, 1]]}}, "manual", {"math": 1, "es": 0.5}),
        ({"lora": [{"id": 1, "scale": 0.5}]}, "manual:es=0.5", {"math": 0, "es": 0.5}),
    ],
)
def test_weights_by_request(client, body, strategy, weights) -> None:
    found = answer(client, **{"model": "tiny", "messages": USER, "max_tokens": 1, **body})["fusion"]
    assert (found["strategy"], found["weights"]) == (strategy, weights)


def test_weights_alone_are_those_of_the_command(client, alone) -> None:
    for body, prompt in (
        ({"messages": USER}, alone.chat_tokens(USER)),
        ({"prompt": USER[0]["content"]}, alone.chat_tokens(USER)),
        ({"prompt": "the king", "raw": True}, alone.tokenize("the king")),
    ):
        found = answer(client, "/v1/weights", model="tiny:calibrated", **body)
        expected = alone.weights(prompt, strategy="calibrated").to_dict()
        assert {**found, "probe_ms": 0} == {**expected, "probe_ms": 0}
    status, error = failure(client, "/v1/weights", prompt="a", messages=USER)
    assert (status, error["param"]) == (400, "prompt")


def test_completions_of_text(client, alone) -> None:
    options = {"temperature": 1.0, "seed": 3}
    expected = alone.generate("the king", max_tokens=16, **options)
    text = expected.text()
    found = answer(client, TEXT, model="tiny", prompt="the king", **options)
    Completion.model_validate(found, strict=True)
    assert found["choices"][0]["text"] == text
    n_prompt, n_completion = expected.n_prompt, expected.n_completion
    assert found["usage"] == {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_completion,
        "total_tokens": n_prompt + n_completion,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    tokens = alone.tokenize("the king")
    found = answer(client, TEXT, model="tiny", prompt=[tokens, "a"], n=2, **options)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert found["choices"][0]["text"] == text
    assert found["usage"]["prompt_tokens"] == len(tokens) + 1
    stream = {"model": "tiny", "prompt": "the king", "stream": True, **options}
    chunks = events(client.post(TEXT, json=stream).text)
    for chunk in chunks:  # the type has no None, which OpenAI sends until the end
        chunk["choices"][0]["finish_reason"] = chunk["choices"][0]["finish_reason"] or "stop"
        Completion.model_validate(chunk, strict=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


def test_usage_tells_what_was_not_prefilled(client, alone) -> None:
    """A message that another prompt began with, under the same weights, is not."""
    system = {"role": "system", "content": "the king and the queen " * 4}
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 1}
    (end,) = alone._model.tokenize("<|im_end|>", add_special=False, parse_special=True)
    n_system = alone.chat_tokens([system, *USER]).index(end) + 1
    for text, scale, n_cached in (("a", 0.1, 0), ("b", 0.1, n_system), ("b", 0.2, 0)):
        messages = [system, {"role": "user", "content": text}]
        found = answer(client, **asked, messages=messages, lora=[{"id": 0, "scale": scale}])
        assert found["usage"]["prompt_tokens_details"] == {"cached_tokens": n_cached}
        times, n_prompt = found["timings"], found["usage"]["prompt_tokens"]
        assert (times["cache_n"], times["prompt_n"]) == (n_cached, n_prompt - n_cached)


def test_paths_of_llama_server(client) -> None:
    rows = [{"id": i, "path": name, "scale": 0.0} for i, name in enumerate(("math", "es"))]
    assert client.get("/lora-adapters?model=tiny").json() == rows
    assert client.get("/lora-adapters?model=x").status_code == 404

    asked = {"model": "tiny", "prompt": "the king", "n_predict": 5, "seed": 1, "temperature": 1}
    expected = answer(client, TEXT, **asked, max_tokens=5)
    whole = answer(client, "/completion", **asked)
    assert whole["content"] == expected["choices"][0]["text"]
    assert (whole["tokens_predicted"], whole["stop_type"], whole["stop"]) == (5, "limit", True)
    assert whole["fusion"]["weights"].keys() == {"math", "es"}
    assert whole["timings"]["predicted_n"] == 5
    lines = client.post("/completion", json={**asked, "stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert "".join(chunk["content"] for chunk in chunks) == whole["content"]
    assert [chunk["stop"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    asked |= {"n_predict": -1, "grammar": 'root ::= "a\\n"'}
    whole = answer(client, "/completion", **asked)
    assert (whole["content"], whole["has_new_line"], whole["stop_type"]) == ("a\n", True, "eos")
    for wrong in ({"n_predict": -2}, {"n": 2}, {"prompt": ["a"]}):
        assert failure(client, "/completion", **asked | wrong)[0] == 400


def test_models(client) -> None:
    found = client.get("/v1/models").json()
    assert [each["id"] for each in found["data"]] == ["tiny", "tiny:base"]
    for each in found["data"]:
        Model.model_validate(each, strict=True)
    meta = client.get("/v1/models/tiny").json()["meta"]
    for strategy in meta["strategies"]:
        one = answer(client, model=f"tiny:{strategy}", messages=USER, max_tokens=1)
        assert one["fusion"]["strategy"] == strategy
        named = client.get(f"/v1/models/tiny:{strategy}").json()
        assert (named["id"], named["meta"]["strategy"]) == (f"tiny:{strategy}", strategy)
    assert {"static", "base", "qa-flora", "single:es"} < set(meta.pop("strategies"))
    assert {len(value) for value in meta.pop("sha256")["adapters"].values()} == {64}
    assert meta == {
        "adapters": ["math", "es"],
        "n_layer": 3,
        "n_ctx": 512,
        "strategy": "qa-flora",
        "loaded": True,
        "failed": False,
        "takes_adapters": False,
        "takes_teaching": False,
        "base": "tiny llama 0",
        "n_ctx_train": 512,
        "descriptions": {"math": "", "es": ""},
        "questions": [],
    }
    status, error = failure(client, model="tiny:single:x", messages=USER)
    assert (status, error["param"], error["code"]) == (404, "model", "model_not_found")
    assert error["message"].startswith("The model is 'tiny:single:x', expected one of tiny, tiny:")


def test_tokens_there_and_back(client, alone) -> None:
    text = "the king <|im_end|> ñ"
    tokens = answer(client, "/tokenize", content=text)["tokens"]
    assert tokens == alone.tokenize(text, parse_special=True)
    plain = answer(client, "/tokenize", content=text, parse_special=False)["tokens"]
    assert plain == alone.tokenize(text)
    assert answer(client, "/detokenize", tokens=tokens) == {"content": text}
    status, error = failure(client, "/detokenize", tokens=[99999])
    message = "Token 0 of the prompt is 99999, expected an id from 0 to 270."
    assert (status, error["param"], error["message"]) == (400, "tokens", message)


@pytest.mark.parametrize("n", [505, 4_000_000])
def test_what_cannot_fit_is_refused_without_cutting_it_into_tokens(client, n, monkeypatch) -> None:
    cut: list[int] = []
    tokenize = Model_.tokenize

    def counted(self: Model_, text: str, **more: Any) -> list[int]:
        cut.append(len(text))
        return tokenize(self, text, **more)

    monkeypatch.setattr(Model_, "tokenize", counted)
    long: Any = [{"role": "user", "content": "a" * n}]
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "a" * n}]}]
    for path, body in (
        (CHAT, {"messages": long}),
        (CHAT, {"messages": parts}),
        (TEXT, {"prompt": "a" * (n + 8)}),
        ("/v1/weights", {"messages": long}),
        ("/v1/responses", {"input": "a" * n}),
    ):
        status, error = failure(client, path, model="tiny", **body)
        assert (status, error["code"]) == (400, "context_length_exceeded")
    longest = max(len(piece) for piece in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    assert all(size < 512 * max(16, longest) + 100 for size in cut)


LONG_TEXT = "y" * 200_000
REFUSED = [
    ({"messages": []}, "messages", "The field messages is [], expected a list of messages"),
    ({"messages": [{}]}, "messages", "Message 0 has role = None, expected a text, as in {"),
    (
        {"messages": [{"role": "robot", "content": "a"}]},
        "messages",
        "Message 0 has role = 'robot', expected one of system, developer, user, assistant, tool,",
    ),
    ({"messages": USER * 2049}, "messages", "The field messages is [{'role': 'user', 'con"),
    ({"stop": [""]}, "stop[0]", "The field stop[0] is '', expected a text that is not empty."),
    ({"n": 17}, "n", "The field n is 17, expected a number of answers from 1 to 16."),
    ({"stream": "yes"}, "stream", "The field stream is 'yes', expected true or false."),
    (
        {"stream": True, "stream_options": {"include_usage": 1}},
        "stream_options.include_usage",
        "The field stream_options.include_usage is 1, expected true or false.",
    ),
    ({"logprobs": 3}, "logprobs", "The field logprobs is 3, expected true or false."),
    ({"logit_bias": {"999": 1}}, "logit_bias", "Option logit_bias has the token 999, expec"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "The chat template of"),
    ({"functions": [{}]}, "functions", "Option functions of chat is [{}], expected nothing: "),
    ({"response_format": {"type": "x"}}, "response_format", "Option response_format is {'ty"),
    ({"grammar": "root ::= ("}, "grammar", "The grammar"),
    ({"grammar": "a" * 300_000}, "grammar", "The grammar has 300000 characters, expected "),
    ({"fusion": {"a": 1}}, "fusion.a", "The field fusion.a does not exist, expected one of"),
    ({"fusion": {"strategy": "x"}}, "fusion", "Strategy 'x' is not known; expected one of"),
    (
        {"model": "tiny:base", "fusion": {"strategy": "static"}},
        "fusion.strategy",
        "The field fusion.strategy is 'static', expected base, as the model says, or nothing.",
    ),
    ({"fusion": {"adapters": ["x"]}}, "fusion", ""),
    ({"fusion": {"weights": [[1]]}}, "fusion", "Weights have the shape [1, 1], expected [2,"),
    (
        {"lora": [{"id": 0, "scale": 200}]},
        "lora[0].scale",
        "The field lora[0].scale is 200, expected a number from -100 to 100.",
    ),
    ({"lora": [{"id": 2, "scale": 1}]}, "lora", "The field lora is [{'id': 2, 'scale': 1.0}]"),
    (
        {"json_schema": {}, "response_format": {"type": "json_object"}},
        "json_schema",
        "The field json_schema is {}, expected nothing next to response_format",
    ),
]


@pytest.mark.parametrize(("body", "param", "message"), REFUSED)
def test_what_cannot_be_followed_is_refused_by_its_field(client, body, param, message) -> None:
    whole = {"model": "tiny", "messages": USER, "max_tokens": 1, **body}
    found, error = failure(client, **whole)
    assert (found, error["param"]) == (400, param), error
    assert message in error["message"]
    if "stream" not in body:
        assert failure(client, **whole, stream=True) == (found, error)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (TEXT, {"prompt": [99999]}, "prompt"),
        (TEXT, {"prompt": "a", "json_schema": {"type": "who"}}, "json_schema"),
        ("/v1/weights", {"prompt": [99999]}, "prompt"),
        ("/v1/weights", {"prompt": "a", "lora": [{"id": 0, "scale": 1}]}, "lora"),
        ("/v1/responses", {"input": [{"role": "user", "content": 3}]}, "input[0].content"),
        ("/tokenize", {"content": 3}, "content"),
    ],
)
def test_the_field_that_is_wrong_is_the_one_of_the_path(client, path, body, param) -> None:
    status, error = failure(client, path, model="tiny", **body)
    assert (status, error["param"]) == (400, param), error


def test_defaults_are_for_requests_that_say_nothing(calibrated) -> None:
    sampling = {"max_tokens": 3, "stop": ("zq",), "logit_bias": {"65": 100}}
    with client_of(calibrated.folder, sampling=sampling) as client:
        asked = {"messages": USER}
        assert answer(client, **asked)["usage"]["completion_tokens"] == 3
        assert answer(client, **asked, max_completion_tokens=5)["usage"]["completion_tokens"] == 5
        found = client.post(TEXT, json={"prompt": "the"}).json()
        assert found["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    "asked",
    [
        {"messages": [{"role": "a", "content": "a", "tool_calls": [LONG_TEXT]}]},
        {"tools": [LONG_TEXT]},
        {"json_schema": {"properties": {LONG_TEXT: {"type": LONG_TEXT}}}},
        {"grammar": f"root ::= {LONG_TEXT}"},
        {"fusion": {"strategy": f"manual:{LONG_TEXT}=1"}},
        {"model": LONG_TEXT},
    ],
)
def test_what_is_wrong_is_repeated_within_bounds(client, asked) -> None:
    status, error = failure(client, **{"model": "tiny", "messages": USER, **asked})
    assert status in (400, 404)
    assert 50 < len(json.dumps(error)) < 9000


def test_unknown_fields_are_ignored(client) -> None:
    extra = {"tempreature": 9, "cache_prompt": True, "options": {}, "keep_history": True}
    extra |= {"on_weights": 3, "cancel": 3, "wait": False, "parse_special": True, "weights": 3}
    assert answer(client, messages=USER, max_tokens=1, **extra)["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"", 400, "The body is no JSON object in UTF-8: Expecting value"),
        (b"[]", 400, "The body is no JSON object in UTF-8: it holds a list, not an object."),
        (b'{"a": "\xff"}', 400, "The body is no JSON object in UTF-8: 'utf-8' codec can't decode"),
        (b'{"a": "' + b"a" * (4 << 20) + b'"}', 413, "The body has more than 4194304 bytes."),
    ],
)
def test_bodies_that_are_none(client, data, status, message) -> None:
    response = client.post(CHAT, content=data)
    assert response.status_code == status
    assert response.json()["error"]["message"].startswith(message)
    chunked = client.post(CHAT, content=iter([data[:3], data[3:]]))
    assert chunked.status_code == status


def test_other_paths_that_clients_try(client, alone) -> None:
    assert client.get("/models").json() == client.get("/v1/models").json()
    assert client.get("/v1/health").json() == {"status": "ok"}
    body = {"messages": USER, "max_tokens": 1}
    assert answer(client, "/chat/completions", **body)["object"] == "chat.completion"
    props = client.get("/props").json()
    assert props["chat_template"] == alone._model.chat_template
    assert (props["total_slots"], props["default_generation_settings"]["n_ctx"]) == (3, 512)
    message = client.post(CHAT, json={"model": "x"} | body).json()["error"]["message"]
    assert message == "The model is 'x', expected one of tiny, tiny:base."


def test_an_image_is_501(client) -> None:
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
    status, error = failure(client, messages=image)
    assert (status, error["param"], error["code"]) == (501, "messages", "not_implemented")


def test_what_is_not_here(client) -> None:
    for path in ("/v1/images/generations", "/v1/audio/speech"):
        status, error = failure(client, path, model="tiny")
        assert (status, error["code"]) == (501, "not_implemented")
    told = "GET /v1/nothing: Not Found; GET /openapi.json lists what there is."
    assert client.get("/v1/nothing").json()["error"] == error_of("not_found", told)
    response = client.get(CHAT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}


def test_embeddings_are_the_engines(client, alone) -> None:
    tokens = alone.tokenize("how far is it " * 20)
    for given, texts in (("a", ["a"]), (["a", "b"], ["a", "b"]), (tokens, [tokens])):
        expected = np.array([alone.embed(text) for text in texts])
        np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1.0, rtol=1e-6)
        n_token = sum(len(alone.tokenize(text)) for text in texts)
        plain = answer(client, "/v1/embeddings", input=given, encoding_format="float")
        assert plain["usage"] == {"prompt_tokens": n_token, "total_tokens": n_token}
        np.testing.assert_array_equal([each["embedding"] for each in plain["data"]], expected)
        CreateEmbeddingResponse.model_validate(plain, strict=True)
