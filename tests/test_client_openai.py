"""The package openai against a server that listens: sync, async, streams, tools, parsed answers."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from bundles import TinyBundle, make_bundle
from openai import OpenAI
from pydantic import BaseModel
from serving import ENGINE, listening
from tiny import QWEN

from qaflora_edge import Engine

USER: Any = [{"role": "user", "content": "the thing?"}]
KEY = "a-key-of-the-tests"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2]}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}


class Animal(BaseModel):
    kind: Literal["cat", "dog"]
    legs: Literal[2, 4]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    place = tmp_path_factory.mktemp("openai")
    return make_bundle(place, chat_template=QWEN, user_defined=("<tool_call>",), n_ctx=1024)


@pytest.fixture(scope="module")
def alone(made: TinyBundle) -> Iterator[Engine]:
    """The oracle."""
    with Engine(made.folder, **ENGINE) as engine:  # type: ignore[arg-type]
        yield engine


@pytest.fixture(scope="module")
def url(made: TinyBundle) -> Iterator[str]:
    with listening(made.folder, api_key=KEY) as url:
        yield f"{url}/v1"


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


def test_stream_with_the_mix_asked_for(client: OpenAI, alone: Engine) -> None:
    options: Any = {"max_tokens": 20, "temperature": 1.5, "seed": 4}
    wanted = alone.chat(USER, weights={"math": 0.75}, **options)
    raw = client.chat.completions.with_raw_response.create(
        model="tiny",
        messages=USER,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"fusion": {"weights": {"math": 0.75}}},
        **options,
    )
    assert raw.headers["x-fusion"] == "math=0.75,es=0.00"
    *chunks, last = list(raw.parse())
    text = wanted["choices"][0]["message"]["content"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == wanted["choices"][0]["finish_reason"]
    assert last.usage is not None
    assert last.usage.completion_tokens == wanted["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_tools(client: OpenAI, choice: Any) -> None:
    asked: Any = {"model": "tiny", "messages": USER, "tools": [WEATHER], "tool_choice": choice}
    found = client.chat.completions.create(max_tokens=200, **asked).choices[0]
    assert found.finish_reason == "tool_calls"
    (call,) = found.message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["place"] in ("Rome", "Oslo")

    with client.chat.completions.stream(max_tokens=200, **asked) as stream:
        whole = stream.get_final_completion().choices[0]
    (streamed,) = whole.message.tool_calls or ()
    assert json.loads(streamed.function.arguments)["place"] in ("Rome", "Oslo")
    # As Extended OpenAI Conversation 2.0.0, of Home Assistant, sends it back.
    result = {"tool_call_id": call.id, "role": "tool", "name": "weather", "content": "warm"}
    told: Any = [*USER, found.message.model_dump(exclude_none=True), result]
    again = client.chat.completions.create(
        model="tiny", messages=told, tools=[WEATHER], tool_choice="none", max_tokens=3
    )
    assert again.choices[0].message.tool_calls is None


def test_parsed_by_a_schema(client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": USER, "response_format": Animal}
    found = client.chat.completions.parse(**asked, temperature=2.0, seed=1)
    assert isinstance(found.choices[0].message.parsed, Animal)
    with client.chat.completions.stream(**asked, temperature=2.0, seed=1) as stream:
        kinds = {event.type for event in stream}
        whole = stream.get_final_completion()
    assert whole.choices[0].message.parsed == found.choices[0].message.parsed
    assert {"content.delta", "content.done"} <= kinds


def test_failures_are_its_own_exceptions(client: OpenAI, url: str) -> None:
    def chat(by: OpenAI = client, **asked: Any) -> None:
        by.chat.completions.create(**{"model": "tiny", "messages": USER, **asked})

    with pytest.raises(openai.NotFoundError) as missing:
        chat(model="other")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="temperature") as refused:
        chat(temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match=r"fusion\.weigths does not exist"):
        chat(extra_body={"fusion": {"weigths": {}}})
    with (
        OpenAI(base_url=url, api_key="another-key", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        chat(stranger)
