"""Decisions: how a question lists its choices, and what their log-probabilities say."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qaflora_edge.answering.reading import PromptReading
from qaflora_edge.arrays import F32, F64
from qaflora_edge.ask import Chat, Prompt, Weighing
from qaflora_edge.errors import PromptError, wrong_option
from qaflora_edge.formats.inputs import Json
from qaflora_edge.inference.sequence import Cancellation, Request
from qaflora_edge.weighing.numbers import n_base_of
from qaflora_edge.weighing.plan import FusionWeights
from qaflora_edge.weighing.weigher import Choice

if TYPE_CHECKING:
    from qaflora_edge.bundles.memory import AdapterSet

MAX_CHOICES = 255
MAX_REMEMBERED = 64  # lists of choices after no question, under a mix
_NOTHING = "N/A"  # a question that says nothing
_LIST = "Answer with one of these, and with nothing else:"


@dataclass(frozen=True)
class Decision:
    """What was chosen.

    choices        as they were given
    probabilities  float64 [n_choice], sums to 1
    fusion         the mix that chose
    by_adapter     "base", each adapter -> its own float64 [n_choice]; empty unless `compare`
    n_prompt       tokens of the question with its choices
    logprobs       float64 [2, n_choice] in nats, of choices after the question and after none
    """

    choices: tuple[str, ...]
    probabilities: F64
    fusion: FusionWeights
    by_adapter: Mapping[str, F64]
    n_prompt: int
    logprobs: F64

    @property
    def choice(self) -> str:
        """Name the likeliest; of equal ones the first."""
        return self.choices[int(np.argmax(self.probabilities))]

    def named(self, probabilities: F64) -> dict[str, float]:
        """Map each choice to its probability, the likeliest first."""
        shares = {}
        for at in np.argsort(-probabilities, kind="stable"):
            shares[self.choices[at]] = round(float(probabilities[at]), 6)
        return shares

    def to_dict(self) -> Json:
        """Give the object that `qaflora decide --json` prints."""
        shown: Json = {
            "choice": self.choice,
            "probabilities": self.named(self.probabilities),
            "fusion": {"strategy": self.fusion.strategy, "weights": self.fusion.means},
            "usage": {"prompt_tokens": self.n_prompt, "completion_tokens": 0},
        }
        if self.by_adapter:
            by_adapter = self.by_adapter.items()
            shown["by_adapter"] = {name: self.named(shares) for name, shares in by_adapter}
        return shown


def decide(
    adapters: "AdapterSet",
    prompt: Any,
    choices: Iterable[str] | Mapping[str, str],
    weighing: Weighing,
    *,
    compare: bool,
    cancellation: Cancellation,
) -> Decision:
    """Decide as Engine.decide does: all mixes score all choices in one call."""
    core = adapters.core
    reader = adapters.reader
    weigher = adapters.weigher.using(weighing.adapters)
    named = checked_choices(choices)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    nothing = [{"role": "user", "content": _NOTHING}]
    question = reader.read(_quick(messages))
    listed = reader.read(_quick(list_choices(messages, named)))
    blank = reader.read(_quick(list_choices(nothing, named)))
    texts = [reader.continuation(listed, name) for name in named]
    end = core.model._lib.llama_vocab_eot(core.model.vocab)
    if end >= 0:
        texts = [(*text, end) for text in texts]
    # As the strategy weighs, but it decodes nothing.
    mixes = {"": replace(weighing, relays=False)}
    if compare:
        mixes["base"] = Weighing("base")
        for name in weigher.adapters:
            mixes[name] = Weighing(f"single:{name}")
    fusions = {}
    requests: dict[Any, Request] = {}  # of a mix, and of a blank that is not remembered
    blank_keys = {}
    remembered = core.scorer.remembered
    if len(remembered) > MAX_REMEMBERED:
        remembered.clear()
    unasked = dict(remembered)  # other calls may clear it meanwhile
    for name, mix in mixes.items():
        choice = weigher.choice(question, mix)  # a list would look like a form
        with PromptReading(core, choice.query, cancellation) as reading:
            fusion = choice.weigh(reading)
        fusions[name] = fusion
        weights = core.all_weights(weigher.adapters, fusion.weights)
        requests[name] = _request(listed, weights, choice)
        of_blank = _request(blank, weights, choice)
        key = (of_blank.tokens, weights.tobytes(), of_blank.n_base, tuple(texts))
        blank_keys[name] = key
        if key not in unasked:
            requests[key] = of_blank
    items = []
    for request in requests.values():
        items += [(request, text) for text in texts]
    scores = core.run(core.scorer.score(items), cancellation, contexts="branch")
    every_sum = np.array([score.sum(dtype=np.float64) for score in scores])
    by_request = every_sum.reshape(-1, len(texts))  # [n_request, n_choice]
    sums = dict(zip(requests, by_request, strict=True))
    logprobs = {}
    shares = {}
    for name, key in blank_keys.items():
        if key in sums:
            unasked[key] = sums[key]
            remembered[key] = sums[key]
        logprobs[name] = np.array([sums[name], unasked[key]])
        shares[name] = probabilities(sums[name], unasked[key])
    return Decision(
        choices=tuple(named),
        probabilities=shares.pop(""),
        fusion=fusions[""],
        by_adapter=shares,
        n_prompt=len(listed.tokens),
        logprobs=logprobs[""],
    )


def _request(prompt: Prompt, weights: F32, choice: Choice) -> Request:
    n_base = n_base_of(len(prompt.tokens)) if choice.is_read_by_base else 0
    return Request(prompt.tokens, weights, n_base=n_base)


def _quick(messages: Any) -> Chat:
    return Chat(messages, chat_template_kwargs={"enable_thinking": False, "thinking": False})


def checked_choices(choices: Iterable[str] | Mapping[str, str]) -> dict[str, str]:
    """Give choice -> what it means, "" where nobody says. Raises OptionError."""
    names = []
    if not isinstance(choices, str) and isinstance(choices, Iterable):
        names = list(choices)
    are_texts = all(isinstance(name, str) and name.strip() for name in names)
    is_right = 1 <= len(names) <= MAX_CHOICES and are_texts
    if not is_right or len(set(names)) < len(names):
        expected = f"1 to {MAX_CHOICES} texts, all different and none empty"
        raise wrong_option("choices", choices, expected)
    means = choices if isinstance(choices, Mapping) else {}
    return {name: means.get(name) or "" for name in names}


def list_choices(messages: Any, choices: Mapping[str, str]) -> list[Json]:
    """Put the choices behind the question that ends a conversation. Raises PromptError."""
    last: Any = messages[-1] if isinstance(messages, Sequence) and messages else None
    question = None
    if isinstance(last, Mapping) and last.get("role") == "user":
        question = last.get("content")
    if not isinstance(question, str) or not question.strip():
        raise PromptError(
            f"The question is {last or messages!r:.100}, expected a text that is not empty, or "
            "messages that end with a user's."
        )
    lines = [question, "", _LIST]
    for name, means in choices.items():
        line = f"- {name}: {means}" if means else f"- {name}"
        lines.append(line)
    asked = dict(last) | {"content": "\n".join(lines)}
    return [*messages[:-1], asked]


def probabilities(asked: F64, unasked: F64) -> F64:
    """Compare choices by how much likelier the question makes each: float64 [n_choice].

    asked, unasked  of whole choices after the question and none: log p in nats, float64 [n_choice]

    Longer choices, and rarer words, are less likely in both. This is the domain-conditional PMI of
    Holtzman et al. 2021, "Surface form competition", with "N/A" as Zhao et al. 2021 ask nothing.
    """
    gains = asked - unasked
    shares = np.exp(gains - gains.max())
    return np.asarray(shares / shares.sum())
