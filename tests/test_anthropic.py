"""Anthropic's messages, without their client: the answers are those of chats of an Engine."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from bundles import TinyBundle, make_bundle
from serving import client_of
from starlette.testclient import TestClient
from test_thoughts import CALL, OPENS, speaking
from tiny import QWEN, USER

from qaflora_edge import Engine

PATH = "/v1/messages"
TURN = {"type": "object", "properties": {"to": {"enum": ["left", "right"]}}, "required": ["to"]}
TOOL: Any = {"name": "turn", "description": "Turn.", "input_schema": TURN}
THEIRS = {"name": "turn", "description": "Turn.", "parameters": TURN}
ASKED: dict[str, Any] = {"model": "tiny", "messages": USER, "max_tokens": 9, "temperature": 0}
IMAGE = {"type": "image", "source": {"type": "url", "url": "a"}}
TEXT = {"type": "text", "text": "the"}


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> TinyBundle:
    place = tmp_path_factory.mktemp("anthropic")
    return make_bundle(place, chat_template=QWEN, user_defined=("<tool_call>",), n_ctx=1024)


@pytest.fixture(scope="module")
def http(served) -> Iterator[TestClient]:
    with client_of(served.folder) as client:
        yield client


def answer(http: TestClient, **more: Any) -> Any:
    response = http.post(PATH, json={**ASKED, **more})
    assert response.status_code == 200, response.text
    return response.json()


def events(http: TestClient, **more: Any) -> list[Any]:
    """The events of a stream; each is named as its type."""
    response = http.post(PATH, json={**ASKED, **more, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def content_of(stream: list[Any]) -> list[Any]:
    """What the blocks of a stream add up to."""
    blocks: list[Any] = []
    for event in stream:
        match event:
            case {"type": "content_block_start"}:
                blocks.append(event["content_block"] | {"json": ""})
                assert event["index"] == len(blocks) - 1
            case {"type": "content_block_delta", "delta": {"text": text}}:
                blocks[-1]["text"] += text
            case {"type": "content_block_delta", "delta": {"thinking": thought}}:
                blocks[-1]["thinking"] += thought
            case {"type": "content_block_delta", "delta": {"partial_json": text}}:
                blocks[-1]["json"] += text
            case {"type": "content_block_stop"}:
                text = blocks[-1].pop("json")
                if text:
                    blocks[-1]["input"] = json.loads(text)
    return blocks


def test_a_message_is_the_answer_of_an_engine(http, alone: Engine) -> None:
    system = [{"type": "text", "text": "Be "}, {**TEXT, "text": "short."}]
    blocks = [{"type": "text", "text": "the "}, {**TEXT, "text": "thing?"}]
    expected = alone.chat([{"role": "system", "content": "Be short."}, *USER], max_tokens=9)
    text = expected.choices[0].message.content
    usage = expected.usage
    for more in (
        {"system": "Be short.", "metadata": {"user_id": "a"}, "service_tier": "auto"},
        {"system": system, "messages": [{"role": "user", "content": blocks}]},
    ):
        found = answer(http, **more)
        assert found["content"] == [{"type": "text", "text": text}]
        assert (found["type"], found["role"], found["model"]) == ("message", "assistant", "tiny")
        assert (found["stop_reason"], found["stop_sequence"]) == ("max_tokens", None)
        n_read = found["usage"]["input_tokens"] + found["usage"]["cache_read_input_tokens"]
        assert (n_read, found["usage"]["output_tokens"]) == (usage.prompt_tokens, 9)
        assert set(found["fusion"]["weights"]) == {"math", "es"}
        counted = {name: value for name, value in (ASKED | more).items() if name != "max_tokens"}
        tokens = http.post(f"{PATH}/count_tokens", json=counted).json()
        assert tokens == {"input_tokens": usage.prompt_tokens}


def test_a_stream_adds_up_to_the_message(http) -> None:
    found = events(http)
    kinds = [event["type"] for event in found if event["type"] != "content_block_delta"]
    assert kinds == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    whole = answer(http)
    start = found[0]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert start["fusion"]["weights"] == whole["fusion"]["weights"]
    assert content_of(found) == whole["content"]
    assert found[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] == 9


def test_a_stop_sequence_is_named(http) -> None:
    (block,) = answer(http)["content"]
    stop = block["text"][4:6]
    found = answer(http, stop_sequences=["never", stop])
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", stop)
    assert found["content"][0]["text"] == block["text"][: block["text"].index(stop)]
    end = events(http, stop_sequences=["never", stop])[-2]["delta"]
    assert end == {"stop_reason": "stop_sequence", "stop_sequence": stop}


def test_the_mix_is_chosen_by_model_or_field(http, alone: Engine) -> None:
    expected = alone.chat(USER, max_tokens=9, strategy="single:es").choices[0].message.content
    by_field = {"fusion": {"strategy": "single:es", "return": "none"}}
    for more in ({"model": "tiny:single:es"}, by_field):
        assert answer(http, **more)["content"] == [{"type": "text", "text": expected}]
    assert "fusion" not in answer(http, **by_field)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "turn"}])
def test_a_tool_is_called_and_its_result_is_read(http, alone: Engine, choice) -> None:
    asked: dict[str, Any] = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 200}
    found = answer(http, **asked)
    (call,) = found["content"]
    assert (call["type"], call["name"], found["stop_reason"]) == ("tool_use", "turn", "tool_use")
    assert call["input"]["to"] in ("left", "right")
    stream = events(http, **asked)
    (streamed,) = content_of(stream)
    assert (streamed["input"], streamed["name"]) == (call["input"], "turn")
    assert stream[-2]["delta"]["stop_reason"] == "tool_use"

    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [TEXT]}
    told = [
        *USER,
        {"role": "assistant", "content": [{**TEXT, "text": "Hm"}, call]},
        {"role": "user", "content": [result, {**TEXT, "text": "and now?"}]},
    ]
    function = {"name": "turn", "arguments": call["input"]}
    said: Any = {"role": "assistant", "content": "Hm"}
    said["tool_calls"] = [{"id": call["id"], "type": "function", "function": function}]
    expected = alone.chat(
        [
            *USER,
            said,
            {"role": "tool", "tool_call_id": call["id"], "content": "the"},
            {"role": "user", "content": "and now?"},
        ],
        tools=[{"type": "function", "function": THEIRS}],
        tool_choice="none",
        max_tokens=9,
    )
    again = answer(http, messages=told, tools=[TOOL], tool_choice={"type": "none"})
    assert again["content"] == [{"type": "text", "text": expected.choices[0].message.content}]


def test_an_answer_under_a_schema(http) -> None:
    form = {"type": "json_schema", "schema": TURN}
    (block,) = answer(http, output_config={"format": form}, max_tokens=200)["content"]
    assert json.loads(block["text"])["to"] in ("left", "right")


def test_thoughts_and_calls_are_blocks(tmp_path) -> None:
    words = ("Hm", " <", "/thi", "nk> \n", CALL)
    tool = {"name": "time", "input_schema": {"type": "object"}}
    asked: dict[str, Any] = {"model": "speaking", "tools": [tool], "max_tokens": 99}
    with client_of(speaking(tmp_path, words, OPENS)) as http:
        found = answer(http, **asked)
        thought, call = found["content"]
        assert thought == {"type": "thinking", "thinking": "Hm", "signature": ""}
        assert (call["type"], call["name"], call["input"]) == ("tool_use", "time", {})
        streamed, again = content_of(events(http, **asked))
        assert (streamed, again["input"]) == (thought | {}, {})
        told = [{"role": "assistant", "content": found["content"]}]
        result = {"type": "tool_result", "tool_use_id": call["id"]}
        told.append({"role": "user", "content": [result]})
        closed = {"thinking": {"type": "enabled", "budget_tokens": 0}}
        again = answer(http, **asked, **closed, messages=[*USER, *told])
        assert "Hm" not in json.dumps(again["content"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [TEXT, IMAGE]}]},
            "The field messages[0].content[1].type is 'image', expected one of text, thinking, "
            "redacted_thinking, tool_use, tool_result.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
            "The field messages[0].content[0].type is 'document', expected one of text, ",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": ""}]}]},
            "The field messages[0].content[0].type is 'thinking', expected a block of a user",
        ),
        ({"max_tokens": None}, "The field max_tokens is None, expected a whole number from 0 up."),
        ({"messages": []}, "The field messages is [], expected a list of messages"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "The field messages[0].role is 'tool', expected one of user, assistant, system.",
        ),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "The field tools[0].type is 'web_search_20250305', expected one of custom.",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "go"}},
            "The field tool_choice.name is 'go', expected the name of a tool: ['turn'].",
        ),
        ({"tool_choice": {"type": "any"}}, "The field tool_choice.type is 'any', expected tools"),
        ({"temperature": -1}, "Option temperature is -1.0, expected"),
        ({"fusion": {"weigths": {}}}, "The field fusion.weigths does not exist, expected one of "),
    ],
)
def test_what_cannot_be_followed_is_refused(http, more, message) -> None:
    response = http.post(PATH, json={**ASKED, **more})
    body = response.json()
    assert (response.status_code, body["type"]) == (400, "error")
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].startswith(message)


def test_failures_have_their_shape(served) -> None:
    with client_of(served.folder, api_key="a-key") as http:
        stranger = http.post(PATH, json=ASKED, headers={"x-api-key": "another"})
        http.headers["x-api-key"] = "a-key"
        missing = http.post(PATH, json={**ASKED, "model": "other"})
        large = http.post(PATH, content=b" " * (5 << 20))
    for response, status, kind in (
        (stranger, 401, "authentication_error"),
        (missing, 404, "not_found_error"),
        (large, 413, "request_too_large"),
    ):
        assert response.status_code == status
        error = response.json()
        assert (error["type"], error["error"]["type"]) == ("error", kind)
