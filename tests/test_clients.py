"""Other programs and libraries that speak OpenAI's or Anthropic's API, against a real server.

`make test-clients` installs them; without them, but for the package openai, tests are skipped.
"""

import asyncio
import json
import os
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, Literal

import httpx2 as httpx
import openai
import pytest
from bundles import TinyBundle, make_bundle
from openai import OpenAI
from patience import python
from pydantic import BaseModel
from serving import ENGINE, listening
from test_thoughts import CALL, speaking
from tiny import EOS, QWEN, constant_logits

from qaflora_edge import Engine

KEY = "a-key-of-the-tests"
USER: Any = [{"role": "user", "content": "the thing?"}]
OPTIONS: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5, "seed": 4}
N_CASES = int(os.environ.get("QAFLORA_TEST_CASES", "40"))  # of schemathesis, for each operation

PLACE = {"place": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2]}}
FORM = {"type": "object", "properties": PLACE, "required": ["place"], "additionalProperties": False}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": FORM}}


class Animal(BaseModel):
    kind: Literal["cat", "dog"]
    legs: Literal[2, 4]


def needs(package: str) -> Callable[[Any], Any]:
    """Mark a slow test of other people's code, which may warn; skipped without a package."""
    missing = f"{package} is not installed (make test-clients)"
    skip = pytest.mark.skipif(find_spec(package) is None, reason=missing)
    return lambda test: pytest.mark.slow(pytest.mark.filterwarnings("default")(skip(test)))


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> TinyBundle:
    place = tmp_path_factory.mktemp("clients")
    return make_bundle(place, chat_template=QWEN, user_defined=("<tool_call>",), n_ctx=1024)


@pytest.fixture(scope="module")
def url(served) -> Iterator[str]:
    with listening(served.folder, api_key=KEY) as url:
        yield f"{url}/v1"


def expected(alone: Engine, strategy: str | None = None) -> str:
    text: str = alone.chat(USER, weights=strategy, **OPTIONS)["choices"][0]["message"]["content"]
    return text


@pytest.fixture
def client(url) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_tools(client, choice) -> None:
    asked: Any = {"model": "tiny", "messages": USER, "tools": [WEATHER], "tool_choice": choice}
    found = client.chat.completions.create(max_tokens=200, **asked).choices[0]
    assert found.finish_reason == "tool_calls"
    (call,) = found.message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["place"] in ("Rome", "Oslo")
    # As Extended OpenAI Conversation 2.0.0, of Home Assistant, sends it back.
    result = {"tool_call_id": call.id, "role": "tool", "name": "weather", "content": "warm"}
    told: Any = [*USER, found.message.model_dump(exclude_none=True), result]
    again = client.chat.completions.create(
        model="tiny", messages=told, tools=[WEATHER], tool_choice="none", max_tokens=3
    )
    assert again.choices[0].message.tool_calls is None


def test_tools_in_tags_are_streamed(tmp_path) -> None:
    template = QWEN.replace("<tool_call>{...}</tool_call>", "<tool_call>\n<function=f>")
    made = make_bundle(tmp_path, chat_template=template, n_ctx=1024)
    asked: Any = {"model": "tiny", "messages": USER, "tools": [WEATHER], "tool_choice": "required"}
    with (
        listening(made.folder) as url,
        OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
        client.chat.completions.stream(max_tokens=200, **asked) as stream,
    ):
        parts = [event for event in stream if event.type.startswith("tool_calls.function.arg")]
        whole = stream.get_final_completion().choices[0]
    (call,) = whole.message.tool_calls or ()
    assert json.loads(call.function.arguments)["place"] in ("Rome", "Oslo")
    assert (whole.finish_reason, len(parts) > 2) == ("tool_calls", True)


def test_parsed_by_a_schema(client) -> None:
    asked: Any = {"model": "tiny", "messages": USER, "response_format": Animal}
    found = client.chat.completions.parse(**asked, temperature=2.0, seed=1)
    assert isinstance(found.choices[0].message.parsed, Animal)
    with client.chat.completions.stream(**asked, temperature=2.0, seed=1) as stream:
        kinds = {event.type for event in stream}
        whole = stream.get_final_completion()
    assert whole.choices[0].message.parsed == found.choices[0].message.parsed
    assert {"content.delta", "content.done"} <= kinds


def test_embeddings(client, alone) -> None:
    found = client.embeddings.create(model="tiny", input=["the thing?", "a"])  # as base64
    for text, each in zip(("the thing?", "a"), found.data, strict=True):
        assert each.embedding == alone.embed(text).tolist()


def test_failures_are_its_own_exceptions(client, url) -> None:
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


@needs("langchain_openai")
def test_langchain(url, alone) -> None:
    from langchain_core.messages import ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel

    class Animal(BaseModel):
        """An animal."""

        legs: bool

    @tool
    def weather(warm: bool) -> str:
        """Say whether it is warm."""
        return "yes" if warm else "no"

    def model(name: str, **more: Any) -> Any:
        return ChatOpenAI(base_url=url, api_key=KEY, model=name, max_retries=0, **OPTIONS, **more)

    found = model("tiny").invoke("the thing?")
    assert found.content == expected(alone)
    mixed = model("tiny:single:es", stream_usage=True)
    parts = list(mixed.stream("the thing?"))
    assert "".join(part.content for part in parts) == expected(alone, "single:es")
    assert sum((part.usage_metadata or {}).get("output_tokens", 0) for part in parts) > 0
    weighed = model("tiny", extra_body={"fusion": {"strategy": "single:es"}})
    assert asyncio.run(weighed.ainvoke("the thing?")).content == expected(alone, "single:es")
    assert [a.content for a in model("tiny").batch(["the thing?"] * 3)] == [expected(alone)] * 3

    long = ChatOpenAI(base_url=url, api_key=KEY, model="tiny", max_tokens=200, temperature=0)
    called = long.bind_tools([weather], tool_choice="weather").invoke("the thing?")
    (call,) = called.tool_calls
    assert call["name"] == "weather"
    assert isinstance(call["args"]["warm"], bool)
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    assert long.invoke([("human", "the thing?"), called, result]).usage_metadata is not None
    for method in ("json_schema", "function_calling"):
        parsed = long.with_structured_output(Animal, method=method).invoke("the thing?")
        assert isinstance(parsed, Animal)


@needs("litellm")
def test_litellm(url, alone, monkeypatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it fetches prices
    import litellm

    asked: Any = {"api_base": url, "api_key": KEY, "messages": USER, "num_retries": 0, **OPTIONS}
    found = litellm.completion(model="openai/tiny", **asked)
    assert found.choices[0].message.content == expected(alone)
    stream = litellm.completion(model="openai/tiny:single:es", stream=True, **asked)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == expected(alone, "single:es")
    weighed = {"extra_body": {"fusion": {"strategy": "single:es"}}}
    later = asyncio.run(litellm.acompletion(model="openai/tiny", **weighed, **asked))
    assert later.choices[0].message.content == expected(alone, "single:es")
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/other", **asked)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(model="openai/tiny", **{**asked, "api_key": "another-key"})


@needs("anthropic")
def test_anthropic(served, alone) -> None:
    import anthropic

    turn = {"name": "weather", "input_schema": FORM}
    asked: Any = {"model": "tiny", "messages": USER, "max_tokens": 12}
    with (
        listening(served.folder, api_key=KEY) as url,
        anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as client,
        anthropic.Anthropic(base_url=url, api_key="another-key", max_retries=0) as stranger,
    ):
        found = client.messages.create(**asked, system="Be short.")
        told = [{"role": "system", "content": "Be short."}, *USER]
        text = alone.chat(told, max_tokens=12).choices[0].message.content
        assert [block.text for block in found.content if block.type == "text"] == [text]
        assert found.stop_reason == "max_tokens"
        with client.messages.stream(**asked, system="Be short.") as stream:
            assert "".join(stream.text_stream) == text
            whole = stream.get_final_message()
        assert whole.usage.output_tokens == found.usage.output_tokens == 12
        counted = client.messages.count_tokens(model="tiny", messages=USER, system="Be short.")
        usage = whole.usage
        assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)

        tools: Any = {"tools": [turn], "tool_choice": {"type": "any"}, "max_tokens": 200}
        with client.messages.stream(**{**asked, **tools}) as stream:
            called = stream.get_final_message()
        (call,) = called.content
        assert call.type == "tool_use"
        assert (call.input["place"] in ("Rome", "Oslo"), called.stop_reason) == (True, "tool_use")
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "warm"}
        again: Any = [*USER, called.to_param(), {"role": "user", "content": [result]}]
        after = client.messages.create(**{**asked, **tools, "messages": again})
        assert after.content[0].type == "tool_use"

        image: Any = {"type": "image", "source": {"type": "url", "url": "http://localhost/a"}}
        with pytest.raises(anthropic.BadRequestError, match=r"content\[0\]\.type is 'image'"):
            client.messages.create(**{**asked, "messages": [{"role": "user", "content": [image]}]})
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**{**asked, "model": "other"})
        with pytest.raises(anthropic.AuthenticationError):
            stranger.messages.create(**asked)


@needs("pydantic_ai")
def test_an_agent_of_anthropics_api(tmp_path) -> None:
    """An agent calls a tool, reads its result and answers; whole and as a stream."""
    from anthropic import AsyncAnthropic
    from pydantic_ai import Agent
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.providers.anthropic import AnthropicProvider

    template = QWEN + "{% if messages[-1].role == 'tool' %}<told>{% endif %}"
    place = speaking(tmp_path, (CALL, EOS, "<told>", "At noon."), template)
    asked_for: list[str] = []

    def time() -> str:
        """Tell the time."""
        asked_for.append("time")
        return "12:00"

    async def answers(url: str) -> list[str]:
        async with AsyncAnthropic(base_url=url, api_key=KEY, max_retries=0) as client:
            provider = AnthropicProvider(anthropic_client=client)
            agent = Agent(AnthropicModel("speaking", provider=provider), tools=[time])
            whole = await agent.run("the thing?")
            async with agent.run_stream("the thing?") as streamed:
                return [whole.output, await streamed.get_output()]

    with listening(place, api_key=KEY) as url:
        assert asyncio.run(answers(url)) == ["At noon.", "At noon."]
    assert asked_for == ["time", "time"]


@needs("llm")
def test_llm(url, alone, tmp_path) -> None:
    """The program `llm`, told of the server as its documentation says."""
    entry = {"model_id": "ours", "model_name": "tiny:single:es", "api_base": url}
    models = json.dumps([{**entry, "api_key_name": "ours"}])  # JSON is YAML
    (tmp_path / "extra-openai-models.yaml").write_text(models, encoding="utf-8")
    (tmp_path / "keys.json").write_text(json.dumps({"ours": KEY}), encoding="utf-8")
    options = [part for name in OPTIONS for part in ("-o", name, str(OPTIONS[name]))]
    for more in ([], ["--no-stream"]):
        words = ("-m", "llm", "-m", "ours", "the thing?", *options, *more)
        done = python(*words, env={"LLM_USER_PATH": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        assert done.stdout == expected(alone, "single:es") + "\n"


@needs("llm_comply")
@pytest.mark.parametrize(
    ("form", "left_out"),
    [
        ("openai-chat", {"chat-image-input", "chat-reasoning-summary"}),
        ("open-responses", {"image-input", "reasoning-summary"}),
    ],
)
def test_llm_comply(tmp_path, form, left_out) -> None:
    """Its checks of chats and responses, but for what a base that reads and writes text has not."""
    # Greedy, and a token is less likely the more often it came: a text begins, and ends.
    logits = {"a": 9.0, EOS: 8.9, '"': 8.8}
    replace = constant_logits(lambda token: logits.get(token, 0.0))
    made = make_bundle(tmp_path, arch="qwen2", chat_template=QWEN, n_ctx=1024, replace=replace)
    sampling = {"temperature": 0.0, "frequency_penalty": 0.5}
    # With two models one has to be named, as the checks expect.
    with listening(made.folder, made.base.path, api_key=KEY, sampling=sampling) as url:
        words = ("-u", f"{url}/v1", "-k", KEY, "-m", "tiny", "--format", form, "--json")
        done = python("-c", "import llm_comply.cli as c; c.main()", *words)
    found = {each["id"]: each for each in json.loads(done.stdout)["results"]}
    assert left_out < found.keys()
    assert {name for name in found if found[name]["status"] != "passed"} <= left_out


@needs("schemathesis")
def test_schemathesis(served, tmp_path) -> None:
    """Requests made from /openapi.json, right and wrong: answers are as it says, and no 5xx."""
    (tmp_path / "schemathesis.toml").write_text(
        "[checks.not_a_server_error]\nexpected-statuses = ['2xx', '3xx', '4xx', 501]\n",
        encoding="utf-8",
    )
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,"
        "response_schema_conformance,response_headers_conformance"
    )
    with listening(served.folder, engine={**ENGINE, "n_ctx": 96}) as url:
        words = [
            *("-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
            *("--max-examples", N_CASES, "--checks", checks, "--seed", 1),
            *("--phases", "examples,coverage,fuzzing", "--mode", "all", "--no-shrink"),
            *("--request-timeout", 300, "--no-color", "--continue-on-failure"),
            *("--generation-database", "none", "--suppress-health-check", "all"),
        ]
        done = python(*words, cwd=tmp_path, timeout=None)
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stderr
    made_of = re.search(r"(\d+) generated", done.stdout)
    assert made_of is not None
    assert int(made_of[1]) > 7 * N_CASES  # six operations have bodies
