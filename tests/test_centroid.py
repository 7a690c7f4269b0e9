"""The strategy `centroid`: sample texts of each adapter, and weights by how near a query lies."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import TinyBundle, bundle_json, make_bundle, qaflora, said_by, snapshot
from numpy.typing import NDArray
from refusals import refused

from qaflora_edge import Engine
from qaflora_edge.bundles.edit import set_samples
from qaflora_edge.bundles.open import load_bundle
from qaflora_edge.cli.bundle import describe
from qaflora_edge.errors import BundleError, PromptError, StrategyError
from qaflora_edge.weighing.published.centroid import centroid_text, parse_centroid

SAMPLES = {"math": ["one ring and ten", "three in all"], "es": ["the rain", "an hour", "on time"]}
QUERY = "in the rain"
EXACT = {"kv_type": "f32", "flash_attn": False}


@pytest.fixture(scope="module")
def made_once(tmp_path_factory) -> TinyBundle:
    made = make_bundle(tmp_path_factory.mktemp("centroid"))
    for name, texts in SAMPLES.items():
        set_samples(made.folder, name, texts, Engine)
    return made


@pytest.fixture
def folder(made_once, tmp_path) -> Path:
    """A bundle of a test's own, with samples of both adapters."""
    return Path(shutil.copytree(made_once.folder, tmp_path / "bundle"))


def fusion(folder: Path) -> Any:
    return bundle_json(folder)["fusion"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # theirs
def test_weights_are_those_of_a_direct_reimplementation(made_once) -> None:
    """In torch, on transformers' own model: hidden states of all tokens, cosine, softmax."""
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("reference")
    model = reference.Reference(made_once.base.path, {"math": made_once.peft})

    def embedding(tokens: list[int]) -> Any:
        kept: list[Any] = []
        hook = model.layers[-1].register_forward_hook(
            lambda _module, _inputs, output: kept.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        with torch.inference_mode(), model.model.disable_adapter():
            model.model(input_ids=torch.tensor([tokens]))
        hook.remove()
        (states,) = kept
        return states.reshape(len(tokens), -1).double().mean(dim=0)

    with Engine(made_once.folder, **EXACT) as engine:

        def as_chat(text: str) -> list[int]:
            return engine.chat_tokens([{"role": "user", "content": text}])

        centroids = torch.stack(
            [
                torch.stack([embedding(as_chat(text)) for text in texts]).mean(dim=0)
                for texts in SAMPLES.values()
            ]
        )
        for query in (QUERY, "ten rings", "a"):
            similarity = torch.cosine_similarity(embedding(as_chat(query)), centroids, dim=-1)
            found = engine.weights(as_chat(query), strategy="centroid")
            assert found.divergence is not None
            assert found.weights.shape == found.divergence.shape == (2, 3)
            # The samples were read with an f16 KV state; softmax at 0.01 makes 1e-4 of it 1e-2.
            np.testing.assert_allclose(found.divergence[:, 0], similarity.numpy(), atol=2e-4)
            scores = [reason.scores["similarity"] for reason in found.why.values()]
            assert scores == found.divergence[:, 0].tolist()
            assert found.because.startswith(f"{found.chosen[0]}: similarity ")
            expected = torch.softmax(similarity / 0.01, dim=0).numpy()
            np.testing.assert_allclose(found.weights[:, 2], expected, atol=2e-2)


def test_embeddings_are_mean_states_of_the_base_alone(made_once) -> None:
    """Of a prompt in several micro-batches too, and whatever was asked before."""
    with Engine(made_once.folder, threads=1, **EXACT) as engine:
        tokens = np.random.default_rng(0).integers(0, 256, 300).tolist()
        states = [engine.hidden_states(tokens[: n + 1]) for n in range(0, 300, 50)]
        run, base = engine._core.run, engine._core.prober
        alone = [run(base.mean_states([tokens[0]])), run(base.mean_states(tokens[:1]))]
        np.testing.assert_allclose(alone[0], states[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(alone[0], alone[1])
        two = run(base.mean_states(tokens[:2]))
        second = engine.hidden_states(tokens[:2])
        np.testing.assert_allclose(two, (states[0] + second) / 2, rtol=1e-4, atol=1e-5)
        long = run(base.mean_states(tokens))
        run(base.mean_states(tokens[:40]))
        np.testing.assert_array_equal(run(base.mean_states(tokens)), long)

        middle = 3 * engine.n_layer // 5
        rest = (300 * long[middle].astype(np.float64) - states[0][middle]) / 299
        found = engine.embed(tokens)  # the first token does not count
        np.testing.assert_allclose(found, rest / np.linalg.norm(rest), rtol=1e-4, atol=1e-5)
        only = engine.embed(tokens[:1])
        expected = alone[0][middle] / np.linalg.norm(alone[0][middle])
        np.testing.assert_array_equal(only, expected.astype(np.float32))


def test_the_bundle_keeps_no_text(folder) -> None:
    record = fusion(folder)["samples"]["es"]
    assert sorted(record) == ["embedding", "n_text", "sha256"]
    assert record["n_text"] == 3
    text = (folder / "bundle.json").read_text(encoding="utf-8")
    assert not any(sample in text for samples in SAMPLES.values() for sample in samples)
    centroid = load_bundle(folder).known.centroids["es"]
    assert (centroid.dtype, centroid.shape) == (np.float32, (64,))
    assert "samples    of math, es" in describe(folder)
    file = folder.with_name("a.jsonl")
    file.write_text('{"prompt": "two\\nlines"}\n{"prompt": "b"}\n', encoding="utf-8")
    stderr = said_by(qaflora("bundle", "samples", folder, "es", file))
    assert stderr == f"Embedded 2 sample texts of es in {folder}.\n"
    assert fusion(folder)["samples"]["es"]["n_text"] == 2
    assert list(fusion(folder)["samples"]) == ["math", "es"]


def test_what_cannot_be_used_changes_nothing(folder) -> None:
    before = snapshot(folder)
    with pytest.raises(BundleError, match="has no adapter 'law'; expected one of: math, es"):
        set_samples(folder, "law", ["a"], Engine)
    with pytest.raises(BundleError, match="No sample texts were given for es"):
        set_samples(folder, "es", [], Engine)
    with pytest.raises(PromptError, match="Sample text 2 cannot be used: The prompt has"):
        set_samples(folder, "es", ["a", "word " * 3000], Engine)
    assert snapshot(folder) == before


def test_it_needs_samples_of_each_adapter(tmp_path) -> None:
    made = make_bundle(tmp_path)
    set_samples(made.folder, "math", ["one"], Engine)
    with Engine(made.folder) as engine:
        told = refused(StrategyError, engine.weights, "a", strategy="centroid")
        assert told == (
            "Strategy centroid needs sample texts of each adapter, missing for es; give them with "
            "`qaflora bundle samples DIR ADAPTER FILE`."
        )
        assert engine.weights("a", strategy="centroid", adapters=["math"]).weights.all()
    result = qaflora("weights", made.folder, "a", "--strategy", "centroid")
    assert (result.exit_code, result.stderr) == (1, f"Error: {told}\n")


VALUES: NDArray[np.float32] = np.array([0.5, -1.25, 3e-5], np.float32)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("AAA", "no base64 ("),
        (centroid_text(VALUES[:2]), "of 8 bytes"),
        (centroid_text(np.array([1, np.nan, 2], np.float32)), "of values that are not finite"),
        (centroid_text(np.zeros(3, np.float32)), "of values that are not finite, or all 0"),
    ],
)
def test_a_centroid_that_is_none_is_refused(text, reason) -> None:
    np.testing.assert_array_equal(parse_centroid(centroid_text(VALUES), 3), VALUES)
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_centroid(text, 3)
