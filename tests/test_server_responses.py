"""OpenAI's responses: by their own client, against chat completions of the same Engine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from bundles import make_bundle
from openai.types.responses import Response
from serving import client_of, listening
from starlette.testclient import TestClient
from tiny import QWEN

TURN = {"type": "object", "properties": {"to": {"enum": ["left", "right"]}}, "required": ["to"]}
TOOL: Any = {"type": "function", "name": "turn", "parameters": TURN, "strict": True}
PART = {"type": "input_text", "text": "the thing?"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("responses")
    return make_bundle(place, chat_template=QWEN, user_defined=("<tool_call>",)).folder


@pytest.fixture(scope="module")
def http(bundle) -> Iterator[TestClient]:
    with client_of(bundle) as client:
        yield client


@pytest.fixture(scope="module")
def client(bundle) -> Iterator[openai.OpenAI]:
    with (
        listening(bundle) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def chat(client: openai.OpenAI, messages: list[Any], **more: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=messages, **more).choices[0]


def test_the_same_answer_in_another_shape(client) -> None:
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "the thing?"}]
    expected = chat(client, messages, max_tokens=9, temperature=0)
    asked: dict[str, Any] = {"model": "tiny", "instructions": "be", "max_output_tokens": 9}
    for given in (
        "the thing?",
        [{"role": "user", "content": "the thing?"}],
        [{"type": "message", "role": "user", "content": [PART]}],
    ):
        found = client.responses.create(**asked, input=given, temperature=0)
        assert found.output_text == expected.message.content
        reason = found.incomplete_details.reason
        assert (found.status, reason) == ("incomplete", "max_output_tokens")
        assert found.usage.output_tokens == 9
        assert found.fusion["strategy"] == "qa-flora"


def test_a_stream_ends_with_the_whole(client) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "the?", "max_output_tokens": 6}
    with client.responses.stream(**asked, temperature=0) as stream:
        events = list(stream)
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text  # type: ignore[union-attr]
    assert text == client.responses.create(**asked, temperature=0).output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_tool_is_called_and_its_result_is_read(client) -> None:
    asked: dict[str, Any] = {"model": "tiny", "tools": [TOOL], "tool_choice": "required"}
    found = client.responses.create(**asked, input="where to?", temperature=0)
    (call,) = found.output
    assert (call.type, call.name) == ("function_call", "turn")
    assert json.loads(call.arguments)["to"] in ("left", "right")
    assert found.status == "completed"
    with client.responses.stream(**asked, input="where to?", temperature=0) as stream:
        assert stream.get_final_response().output[0].arguments == call.arguments
    items: list[Any] = [
        {"role": "user", "content": "where to?"},
        call.model_dump(exclude={"id", "status"}, exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "done"},
    ]
    tools: Any = [{"type": "function", "function": {"name": "turn", "parameters": TURN}}]
    function = {"name": "turn", "arguments": call.arguments}
    calls = [{"id": "1", "type": "function", "function": function}]
    messages = [
        {"role": "user", "content": "where to?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "done"},
    ]
    more: dict[str, Any] = {"temperature": 0}
    expected = chat(client, messages, tools=tools, max_tokens=5, **more)
    more |= {"tools": [TOOL], "max_output_tokens": 5}
    found = client.responses.create(model="tiny", input=items, **more)
    assert found.output_text == expected.message.content


def test_text_under_a_schema(client) -> None:
    form: Any = {"type": "json_schema", "name": "turn", "schema": TURN, "strict": True}
    found = client.responses.create(model="tiny", input="where to?", text={"format": form})
    assert json.loads(found.output_text)["to"] in ("left", "right")


def test_shape_is_openais(http) -> None:
    body = {"model": "tiny", "input": "the?", "max_output_tokens": 3, "metadata": {"a": "b"}}
    Response.model_validate(http.post("/v1/responses", json=body).json())


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"input": None}, "input", "The field input is None, expected a text or a list of items."),
        (
            {"input": [{"type": "item_reference"}]},
            "input[0].type",
            "The field input[0].type is 'item_",
        ),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "Option previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools", "Option tools has {'type': 'web_search'}, "),
        ({"n": 2}, "n", "Option n of responses is 2, expected"),
        ({"text": 3}, "text", "The field text is 3, expected an object such as"),
    ],
)
def test_what_cannot_be_followed_is_refused(http, body, param, message) -> None:
    found = http.post("/v1/responses", json={"model": "tiny", "input": "a", **body})
    assert found.status_code == 400
    error = found.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(message)
