"""Infill: the prompt for a gap in code, of bases that were trained for it."""

from collections.abc import Sequence
from typing import Any

from qaflora_edge.errors import PromptError

N_PROMPT = 4096  # tokens of a prompt, where nobody asks for more
_TOKEN_CHARS = 16  # most tokens are shorter
PARTS = ("pre", "suf", "mid", "rep", "sep")  # tokens before the prefix, suffix, gap, project, file


def infill_marks(engine: Any) -> list[int] | None:
    """Give the ids of a base's tokens for PARTS, -1 for a missing one; None: it cannot infill."""
    lib, vocab = engine._model._lib, engine._model.vocab
    found = [getattr(lib, f"llama_vocab_fim_{part}")(vocab) for part in PARTS]
    return None if min(found[:3]) < 0 else found


def infill_tokens(
    engine: Any,
    prefix: str,
    suffix: str,
    files: Sequence[tuple[str, str]] = (),
    n_answer: int = 0,
    n_prompt: int = N_PROMPT,
) -> list[int]:
    """Make the prompt for what stands between a prefix and a suffix, as Qwen2.5-Coder knows it.

    engine    an Engine
    files     other ones of the project: names and texts
    n_answer  tokens to leave for the answer; at least 128, and half of the context at most
    n_prompt  most tokens of the prompt

    What it cannot hold is left out: the other files first, then the prefix's beginning and the
    suffix's end. Raises PromptError for a base that was not trained for it.
    """
    marks = infill_marks(engine)
    if marks is None:
        raise PromptError(
            f"The base {engine.name} has no tokens for infill, expected those that Qwen2.5-Coder "
            "and other bases for code have (fim_pre, fim_suf, fim_mid); use such a base."
        )
    pre, suf, mid, rep, sep = ([mark] if mark >= 0 else [] for mark in marks)
    model = engine._model

    def tokens(text: str) -> list[int]:
        with engine._core.call():
            found: list[int] = model.tokenize(text, add_special=False, parse_special=False)
        return found

    n_char = n_prompt * _TOKEN_CHARS
    before = tokens(prefix[-n_char:])
    after = tokens(suffix[:n_char])
    others = [*rep, *tokens("project\n")] if files and rep else []
    for name, text in files:
        others += [*sep, *tokens(f"{name}\n{text[-n_char:]}\n")]
    if files and sep:  # the name of this one is not known
        others += [*sep, *tokens("file\n")]
    bos = [model._lib.llama_vocab_bos(model.vocab)]
    begin = bos if model._lib.llama_vocab_get_add_bos(model.vocab) else []
    n_answer = min(max(n_answer, 128), engine.n_ctx // 2)
    n_room = max(0, min(n_prompt, engine.n_ctx - n_answer) - len(begin) - 3)
    after = after[: max(n_room // 4, n_room - len(before))]
    n_room -= len(after)
    before = before[max(0, len(before) - n_room) :]
    others = others[max(0, len(others) - n_room + len(before)) :]
    return [*begin, *others, *pre, *before, *suf, *after, *mid]
