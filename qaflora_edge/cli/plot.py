"""Fusion weights as a picture: HTML written here, PNG and SVG by matplotlib."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from qaflora_edge.cli.prompts import Prompt
from qaflora_edge.errors import OutputFileError
from qaflora_edge.files import atomic_path, check_has_folder, write_text_atomic
from qaflora_edge.weighing.numbers import FusionWeights

PANELS_MAX = 200


def check_can_plot(path: Path, n_prompt: int) -> None:
    """Fail before the work, not after it: a missing folder or matplotlib, too many prompts.

    Raises OutputFileError.
    """
    if path.suffix.lower() != ".html" and importlib.util.find_spec("matplotlib") is None:
        raise OutputFileError(
            f"Cannot write {path}: PNG and SVG need matplotlib, which is not installed. Install it "
            "with `pip install 'qaflora-edge[plot]'`, or name a file that ends in .html."
        )
    if n_prompt > PANELS_MAX:
        raise OutputFileError(
            f"Cannot draw {path}: there are {n_prompt} prompts, expected at most {PANELS_MAX}, a "
            "panel each. Take fewer prompts, or --json or --csv and a tool of your own."
        )
    check_has_folder(path)


def write_plot(
    path: Path,
    weighed: Sequence[tuple[Prompt, FusionWeights]],
    subject: str,
    *,
    dpi: int | None = None,
    is_dark: bool = False,
) -> str:
    """Draw a panel per prompt; the suffix chooses .svg, .html or .png.

    subject       names of bundle and base, which stand above the panels
    dpi, is_dark  of PNG, and of PNG and SVG; HTML follows its viewer

    Returns what to tell the user of the picture, or "". The same weights give the same bytes, with
    PNG and SVG where matplotlib and fonts are the same. Raises OutputFileError, also when there is
    no adapter.
    """
    if not weighed[0][1].adapters:
        raise OutputFileError(
            f"Cannot draw {path}: the bundle has no adapters, expected one or more. Add one with "
            "`qaflora bundle add`."
        )
    kind = path.suffix.lower()[1:]
    if kind == "html":
        from qaflora_edge.cli.plot_html import html

        write_text_atomic(path, html(weighed, subject))
        return ""
    from qaflora_edge.cli import plot_figure

    dots = dpi or plot_figure.DPI
    data, drawn_dpi, missing = plot_figure.figure(
        weighed, subject, kind=kind, dpi=dots, is_dark=is_dark
    )
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    notes = [_note_on_fonts(path, missing)] if missing else []
    if dpi and kind == "png" and drawn_dpi < dpi:
        notes.append(
            f"Note: {path} has {drawn_dpi} dots per inch instead of {dpi}, so that it is at most "
            f"{plot_figure.PIXELS_MAX:,} pixels wide and high, as viewers expect."
        )
    return "\n".join(notes)


def _note_on_fonts(path: Path, missing: str) -> str:
    shown = missing if len(missing) <= 10 else f"{missing[:10]}…"
    return (
        f"Note: no font found here has {len(missing)} of the characters in {path} ({shown}); □ "
        "stands for them. Install one that has, such as Noto Sans CJK, or write .html or .svg, "
        "which leave fonts to the viewer."
    )
