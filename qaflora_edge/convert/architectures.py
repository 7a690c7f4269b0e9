"""The architectures whose conversion was reviewed, and why others are refused. No I/O."""

from collections.abc import Mapping

from qaflora_edge.convert import layouts
from qaflora_edge.convert.layouts import Layout
from qaflora_edge.formats.arch_facts import ARCH_FACTS, ArchFacts
from qaflora_edge.formats.arch_facts import REASONS as _WHY


def _layout(facts: ArchFacts) -> Layout:
    if isinstance(facts.layout, str):
        found: Layout = getattr(layouts, facts.layout)
        return found
    return layouts.halves(**facts.layout)


# general.architecture -> how its modules lie
ARCHITECTURES: Mapping[str, Layout] = {
    name: _layout(facts) for name, facts in ARCH_FACTS.items() if facts.layout
}
# Those whose experts may be adapted: in HF and in a GGUF alike, each has gate, up and down.
MIXTURES = tuple(name for name, facts in ARCH_FACTS.items() if facts.experts)
# Why adapters are refused -> for which architectures
REASONS: Mapping[str, tuple[str, ...]] = {
    why: tuple(name for name, facts in ARCH_FACTS.items() if facts.refused == key)
    for key, why in _WHY.items()
}
REFUSED: Mapping[str, str] = {name: why for why, names in REASONS.items() for name in names}
