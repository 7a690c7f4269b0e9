"""SmolLM2 with three trained adapters, against transformers and PEFT on the dequantised base."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from qaflora_edge import Engine
from qaflora_edge.convert.adapter import convert_adapter

if TYPE_CHECKING:
    import gguf
    from reference import Reference  # and so torch, which takes seconds

NAMES = ("math", "es", "med")
DEMO = Path(__file__).parents[1] / "models" / "demo" / "adapters"
pytestmark = [
    pytest.mark.slow,
    # transformers and peft warn of each other's ways; nothing of ours is called there.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
N_HEAD, N_HEAD_KV = 9, 3  # of SmolLM2-135M
LOGIT_ERROR = 2e-3

PROMPTS = [
    "A train leaves at 9:40 and arrives at 11:15. How long is the journey?",
    "What is 17 times 6?",
    "¿Cuántas manzanas quedan si como tres de diez?",
    "¿Cuál es la capital de Francia?",
    "Which vitamin prevents scurvy?\nA. Vitamin A\nB. Vitamin B\nC. Vitamin C\nD. Vitamin D",
    "¿Qué órgano produce la insulina?",
    "Wie spät ist es?",
    "Write a short poem about a cat.",
]


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """Let each GGUF be read once: a vocabulary takes gguf seconds, and transformers asks often."""
    import gguf

    reader = gguf.GGUFReader

    @cache
    def read(path: str) -> gguf.GGUFReader:
        with pytest.MonkeyPatch.context() as patch:  # slices of a memmap take twice as long
            patch.setattr(np, "memmap", lambda path, mode: np.fromfile(path, np.uint8))
            return reader(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lambda path: read(str(path)))
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def peft_folders(folder) -> dict[str, Path]:
    from reference import peft_from_gguf

    return {
        name: peft_from_gguf(DEMO / f"{name}.gguf", folder / name, N_HEAD, N_HEAD_KV)
        for name in NAMES
    }


@pytest.fixture(scope="module")
def exact(smollm2, folder, peft_folders) -> Iterator[Engine]:
    """F32 base, F32 adapters from our own converter, F32 KV, no flash attention."""
    from reference import dequantise

    base = dequantise(smollm2, folder / "f32.gguf")
    adapters = {
        name: convert_adapter(path, base, folder / f"{name}.gguf", outtype="f32").path
        for name, path in peft_folders.items()
    }
    with Engine(base=base, adapters=adapters, kv_type="f32", flash_attn=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(smollm2, peft_folders, exact) -> Reference:
    from reference import Reference

    made = Reference(smollm2, peft_folders)
    made.read(queries(exact))
    return made


def queries(engine: Engine) -> list[list[int]]:
    """Half of the prompts in chat form, half as plain text."""
    return [
        engine.chat_tokens([{"role": "user", "content": text}]) if i % 2 else engine.tokenize(text)
        for i, text in enumerate(PROMPTS)
    ]


def test_tokens_equal_the_reference_tokeniser(smollm2, exact) -> None:
    from transformers import AutoTokenizer

    tokeniser = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    for text in PROMPTS:
        assert exact.tokenize(text) == tokeniser(text, add_special_tokens=False).input_ids
        messages = [{"role": "user", "content": text}]
        chat = tokeniser.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        expected = tokeniser(chat, add_special_tokens=False).input_ids
        assert exact.chat_tokens(messages) == expected


def test_states_and_logits_equal_the_reference(exact, reference) -> None:
    for tokens in queries(exact)[::3]:
        for adapter in (None, *NAMES):
            expected, expected_logits = reference.states(tokens, adapter)
            found = exact.hidden_states(tokens, adapter=adapter)
            error = np.abs(found - expected).max(axis=-1) / np.abs(expected).max(axis=-1)
            assert error.max() < 1e-4
            weights = "base" if adapter is None else {adapter: 1.0}  # the mix reads all
            logits = exact.logits(tokens, weights=weights)
            np.testing.assert_allclose(logits, expected_logits, atol=LOGIT_ERROR, rtol=0)


def test_weights_equal_the_reference(exact, reference, folder) -> None:
    """Raw layers are ill-conditioned (one token has all probability)."""
    adapters = {name: folder / f"{name}.gguf" for name in NAMES}
    options = {"kv_type": "f32", "flash_attn": False, "lens": "raw"}
    with Engine(base=folder / "f32.gguf", adapters=adapters, **options) as raw:
        for engine, lens, limit, few in ((exact, "norm", 1e-3, 1), (raw, "raw", 1e-2, 3)):
            for tokens in queries(engine)[::few]:
                expected = reference.weights(tokens, lens)
                assert np.abs(engine.weights(tokens).weights - expected).max() < limit


def test_greedy_continuation_equals_the_reference(exact, reference) -> None:
    for tokens in queries(exact)[::3]:
        fusion = exact.weights(tokens)
        answer = exact.generate(tokens, weights=fusion, max_tokens=32)
        text = answer.text()
        held = [each for each in exact._core.context.tokens if each[: len(tokens)] == tokens]
        found = max(held, key=len)[len(tokens) :]  # what was read back: not the last token
        (logits,) = reference.logits([(tokens, found)], fusion.weights)
        # Each is the likeliest; of two that are closer than logits are exact, either may be taken.
        taken = logits[range(len(found)), found]
        assert np.all(logits[:-1].max(axis=1) - taken < 2 * LOGIT_ERROR)
        whole = b"".join(exact._model.piece(token) for token in found).decode("utf-8", "replace")
        assert text.startswith(whole.rstrip("\ufffd"))
        is_ended = exact._model.is_end(int(logits[-1].argmax()))
        assert answer.n_completion == len(found) + (not is_ended)
        assert is_ended or answer.n_completion == 32


def test_scores_equal_the_reference(exact, reference) -> None:
    """Several continuations of each prompt under its weights, one longer than a batch."""
    texts = (" The answer is 7.", " No", " Hola, ¿qué tal? " * 12)
    for tokens in queries(exact)[1:3]:
        fusion = exact.weights(tokens)
        answers = [exact.tokenize(text) for text in texts]
        found = exact.score([tokens] * len(answers), answers)
        pairs = [(tokens, answer) for answer in answers]
        merged = reference.logits(pairs, fusion.weights)
        for answer, scores, rows in zip(answers, found, merged, strict=True):
            logits = rows[:-1].astype(np.float64)
            expected = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            expected = expected[range(len(answer)), answer]
            np.testing.assert_allclose(scores, expected, atol=2 * LOGIT_ERROR, rtol=0)
