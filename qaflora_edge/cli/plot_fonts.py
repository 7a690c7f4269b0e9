"""Fonts of this machine for text that matplotlib's own font lacks, such as Chinese."""

import contextlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MISSING = "□"
# Looked at before others: plain faces of many scripts. A hand-written face may have a sign too.
_FIRST = (
    *("Noto Sans CJK", "Source Han Sans", "Noto Sans", "WenQuanYi", "Hiragino Sans", "PingFang"),
    *("Apple SD Gothic Neo", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic", "Nirmala UI"),
    *("Arial Unicode MS", "Segoe UI"),
)


@dataclass(frozen=True)
class Fonts:
    """Families to draw some texts with, and the characters that none of them has."""

    families: tuple[str, ...]
    missing: frozenset[str]

    def shown(self, text: str) -> str:
        """A text with a box for each character that no font has; marks without a shape go."""
        return "".join(
            char
            if char not in self.missing
            else ""
            if unicodedata.category(char) == "Cf"
            else MISSING
            for char in text
        )


def fonts_for(texts: str) -> Fonts:
    """matplotlib's own font, and as few others as have what it lacks of these texts."""
    from matplotlib import font_manager

    default = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    families = [default.family_name]
    lacking = {char for char in texts if char not in "\t\n" and not _has(default, char)}
    if lacking:
        _add_new_fonts(font_manager)
    for name, font in _others(font_manager) if lacking else ():
        if found := {char for char in lacking if _has(font, char)}:
            families.append(name)
            lacking -= found
        if not lacking:
            break
    return Fonts(tuple(families), frozenset(lacking))


def _has(font: Any, char: str) -> bool:
    return bool(font.get_char_index(ord(char)))


def _add_new_fonts(font_manager: Any) -> None:
    """Tell matplotlib of fonts that were installed since it wrote its list."""
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - known):
        with contextlib.suppress(OSError, RuntimeError):  # a file that FreeType cannot read
            font_manager.fontManager.addfont(path)


def _others(font_manager: Any) -> Iterator[tuple[str, Any]]:
    """Each further family with a regular face; not the one that draws boxes for everything."""
    names = {
        entry.name
        for entry in font_manager.fontManager.ttflist
        if (entry.style, entry.weight) == ("normal", 400)
    }
    for name in sorted(names, key=_order):
        if name.startswith("Last Resort"):
            continue
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            properties = font_manager.FontProperties(family=[name])
            font = font_manager.get_font(
                font_manager.findfont(properties, fallback_to_default=False)
            )
            if font.scalable:  # matplotlib draws no emoji out of pixels
                yield name, font


def _order(name: str) -> tuple[int, str]:
    first = (i for i, start in enumerate(_FIRST) if name.startswith(start))
    return next(first, len(_FIRST)), name
