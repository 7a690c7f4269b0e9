"""An HTML file that stands alone: no file, font or host beside it is asked.

The policy in its head lets nothing run but its own script, whatever the texts in it contain.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from qaflora_edge.weighing.svg_panel import clean


def asset(name: str) -> str:
    """A text of the folder assets, after an empty line."""
    text = (files("qaflora_edge.cli") / "assets" / name).read_text(encoding="utf-8")
    return "\n" + text.replace("\r\n", "\n")


def html_file(title: str, body: Sequence[str], *, style: str, script: str) -> str:
    """A whole file.

    title  a text
    body   lines of HTML
    """
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{clean(title)}</title>",
        f"<style>{style}</style>",
        "</head>",
        "<body>",
        *body,
        '<div id="tip" role="status" aria-live="polite" hidden></div>',
        f"<script>{script}</script>",
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def _hash(text: str) -> str:
    """The source expression of a policy that allows exactly this text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
