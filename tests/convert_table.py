"""What converting does for each family and feature, found by trying; as tables for the docs.

    python tests/convert_table.py        finds all (`make convert-table`)
    python tests/convert_table.py page   writes the page from findings.json: the unusual cells

A row is found by `Findings.row`: "exact" where logits, or states, are those of transformers and
peft; "refused" where converting or the runtime says so with one of our errors. What is converted
and wrong is neither: the finding fails.
"""

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import published  # noqa: F401 (registers norm)
from families import FAMILIES, MIXTURES, AnyFamily
from specimen import ADAPTERS, EXPERTS, LAYER_WEIGHTS, TOKENS, UPSTREAM, Specimen
from stock import StockContext
from tiny import F32

from qaflora_edge import Engine
from qaflora_edge.backend.model import Model
from qaflora_edge.convert.adapter import convert_adapter
from qaflora_edge.errors import BackendError, StrategyError, UnsupportedAdapterError
from qaflora_edge.files import cache_dir
from qaflora_edge.formats.base import read_base

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
STORE = Path(__file__).with_name("findings.json")
BEGIN, END = "<!-- {}: begin -->\n| what | which |\n| --- | --- |\n", "<!-- {}: end -->"
EXACT, REFUSED, ABSENT = "exact", "refused", "–"
COLUMNS = ("projections", "scales", "embedding", "head", "probe", "norm", "llama.cpp", "upstream")
EXPERT_COLUMNS = ("stacked", "one by one", "probe", "llama.cpp", "upstream")
USUAL = {**dict.fromkeys((*COLUMNS, *EXPERT_COLUMNS), EXACT), "upstream": "same"}


class Findings:
    """Specimens of some families, and what was found of them."""

    def __init__(self, families: Iterable[AnyFamily], upstream: Path, folder: Path) -> None:
        import zoo  # and so torch, which takes seconds

        self.specimens = zoo.build(families, upstream, folder)

    def row(self, family: str) -> dict[str, str]:
        """Find a row's cells: column -> cell. A wrong result raises AssertionError."""
        specimen = self.specimens[family]
        found = dict.fromkeys(COLUMNS, REFUSED)
        files = {}
        for adapter in ADAPTERS:
            if not specimen.peft(adapter).exists():
                found[adapter] = ABSENT
                continue
            path = specimen.folder / f"{adapter}.gguf"
            with suppress(UnsupportedAdapterError):
                convert_adapter(
                    specimen.peft(adapter), specimen.base, path, outtype="f32", verify=True
                )
                files[adapter] = path
        with _engine(specimen, files) as engine:
            found |= dict.fromkeys(files, EXACT)
            _check_logits(specimen, engine)
            with suppress(BackendError):
                _check_probe(specimen, engine, "projections", specimen.states)
                found["probe"] = EXACT
        with suppress(BackendError, StrategyError):
            _check_norm(specimen, files["projections"])
            found["norm"] = EXACT
        found["llama.cpp"] = _check_stock(specimen, files)
        found["upstream"] = _compare_upstream(specimen, files)
        return found

    def expert_row(self, family: str) -> dict[str, str]:
        """Find the same of adapters of a mixture's experts."""
        specimen = self.specimens[family]
        files = {}
        for adapter in specimen.experts:
            files[adapter] = specimen.folder / f"{adapter}.gguf"
            convert_adapter(
                specimen.peft(adapter), specimen.base, files[adapter], outtype="f32", verify=True
            )
        assert specimen.expert_states is not None
        with _engine(specimen, files) as engine:
            _check_logits(specimen, engine)
            _check_probe(specimen, engine, "experts", specimen.expert_states)
        cells = [EXACT if adapter in files else ABSENT for adapter in EXPERTS]
        upstream = _compare_upstream(specimen, files) if UPSTREAM & files.keys() else ABSENT
        cells += [EXACT, _check_stock(specimen, files), upstream]
        return dict(zip(EXPERT_COLUMNS, cells, strict=True))


def _engine(specimen: Specimen, files: Mapping[str, Path]) -> Engine:
    options = {"n_ctx": 64, "kv_type": "f32", "flash_attn": False, "threads": 1}
    return Engine(base=specimen.base, adapters=files, **options)


def _check_logits(specimen: Specimen, engine: Engine) -> None:
    """Compare the base's, each adapter's and a mix per layer with transformers and peft."""
    assert_near(specimen, engine.logits(TOKENS, weights="base"), "base")
    for index, adapter in enumerate(engine.adapters):
        weights = np.zeros((len(engine.adapters), engine.n_layer), np.float32)
        weights[index] = 1.0
        assert_near(specimen, engine.logits(TOKENS, weights=weights), adapter)
        per_layer = {"projections": "per layer", "experts": "experts per layer"}.get(adapter)
        if per_layer:
            weights[index] = LAYER_WEIGHTS[: engine.n_layer]
            assert_near(specimen, engine.logits(TOKENS, weights=weights), per_layer)


def _check_probe(specimen: Specimen, engine: Engine, adapter: str, expected: F32) -> None:
    """Compare captured states, and see that the lens finds what moved them."""
    states = engine.hidden_states(TOKENS, adapter=adapter)
    error = np.abs(states - expected).max() / np.abs(expected).max()
    assert error <= specimen.family.tolerance, f"states differ by {error:.1e}"
    weights = engine.weights(TOKENS).weights
    np.testing.assert_allclose(weights.sum(axis=0), 1.0, rtol=1e-6)
    # The first layer may be one without experts.
    own = weights[engine.adapters.index(adapter)]
    assert np.all(own[1 if adapter == "experts" else 0 :] > 0.01)


def _check_norm(specimen: Specimen, path: Path) -> None:
    with _engine(specimen, {"it": path}) as engine:
        weights = engine.weights(TOKENS, strategy="norm").weights
    assert np.all(weights == 1.0)  # of the one adapter there is


def _check_stock(specimen: Specimen, files: Mapping[str, Path]) -> str:
    """Load the files with llama.cpp's own code, and compare the logits of those that it loads."""
    is_tied = "output.weight" not in {t.name for t in gguf.GGUFReader(specimen.base).tensors}
    # Under a tied head, build_lora_mm applies the embedding's A to the head and aborts.
    tried = {"projections", "head", *EXPERTS} | (set() if is_tied else {"embedding"})
    unloaded = []
    with Model(read_base(specimen.base)) as model:
        for adapter in files.keys() & tried:
            context = StockContext(model, n_ctx=64)
            try:
                if context.can_load(files[adapter]):
                    context.set_adapters([files[adapter]], [1.0])
                    assert_near(specimen, context.decode(TOKENS), adapter)
                else:
                    unloaded.append(adapter)
            finally:
                context.close()
    return ", ".join([EXACT, *(f"{adapter}: not loaded" for adapter in sorted(unloaded))])


def assert_near(specimen: Specimen, logits: F32, which: str) -> None:
    """Compare logits with the reference, and see that the adapter made a difference to it."""
    expected = specimen.logits[which]
    scale, tolerance = np.abs(expected).max(), specimen.family.tolerance
    error = np.abs(logits - expected).max() / scale
    assert error <= tolerance, f"{which}: logits differ by {error:.1e} of the largest"
    if which != "base":
        effect = np.abs(expected - specimen.logits["base"]).max() / scale
        assert effect > 5 * tolerance, f"{which}: the adapter moves logits by {effect:.1e} only"


def _compare_upstream(specimen: Specimen, files: Mapping[str, Path]) -> str:
    """Compare with upstream's tensors, of the adapters that we convert."""
    found = {}
    for adapter, path in files.items():
        if adapter not in UPSTREAM:
            continue
        theirs = specimen.upstream(adapter)
        if not theirs.exists():
            found[adapter] = "stops"
            continue
        ours, tensors = stored(path), stored(theirs)
        if not tensors:
            found[adapter] = "left out"
            continue
        assert tensors.keys() == ours.keys()
        if any(not np.array_equal(tensors[name], ours[name]) for name in ours):
            found[adapter] = "other values"
    return ", ".join(f"{adapter}: {what}" for adapter, what in found.items()) or "same"


def stored(path: Path) -> dict[str, F32]:
    """Read an adapter with gguf's own reader: tensor name -> float32 values."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


def committed() -> dict[str, dict[str, dict[str, str]]]:
    """Read what was found: architectures or experts -> family -> unusual cells."""
    return dict(json.loads(STORE.read_text(encoding="utf-8")))


def unusual(cells: Mapping[str, str]) -> dict[str, str]:
    """Leave out the usual cells of a row."""
    return {column: cell for column, cell in cells.items() if cell != USUAL[column]}


def exceptions(name: str) -> dict[str, list[str]]:
    """Name the families of each unusual cell."""
    found: dict[str, list[str]] = {}
    for family, cells in committed()[name].items():
        for column, cell in cells.items():
            found.setdefault(f"{column}: {cell}", []).append(family)
    return found


def page(text: str) -> str:
    """Put the tables in their places in the page."""
    models: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        models.setdefault(f"`{family.arch}`", []).append(family.name)
    parts: dict[str, Mapping[str, Iterable[str]]] = {
        "architectures": models,
        "exceptions": exceptions("architectures"),
        "experts": {"stacked: exact": [each.name for each in MIXTURES], **exceptions("experts")},
    }
    for name, rows in parts.items():
        made = "".join(f"| {what} | {'; '.join(names)} |\n" for what, names in rows.items())
        before, _, rest = text.partition(BEGIN.format(name))
        after = rest.partition(END.format(name))[2]
        text = f"{before}{BEGIN.format(name)}{made}{END.format(name)}{after}"
    return text


def find() -> None:
    """Try every family again, and keep what is found."""
    import zoo

    archive = zoo.find_archive(PAGE.parents[1] / "patches", cache_dir())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        upstream = zoo.unpack_upstream(archive, folder / "upstream")
        findings = Findings(FAMILIES.values(), upstream, folder)
        found = {
            "architectures": {each: unusual(findings.row(each)) for each in FAMILIES},
            "experts": {each.name: unusual(findings.expert_row(each.name)) for each in MIXTURES},
        }
    STORE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["page"]:
        find()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
