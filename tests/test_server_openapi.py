"""The description of the server is valid, and says what the server does."""

from typing import Any

import jsonschema
import pytest
from starlette.routing import Route

from qaflora_edge.server.app import NOT_HERE


@pytest.fixture(scope="module")
def document(client) -> Any:
    return client.get("/openapi.json").json()


def test_every_route_is_described(client, document) -> None:
    every = [route for route in client.app.routes if isinstance(route, Route)]  # type: ignore[attr-defined]
    routes = [route for route in every if route.include_in_schema]  # the page's are no API
    paths = {route.path.replace(":path", "") for route in routes if route.path not in NOT_HERE}
    assert paths == set(document["paths"])
    for route in routes:
        if route.path not in (*NOT_HERE, "/"):
            methods = {method.lower() for method in route.methods or ()} - {"head", "options"}
            assert methods == set(document["paths"][route.path.replace(":path", "")])


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
