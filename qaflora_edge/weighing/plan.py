"""A plan: how one question is answered, in steps that are data.

A strategy makes it. Most have one step, which writes the answer under some weights. A relay has
two: an adapter drafts, and another writes with the draft in view.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Self, get_args

from qaflora_edge.arrays import F32, ArrayLike

if TYPE_CHECKING:
    from qaflora_edge.formats.inputs import Json
    from qaflora_edge.weighing.strategy import Measured

BASE = "base"  # in place of an adapter's name, where the base alone is meant
ANSWER = ""  # the same, where the weights of the answer are
DRAFT_TOKENS = 128  # of the longest draft
LEAST_SURE = 0.5  # an answer below may be made up
DEFAULT_STRATEGY = "qa-flora"
DEFAULT_LENS = "norm"
DEFAULT_POOL = "last"

View = Literal["", "before"]  # where a draft stands from the question; "": nowhere
VIEWS = get_args(View)


@dataclass(frozen=True)
class Draft:
    """Hold what one adapter alone, or the base, answers to a query: greedy, the base prefills.

    adapter   its name, or BASE
    tokens    ids, at most DRAFT_TOKENS
    text      of them
    logprobs  of each token, in nats
    is_whole  whether it ended by itself
    draft_ms  time of writing it once a plan was made; 0 where a strategy read it
    """

    adapter: str
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    is_whole: bool
    draft_ms: float = 0.0

    def has(self, n_token: int) -> bool:
        """Tell whether it is whole, or has so many tokens."""
        return self.is_whole or len(self.tokens) >= n_token


_NOTHING_DRAFTED = Draft("", (), "", (), is_whole=False)


@dataclass(frozen=True)
class DraftStep:
    """Let one adapter alone, or the base, draft: its text is for the steps that follow.

    knower  its name, or BASE; of a mix the heaviest
    mix     [n_adapter, n_layer], where a mix drafts; None: the knower alone
    is_in_words  ask it to answer in words, behind the question
    view    where it sees the draft of the step before
    begun   what the strategy has read of its draft; a whole one is not written again
    """

    knower: str
    mix: ArrayLike | None = None
    is_in_words: bool = False
    view: View = ""
    begun: Draft | None = None

    @property
    def guesses(self) -> tuple[int, ...]:
        """Give the tokens with which the draft probably begins."""
        return () if self.begun is None else self.begun.tokens


@dataclass(frozen=True)
class WriteStep:
    """Write the answer.

    weights  [n_adapter, n_layer]
    view     where the draft of the step before stands
    guesses  tokens with which a greedy answer probably begins, where a draft told
    """

    weights: ArrayLike
    view: View = ""
    guesses: tuple[int, ...] = ()


Step = DraftStep | WriteStep


@dataclass(frozen=True)
class Reason:
    """Hold what decided about an adapter, by place, and the place it is taken for, or ""."""

    scores: Mapping[str, float]
    thresholds: Mapping[str, float] = field(default_factory=dict)
    taken_as: str = ""


@dataclass(frozen=True)
class Plan:
    """Say how a question is answered, and why.

    steps       drafts, and the last one, which writes
    divergence  [n_adapter, n_layer] in the strategy's measure, or None
    why, because  what decided, for all layers: by adapter, and in words
    known       adapter -> probability that what it drafts is right, where drafts were read
    sure        probability that what an adapter says is right, where its draft was read
    """

    steps: tuple[Step, ...]
    divergence: ArrayLike | None = None
    why: Mapping[str, Reason] = field(default_factory=dict)
    because: str = ""
    known: Mapping[str, float] = field(default_factory=dict)
    sure: float | None = None

    @classmethod
    def mix(
        cls,
        weights: ArrayLike,
        divergence: ArrayLike | None = None,
        why: Mapping[str, Reason] | None = None,
        because: str = "",
    ) -> Self:
        """Answer in one step under weights [n_adapter, n_layer]."""
        return cls((WriteStep(weights),), divergence, why or {}, because)

    @property
    def writing(self) -> WriteStep:
        """Give the last step."""
        last = self.steps[-1]
        assert isinstance(last, WriteStep), "the last step of a plan is a WriteStep"
        return last

    @property
    def weights(self) -> ArrayLike:
        """Give the weights [n_adapter, n_layer] of the answer."""
        return self.writing.weights

    @property
    def drafting(self) -> DraftStep | None:
        """Give the last step that drafts, where there is one."""
        for step in reversed(self.steps):
            if isinstance(step, DraftStep):
                return step
        return None

    @property
    def read_drafts(self) -> tuple[Draft, ...]:
        """Give the drafts of the first steps that were read whole: these steps are done."""
        drafts = []
        for step in self.steps:
            if not isinstance(step, DraftStep) or step.begun is None or not step.begun.is_whole:
                break
            drafts.append(step.begun)
        return tuple(drafts)


@dataclass(frozen=True)
class FusionWeights:
    """Hold what adapters weigh for one query, and the plan that the weights are part of.

    adapters  names, in the order of the first axis
    plan      of checked arrays: float32 [n_adapter, n_layer]
    prompt    ids of the query; its drafts are for no other
    probe_ms  time of reading and planning in milliseconds, 0 where nothing is read
    drafts    of the plan's first steps, which are done
    """

    adapters: tuple[str, ...]
    plan: Plan
    strategy: str = "manual"
    lens: str = DEFAULT_LENS
    pool: str = DEFAULT_POOL
    prompt: tuple[int, ...] = field(default=(), repr=False)
    probe_ms: float = 0.0
    drafts: tuple[Draft, ...] = ()

    @property
    def step(self) -> Step:
        """Give the plan's first step that is not done."""
        return self.plan.steps[len(self.drafts)]

    @property
    def drafted(self) -> list[Draft]:
        """List the drafts of steps that are done, and what was read of the others'."""
        left = self.plan.steps[len(self.drafts) :]
        begun = [step.begun for step in left if isinstance(step, DraftStep) and step.begun]
        return [*self.drafts, *begun]

    @property
    def draft(self) -> Draft | None:
        """Give the draft that the answer is written from, where there is one, as far as it is."""
        return self.drafted[-1] if self.drafted else None

    def undrafted(self) -> Self:
        """Give the same without drafts: who writes answers alone."""
        writing = replace(self.plan.writing, view="")
        return replace(self, plan=replace(self.plan, steps=(writing,)), drafts=())

    @property
    def weights(self) -> F32:
        """Give the weights of the answer: float32 [n_adapter, n_layer]."""
        import numpy as np

        return np.asarray(self.plan.weights, np.float32)

    @property
    def divergence(self) -> F32 | None:
        """Give the strategy's measure (KL in nats): float32 [n_adapter, n_layer], or None."""
        import numpy as np

        measured = self.plan.divergence
        return None if measured is None else np.asarray(measured, np.float32)

    @property
    def prompt_tokens(self) -> int:
        """Count the tokens of the query."""
        return len(self.prompt)

    @property
    def because(self) -> str:
        """Say in words what decided; "" where layers differ."""
        return self.plan.because

    @property
    def why(self) -> Mapping[str, Reason]:
        """Say by adapter what decided; nothing where layers differ."""
        return self.plan.why

    @property
    def measured(self) -> "Measured":
        """Give name and unit of `divergence`: what the strategy measures."""
        from qaflora_edge.weighing.strategy import measured_by

        return measured_by(self.strategy)

    @property
    def means(self) -> dict[str, float]:
        """Map each adapter to its mean weight over layers."""
        means = self.weights.mean(axis=1)
        return {name: float(mean) for name, mean in zip(self.adapters, means, strict=True)}

    @property
    def chosen(self) -> tuple[str, ...]:
        """Name the adapters with a mean weight above 0, heaviest first."""
        means = self.means
        heaviest_first = sorted(means, key=means.__getitem__, reverse=True)
        return tuple(name for name in heaviest_first if means[name] > 0)

    @property
    def writer(self) -> str:
        """Name the heaviest adapter, or BASE where none weighs anything."""
        chosen = self.chosen
        return chosen[0] if chosen else BASE

    def to_dict(self) -> "Json":
        """Give the object that `qaflora weights --json` prints."""
        divergence = None
        if self.divergence is not None:
            divergence = self.divergence.tolist()
        fields = {
            "adapters": list(self.adapters),
            "strategy": self.strategy,
            "lens": self.lens,
            "pool": self.pool,
            "n_layer": int(self.weights.shape[1]),
            "prompt_tokens": self.prompt_tokens,
            "divergence": divergence,
            "weights": self.weights.tolist(),
            "probe_ms": round(self.probe_ms, 3),
        }
        return fields | self.why_dict() | self.relay_dict() | self.sure_dict()

    def relay_dict(self) -> "Json":
        """Give `relay` for JSON: knower, writer, draft and how sure each was; else nothing."""
        step = self.plan.drafting
        if step is None:
            return {}
        draft = self.draft or _NOTHING_DRAFTED
        fields = {
            "knower": step.knower,
            "writer": self.writer,
            "draft": draft.text,
            "draft_tokens": len(draft.tokens),
            "draft_ms": round(draft.draft_ms, 3),
        }
        return {"relay": fields}

    @property
    def sure(self) -> float | None:
        """Give the probability that the answer is right; None where no draft tells."""
        return self.plan.sure

    @property
    def is_doubtful(self) -> bool:
        """Tell whether the answer may be made up."""
        return self.sure is not None and self.sure < LEAST_SURE

    def sure_dict(self) -> "Json":
        """Give `sure` for JSON; nothing where there is none."""
        return {} if self.sure is None else {"sure": round(self.sure, 3)}

    def why_dict(self) -> "Json":
        """Give `because` and `why` for JSON; nothing where there are none."""
        if not self.because:
            return {}
        reasons = {name: asdict(reason) for name, reason in self.why.items()}
        return {"because": self.because, "why": reasons}

    def __repr__(self) -> str:
        from qaflora_edge.show import who_spoke

        n_layer = self.weights.shape[1]
        return f"<FusionWeights {self.strategy}, {n_layer} layers: {who_spoke(self)}>"


def alone_weights(name: str, adapters: tuple[str, ...], n_layer: int) -> F32:
    """Give float32 [n_adapter, n_layer] of one adapter at 1, or of BASE."""
    import numpy as np

    weights = np.zeros((len(adapters), n_layer), np.float32)
    if name != BASE:
        weights[adapters.index(name)] = 1
    return weights
