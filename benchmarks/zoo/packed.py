"""Train a LoRA adapter on short examples, many a step.

Examples of a step lie behind one another in one sequence: all see the head that they share, and
each sees itself. So nothing is padded and the head is read once a step; only tokens of answers get
logits. The gradients are those of a batch of the same examples, padded.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

Tensor = torch.Tensor


@dataclass(frozen=True)
class Read:
    """An example as token ids: its prompt behind the shared head, and what is learnt."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Pack:
    """Examples of one step, of n tokens with the head.

    ids, places   int64 [1, n]: token ids; places count on from the head in every example
    sees          bool [1, 1, n, n]: whether a token sees another
    before        int64 [m]: places of the tokens that lie before those that are learnt
    learnt        int64 [m]: what is learnt
    """

    ids: Tensor
    places: Tensor
    sees: Tensor
    before: Tensor
    learnt: Tensor


def pack(head: Sequence[int], examples: Sequence[Read]) -> Pack:
    """Lay examples behind the head that they share."""
    ids = list(head)
    places = list(range(len(head)))
    part = [0] * len(head)
    before = []
    learnt = []
    for number, example in enumerate(examples, 1):
        whole = [*example.prompt, *example.answer]
        first = len(ids) + len(example.prompt)
        before += range(first - 1, first - 1 + len(example.answer))
        learnt += example.answer
        ids += whole
        places += range(len(head), len(head) + len(whole))
        part += [number] * len(whole)
    parts = torch.tensor(part)
    is_same = parts[:, None] == parts[None, :]
    is_head = (parts == 0)[None, :]
    sees = torch.tril(is_same | is_head)
    return Pack(
        torch.tensor([ids]),
        torch.tensor([places]),
        sees[None, None],
        torch.tensor(before),
        torch.tensor(learnt),
    )


def nats_of(model: Any, packed: Pack) -> Tensor:
    """Nats of each learnt token. model: of transformers, with or without PEFT around it."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.autocast("cpu", torch.bfloat16, enabled=causal.dtype == torch.bfloat16):
        states = causal.model(
            input_ids=packed.ids,
            attention_mask=packed.sees,
            position_ids=packed.places,
            use_cache=False,
        ).last_hidden_state
        logits = causal.lm_head(states[0, packed.before])
    return cross_entropy(logits.float(), packed.learnt, reduction="none")


def loss_of(model: Any, packed: Pack) -> Tensor:
    """Mean nats of a learnt token."""
    return nats_of(model, packed).mean()


def steps(examples: Sequence[Read], n_step: int, n_token: int, seed: int) -> Iterator[list[Read]]:
    """Give the examples of each step, of about n_token tokens: all in turn, shuffled."""
    draw = random.Random(seed)
    left: list[Read] = []
    for _ in range(n_step):
        chosen: list[Read] = []
        used = 0
        while used < n_token:
            if not left:
                left = draw.sample(examples, len(examples))
            chosen.append(left.pop())
            used += len(chosen[-1].prompt) + len(chosen[-1].answer)
        yield chosen
