"""The page at `/` of `qaflora serve` as one text, and the policy under which browsers use it.

The folder `parts` has its parts, `vendor` what others wrote: Temml 0.13.5 draws LaTeX as MathML,
and is a file of its package in npm. The policy allows one script and one style, by hash, and
requests to its own server. Trusted types keep scripts from turning a text into HTML: whatever a
model writes stays text, even where the page has a mistake.
"""

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files

from qaflora_edge.formats.inputs import Json
from qaflora_edge.weighing.strategy import strategies

# In this order: each uses what stands before it.
SCRIPTS = (
    *("elements", "icons", "store", "database", "kept", "server", "markdown", "answered"),
    *("mix", "documents", "teach", "answer", "turn", "adapters", "presets", "panel", "download"),
    *("session", "chats", "chat"),
)


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """Return the page in UTF-8, and its headers."""
    style = _part("parts/page.css")
    own = "".join(_part(f"parts/{name}.js") for name in SCRIPTS)
    script = f'"use strict";\n{_part("vendor/temml.min.js")}\n{{\n{own}}}\n'
    helps = json.dumps(_helps()).replace("<", "\\u003c")
    html = _part("parts/page.html")
    for mark, text in (("style", style), ("helps", helps), ("script", script)):
        before, after = html.split(f"/* {mark} */")
        html = before + text + after
    policy = (
        f"default-src 'none'; script-src '{_allowing(script)}'; style-src '{_allowing(style)}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Cross-Origin-Opener-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
        "Cache-Control": "no-cache",
    }
    return html.encode(), headers


def _helps() -> Json:
    """Say of each strategy what it does, and whether it asks every adapter for itself."""
    helps = {}
    for strategy in strategies():
        is_each = strategy.is_probed and strategy.measured.name == "divergence"
        helps[strategy.name] = {"help": strategy.help, "is_each": is_each}
    return helps


def _part(name: str) -> str:
    text = (files("qaflora_edge.server.page") / name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def _allowing(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
