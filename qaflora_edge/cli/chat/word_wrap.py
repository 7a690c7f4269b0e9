"""Lines that are being typed break between words; prompt_toolkit breaks them at any letter."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right

from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.formatted_text.utils import fragment_list_to_text
from prompt_toolkit.layout.processors import Processor, Transformation, TransformationInput
from prompt_toolkit.layout.utils import explode_text_fragments
from prompt_toolkit.utils import get_cwidth


class WordWrap(Processor):
    """Fills rows with blanks up to their end where the next word does not fit.

    n_prefix  columns that each row begins with: the prompt, or what continues it
    """

    def __init__(self, n_prefix: int) -> None:
        self._n_prefix = n_prefix

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        fragments = explode_text_fragments(transformation_input.fragments)
        width = max(1, transformation_input.width - self._n_prefix)
        n_blank = blanks(fragment_list_to_text(fragments), width)
        # Of each letter, where it stands in the line that is shown.
        places = [place + n for place, n in enumerate(itertools.accumulate(n_blank))]
        shown: StyleAndTextTuples = []
        for fragment, n in zip(fragments, n_blank, strict=True):
            shown += [("", " " * n), fragment] if n else [fragment]
        end = len(fragments) + sum(n_blank)

        def to_display(place: int) -> int:
            return places[place] if place < len(places) else end + place - len(places)

        def to_source(place: int) -> int:
            return max(0, bisect_right(places, place) - 1) if place < end else len(places)

        return Transformation(shown, source_to_display=to_display, display_to_source=to_source)


def blanks(text: str, width: int) -> list[int]:
    """How many blanks go before each letter, so that no word breaks that is not wider than a row.

    A blank that ends a row stays in it; where there is no room, it begins the next one.
    """
    n_blank = [0] * len(text)
    column = 0
    for word in re.finditer(" +|[^ ]+", text):
        n_word = get_cwidth(word[0])
        if column + n_word > width >= n_word and column and word[0][0] != " ":
            n_blank[word.start()] = width - column
            column = 0
        for n in map(get_cwidth, word[0]):
            column = column + n if column + n <= width else n
        column %= width
    return n_blank
