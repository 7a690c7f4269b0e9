"""Drafting: guesses, how many, and answers that are the same bits as without them."""

import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bundles import bundle_json
from tiny import write_tiny_base

from qaflora_edge import Engine
from qaflora_edge.backend.batch import Span
from qaflora_edge.errors import OptionError
from qaflora_edge.hub import fetch_model
from qaflora_edge.inference.guesses import Guesser, guess_together

COPY = "Write this list again, with a number before each line:\n" + "red apple, green pear\n" * 6
SCHEMA = {"type": "array", "items": {"enum": ["red apple", "green pear"]}, "maxItems": 6}


@pytest.mark.parametrize("seed", range(20))
def test_a_guess_is_what_followed_the_last_tokens_where_they_stood_last(seed) -> None:
    rng = random.Random(seed)
    prompt, answer = ([rng.randrange(8) for _ in range(n)] for n in (rng.randrange(9), 60))
    guesser = Guesser(prompt, 4)
    for n in range(1, len(answer)):
        text = "".join(map(str, prompt + answer[:n]))
        found = [text[:-1].rfind(text[-k:]) + k for k in (4, 3, 2, 1) if text[-k:] in text[:-1]]
        expected = [int(digit) for digit in text[found[0] :][:4]] if found else []
        assert guesser.guess(answer[:n]) == expected


@pytest.mark.parametrize(
    ("lengths", "n_ctx", "expected"),
    [
        ([7], 100, 7),
        ([7], 55, 4),  # as many as fit behind 50 tokens and the next
        ([15, 15], 100, 7),  # 16 rows
        ([15, 2], 100, 2),
        ([4, 0], 100, 0),
        ([7] * 3, 100, 0),
    ],
)
def test_sequences_guess_the_same_number_of_tokens(lengths, n_ctx, expected) -> None:
    def sequence(n: int) -> Any:
        guesser = SimpleNamespace(guess=lambda answer: [9] * n)
        return SimpleNamespace(guesser=guesser, answer=[1], n_max=90, n_past=50)

    guesses = guess_together([sequence(n) for n in lengths], n_ctx)
    assert [len(guess) for guess in guesses] == [expected] * len(lengths)


def test_a_guess_ends_where_the_answer_must() -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 1, 2]
    sequence: Any = SimpleNamespace(guesser=Guesser(prompt, 7), answer=[3], n_max=4, n_past=9)
    assert guess_together([sequence], 100) == [[4, 5]]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["models/demo", "models/demo-small"])
def test_answers_are_the_same_bits_with_guesses_and_without(checkout, folder) -> None:
    """Greedy, sampled, penalised, under a schema, and four at once under four mixes."""
    fetch_model(bundle_json(checkout / folder)["base"]["registry"])
    ways: list[dict[str, Any]] = [
        {},
        {"temperature": 0.6, "seed": 3},
        {"repeat_penalty": 1.1, "stop": "pear, red"},
        {"json_schema": SCHEMA, "temperature": 0.3, "seed": 1},
    ]
    options: dict[str, Any] = {"n_parallel": 4, "n_ctx": 256, "threads": 1}
    with (
        Engine(checkout / folder, guesses=0, **options) as plain,
        Engine(checkout / folder, guesses=15, **options) as drafting,
        Engine(checkout / folder, **options) as automatic,
    ):
        if drafting._core.pack.n_alike < 16:
            assert automatic._core.n_guess == 0
            pytest.skip("this processor computes few rows otherwise than one")
        tokens = plain.chat_tokens([{"role": "user", "content": COPY}])
        names = plain.adapters
        asked = [
            {"prompt": tokens, "weights": {names[i % 2]: 0.2 * i}, "logprobs": 2, **way}
            for i, way in enumerate(ways)
        ]

        def answered(engine: Engine, *, is_together: bool) -> tuple[list[Any], int]:
            groups = [asked] if is_together else [[each] for each in asked]
            answers = [
                answer
                for group in groups
                for _, answer in sorted(engine.generate_many(group, max_tokens=40))
            ]
            found = [(answer.text(), answer.logprobs, answer.finish_reason) for answer in answers]
            return found, sum(answer.timings.guessed_n_right for answer in answers)

        expected, none = answered(plain, is_together=False)
        assert none == 0
        for engine in (drafting, automatic):
            for is_together in (False, True):
                found, n_accepted = answered(engine, is_together=is_together)
                assert found == expected
                assert n_accepted > 10 or is_together


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["models/demo", "models/demo-small"])
def test_the_base_reads_a_prompt_to_the_same_bits_however_it_is_cut(checkout, folder) -> None:
    fetch_model(bundle_json(checkout / folder)["base"]["registry"])
    tokens = np.random.default_rng(3).integers(100, 20_000, 300).tolist()
    with Engine(checkout / folder, n_ctx=512) as engine:
        context = engine._core.context
        if not engine._core._is_exact:
            pytest.skip("this processor computes few rows otherwise than one")

        def read(*cuts: int) -> bytes:
            context.clear()
            for at, end in pairwise((0, *cuts)):
                context.decode_spans([Span(1, tokens[at:end], at, "last")])
            _, _, state = context.kv_state_of(1).sequences[0]
            return state.tobytes() + context.logits().tobytes()

        expected = read(300)
        for cuts in [(4, 300), (256, 300), (77, 90, 299, 300), (*range(3, 301, 9),)]:
            assert read(*cuts) == expected


@pytest.mark.parametrize("name", ["guesses", "draft"])  # its name before
def test_a_base_that_cannot_forget_a_guess_guesses_none(tmp_path, name) -> None:
    base = write_tiny_base(tmp_path / "base.gguf", "gemma3", window=16).path
    with Engine(base=base, adapters={}) as engine:
        assert engine._core.n_guess == 0
    with pytest.raises(OptionError, match="Option guesses is 4, expected 0: the base"):
        Engine(base=base, adapters={}, **{name: 4})
