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
from qaflora_edge.evaluation.results import ResultsFile
from qaflora_edge.evaluation.tasks import Item, Task
from qaflora_edge.weighing.numbers import FusionWeights


def header(
    folder: Path,
    engine: Engine,
    tasks: Sequence[Task],
    strategies: Sequence[str],
    options: Mapping[str, Any],
    machine: str = "",
) -> dict[str, Any]:
    """Write the first line of a results file.

    folder   of the bundle
    machine  name of the processor
    """
    from qaflora_edge import __version__
    from qaflora_edge.chat.conversation import bundle_identity
    from qaflora_edge.formats.bundle import is_base, read_bundle_text

    identity = bundle_identity(folder)
    fusion = {} if is_base(folder) else read_bundle_text(folder).raw.get("fusion", {})
    keys = ("name", "metric", "sha256", "language", "domain", "system", "template")
    return {
        "eval": 1,
        "version": __version__,
        "bundle": identity["name"],
        "base": {"name": engine.name, "sha256": identity["base_sha256"]},
        "adapters": [
            {"name": name, "sha256": identity["adapters"][name]} for name in engine.adapters
        ],
        "n_layer": engine.n_layer,
        "measured": {  # what some strategies use
            key: hashlib.sha256(json.dumps(fusion[key], sort_keys=True).encode()).hexdigest()
            for key in ("typical", "samples")
            if key in fusion
        },
        "tasks": [
            {**{key: getattr(task, key) for key in keys}, "n_item": len(task.items)}
            for task in tasks
        ],
        "strategies": list(strategies),
        "options": dict(options),
        "machine": machine,
    }


@dataclass(frozen=True)
class _Weighed:
    """An item, weighed under one strategy.

    record  what is written of it by now
    """

    item: Item
    tokens: Sequence[int]
    fusion: FusionWeights
    record: dict[str, Any]


@dataclass
class Evaluation:
    """Tasks that are asked under strategies; what the file has already is left out.

    limit       items of each task that are asked; None: all
    sampling    keywords of Engine.generate
    raw_prompt  no chat template, whatever the tasks say
    tell        called after each result with the number of its tokens

    An item with a prompt that cannot be used, one that is too long for example, is a result
    without a score. Any other failure ends the run, which can resume.
    """

    engine: Engine
    tasks: Sequence[Task]
    strategies: Sequence[str]
    file: ResultsFile
    limit: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    raw_prompt: bool = False
    tell: Callable[[int], None] = lambda n_token: None

    def left(self, task: Task) -> Iterator[tuple[Item, str]]:
        """Give each item and strategy that the file does not have.

        Strategies of an item come one after the other, for they share what is measured of it.
        Each is in turn the first, which pays for that.
        """
        n = len(self.strategies)
        for item, at in itertools.product(task.items[: self.limit], range(n)):
            strategy = self.strategies[(item.index + at) % n]
            if (task.name, item.index, strategy) not in self.file.records:
                yield item, strategy

    def run(self) -> None:
        """Ask what is left; each result is written when it is there."""
        for task in self.tasks:
            ask = self._score if task.by.is_likelihood else self._generate
            ask(task)

    def _weighed(self, task: Task) -> Iterator[_Weighed]:
        """Weigh the items that are left."""
        last, before_ms = None, 0.0  # probe time of the item's strategies before
        for item, strategy in self.left(task):
            if item is not last:
                last, before_ms = item, 0.0
            try:
                tokens = task_prompt(self.engine, task, item, raw_prompt=self.raw_prompt)
                fusion = self.engine.weights(tokens, strategy=strategy)
            except (PromptError, ChatTemplateError) as error:
                self._write(asked_fields(task, item, strategy) | {"error": str(error)})
                continue
            record = asked_fields(task, item, strategy, fusion)
            record |= {"probe_ms": fusion.probe_ms, "probe_before_ms": before_ms}
            yield _Weighed(item, tokens, fusion, {**record, "n_prompt": len(tokens)})
            before_ms += fusion.probe_ms

    def _generate(self, task: Task) -> None:
        """Generate answers, many at once."""
        running: dict[int, _Weighed] = {}

        def requests() -> Iterator[dict[str, Any]]:
            for number, weighed in enumerate(self._weighed(task)):
                running[number] = weighed
                yield {"prompt": weighed.tokens, "weights": weighed.fusion}

        own = {"max_tokens": task.max_tokens, "stop": task.stop and tuple(task.stop)}
        sampling = {**self.sampling, **{key: each for key, each in own.items() if each is not None}}
        for number, answer in self.engine.generate_many(requests(), **sampling):
            if answer.error is not None and not isinstance(answer.error, PromptError):
                raise answer.error
            if answer.is_cancelled:
                raise CancelledError("The evaluation was ended; the same command resumes it.")
            weighed, error = running.pop(number), answer.error
            facts = {
                "prefill_ms": answer.timings.prefill_ms,
                "decode_ms": answer.timings.decode_ms,
                "n_token": answer.n_completion,
                "finish_reason": answer.finish_reason,
            }
            found = score_fields(task, weighed.item, answer.text()) if error is None else {}
            self._write(weighed.record | facts | found | {"error": error and str(error)})

    def _score(self, task: Task) -> None:
        """Measure the likelihood of texts; nothing is generated."""
        for weighed in self._weighed(task):
            texts = scored_texts(task, weighed.item)
            start = time.perf_counter()
            try:
                prompts = [weighed.tokens] * len(texts)
                scores = self.engine.score(prompts, texts, weights=weighed.fusion)
            except PromptError as error:
                self._write(weighed.record | {"error": str(error)})
                continue
            facts = {
                "prefill_ms": 1e3 * (time.perf_counter() - start),
                "decode_ms": 0.0,
                "n_token": sum(map(len, scores)),
                "finish_reason": None,
            }
            self._write(weighed.record | facts | score_fields(task, weighed.item, scores))

    def _write(self, record: dict[str, Any]) -> None:
        ms = {key: round(record[key], 3) for key in record if key.endswith("_ms")}
        self.file.write(record | ms)
        self.tell(record.get("n_token", 0))


def asked_fields(
    task: Task, item: Item, strategy: str, fusion: FusionWeights | None = None
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
        "error": None,
    }
    if fusion is not None:
        means = np.asarray(fusion.weights, np.float64).mean(axis=1).round(4)  # [n_adapter]
        record["weights"] = dict(zip(fusion.adapters, means.tolist(), strict=True))
    return record


def scored_texts(task: Task, item: Item) -> list[str]:
    """Give the texts that are scored where nothing is generated."""
    found = item.fields[task.by.needs]
    return found if task.metric == "choice" else [found]


def score_fields(task: Task, item: Item, given: str | Sequence[F32]) -> dict[str, Any]:
    """Score an answer, or texts by their likelihood; `score` and what else the metric says.

    given  the answer, or log-probabilities of each text's tokens in nats: float32 [n_token] each
    """
    found = task.by.score(given, item.fields)
    answer = {"answer": given if isinstance(given, str) else None}
    return answer | (dict(found) if isinstance(found, Mapping) else {"score": float(found)})


def task_prompt(engine: Engine, task: Task, item: Item, *, raw_prompt: bool = False) -> list[int]:
    """Tokenize what an item asks: in chat form where there is a template, or as it is.

    raw_prompt  no chat template, whatever the task says

    Messages and system always need the template. Raises PromptError for one that is too long,
    ChatTemplateError for a conversation without a template.
    """
    is_chat = engine.has_chat_template and not (raw_prompt or task.raw_prompt)
    if is_chat or "messages" in item.fields or task.system is not None:
        return engine.chat_tokens(task.messages(item))
    return engine.tokenize(task.question(item))
