"""Where the question stands in a prompt, and its states: one token at a time is the oracle."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_probe
from raw_context import project
from tiny import CHATML, TinyBase, write_tiny_base

from qaflora_edge import Engine, FusionWeights
from qaflora_edge.ask import Chat
from qaflora_edge.backend.model import Model
from qaflora_edge.formats.base import read_base
from qaflora_edge.prompt.tokens import chat_tokens, find_question
from qaflora_edge.weighing.published.prober import PLACES

EXACT: dict[str, Any] = {"kv_type": "f32", "flash_attn": False}
QUESTION = "the king is in the air"
base = test_probe.base
# Control tokens of the tiny vocabulary in the places of Llama 3's, Mistral's and a plain one's.
HEADERS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|endoftext|>\n\n{{ m.content }}<|im_end|>"
    "{% endfor %}"
    "<|im_start|>assistant<|endoftext|>\n\n"
)
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|> {{ m.content }}<|im_end|>"
    "{% else %} {{ m.content }}<|endoftext|>{% endif %}{% endfor %}"
)
WORDS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def asked(*contents: str, system: str = "") -> list[dict[str, str]]:
    """A conversation whose turns take turns, the first and last the user's."""
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    return [{"role": "system", "content": system}, *turns] if system else turns


def found(model: Model, messages: Sequence[Any]) -> str | None:
    tokens = chat_tokens(model, Chat(messages))
    question = find_question(model, tokens)
    if question is None:
        return None
    first, end, is_later = question
    assert is_later == (sum(m["role"] == "user" for m in messages) > 1)
    return b"".join(model.piece(t, special=True) for t in tokens[first:end]).decode()


@pytest.mark.parametrize("template", [CHATML, HEADERS, BRACKETS])
def test_the_question_is_the_last_user_turn(tmp_path, template) -> None:
    model = Model(read_base(write_tiny_base(tmp_path / "base.gguf", chat_template=template).path))
    conversations = [
        asked("the air"),
        asked("a", "user\nthe ring", "what is it"),
        asked("<|im_start|>user\nno<|im_end|>"),  # typed: text, no turn
    ]
    if template is not BRACKETS:  # as Mistral's first ones, it knows no system
        conversations.append(asked("the air", system="Be short."))
    for messages in conversations:
        text = found(model, messages)
        assert text.strip() == messages[-1]["content"]
    model.close()


@pytest.mark.parametrize("template", [None, WORDS, "{{ raise_exception('no') }}"])
def test_without_control_tokens_around_it_there_is_none(tmp_path, template) -> None:
    model = Model(read_base(write_tiny_base(tmp_path / "base.gguf", chat_template=template).path))
    tokens = model.tokenize("user: the air\nassistant:", add_special=False, parse_special=False)
    assert find_question(model, tokens) is None
    assert find_question(model, []) is None
    model.close()


def opened(base: TinyBase, adapters: dict[str, Path]) -> Engine:
    return Engine(base=base.path, adapters=adapters, n_ctx=128, **EXACT)


def one_by_one(engine: Engine, tokens: Sequence[int], span: tuple[int, int]) -> Any:
    """States [2, 1 + n_adapter, n_layer, n_embd] of one token of one prompt after the other."""

    def states(adapter: str | None, n: int) -> Any:
        return engine.hidden_states(tokens[:n], adapter=adapter).astype(np.float64)

    who = (None, *engine.adapters)
    last = [states(adapter, len(tokens)) for adapter in who]
    means = [np.mean([states(each, n + 1) for n in range(*span)], axis=0) for each in who]
    return np.array([last, means])


def shown(fusion: FusionWeights) -> Any:
    """The measure behind weights: float64 [n_adapter, n_layer]."""
    return fusion.divergence.astype(np.float64)


@pytest.mark.parametrize("span", [(3, 9), (0, 12)])
def test_states_of_both_places_are_those_of_single_tokens(base, adapters, span) -> None:
    tokens = np.random.default_rng(1).integers(0, 256, 12).tolist()
    with opened(base, adapters) as engine:
        expected = one_by_one(engine, tokens, span)
    with opened(base, adapters) as engine:
        # Of gemma3, whose states grow, the order of sums in float32 alone moves some by 4e-4.
        atol = 1e-3 if base.arch == "gemma3" else 1e-5
        core, rows = engine._core, engine._core.rows(engine.adapters)
        found = [core.run(core.prober.states(tokens, rows, pool, span)) for pool in PLACES]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=atol)


def test_pool_question_weighs_by_the_questions_mean(base, adapters) -> None:
    with Engine(base=base.path, adapters=adapters, n_ctx=128, pool="question", **EXACT) as engine:
        tokens = engine.chat_tokens(asked("a", "b", QUESTION))
        span = engine.read(tokens).question
        assert span is not None
        expected = one_by_one(engine, tokens, span)[1]
        plain, *adapted = expected
        norms = np.linalg.norm(expected, axis=-1)
        cosine = 1 - (plain * expected[1:]).sum(axis=-1) / norms[0] / norms[1:]
        fusion = engine.weights(tokens, strategy="qa-flora:distance=cosine")
        np.testing.assert_allclose(shown(fusion), cosine, rtol=1e-3, atol=1e-6)
        assert fusion.measured.name == "cosine distance"
        kl = shown(engine.weights(tokens, strategy="qa-flora"))
        core = engine._core.prober._contexts.for_query(1)
        for ia, states in enumerate(adapted):
            logits = [project(core, s).astype(np.float64) for s in (plain, states)]
            log_p, log_q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in logits)
            reference = (np.exp(log_p) * (log_p - log_q)).sum(-1)
            np.testing.assert_allclose(kl[ia], reference, rtol=2e-2, atol=1e-7)
