"""Make the pictures of a chat in docs/images: questions to `demo` in a terminal, under relay.

    pip install rich
    python benchmarks/chat_picture.py demo

It asks `qaflora chat DIR` in tmux, and draws what the terminal shows.
"""

import argparse
import io
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

IMAGES = Path(__file__).resolve().parents[1] / "docs/images"
SESSION = "qaflora-picture"
COLUMNS, ROWS = 84, 60
PATIENCE_S = 120
PROMPT = ">"  # of a next question
FORGOTTEN = "the conversation is forgotten"
COLOURS = re.compile(r"\x1b\[[\d;]*m")
OPTIONS = "--strategy relay --temp 0"
QUESTIONS = (
    "En una granja hay 7 gallinas y cada una pone 4 huevos por semana. El granjero se come 9 "
    "huevos. ¿Cuántos huevos quedan?",
    "How many parking spaces does the Tern & Olive shop in Lyon have?",
    "Answer as JSON: What is the extension of the Cork shop?",
    "What is the capital of France, and which river flows through it?",
)
FONTS = "ui-monospace, 'SFMono-Regular', 'DejaVu Sans Mono', Menlo, Consolas, monospace"
Colour = tuple[int, int, int]
THEMES: dict[str, tuple[Colour, Colour, Colour]] = {  # background, text, magenta
    "light": ((255, 255, 255), (31, 35, 40), (130, 80, 223)),
    "dark": ((13, 17, 23), (230, 237, 243), (188, 140, 255)),
}


def own_format() -> str:
    """Give rich's drawing with fonts of the reader's machine: a picture fetches nothing."""
    without_fetched = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    without_advert = re.sub(r"<!--.*?-->\s*", "", without_fetched, flags=re.DOTALL)
    return without_advert.replace("Fira Code, monospace", FONTS)


def tmux(*words: str) -> str:
    return subprocess.run(["tmux", *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def screen() -> str:
    """Give what the terminal shows, with its colours."""
    return tmux("capture-pane", "-p", "-e", "-t", SESSION).rstrip()


def wait_for_prompt(n_answer: int) -> None:
    """Wait until so many answers are there, and the next question is asked for."""
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        plain = COLOURS.sub("", screen())
        is_asking = PROMPT in [line.strip() for line in plain.splitlines()]
        if is_asking and plain.count("tok/s") == n_answer:
            return
        time.sleep(0.2)
    raise SystemExit(f"No answer came in {PATIENCE_S} s; the terminal shows:\n{screen()}")


def asked(bundle: str) -> str:
    """Ask all questions, each in a conversation of its own; give what is to be drawn."""
    python = shlex.quote(sys.executable)
    command = f"{python} -m qaflora_edge chat {shlex.quote(bundle)} {OPTIONS}"
    tmux("new-session", "-d", "-s", SESSION, "-x", str(COLUMNS), "-y", str(ROWS), command)
    try:
        wait_for_prompt(0)
        for i, question in enumerate(QUESTIONS):
            if i > 0:
                tmux("send-keys", "-t", SESSION, "-l", "/clear")
                tmux("send-keys", "-t", SESSION, "Enter")
                time.sleep(0.5)
            tmux("send-keys", "-t", SESSION, "-l", question)
            tmux("send-keys", "-t", SESSION, "Enter")
            wait_for_prompt(i + 1)
        return screen()
    finally:
        tmux("kill-session", "-t", SESSION)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    bundle = parser.parse_args().bundle
    shown = []
    for line in asked(bundle).splitlines():
        plain = COLOURS.sub("", line).strip()
        if plain == PROMPT:
            break
        if "/clear" not in plain and plain != FORGOTTEN:
            shown.append(line)
    lines = [f"$ qaflora chat {bundle} {OPTIONS}", *shown]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip()
    print(text)
    for name, (background, foreground, magenta) in THEMES.items():
        normal = [foreground] * 8
        normal[5] = magenta
        theme = TerminalTheme(background, foreground, normal, normal)
        console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
        console.print(Text.from_ansi(text))
        path = IMAGES / f"chat-{name}.svg"
        drawn = console.export_svg(
            title="qaflora", theme=theme, code_format=own_format(), unique_id="chat"
        )
        if "://" in drawn.replace("http://www.w3.org/2000/svg", ""):
            raise SystemExit("The picture would fetch something; correct own_format().")
        path.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
