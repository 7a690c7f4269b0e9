"""The description of the server is valid, and says what the server does."""

from typing import Any

import jsonschema
import pytest
from starlette.routing import Route

from qaflora_edge.config import in_group
from qaflora_edge.server.app import NOT_HERE


@pytest.fixture(scope="module")
def document(client) -> Any:
    return client.get("/openapi.json").json()


def schema_of(document: Any, path: str) -> Any:
    """Of a body, with the rest of the document, in which it names parts."""
    body = document["paths"][path]["post"]["requestBody"]
    name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    return {**document["components"]["schemas"][name], "components": document["components"]}


def test_every_route_is_described(client, document) -> None:
    every = [route for route in client.app.routes if isinstance(route, Route)]  # type: ignore[attr-defined]
    routes = [route for route in every if route.include_in_schema]  # the page's are no API
    paths = {route.path.replace(":path", "") for route in routes if route.path not in NOT_HERE}
    assert paths == set(document["paths"])
    for route in routes:
        if route.path not in (*NOT_HERE, "/"):
            methods = {method.lower() for method in route.methods or ()} - {"head", "options"}
            assert methods == set(document["paths"][route.path.replace(":path", "")])


def test_schemas_are_schemas(document) -> None:
    for path, methods in document["paths"].items():
        if "post" in methods:
            jsonschema.Draft202012Validator.check_schema(schema_of(document, path))


def test_ranges_are_those_of_the_options(client, document) -> None:
    """What the description refuses the server refuses, at the ends of each range."""
    properties = schema_of(document, "/v1/completions")["properties"]
    whole: dict[str, Any] = {"model": "tiny", "max_tokens": 1, "prompt": "a"}
    for option in in_group("sampling").values():
        if option.name in ("grammar", "logprobs", "logit_bias", "stop"):
            continue
        for value, is_good in (
            (option.low, not option.is_open),
            (option.high, True),
            (None if option.low is None else option.low - 1, False),
            (None if option.high is None else option.high + 1, False),
            ("x", False),
        ):
            if value is None or (option.name == "max_tokens" and value == option.high):
                continue
            if option.kind is int and isinstance(value, float):
                value = int(value)
            valid = jsonschema.Draft202012Validator(properties[option.name]).is_valid(value)
            response = client.post("/v1/completions", json={**whole, option.name: value})
            assert (response.status_code, valid) == (200 if is_good else 400, is_good), option.name


def test_answers_are_as_described(client, document) -> None:
    user = [{"role": "user", "content": "a"}]
    for path, body in (
        ("/v1/chat/completions", {"messages": user, "max_tokens": 1}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 1}),
        ("/v1/weights", {"messages": user}),
        ("/tokenize", {"content": "a"}),
        ("/detokenize", {"tokens": [65]}),
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/models", None),
        ("/v1/models/tiny", None),
        ("/health", None),
        ("/props", None),
    ):
        whole = {"model": "tiny", **body} if body else None
        response = client.post(path, json=whole) if whole else client.get(path)
        method = document["paths"][path.replace("/tiny", "/{model}")]["post" if whole else "get"]
        status = "200" if response.status_code == 200 else "4XX"
        content = method["responses"][status]["content"]
        schema = {**content["application/json"]["schema"], "components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(response.json())
