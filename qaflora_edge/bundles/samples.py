"""Sample texts of an adapter, for the strategy `centroid`: embedded by the base, and not kept."""

from collections.abc import Sequence
from pathlib import Path

from qaflora_edge.bundles.edit import adapter_index, editing
from qaflora_edge.bundles.open import load_bundle
from qaflora_edge.bundles.write import prompts_sha256
from qaflora_edge.errors import BundleError
from qaflora_edge.files import AnyPath, check_takes_file
from qaflora_edge.formats.bundle import BUNDLE_FILE
from qaflora_edge.progress import Tell, silent
from qaflora_edge.weighing.baselines import centroid_text

MAX_SAMPLES = 1000
SAMPLE_CTX = 2048  # tokens of one text


def set_samples(
    folder: AnyPath, name: str, texts: Sequence[str], *, progress: Tell | None = None
) -> None:
    """Embed texts like those that an adapter is for; they replace what was embedded before.

    bundle.json gets their mean embedding, their number and their hash, and no text.

    Raises BundleError for no adapter of the bundle, no text or too many, PromptError for a text of
    more than 2,048 tokens; the bundle is as it was then.
    """
    folder, tell = Path(folder), progress or silent
    if not 1 <= len(texts) <= MAX_SAMPLES:
        raise BundleError(
            f"{len(texts)} sample texts were given for the adapter {name} of {folder}, expected 1 "
            f"to {MAX_SAMPLES}; a few dozen are enough."
        )
    from qaflora_edge.engine import Engine

    with editing(folder) as (text, raw):
        adapter_index(folder, text, name)
        loaded = load_bundle(folder)
        check_takes_file(folder / BUNDLE_FILE)
        with Engine(base=loaded.base_path, n_ctx=SAMPLE_CTX) as engine:
            centroid = engine.centroid(texts, lambda *done: tell("samples", *done))
        raw.setdefault("fusion", {}).setdefault("samples", {})[name] = {
            "embedding": centroid_text(centroid),
            "n_text": len(texts),
            "sha256": prompts_sha256(texts),
        }
