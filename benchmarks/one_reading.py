"""Measure how much of a prompt the mix must prefill, and how much the base can.

    python benchmarks/one_reading.py run BUNDLE DATA -o results.jsonl
    python benchmarks/one_reading.py report results.jsonl

A reading says which part of a prompt the base prefills, at weights 0. The mix prefills the rest
and answers:

    mix        nothing by the base, as the product does it
    base       all but the last token by the base: its logits are the mix's first ones
    last_turn  everything before the words of the last user turn by the base
    tailN      all but the last N tokens by the base

A request's `n_base` says how many tokens the base prefills.

DATA holds `math_L.jsonl` (question, answer), `code_L.jsonl` (prompt, entry_point, test),
`medical_L.jsonl` (question, choices, answer) and `medical_sentences.jsonl`. BUNDLE names its
adapters math, code, med, es, ru, zh. Even items are the development half, odd ones confirm.
Results are JSON lines, one per item, strategy and reading; the same command goes on with them.
"""

import argparse
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from typing import Any

import code_metric
import numpy as np
from nine_cells import CODE, halves, read

from qaflora_edge import Engine, FusionWeights, Generation, Plan
from qaflora_edge.ask import Sampling
from qaflora_edge.evaluation.metrics import metrics
from qaflora_edge.inference.sampler import Sampler
from qaflora_edge.inference.sequence import Request

Key = tuple[str, str, int, str, str]  # cell, language, item, strategy, reading
# The cheapest first, after the one that all are compared with.
READINGS = ("mix", "base", "tail8", "tail16", "tail32", "last_turn")
STRATEGIES = ("two-place", "static", "single", "qa-flora")
CELLS = ("math", "medical", "text", "code", "system", "chat", "math_en")
N_ITEM = {
    "math": 125,
    "math_en": 125,
    "medical": 100,
    "text": 100,
    "code": 40,
    "system": 32,
    "chat": 20,
}
ADAPTER = {"medical": "med", "code": "code"}  # of `single`; text: the language's; else math
FIRST = (("two-place", "static"), ("mix", "base", "last_turn", "tail16"))
HALVES = ("dev", "confirm")
CHOICES = {"halves": HALVES, "cells": CELLS, "strategies": STRATEGIES, "readings": READINGS}
SUBJECT = {"math_en": "math"}  # the others are their own
SUBJECTS = ("math", "medical", "code", "system", "chat", "text")
N_RESAMPLE, SEED = 9999, 0
SYSTEM = """\
You are the assistant of a small learning centre in a town by the sea. People of all ages write to
you: pupils who prepare for a test, parents who help with homework, and adults who learn for their
work. Follow these house rules in every answer. Answer in the language in which the question is
written, and keep to that language until the end. Be friendly, but do not begin with praise or with
an apology. Say what you know, and say so when you do not know something; never invent a source.
When a task has several steps, take them one after the other, so that the reader can follow each of
them and find a mistake by themselves. Use short sentences and simple words. Explain a foreign or
technical word the first time that you use it. Write numbers with digits, and write the unit next to
each number. Do not use tables or pictures, because many readers see your answer on an old phone
with a small screen. If a question lacks something that is needed to answer it, choose the most
likely meaning, name your choice in one sentence, and go on. If a question is about somebody's
health, remind the reader kindly that a doctor has the last word. Never ask for names, addresses or
other private facts. Do not mention these rules, the centre's opening hours, or its prices, unless
somebody asks for them: the centre is open from Monday to Friday between nine and six, and the first
lesson is free. End when the question is answered, without a summary and without offering more help.
"""


@dataclass(frozen=True)
class Question:
    """One question; `fields` are those of its line, `earlier` the questions asked before it."""

    cell: str
    language: str
    index: int
    fields: dict[str, Any]
    earlier: tuple[str, ...] = ()

    @property
    def place(self) -> tuple[str, str, int]:
        return self.cell, self.language, self.index

    @property
    def names(self) -> dict[str, Any]:
        return dict(zip(("cell", "language", "item"), self.place, strict=True))

    @property
    def single(self) -> str:
        """Name the strategy with the subject's adapter alone."""
        default = self.language if self.cell == "text" else "math"
        return f"single:{ADAPTER.get(self.cell, default)}"


def read_items(data: Path, cell: str, limit: int) -> list[Question]:
    """Read a cell's items, the languages in turn; at most `limit` of a language."""
    columns = []
    for language in ("en",) if cell == "math_en" else ("es", "zh", "ru"):
        if cell == "text":
            lines = read(data / "medical_sentences.jsonl")
            fields = [halves(line[language], language) for line in lines]
        else:
            kind = cell if cell in ("medical", "code") else "math"
            fields = [dict(line) for line in read(data / f"{kind}_{language}.jsonl")]
        if cell == "code":
            ask = f"{CODE[language]}\n\n```python\n{{}}```"
            fields = [{**line, "question": ask.format(line["prompt"])} for line in fields]
        n, first = len(fields), 60 if cell == "system" else 0
        asked = [line.get("question", "") for line in fields]
        items = []
        for i in range(first, first + min(n, limit, N_ITEM[cell])):
            earlier = (asked[(i + 50) % n], asked[(i + 75) % n]) if cell == "chat" else ()
            items.append(Question(cell, language, i, fields[i], earlier))
        columns.append(items)
    return list(chain.from_iterable(zip(*columns, strict=True)))


def n_base_of(reading: str, n_prompt: int, n_before: int) -> int:
    """How many tokens of a prompt the base prefills."""
    if reading.startswith("tail"):
        return max(0, n_prompt - int(reading.removeprefix("tail")))
    return {"mix": 0, "base": n_prompt - 1, "last_turn": min(n_before, n_prompt - 1)}[reading]


@dataclass(eq=False)
class Job:
    """One computation, and the strategies and readings that it is the result of."""

    item: Question
    tokens: list[int]
    n_base: int
    weights: np.ndarray  # float32 [n_adapter, n_layer]
    of: list[tuple[str, str]] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Equal for equal computations of one item."""
        rounded = np.round(self.weights, 6).tobytes()
        return f"{hashlib.sha256(rounded).hexdigest()[:12]}-{self.n_base}"


def begin(engine: Engine, job: Job, **options: Any) -> Any:
    """Begin a greedy answer to a prompt whose first n_base tokens the base prefills."""
    sampling = Sampling().updated(options)
    request = Request(tuple(job.tokens), job.weights, sampling, engine.adapters, job.n_base)
    fusion = FusionWeights(engine.adapters, Plan.mix(job.weights))
    sequence = engine._core.begin(request, Sampler(engine._model, sampling))
    return Generation(engine._core, fusion, sequence)


def score_texts(engine: Engine, job: Job, texts: Sequence[str]) -> list[list[float]]:
    """Score continuations token by token: log-probabilities in nats."""
    request = Request(tuple(job.tokens), job.weights, n_base=job.n_base)
    items = [(request, tuple(engine.tokenize(text))) for text in texts]
    core = engine._core
    return [scores.tolist() for scores in core.run(core.scorer.score(items), contexts="branch")]


def likelihood_result(item: Question, scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Score a choice (1 or 0, by the mean of its tokens) or a sentence (nats a token, negative)."""
    means = [float(np.mean(each)) for each in scores]
    if item.cell == "text":
        return {"score": means[0], "n_token": len(scores[0])}
    right = item.fields["answer"]
    is_right = all(means[right] > mean for i, mean in enumerate(means) if i != right)
    rounded = [round(mean, 5) for mean in means]
    return {"score": float(is_right), "means": rounded, "n_token": sum(map(len, scores))}


def answer_result(item: Question, text: str) -> dict[str, Any]:
    """Score an answer, 1 or 0; the sandbox runs code."""
    if item.cell != "code":
        return {"answer": text, "score": metrics()["number"].score(text, item.fields)}
    return {"answer": text, **code_metric.score(text, item.fields)}


class Results:
    """A file of results; a last line that was cut off is dropped.

    done      by item, strategy and reading
    earlier   the base's own answers to a conversation's earlier questions, by item
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.done: dict[Key, dict[str, Any]] = {}
        self.earlier: dict[tuple[str, str, int], list[str]] = {}
        before = path.read_bytes() if path.exists() else b""
        before = before[: before.rfind(b"\n") + 1]
        self._file = path.open("ab")
        self._file.truncate(len(before))
        for line in read_lines(before):
            self._note(line)
        if not before:
            self.write({"run": facts})

    def write(self, line: dict[str, Any]) -> None:
        """Append a line, at once."""
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self._note(line)

    def _note(self, line: dict[str, Any]) -> None:
        if "score" in line:
            self.done[key_of(line)] = line
        elif "earlier" in line:
            self.earlier[line["cell"], line["language"], line["item"]] = line["earlier"]

    def same(self, item: Question, key: str) -> dict[str, Any] | None:
        """Find a result of an equal computation."""
        ways = product(STRATEGIES, READINGS)
        found = (self.done.get((*item.place, *way)) for way in ways)
        return next((line for line in found if line and line["key"] == key), None)

    def write_result(self, job: Job, found: dict[str, Any], *, is_copy: bool = False) -> None:
        """Append a line for each strategy and reading that a result is of."""
        means = [round(float(mean), 4) for mean in job.weights.mean(axis=1)]
        for i, (strategy, reading) in enumerate(job.of):
            line = {**job.item.names, "strategy": strategy, "reading": reading, "key": job.key}
            line |= {"is_copy": is_copy or i > 0, "weights": means}
            line |= {"n_prompt": len(job.tokens), "n_base": job.n_base}
            self.write({**line, **{key: value for key, value in found.items() if key not in line}})


def read_lines(data: bytes) -> Iterator[dict[str, Any]]:
    """Read JSON lines."""
    return (json.loads(line) for line in data.decode().split("\n") if line)


def key_of(line: dict[str, Any]) -> Key:
    return line["cell"], line["language"], line["item"], line["strategy"], line["reading"]


class Run:
    """Ask what a file of results lacks: the development half, and its main readings, first."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        common: dict[str, Any] = {"threads": args.threads, "n_ctx": 2048}
        self.engine = Engine(args.bundle, n_parallel=args.n_parallel, **common)
        self.scorer = Engine(args.bundle, **common)
        facts = {"bundle": self.engine.name, "adapters": self.engine.adapters}
        self.results = Results(args.output, {**facts, "max_tokens": args.max_tokens})
        self.n_computed, self.began_s = 0, time.time()

    def run(self) -> None:
        """Go through all stages."""
        args = self.args
        for half in args.halves:
            for strategies, readings in (FIRST, (STRATEGIES, READINGS)):
                ways = [
                    (strategy, reading)
                    for strategy in strategies
                    for reading in readings
                    if strategy in args.strategies and reading in args.readings
                ]
                for cell in args.cells:
                    items = read_items(args.data, cell, args.limit)
                    asked = (item for item in items if half_of(item.index) == half)
                    jobs = chain.from_iterable(self.jobs(item, ways) for item in asked)
                    (self.score if cell in ("medical", "text") else self.answer)(jobs)
                    print(f"{half} {cell}: done, {self.n_computed} computed", flush=True)

    def prompt(self, item: Question) -> tuple[list[int], int]:
        """Give a prompt's token ids, and how many stand before the last user turn's words."""
        if item.cell == "text":
            return self.engine.tokenize(item.fields["prompt"]), 0
        question = str(item.fields["question"])
        other = "0" if question[:1] != "0" else "A"
        before = self.messages_before(item)
        prompts = [
            self.engine.chat_tokens([*before, {"role": "user", "content": text}])
            for text in (question, other)
        ]
        return prompts[0], [a == b for a, b in zip(*prompts, strict=False)].index(False)

    def messages_before(self, item: Question) -> list[dict[str, str]]:
        """What stands before a question: a system prompt, or a conversation with the base."""
        if item.cell == "system":
            return [{"role": "system", "content": SYSTEM}]
        known, answers = self.results.earlier.get(item.place), []
        nothing = np.zeros((len(self.engine.adapters), self.engine.n_layer), np.float32)
        messages = []
        for i, question in enumerate(item.earlier):
            messages.append({"role": "user", "content": question})
            if known is None:
                prompt = self.engine.chat_tokens(messages)
                options: dict[str, Any] = {"weights": nothing, "max_tokens": self.args.max_tokens}
                answers.append(self.engine.generate(prompt, **options).text())
            content = answers[i] if known is None else known[i]
            messages.append({"role": "assistant", "content": content})
        if answers:
            self.results.write({**item.names, "earlier": answers})
        return messages

    def jobs(self, item: Question, ways: Iterable[tuple[str, str]]) -> list[Job]:
        """What is to be computed of an item: `mix` last, so that no slot has its KV state yet."""
        missing = [way for way in ways if (*item.place, *way) not in self.results.done]
        if not missing:
            return []
        tokens, n_before = self.prompt(item)
        weights_of = {}
        for strategy in {strategy for strategy, _ in missing}:
            name = item.single if strategy == "single" else strategy
            weights_of[strategy] = self.engine.weights(tokens, strategy=name).weights
        jobs: dict[str, Job] = {}
        for strategy, reading in missing:
            weights = weights_of[strategy]
            n_base = n_base_of(reading, len(tokens), n_before) if weights.any() else 0
            job = Job(item, tokens, n_base, weights)
            jobs.setdefault(job.key, job).of.append((strategy, reading))
        for key, job in list(jobs.items()):
            if known := self.results.same(item, key):
                self.results.write_result(job, known, is_copy=True)
                del jobs[key]
        return sorted(jobs.values(), key=lambda job: job.n_base == 0)

    def answer(self, jobs: Iterator[Job]) -> None:
        """Generate answers, n_parallel together."""
        options: dict[str, Any] = {"max_tokens": self.args.max_tokens}
        alive: list[tuple[Job, Any]] = []
        while True:
            while len(alive) < self.args.n_parallel and (job := next(jobs, None)):
                alive.append((job, begin(self.engine, job, **options)))
            if not alive:
                return
            first, answer = alive[0]
            first.parts.append(next(answer, ""))  # computes for all
            for job, answer in [pair for pair in alive if pair[1].is_done]:
                alive.remove((job, answer))
                text = "".join(job.parts) + answer.text()
                found = {"n_token": answer.n_completion, "finish": answer.finish_reason}
                self.take(job, {**answer_result(job.item, text), **found})

    def score(self, jobs: Iterator[Job]) -> None:
        """Score the texts of choices and sentences."""
        for job in jobs:
            texts = job.item.fields.get("choices") or [job.item.fields["continuation"]]
            scores = score_texts(self.scorer, job, texts)
            self.take(job, {**likelihood_result(job.item, scores), "finish": None})

    def take(self, job: Job, found: dict[str, Any]) -> None:
        """Write a result; tell now and then how fast it goes."""
        self.results.write_result(job, found)
        self.n_computed += 1
        if self.n_computed % 50 == 0:
            per_minute = 60 * self.n_computed / (time.time() - self.began_s)
            print(f"{job.item.place}: {self.n_computed} computed, {per_minute:.1f}/min", flush=True)


def half_of(index: int) -> str:
    return "confirm" if index % 2 else "dev"


class Report:
    """Paired differences to the reading `mix`, in points; of sentences in nats a token."""

    def __init__(self, lines: Iterable[dict[str, Any]]) -> None:
        self.items: dict[tuple[str, str, int], dict[tuple[str, str], Any]] = defaultdict(dict)
        for line in lines:
            way = line["strategy"], line["reading"]
            self.items[line["cell"], line["language"], line["item"]][way] = line

    def table(
        self, where: str, half: str, strategies: Sequence[str], reading: str
    ) -> dict[str, np.ndarray]:
        """Figures of `mix` and of a reading: float64 [2, n_item] each, means over strategies.

        where  a subject, or `subject/language`; items that lack a result are left out
        """
        unit = 1.0 if where.startswith("text") else 100.0
        rows = []
        for (cell, language, index), lines in self.items.items():
            subject = SUBJECT.get(cell, cell)
            if where in (subject, f"{subject}/{language}") and half in ("all", half_of(index)):
                both = [[lines.get((s, r)) for s in strategies] for r in ("mix", reading)]
                if all(all(side) for side in both):
                    rows.append([[figures(line, unit) for line in side if line] for side in both])
        array = np.array(rows, np.float64).reshape(-1, 2, len(strategies), 3).mean(axis=2)
        return dict(zip(("score", "n_token", "is_cut"), array.transpose(2, 1, 0), strict=True))

    def rows(self, half: str) -> Iterator[str]:
        """Lines of a half's table: every subject, also by language, strategy and reading."""
        yield "where | strategy | reading | n | mix | reading | difference | tokens | cut"
        languages = {f"{SUBJECT.get(cell, cell)}/{language}" for cell, language, _ in self.items}
        for where, strategy, reading in product(
            sorted({*SUBJECTS, *languages}), STRATEGIES, READINGS[1:]
        ):
            found = self.table(where, half, [strategy], reading)
            if n := found["score"].shape[1]:
                value, low, high = interval([found["score"][1] - found["score"][0]])
                score, n_token = found["score"].mean(axis=1), found["n_token"].mean(axis=1)
                cut = 100 * found["is_cut"].mean(axis=1)
                yield (
                    f"{where} | {strategy} | {reading} | {n} | {score[0]:.2f} | {score[1]:.2f} | "
                    f"{value:+.3f} ({low:+.3f} to {high:+.3f}) | {n_token[0]:.0f}, "
                    f"{n_token[1]:.0f} | {cut[0]:.1f} %, {cut[1]:.1f} %"
                )

    def verdicts(self, half: str) -> Iterator[str]:
        """The rule, for all strategies that were asked and for each; the cheapest reading first.

        A reading passes where the mean over subjects is above -2 points with its interval above
        -4, and no subject's interval lies wholly below 0. Sentences count in the second part only.
        """
        asked = tuple(
            s for s in STRATEGIES if any((s, "mix") in way for way in self.items.values())
        )
        for strategies, reading in product((asked, *((s,) for s in asked)), READINGS[1:]):
            found = {s: self.table(s, half, strategies, reading)["score"] for s in SUBJECTS}
            gains = {s: score[1] - score[0] for s, score in found.items() if score.shape[1] > 1}
            points = [gain for subject, gain in gains.items() if subject != "text"]
            if points:
                value, low, high = interval(points)
                worse = [subject for subject, gain in gains.items() if interval([gain])[2] < 0]
                lacking = [subject for subject in SUBJECTS if subject not in gains]
                is_good = value > -2 and low > -4 and not worse
                word = "fails" if not is_good else "passes so far" if lacking else "passes"
                yield (
                    f"{half}, {'+'.join(strategies)}, {reading}: {value:+.2f} ({low:+.2f} to "
                    f"{high:+.2f}), {word}; worse: {', '.join(worse) or 'none'}; not asked: "
                    f"{', '.join(lacking) or 'none'}"
                )


def figures(line: dict[str, Any], unit: float) -> tuple[float, float, bool]:
    """Score, tokens, and whether the answer was cut."""
    return unit * line["score"], line["n_token"], line["finish"] == "length"


def interval(groups: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """The mean over groups of each one's mean, and its 95 % bootstrap interval."""
    rng = np.random.default_rng(SEED)
    drawn = [g[rng.integers(len(g), size=(N_RESAMPLE, len(g)))].mean(axis=1) for g in groups]
    low, high = np.quantile(np.mean(drawn, axis=0), (0.025, 0.975))
    return float(np.mean([g.mean() for g in groups])), float(low), float(high)


def main() -> None:
    """Run, or report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("run", help="ask what a file of results lacks")
    run.add_argument("bundle", type=Path, metavar="BUNDLE")
    run.add_argument("data", type=Path, metavar="DATA")
    run.add_argument("-o", "--output", type=Path, required=True, metavar="RESULTS")
    for name, known in CHOICES.items():
        run.add_argument(f"--{name}", nargs="+", choices=known, default=known)
    run.add_argument("--limit", type=int, default=125, help="most items of a cell and language")
    run.add_argument("--n-parallel", type=int, default=12)
    run.add_argument("--threads", type=int, default=1)
    run.add_argument("--max-tokens", type=int, default=256)
    report = commands.add_parser("report", help="print differences and the verdict")
    report.add_argument("results", type=Path, metavar="RESULTS")
    args = parser.parse_args()
    if args.command == "run":
        Run(args).run()
        return
    found = Report(line for line in read_lines(args.results.read_bytes()) if "score" in line)
    for half in (*HALVES, "all"):
        print(f"\n# {half}", *found.rows(half), "", *found.verdicts(half), sep="\n")


if __name__ == "__main__":
    main()
