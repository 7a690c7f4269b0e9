"""What was measured of a question and of each adapter: all that decides who answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Drafted:
    """Hold what the first tokens of an adapter's draft tell, in nats where nothing else is said.

    sure     known.sureness of it
    unusual  how much surer the adapter is than it mostly is, in spreads
    gain     log p of the draft under the adapter, less that under the base
    first    log p of its first token as the base's
    words    the same of the first one behind a name of the question
    oddly    whether it begins as the base would not
    whole    whether it ended
    recognised  known.recognised of the question
    """

    sure: float
    unusual: float
    gain: float
    first: float
    words: float
    oddly: bool
    whole: bool
    recognised: float


@dataclass(frozen=True)
class Standing:
    """Hold what was measured of one adapter, in standard deviations of what is typical of it.

    question, last  how far it stands out in the question, and at the last token
    own      the first, less what adapters alike do
    both     both places together, as two-place counts
    opening, spread  what the base's log p of its first token mostly is, in nats
    draft    what its draft tells; None: it drafted nothing
    """

    question: float
    own: float
    last: float
    both: float
    opening: float
    spread: float
    draft: Drafted | None = None


@dataclass(frozen=True)
class Evidence:
    """Hold what was measured of a question.

    nats      by which it surprises the base, or one that it goes on from
    adapters  name -> what was measured of it
    mix       whom two-place takes, the heaviest first
    """

    nats: float
    adapters: Mapping[str, Standing] = field(default_factory=dict)
    mix: Sequence[str] = ()

    def foremost(self, place: str, n: int) -> list[str]:
        """Name the n adapters that stand out most at a place of Standing."""
        names = sorted(self.adapters, key=lambda name: getattr(self.adapters[name], place))
        return names[::-1][:n]

    def ahead(self, name: str, place: str) -> float:
        """Tell how far an adapter is ahead of the next at a place of Standing."""
        values = {other: getattr(each, place) for other, each in self.adapters.items()}
        own: float = values.pop(name)
        return own - max(values.values(), default=0.0)

    def with_drafts(self, drafts: Mapping[str, Drafted]) -> "Evidence":
        adapters = {
            name: replace(standing, draft=drafts.get(name))
            for name, standing in self.adapters.items()
        }
        return replace(self, adapters=adapters)
