"""What the page needs beside the API: itself, and Markdown as data.

Markdown is read here, by the library and the rules of the chat in the terminal, so that the page
holds no parser, needs nothing that is built, and answers look alike in both.

    POST page/blocks  {"text": "...", "is_whole": false}
    -> {"settled": [node, ...], "live": [node, ...], "rest": "..."}

`settled` are the blocks that stay as they are whatever comes behind the text, `live` the last one
while it grows, and `rest` is its text, which begins the next request. Nodes are those of
markdown.tree. With `is_whole` all is settled.
"""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from qaflora_edge.markdown.syntax import cut
from qaflora_edge.markdown.tree import tree
from qaflora_edge.server.body import json_body
from qaflora_edge.server.page.content import page
from qaflora_edge.server.refusals import Refusal, wrong_field

MAX_TEXT_CHARS = 1 << 18  # the slowest of such texts take a few seconds


def page_routes() -> list[Route]:
    """The routes of the page, which are no part of the API."""
    return [
        Route("/", _page, methods=["GET"], include_in_schema=False),
        Route("/page/blocks", _blocks, methods=["POST"], include_in_schema=False),
    ]


async def _page(request: Request) -> Response:
    found = page()
    return Response(found.body, media_type="text/html; charset=utf-8", headers=found.headers)


async def _blocks(request: Request) -> Response:
    body = await json_body(request)
    text, is_whole = body.get("text"), body.get("is_whole", False)
    if not isinstance(text, str):
        raise wrong_field("text", text, "a text")
    if not isinstance(is_whole, bool):
        raise wrong_field("is_whole", is_whole, "true or false")
    if len(text) > MAX_TEXT_CHARS:
        message = f"The text has {len(text)} characters, at most {MAX_TEXT_CHARS} are laid out."
        raise Refusal(413, message, param="text", code="request_too_large")
    return JSONResponse(await asyncio.to_thread(blocks, text, is_whole))


def blocks(text: str, is_whole: bool) -> dict[str, Any]:
    """A text as settled blocks, the one that still grows, and the text of that."""
    settled, rest = (text, "") if is_whole else cut(text)
    return {"settled": tree(settled), "live": tree(rest), "rest": rest}
