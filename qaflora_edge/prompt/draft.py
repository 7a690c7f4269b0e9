"""Where a draft stands in the prompt of who reads it, and how a knower is asked for words."""

from collections.abc import Sequence

from qaflora_edge.backend.model import Model
from qaflora_edge.weighing.plan import Draft

IN_WORDS = " Answer in words."  # behind the question to a knower
_N_AROUND = 8  # tokens around a draft, at most


def in_words(
    model: Model, tokens: Sequence[int], question: tuple[int, int] | None, n_ctx: int
) -> list[int]:
    """Ask for an answer in words, behind the question of a prompt, where there is room."""
    told = model.tokenize_inside(IN_WORDS)
    if question is None or len(tokens) + len(told) >= n_ctx:
        return [*tokens]
    end = question[1]
    return [*tokens[:end], *told, *tokens[end:]]


def with_draft(
    model: Model,
    tokens: Sequence[int],
    question: tuple[int, int] | None,
    draft: Draft,
    n_ctx: int,
    *,
    is_behind: bool = False,
) -> list[int]:
    """Put a draft in parentheses before the question, or behind it, as if it had been asked so.

    tokens    of the prompt
    question  begin and end of the question in it, as prompt.tokens.find_question gives them
    n_ctx     tokens of the context; a draft takes half of what is free there, at most

    The base answers in the language that comes last, and forms copy a draft that comes first more
    often; but an adapter of the question's language repeats a question that comes last.

    A control token that is spelt out in the draft stays text. Without room, or words, the prompt
    stays as it is.
    """
    if question is None:
        return [*tokens]
    start, end = question
    n_room = (n_ctx - len(tokens)) // 2
    said = model.text(draft.tokens[: max(0, n_room)]).strip()
    if not said:
        return [*tokens]
    if is_behind:
        told = model.tokenize_inside(f" ({said})")
        prompt = [*tokens[:end], *told, *tokens[end:]]
    else:
        asked = model.detokenize(tokens[start:end]).decode("utf-8", "replace")
        words = asked.lstrip(" ")
        space = asked[: len(asked) - len(words)]  # SentencePiece's first word brings its own
        told = model.tokenize_inside(f"{space}({said})\n\n{words}")
        prompt = [*tokens[:start], *told, *tokens[end:]]
    n_more = len(prompt) - len(tokens)  # bytes that are no text become more tokens
    has_room = n_more <= n_room + _N_AROUND and len(prompt) < n_ctx
    return prompt if has_room else [*tokens]
