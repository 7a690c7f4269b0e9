"""A conversation as data: order, undoing, and what drops out when the context is full."""

import itertools

import pytest

from qaflora_edge.chat.conversation import Conversation, Message, Turn
from qaflora_edge.errors import PromptError

N_CTX = 100


def tokenize(messages: list[Message]) -> list[int]:
    """One token a character, and an end for each message."""
    tokens = [ord(char) for message in messages for char in f"{message['content']}\n"]
    if len(tokens) > N_CTX:
        raise PromptError(f"The prompt has {len(tokens)} tokens, the context {N_CTX}.")
    return tokens


def talk(n_turn: int, *, system: str | None = None, length: int = 9) -> Conversation:
    letters = itertools.cycle("abcdefghij")
    turns = [Turn(next(letters) * length, next(letters) * length) for _ in range(n_turn)]
    return Conversation(system, turns)


def test_messages_are_in_order() -> None:
    conversation = Conversation("be short", [Turn("one?", "1"), Turn("two?", "2")])
    assert conversation.messages("three?") == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "three?"},
    ]


def test_what_fits_is_sent_whole() -> None:
    conversation = talk(3, system="s")
    tokens = conversation.fit("why?", tokenize, 90)
    assert tokens == tokenize(conversation.messages("why?"))
    assert conversation.n_dropped == 0


@pytest.mark.parametrize("n_turn", [4, 5, 37, 200])
@pytest.mark.parametrize("n_most", [30, 60, 100])
def test_oldest_turns_drop_out_and_the_system_prompt_stays(n_turn: int, n_most: int) -> None:
    conversation = talk(n_turn, system="sys")
    tokens = conversation.fit("why?", tokenize, n_most)
    kept = conversation.turns[conversation.n_dropped :]
    # A turn is 20 tokens; the system prompt is 4 and the question 5.
    is_all = 9 + n_turn * 20 <= n_most
    assert len(kept) == (n_turn if is_all else (n_most - 9) // 2 // 20)
    assert tokens == tokenize(Conversation("sys", kept).messages("why?"))
    assert len(conversation.turns) == n_turn  # they are kept for a session file


def test_a_full_context_is_not_begun_anew_with_every_turn() -> None:
    conversation = Conversation("sys")
    begun = []
    for number in range(40):
        tokens = conversation.fit(f"{number:04}", tokenize, 94)
        begun.append(conversation.n_dropped)
        assert len(tokens) <= 94
        conversation.turns.append(Turn(f"{number:04}", "a" * 4))
    n_begun = len(set(begun)) - 1
    # A turn is 10 tokens: 9 fit beside the system prompt, and some 4 are dropped at once.
    assert 40 // 9 <= n_begun <= 9


def test_what_dropped_out_stays_out() -> None:
    conversation = talk(6)
    conversation.fit("why?" * 10, tokenize, 60)
    n_dropped = conversation.n_dropped
    assert n_dropped > 0
    conversation.fit("why?", tokenize, 100)
    assert conversation.n_dropped == n_dropped


def test_too_long_a_question_is_refused_and_drops_nothing() -> None:
    conversation = talk(2)
    with pytest.raises(PromptError, match="The prompt has 121 tokens, the context 100"):
        conversation.fit("x" * 120, tokenize, 75)
    assert conversation.n_dropped == 0


def test_much_too_long_a_history_is_not_tokenised() -> None:
    conversation = talk(1000, length=1000)
    lengths: list[int] = []

    def counting(messages: list[Message]) -> list[int]:
        lengths.append(sum(len(message["content"]) for message in messages))
        return tokenize(messages)

    conversation.fit("why?", counting, N_CTX)
    assert conversation.n_dropped == 1000
    assert max(lengths) < 10_000


def test_undo_takes_back_turns_until_there_are_none() -> None:
    conversation = talk(2)
    conversation.n_dropped = 2
    assert conversation.undo() == Turn("c" * 9, "d" * 9)
    assert conversation.n_dropped == 1
    assert conversation.undo() is not None
    assert conversation.undo() is None
    assert conversation.messages() == []
