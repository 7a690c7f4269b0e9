"""The page as one text, and the policy under which a browser may use it.

Its parts stand beside this module. What runs and what styles it is allowed by hash; it talks to
its own server alone. No script may turn a text into HTML: trusted types see to that, so that
whatever a model writes stays text even where the page has a mistake.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from qaflora_edge.show.pages import allowing
from qaflora_edge.weighing.strategy import strategies

# In this order: each uses what stands before it.
SCRIPTS = (
    *("elements", "icons", "store", "server", "markdown", "answered", "mix", "answer", "turn"),
    *("panel", "download", "session", "chat"),
)


@dataclass(frozen=True)
class Page:
    """The page in UTF-8, and the headers it is sent with."""

    body: bytes
    headers: dict[str, str]


@cache
def page() -> Page:
    """The page of this version of the package."""
    style = _part("page.css")
    script = '"use strict";\n{\n' + "".join(_part(f"{name}.js") for name in SCRIPTS) + "}\n"
    helps = {each.name: each.help for each in strategies()}
    html = _part("page.html")
    for mark, text in (
        ("/* style */", style),
        ("/* helps */", json.dumps(helps).replace("<", "\\u003c")),
        ("/* script */", script),
    ):
        before, after = html.split(mark)
        html = before + text + after
    policy = (
        f"default-src 'none'; script-src '{allowing(script)}'; style-src '{allowing(style)}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Cache-Control": "no-cache",
    }
    return Page(html.encode(), headers)


def _part(name: str) -> str:
    text = (files("qaflora_edge.server.page") / "parts" / name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")
