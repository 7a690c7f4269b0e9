"""Measure: many callers at once, each with a mix of its own.

Beside one caller, the base alone, and the bare C interface: llama_decode by hand.
"""

import contextlib
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.backend.batch import Span, pieces_of
from qaflora_edge.backend.context import Context
from qaflora_edge.bench.measure import Plan, Row, Run, in_turn, ratios, spread
from qaflora_edge.bench.rig import Prompts, Rig, read_pieces
from qaflora_edge.engine import Engine
from qaflora_edge.errors import BackendError, OptionError
from qaflora_edge.inference.generation import Generation
from qaflora_edge.progress import Tell
from qaflora_edge.weighing.reading import Steps

T = TypeVar("T")
Tokens = Sequence[int]
Times = list[list[float]]  # seconds at which each caller's tokens were chosen

WAYS = ("base", "bare C", "generate_many", "threads")
_N_LONGER = 3  # tokens by which each caller's prompt is longer than that of the one before
_N_ALONE = 8  # tokens of an answer before another's question comes


def measure_callers(rig: Rig, plan: Plan, prompts: Prompts, tell: Tell) -> list[Row]:
    """Decoding for some callers at once, in four ways: all read the same prompts."""
    most, k = max(plan.callers), plan.probe_k
    n_ctx = min(plan.prompt_tokens) + _N_LONGER * most + plan.max_tokens
    mixes = _mixes(most, k, rig.model.n_layer)
    base, bare = rig.base(most, n_ctx=n_ctx), rig.ours(k, most, n_ctx=n_ctx)
    for seq, mix in enumerate(mixes):
        bare.set_weights(mix, seq=seq)
    runs: dict[tuple[int, str], list[Run]] = {(n, w): [] for n in plan.callers for w in WAYS}
    with rig.engine(k, n_ctx=n_ctx, n_parallel=most) as engine:
        _never_end(engine)
        answers: dict[str, Callable[[Sequence[Tokens]], Times]] = {
            "base": lambda read: _between(engine, lambda: _by_hand(base, read, plan.max_tokens)),
            "bare C": lambda read: _between(engine, lambda: _by_hand(bare, read, plan.max_tokens)),
            "generate_many": lambda read: _by_generate_many(engine, read, mixes, plan.max_tokens),
            "threads": lambda read: _by_threads(engine, read, mixes, plan.max_tokens),
        }
        for turn in range(1 + plan.repeat):
            for n in plan.callers:
                read = [prompts.draw(min(plan.prompt_tokens) + _N_LONGER * i) for i in range(n)]
                for way in in_turn(WAYS, turn):
                    run = _speed(answers[way](read))
                    if turn:
                        runs[n, way].append(run)
            tell("callers", turn + 1, 1 + plan.repeat)
    return [_row(n, way, runs, min(plan.callers)) for n, way in runs]


def _mixes(n: int, k: int, n_layer: int) -> F32:
    """Weights of each caller: float32 [n, k, n_layer], whose sum over k is 1."""
    drawn = np.random.default_rng(0).dirichlet(np.ones(k), (n, n_layer))
    return np.ascontiguousarray(drawn.transpose(0, 2, 1), np.float32)


def _never_end(engine: Engine) -> None:
    """Let tokens that end an answer be like others, so that nobody leaves before the rest."""
    vars(engine._core.model)["is_end"] = lambda token: False


def _speed(times: Times) -> Run:
    """Tokens a second from when all are decoded together until the first one has ended."""
    start, ended = max(own[0] for own in times), min(times, key=lambda own: own[-1])
    end, n_step = ended[-1], sum(at > start for at in ended)
    if not n_step:
        raise OptionError(
            f"The part callers found an answer of {len(ended)} tokens that ended before all of "
            f"{len(times)} callers had begun, expected that all are decoded together. Raise "
            "--max-tokens, lower --callers or --prompt-tokens, or leave out callers with --only."
        )
    n_decoded = n_step * len(times)
    return {
        "decode_ms": 1e3 * (end - start),
        "n_decoded": n_decoded,
        "tokens_per_second": n_decoded / (end - start),
    }


def _between(engine: Engine, work: Callable[[], T]) -> T:
    """What a function gives, run by the thread that computes for an Engine.

    A second thread that computes slows both: see Loop.
    """

    def steps() -> Steps[T]:
        yield None
        return work()

    return engine._core.run(steps())


def _by_hand(context: Context, prompts: Sequence[Tokens], n_token: int) -> Times:
    """The likeliest tokens by llama_decode and nothing else."""
    lib, n_seq, n_vocab = context._lib, len(prompts), context._model.n_vocab
    context.clear()
    ids = np.zeros(n_seq, np.int64)
    for seq, tokens in enumerate(prompts):
        (row,) = context.decode_spans([Span(seq, tokens)])
        ids[seq] = context.logits_view(row).argmax()
    times = [time.perf_counter()]
    batch = lib.llama_batch_init(n_seq, 0, 1)
    batch.n_tokens = n_seq
    for seq, tokens in enumerate(prompts):
        batch.pos[seq], batch.n_seq_id[seq], batch.logits[seq] = len(tokens), 1, 1
        batch.seq_id[seq][0] = seq
    while len(times) < n_token:
        for seq in range(n_seq):
            batch.token[seq] = int(ids[seq])
        if code := lib.llama_decode(context._pointer, batch):
            raise BackendError(f"llama_decode failed with code {code}.")
        logits = np.ctypeslib.as_array(lib.llama_get_logits(context._pointer), (n_seq, n_vocab))
        ids = logits.argmax(axis=1)
        for seq in range(n_seq):
            batch.pos[seq] += 1
        times.append(time.perf_counter())
    lib.llama_batch_free(batch)
    return [times] * n_seq


def _by_generate_many(engine: Engine, prompts: Sequence[Tokens], mixes: F32, n_token: int) -> Times:
    requests = [
        {"prompt": tokens, "weights": mix} for tokens, mix in zip(prompts, mixes, strict=False)
    ]
    answers = engine.generate_many(requests, max_tokens=n_token)
    return [_whole(answer).timings.token_s for _, answer in answers]


def _by_threads(engine: Engine, prompts: Sequence[Tokens], mixes: F32, n_token: int) -> Times:
    """Each caller takes the pieces of its own answer."""
    answers = [
        engine.generate(tokens, weights=mix, max_tokens=n_token, wait=False)
        for tokens, mix in zip(prompts, mixes, strict=False)
    ]
    threads = [threading.Thread(target=_take, args=(answer,)) for answer in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [_whole(answer).timings.token_s for answer in answers]


def _take(answer: Generation) -> None:
    with contextlib.suppress(Exception):  # _whole raises it, in the thread that measures
        for _ in answer:
            pass


def _whole(answer: Generation) -> Generation:
    if answer.error is not None:
        raise answer.error
    return answer


def _row(n: int, way: str, runs: dict[tuple[int, str], list[Run]], fewest: int) -> Row:
    key, own = "tokens_per_second", runs[n, way]
    row: Row = {"callers": n, "way": way, key: spread([run[key] for run in own])}
    row["of_one"] = spread(ratios(own, runs[fewest, way], key))
    if way != "base":
        row["of_base"] = spread(ratios(own, runs[n, "base"], key))
    if way not in ("base", "bare C"):
        row["of_bare"] = spread(ratios(own, runs[n, "bare C"], key))
    return row | {"runs": own}


# pause


def measure_pause(rig: Rig, plan: Plan, prompts: Prompts, tell: Tell) -> list[Row]:
    """How long one caller waits for a token while another's question is probed and read."""
    k, n_room = plan.probe_k, plan.question_tokens + pieces_of().n_most
    n_ctx = min(plan.prompt_tokens) + n_room  # which its answer has for itself
    prober, context = rig.prober(k), rig.ours(k, 1, n_ctx=n_ctx)
    (mix,) = _mixes(1, k, rig.model.n_layer)
    runs: list[Run] = []
    with rig.engine(k, n_ctx=n_ctx, n_parallel=2, lens=plan.lens, pool=plan.pool) as engine:
        _never_end(engine)
        for turn in range(1 + plan.repeat):
            own, other, question = (prompts.draw(plan.question_tokens) for _ in range(3))
            steps = prober.divergence(own, range(k), "kl", plan.lens, plan.pool)
            parts_ms = _between(engine, partial(_each_ms, steps))
            prefill_ms = _between(engine, partial(_prefill_ubatch_ms, context, other))
            run = {
                "probe_ubatch_ms": statistics.median(parts_ms[:-1]),  # the lens is last
                "prefill_ubatch_ms": prefill_ms,
                **_pause(engine, mix, prompts.draw(min(plan.prompt_tokens)), question),
            }
            longer_ms = max(run["probe_ubatch_ms"], run["prefill_ubatch_ms"])
            if turn:
                runs.append(run | {"of_ubatch": run["pause_ms"] / longer_ms})
            tell("pause", turn + 1, 1 + plan.repeat)
    row: Row = {"k": k, "question_tokens": plan.question_tokens}
    return [row | {key: spread([run[key] for run in runs]) for key in runs[0]} | {"runs": runs}]


def _each_ms(steps: Any) -> list[float]:
    """Drive a generator to its end: what each of its parts took."""
    parts, start = [], time.perf_counter()
    for _ in steps:
        parts.append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
    return [*parts, 1e3 * (time.perf_counter() - start)]


def _prefill_ubatch_ms(context: Context, tokens: Tokens) -> float:
    """The median of a prompt's pieces."""
    context.clear()
    return statistics.median(_each_ms(read_pieces(context, tokens)))


def _pause(engine: Engine, mix: F32, prompt: Tokens, question: Tokens) -> Run:
    """The longest time between two tokens of an answer, once another's question has come."""
    answer = engine.generate(prompt, weights=mix)
    thread = threading.Thread(target=_take, args=(answer,))
    thread.start()
    while answer.n_completion < _N_ALONE and not answer.is_done:
        time.sleep(1e-3)
    start, n_alone = time.perf_counter(), answer.n_completion
    other = engine.generate(question, weights="qa-flora", max_tokens=1)
    end = time.perf_counter()
    answer.cancel()
    thread.join()
    _whole(answer)
    times = answer.timings.token_s
    gaps = [(at, 1e3 * (after - at)) for at, after in itertools.pairwise(times)]
    during = [gap for at, gap in gaps if at + gap / 1e3 > start and at < end]
    if n_alone < 2 or not during:
        raise OptionError(
            f"The part pause found an answer of {len(times)} tokens, expected one that lasts until "
            "another's question is read. Raise --question-tokens, or leave out pause with --only."
        )
    return {
        "alone_ms": statistics.median(gap for _, gap in gaps[: n_alone - 1]),
        "pause_ms": max(during),
        "question_ms": 1e3 * (end - start),
        "n_decoded": sum(start < at < end for at in times),
        "probe_ms": other.timings.probe_ms,
    }
