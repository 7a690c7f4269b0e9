"""The card of a pushed repository, README.md: what it holds and how it is used."""

from collections.abc import Mapping, Sequence

from qaflora_edge.bundles.open import known_of
from qaflora_edge.formats.adapter import AdapterInfo
from qaflora_edge.formats.bundle import BundleText
from qaflora_edge.formats.hub_ref import is_repo, parse_hub_ref
from qaflora_edge.peft.module import PeftAdapter

LIBRARY = "qaflora-edge"
# Licences as bundles name them -> the Hub's names. Others are stated in the text only.
LICENSES = {
    name.lower(): name.lower()
    for name in ("MIT", "Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC0-1.0", "BSD-3-Clause")
}


def bundle_card(text: BundleText, repo: str) -> str:
    """The card of a bundle."""
    base = text.base
    base_model = parse_hub_ref(base.hub).repo if base.hub else None
    rows = [
        (a.name, str(a.rank), ", ".join(a.targets), a.description, a.source, a.license)
        for a in text.adapters
    ]
    lines = [
        *_head(text.license, base_model),
        f"# {_line(text.name) or repo}",
        "",
        *([_line(text.description), ""] if text.description else []),
        f"A bundle for {LIBRARY}: LoRA adapters for one quantised base, mixed anew for each "
        "question.",
        "",
        *_code(f"qaflora pull {repo} --with-base", f'qaflora run {repo} "A question"'),
        *_table(("adapter", "rank", "modules", "trained for", "source", "licence"), rows),
        *_measured(text),
        f"The base: {base.architecture}, {base.n_layer} layers, {base.size_bytes} bytes, SHA-256 "
        f"`{base.sha256}`"
        + (f", from `{place}`." if (place := base.hub or base.registry) else "."),
        "",
        *(
            [f"Strategy {_line(known_of(text).strategy)}, {_line(text.evidence)}.", ""]
            if text.evidence
            else []
        ),
        f"Licence: {_line(text.license) or 'not stated'}. The base has its own.",
    ]
    return "\n".join(lines) + "\n"


def _measured(text: BundleText) -> list[str]:
    """What the bundle knows of its adapters besides what they are: lines, or none."""
    samples = ", ".join(text.fusion.get("samples", {}))
    return [f"* `--strategy centroid`: sample texts of {samples}", ""] if samples else []


def gguf_card(info: AdapterInfo, repo: str) -> str:
    """The card of a single adapter GGUF."""
    facts = (info.path.name, str(info.rank), f"{info.alpha:g}", ", ".join(info.targets))
    names = ("file", "rank", "alpha", "modules")
    return _adapter_card(repo, info.architecture, _head("", None), names, facts)


def peft_card(adapter: PeftAdapter, repo: str) -> str:
    """The card of a PEFT adapter."""
    config = adapter.config
    kinds = sorted({name.rpartition(".")[2] for name in adapter.modules})
    facts = (str(config.rank), f"{config.alpha:g}", ", ".join(kinds))
    head = _head("", config.base_name, library="peft", tags="[lora, qaflora]")
    return _adapter_card(repo, "PEFT", head, ("rank", "alpha", "modules"), facts)


def _adapter_card(
    repo: str, kind: str, head: Sequence[str], names: Sequence[str], facts: Sequence[str]
) -> str:
    name = repo.partition("/")[2]
    lines = [
        *head,
        f"# {name}",
        "",
        f"A LoRA adapter ({_line(kind)}) that {LIBRARY} mixes with others for each question.",
        "",
        *_code(f"qaflora bundle create my-bundle --base BASE.gguf --adapter {name}={repo}"),
        *_table(names, [facts]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _head(
    license: str,
    base_model: str | None,
    *,
    library: str = LIBRARY,
    tags: str = "[qaflora, lora, gguf]",
) -> list[str]:
    """The YAML that the Hub reads; it refuses a base_model that is no repository's name."""
    if base_model is not None and not is_repo(base_model):
        base_model = None
    fields: Mapping[str, str | None] = {
        "library_name": library,
        "license": LICENSES.get(license.strip().lower()),
        "base_model": base_model,
        "base_model_relation": "adapter" if base_model else None,
        "tags": tags,
    }
    return ["---", *(f"{key}: {value}" for key, value in fields.items() if value), "---", ""]


def _code(*commands: str) -> list[str]:
    return ["```sh", f"pip install {LIBRARY}", *commands, "```", ""]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(map(_line, line)) + " |" for line in lines), ""]


def _line(text: str) -> str:
    """A text of a bundle as one line of Markdown that cannot become anything else."""
    flat = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return flat.replace("<", "&lt;").replace("[", "\\[").replace("`", "\\`")
