"""Ask items of tasks under strategies, and score the answers."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qaflora_edge import __version__
from qaflora_edge.arrays import F32
from qaflora_edge.ask import Ask, Sampling, Weighing
from qaflora_edge.engine import Engine
from qaflora_edge.errors import CancelledError, ChatTemplateError, PromptError
from qaflora_edge.evaluation.metrics import Fields, listed
from qaflora_edge.evaluation.tasks import Results, Task
from qaflora_edge.formats.bundle import is_base, read_bundle_text
from qaflora_edge.prompt.conversation import bundle_identity
from qaflora_edge.weighing.plan import FusionWeights

Asked = tuple[int, str]  # the index of an item, and a strategy
Record = dict[str, Any]
TASK_FACTS = ("name", "metric", "sha256", "language", "domain", "system", "template")
_UNUSABLE = (PromptError, ChatTemplateError)  # the fault of one item; other errors end the run


def header(
    folder: Path,
    engine: Engine,
    tasks: Sequence[Task],
    strategies: Sequence[str],
    options: Fields,
    machine: str = "",
) -> Record:
    """Write the first line of a results file; `machine` names the processor."""
    identity = bundle_identity(folder)
    fusion: Fields = {}
    if not is_base(folder):
        fusion = read_bundle_text(folder).raw.get("fusion", {})
    # What some strategies use: a file from before a calibration is of another evaluation.
    # None stands where earlier versions had more, so that their files can be continued.
    measured = [fusion.get("typical"), None]
    measured_json = json.dumps(measured, sort_keys=True)
    sha256 = identity["adapters"]
    adapters = [{"name": name, "sha256": sha256[name]} for name in engine.adapters]
    asked = [{key: getattr(task, key) for key in TASK_FACTS} for task in tasks]
    return {
        "eval": 1,
        "version": __version__,
        "bundle": identity["name"],
        "base": {"name": engine.name, "sha256": identity["base_sha256"]},
        "adapters": adapters,
        "n_layer": engine.n_layer,
        "measured": hashlib.sha256(measured_json.encode()).hexdigest(),
        "tasks": asked,
        "strategies": list(strategies),
        "options": dict(options),
        "machine": machine,
    }


def left(
    task: Task, strategies: Sequence[str], results: Results, limit: int | None = None
) -> list[Asked]:
    """List what the results lack.

    limit  items that are asked; None: all

    Strategies of an item come one after the other, for they share what is measured of it.
    Each is in turn the first, which pays for that.
    """
    n_strategy = len(strategies)
    lacking = []
    for item in range(len(task.items))[:limit]:
        for turn in range(n_strategy):
            strategy = strategies[(item + turn) % n_strategy]
            if (task.name, item, strategy) not in results.records:
                lacking.append((item, strategy))
    return lacking


def evaluate(
    engine: Engine,
    task: Task,
    asked: Iterable[Asked],
    sampling: Sampling,
    *,
    raw_prompt: bool = False,
) -> Iterator[Record]:
    """Ask and score; give records in the order in which items end.

    raw_prompt  no chat template, whatever the task says

    An item with a prompt that cannot be used, one that is too long for example, is a record
    without a score. Raises any other failure.
    """
    is_chat = engine.has_chat_template and not raw_prompt
    if task.by.is_likelihood:
        return _likelihoods(engine, task, asked, is_chat)
    if task.max_tokens is not None:
        sampling = replace(sampling, max_tokens=task.max_tokens)
    if task.stop is not None:
        sampling = replace(sampling, stop=tuple(task.stop))
    return _answers(engine, task, asked, is_chat, sampling)


def _answers(
    engine: Engine, task: Task, asked: Iterable[Asked], is_chat: bool, sampling: Sampling
) -> Iterator[Record]:
    records = []
    spent_ms: Counter[int] = Counter()

    def asks() -> Iterator[Ask]:
        for index, strategy in asked:
            record = asked_fields(task, index, strategy)
            records.append(record)
            yield Ask(
                task.asked(task.items[index], is_chat=is_chat),
                Weighing(strategy),
                sampling,
                on_weights=partial(_weighed, record, spent_ms),
            )

    for number, answer in engine.submit_many(asks()):
        record = records[number]
        error = answer.error
        if answer.is_cancelled:
            raise CancelledError("The evaluation was ended; the same command resumes it.")
        if error is None:
            item = task.items[record["item"]]
            record |= score_fields(task, item, answer.text())
            record |= answer.timings.to_dict()
            record["n_prompt"] = answer.n_prompt
            record["n_token"] = answer.n_completion
            record["finish_reason"] = answer.finish_reason
            record |= answer.fusion.relay_dict()  # with the whole draft
        elif isinstance(error, _UNUSABLE):
            record["error"] = str(error)
        else:
            raise error
        yield record


def _likelihoods(
    engine: Engine, task: Task, asked: Iterable[Asked], is_chat: bool
) -> Iterator[Record]:
    spent_ms: Counter[int] = Counter()
    for index, strategy in asked:
        record = asked_fields(task, index, strategy)
        item = task.items[index]
        texts = listed(item[task.by.needs])
        try:
            tokens = task_prompt(engine, task, item, is_chat=is_chat)
            fusion = engine.weights(tokens, strategy=strategy)
            _weighed(record, spent_ms, fusion)
            start = time.perf_counter()
            scores = engine.score([tokens] * len(texts), texts, weights=fusion)
        except _UNUSABLE as error:
            record["error"] = str(error)
        else:
            seconds = time.perf_counter() - start
            record["prefill_ms"] = round(1e3 * seconds, 3)
            record["n_prompt"] = len(tokens)
            record["n_token"] = sum(map(len, scores))
            record |= score_fields(task, item, scores)
        yield record


def _weighed(record: Record, spent_ms: Counter[int], fusion: FusionWeights) -> None:
    """Add weights to a record, what they took, and what earlier strategies of the item took."""
    item = record["item"]
    probe_ms = round(fusion.probe_ms, 3)
    record["weights"] = {name: round(mean, 4) for name, mean in fusion.means.items()}
    record["probe_ms"] = probe_ms
    record["probe_before_ms"] = spent_ms[item]
    record |= fusion.relay_dict()
    spent_ms[item] += probe_ms  # type: ignore[assignment]


def asked_fields(task: Task, index: int, strategy: str) -> Record:
    """Begin a record: what is asked. It has no weights and no answer yet."""
    item = task.items[index]
    return {
        "task": task.name,
        "item": index,
        "strategy": strategy,
        "score": None,
        "answer": None,
        "expected": task.expected(item),
        "question": task.question(item),
        "weights": {},
        "error": None,
    }


def score_fields(task: Task, item: Fields, result: str | Sequence[F32]) -> Record:
    """Score an answer, or texts by their likelihood; `score` and what else the metric says.

    result  the answer, or log-probabilities of each text's tokens in nats: float32 [n_token] each
    """
    fields: Record = {"answer": result if isinstance(result, str) else None}
    score = task.by.score(result, item)
    if isinstance(score, Mapping):
        fields.update(score)
    else:
        fields["score"] = float(score)
    return fields


def task_prompt(engine: Engine, task: Task, item: Fields, *, is_chat: bool = True) -> list[int]:
    """Tokenize what an item asks; is_chat as Task.asked takes it.

    Raises PromptError for one that is too long, ChatTemplateError for a chat without a template.
    """
    question = task.asked(item, is_chat=is_chat and engine.has_chat_template)
    return [*engine.read(question).tokens]
