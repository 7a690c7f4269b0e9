"""Signs that a terminal's encoding may lack, and text that may not reach a terminal as it is."""

from __future__ import annotations

from qaflora_edge.cli.show import can_show

# What we and Markdown's rendering draw with -> what stands for it in ASCII.
_ASCII = str.maketrans(
    {
        **dict.fromkeys("─━╌═", "-"),
        **dict.fromkeys("│┃║▌▏", "|"),
        **dict.fromkeys("┌┐└┘├┤┬┴┼┏┓┗┛┡┩╇╈╞╡╪┳╋", "+"),
        "•": "*",
        "·": "-",
        "…": "...",
        "›": ">",
    }
)
_SAMPLE = "─│┼•·…"
_KEPT = "\n\t"


def has_signs(encoding: str | None) -> bool:
    """Whether an encoding has the signs we draw with."""
    return can_show(_SAMPLE, encoding)


def to_ascii(text: str) -> str:
    """The signs we draw with in ASCII; other text stays."""
    return text.translate(_ASCII)


def visible(text: str, *, has_signs: bool) -> str:
    """Text without control characters: an answer moves no cursor and changes no colour.

    Line ends and tabs stay; carriage returns go; other control characters are shown as signs.
    """
    return text.translate(_PICTURES if has_signs else _MARKS)


_CONTROLS = [code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in _KEPT]
_MARKS: dict[int, str | None] = {code: "?" for code in _CONTROLS} | {ord("\r"): None}
_PICTURES: dict[int, str | None] = {
    **{code: chr(0x2400 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}" for code in _MARKS},
    0x7F: "\N{SYMBOL FOR DELETE}",
    ord("\r"): None,
}
