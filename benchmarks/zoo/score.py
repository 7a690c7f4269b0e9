"""The metric `zoo`: whether an answer has the fact that was asked for, and the form or language.

Items have `answer`: a text, or a list of which one is enough; `also`: a text that must be there
too; `form` or `language`: a key of forms.toml, whose pattern the answer must match. Of a form only
what its pattern calls `said` may bring the fact. A text counts as a whole: 118 is not in 1180.
"""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from data import FORMS

from qaflora_edge import Metric, register_metric


def plain(text: str) -> str:
    """Give a text in one case, without marks around words, spaces and commas within numbers."""
    text = unicodedata.normalize("NFC", text).casefold()
    text = re.sub(r"(?<=\d)[,.\u202f\u00a0 ](?=\d{3}(?!\d))", "", text)
    return " ".join(re.sub(r"[*_`]", " ", text).split())


def has(text: str, sought: str) -> bool:
    """Tell whether a text stands in another as a whole."""
    return re.search(rf"(?<!\w){re.escape(plain(sought))}(?!\w)", plain(text)) is not None


def score(text: str, item: Mapping[str, Any]) -> dict[str, Any]:
    """Give score, fact, and form where one is asked for; each 0.0 or 1.0."""
    said = text.strip()
    is_formed = True
    if "form" in item:
        match = re.fullmatch(FORMS[item["form"]]["right"], said, re.DOTALL)
        is_formed = match is not None
        said = match["said"] if match else said
    if "language" in item:
        is_formed = re.search(FORMS["languages"][item["language"]]["right"], said) is not None
    answers = item["answer"] if isinstance(item["answer"], list) else [item["answer"]]
    is_right = any(has(said, str(answer)) for answer in answers)
    is_right = is_right and ("also" not in item or has(said, item["also"]))
    fields = {"score": float(is_right and is_formed), "fact": float(is_right)}
    return fields | ({"form": float(is_formed)} if "form" in item or "language" in item else {})


def register() -> None:
    """Let tasks of this process name the metric."""
    register_metric(Metric("zoo", score))
