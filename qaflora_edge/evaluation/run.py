"""Ask every item of some tasks under every strategy, score the answers, and write each result."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.engine import Engine
from qaflora_edge.errors import CancelledError, ChatTemplateError, PromptError
from qaflora_edge.evaluation.results import Record, ResultsFile
from qaflora_edge.evaluation.tasks import Item, Task
from qaflora_edge.weighing.numbers import FusionWeights

Tell = Callable[[int], None]  # given the tokens that were generated for a result

_DIGITS = 4  # of weights that are written


@dataclass(frozen=True)
class Asking:
    """How items are asked, where their task does not say.

    sampling    keywords of Engine.generate
    raw_prompt  no chat template
    has_layers  results have the weights of every layer
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    raw_prompt: bool = False
    has_layers: bool = False

    def max_tokens(self, task: Task) -> int | None:
        """Give the most tokens of an answer; None where nothing is generated, or nothing says."""
        limit: int | None = task.max_tokens or self.sampling.get("max_tokens")
        return None if task.by.is_likelihood else limit

    def facts(self, task: Task) -> dict[str, Any]:
        """Describe a task for the results file."""
        keys = ["name", "metric", "sha256", "language", "domain", "system", "template"]
        keys += ["choice_template", "score_by"] if task.metric == "choice" else []
        return {key: getattr(task, key) for key in keys} | {
            "n_item": len(task.items),
            "max_tokens": self.max_tokens(task),
            "raw_prompt": self.raw_prompt or task.raw_prompt,
        }


def header(
    folder: Path,
    engine: Engine,
    tasks: Sequence[Task],
    strategies: Sequence[str],
    asking: Asking,
    options: Mapping[str, Any],
    *,
    machine: str = "",
) -> dict[str, Any]:
    """Write the first line of a results file.

    folder   of the bundle
    machine  name of the processor
    """
    from qaflora_edge import __version__
    from qaflora_edge.chat.conversation import bundle_identity
    from qaflora_edge.formats.bundle import is_base, read_bundle_text

    identity, sizes = bundle_identity(folder), engine.adapter_bytes
    fusion = {} if is_base(folder) else read_bundle_text(folder).raw.get("fusion", {})
    return {
        "eval": 1,
        "version": __version__,
        "bundle": identity.name,
        "base": {"name": engine.name, "sha256": identity.base_sha256},
        "adapters": [
            {"name": name, "sha256": identity.adapters[name], "bytes": sizes[name]}
            for name in engine.adapters
        ],
        "n_layer": engine.n_layer,
        # what some strategies use
        "measured": {
            key: hashlib.sha256(json.dumps(fusion[key], sort_keys=True).encode()).hexdigest()
            for key in ("typical", "samples")
            if key in fusion
        },
        "tasks": [asking.facts(task) for task in tasks],
        "strategies": list(strategies),
        "options": dict(options),
        "machine": machine,
    }


@dataclass(frozen=True)
class _Weighed:
    """An item that is asked under the same weights by one strategy or several.

    fusions    by strategy
    before_ms  by strategy: probe time of the strategies before it
    """

    item: Item
    tokens: tuple[int, ...]
    fusion: FusionWeights
    fusions: Mapping[str, FusionWeights]
    before_ms: Mapping[str, float]


class Evaluation:
    """Tasks that are asked under strategies; what the file has already is left out.

    items  task name -> indexes of the items that are asked

    An item with a prompt that cannot be used, one that is too long for example, is a result
    without a score. Any other failure ends the run, which can resume.
    """

    def __init__(
        self,
        engine: Engine,
        tasks: Sequence[Task],
        strategies: Sequence[str],
        file: ResultsFile,
        *,
        items: Mapping[str, Sequence[int]],
        asking: Asking,
    ) -> None:
        self._engine, self._tasks, self._strategies = engine, tasks, strategies
        self._file, self._items, self._asking = file, items, asking
        self._tell: Tell = lambda n_token: None
        self.n_before = sum(map(len, items.values())) * len(strategies) - self.n_left

    @property
    def n_left(self) -> int:
        """How many results the file does not have."""
        asked = ((task, item) for task in self._tasks for item in self._of(task))
        return sum(len(self._missing(task, item)) for task, item in asked)

    def run(self, tell: Tell | None = None) -> None:
        """Ask what is left; each result is written when it is there."""
        self._tell = tell or self._tell
        for task in self._tasks:
            if task.by.is_likelihood:
                self._score_task(task)
            else:
                self._answer_task(task)

    def _of(self, task: Task) -> Iterator[Item]:
        return (task.items[index] for index in self._items[task.name])

    def _missing(self, task: Task, item: Item) -> list[str]:
        # Each strategy is in turn the first of an item: the first pays for what several share.
        # The turn changes by two items, since one half of the items is every other one.
        turn = item.index // 2 % len(self._strategies)
        turned = (*self._strategies[turn:], *self._strategies[:turn])
        return [s for s in turned if not self._file.has(task.name, item.index, s)]

    def _weighed(self, task: Task) -> Iterator[_Weighed]:
        """Weigh the items that are left: the strategies of an item one after the other.

        They share what is measured of it. Strategies with the same weights share an answer.
        """
        for item in self._of(task):
            missing = self._missing(task, item)
            if not missing:
                continue
            fusions: dict[str, FusionWeights] = {}
            before_ms: dict[str, float] = {}
            try:
                raw_prompt = self._asking.raw_prompt
                tokens = tuple(task_prompt(self._engine, task, item, raw_prompt=raw_prompt))
                for strategy in missing:
                    before_ms[strategy] = sum(fusion.probe_ms for fusion in fusions.values())
                    fusions[strategy] = self._engine.weights(tokens, strategy=strategy)
            except (PromptError, ChatTemplateError) as error:
                self._fail(task, item, dict.fromkeys(missing), str(error))
                continue
            groups: dict[bytes, dict[str, FusionWeights]] = {}
            for strategy, fusion in fusions.items():
                groups.setdefault(fusion.weights.tobytes(), {})[strategy] = fusion
            for group in groups.values():
                yield _Weighed(item, tokens, next(iter(group.values())), group, before_ms)

    def _answer_task(self, task: Task) -> None:
        """Generate answers, many at once."""
        running: dict[int, _Weighed] = {}
        numbers = itertools.count()

        def requests() -> Iterator[dict[str, Any]]:
            for weighed in self._weighed(task):
                running[next(numbers)] = weighed
                yield {"prompt": weighed.tokens, "weights": weighed.fusion}

        sampling = {**self._asking.sampling, "max_tokens": self._asking.max_tokens(task)}
        if task.stop is not None:
            sampling["stop"] = tuple(task.stop)
        for number, answer in self._engine.generate_many(requests(), **sampling):
            weighed = running.pop(number)
            if isinstance(answer.error, PromptError):
                self._fail(task, weighed.item, weighed.fusions, str(answer.error))
                continue
            if answer.error is not None:
                raise answer.error
            if answer.is_cancelled:
                raise CancelledError("The evaluation was ended; the same command resumes it.")
            found = {
                **answer_fields(task, weighed.item, answer.text()),
                "prefill_ms": round(answer.timings.prefill_ms, 3),
                "decode_ms": round(answer.timings.decode_ms, 3),
                "n_token": answer.n_completion,
                "finish_reason": answer.finish_reason,
            }
            self._write(task, weighed, found)

    def _score_task(self, task: Task) -> None:
        """Score texts by their likelihood; nothing is generated."""
        for weighed in self._weighed(task):
            texts = scored_texts(task, weighed.item)
            start = time.perf_counter()
            try:
                prompts = [weighed.tokens] * len(texts)
                scores = self._engine.score(prompts, texts, weights=weighed.fusion)
            except PromptError as error:
                self._fail(task, weighed.item, weighed.fusions, str(error))
                continue
            found = {
                **likelihood_fields(task, weighed.item, scores),
                "prefill_ms": round(1e3 * (time.perf_counter() - start), 3),
                "decode_ms": 0.0,
                "n_token": sum(map(len, scores)),
                "finish_reason": None,
            }
            self._write(task, weighed, found)

    def _write(self, task: Task, weighed: _Weighed, found: Record) -> None:
        first = next(iter(weighed.fusions))
        for strategy, fusion in weighed.fusions.items():
            record = {
                **asked_fields(task, weighed.item, strategy, fusion, self._asking),
                **found,
                "probe_ms": round(fusion.probe_ms, 3),
                "probe_before_ms": round(weighed.before_ms[strategy], 3),
                "n_prompt": len(weighed.tokens),
                "error": None,
            }
            self._file.write(record if strategy == first else {**record, "same_as": first})
            self._tell(found["n_token"] if strategy == first else 0)

    def _fail(
        self, task: Task, item: Item, fusions: Mapping[str, FusionWeights | None], message: str
    ) -> None:
        for strategy, fusion in fusions.items():
            record = asked_fields(task, item, strategy, fusion, self._asking)
            self._file.write({**record, "error": message})
            self._tell(0)


def asked_fields(
    task: Task, item: Item, strategy: str, fusion: FusionWeights | None, asking: Asking
) -> dict[str, Any]:
    """Write a result's fields of the question and its weights; there is no answer yet.

    fusion  None where it could not be weighed
    """
    record = {
        "task": task.name,
        "item": item.index,
        "strategy": strategy,
        "score": None,
        "answer": None,
        "expected": task.expected(item),
        "question": task.question(item),
        "weights": {},
    }
    if fusion is None:
        return record
    weights = np.asarray(fusion.weights, np.float64)  # [n_adapter, n_layer]
    means = weights.mean(axis=1)
    rounded = (round(float(mean), _DIGITS) for mean in means)
    record["weights"] = dict(zip(fusion.adapters, rounded, strict=True))
    record["total"] = round(float(means.sum()), _DIGITS)
    layers = {"layers": np.round(weights, _DIGITS).tolist()} if asking.has_layers else {}
    return record | layers


def answer_fields(task: Task, item: Item, text: str) -> dict[str, Any]:
    """Score an answer that was generated; `score` and what else its metric says."""
    found = task.by.score(text, item.fields)
    return {"answer": text, **(found if isinstance(found, Mapping) else {"score": float(found)})}


def scored_texts(task: Task, item: Item) -> list[str]:
    """Give the texts that are scored where nothing is generated."""
    return task.choices(item) if task.metric == "choice" else [item.fields[task.by.needs]]


def likelihood_fields(task: Task, item: Item, scores: Sequence[F32]) -> dict[str, Any]:
    """Score texts by their likelihood; `score` and what else the metric says.

    scores  log-probabilities of each text's tokens, in nats: float32 [n_token] each
    """
    found = task.by.score(scores, item.fields)
    found = dict(found) if isinstance(found, Mapping) else {"score": float(found), "answer": None}
    if task.metric == "choice" and task.score_by == "sum":
        best = int(np.argmax(found["log_probs"]))
        found |= {"score": found["score_sum"], "answer": item.fields["choices"][best]}
    return found


def task_prompt(engine: Engine, task: Task, item: Item, *, raw_prompt: bool = False) -> list[int]:
    """Tokenize what an item asks: in chat form where there is a template, or as it is.

    raw_prompt  no chat template, whatever the task says

    Raises PromptError for one that is too long, ChatTemplateError for a conversation without a
    template.
    """
    if not (raw_prompt or task.raw_prompt) and engine.has_chat_template:
        return engine.chat_tokens(task.messages(item))
    if "messages" in item.fields or task.system is not None:
        raise ChatTemplateError(
            f"Cannot ask {item.where}: messages and system need a chat template, and there is "
            "none, or raw_prompt leaves it out. Write the prompt as one text."
        )
    return engine.tokenize(task.question(item))
