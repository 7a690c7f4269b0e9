"""Gaps in code as prompts, for bases that were trained to fill them."""

from qaflora_edge.ask import Gap
from qaflora_edge.backend.model import PIECE_BYTES, Model
from qaflora_edge.errors import PromptError

PARTS = ("pre", "suf", "mid", "rep", "sep")  # marks of prefix, suffix, gap, project, file
_LEAST_ANSWER = 128  # tokens that the prompt of a gap leaves for the answer


def infill_marks(model: Model) -> list[int] | None:
    """Give the ids of a base's tokens for PARTS, -1 for a missing one; None: it has none."""
    marks = []
    for part in PARTS:
        mark_of = getattr(model._lib, f"llama_vocab_fim_{part}")
        marks.append(mark_of(model.vocab))
    return None if min(marks[:3]) < 0 else marks


def infill_tokens(model: Model, gap: Gap, n_ctx: int) -> list[int]:
    """Make the prompt for what stands between a prefix and a suffix, as Qwen2.5-Coder knows it.

    What n_ctx tokens cannot hold is left out: the other files first, then the prefix's beginning
    and the suffix's end. Raises PromptError for a base that was not trained for it.
    """
    marks = infill_marks(model)
    if marks is None:
        raise PromptError(
            f"The base {model.name} has no tokens for infill, expected those that Qwen2.5-Coder "
            "and other bases for code have (fim_pre, fim_suf, fim_mid); use such a base."
        )
    pre, suf, mid, rep, sep = ([mark] if mark >= 0 else [] for mark in marks)

    def tokens(text: str) -> list[int]:
        return model.tokenize(text)

    n_char = gap.n_prompt * PIECE_BYTES
    before = tokens(gap.prefix[-n_char:])
    after = tokens(gap.suffix[:n_char])
    others = []
    if gap.files and rep:
        others += rep
        others += tokens("project\n")
    for name, text in gap.files:
        others += sep
        others += tokens(f"{name}\n{text[-n_char:]}\n")
    if gap.files and sep:  # the name of this one is not known
        others += sep
        others += tokens("file\n")
    begin = []
    if model._lib.llama_vocab_get_add_bos(model.vocab):
        begin.append(model._lib.llama_vocab_bos(model.vocab))
    n_answer = min(max(gap.n_answer, _LEAST_ANSWER), n_ctx // 2)
    n_most = min(gap.n_prompt, n_ctx - n_answer)
    n_room = max(0, n_most - len(begin) - 3)
    n_after = max(n_room // 4, n_room - len(before))
    after = after[:n_after]
    n_room -= len(after)
    n_cut = max(0, len(before) - n_room)
    before = before[n_cut:]
    n_room -= len(before)
    n_cut = max(0, len(others) - n_room)
    others = others[n_cut:]
    return [*begin, *others, *pre, *before, *suf, *after, *mid]
