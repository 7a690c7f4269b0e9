"""The strategy two-place and what it needs to know of adapters, against numbers written out."""

from collections.abc import Sequence
from dataclasses import replace
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from bundles import make_bundle, rewrite
from decoded import count_decoded, probe
from refusals import refused
from tiny import QWEN

from qaflora_edge import Engine, FusionWeights
from qaflora_edge.answering.typical import measure
from qaflora_edge.ask import Chat, Prompt, Tools
from qaflora_edge.backend.batch import n_common
from qaflora_edge.backend.context import Context
from qaflora_edge.bundles.create import create_bundle
from qaflora_edge.bundles.edit import calibrate, neutral
from qaflora_edge.bundles.open import load_bundle
from qaflora_edge.errors import QafloraError, StrategyError
from qaflora_edge.prompt.calls import calls_of
from qaflora_edge.prompt.neutral import neutral as all_neutral
from qaflora_edge.weighing.calibration import KEYS
from qaflora_edge.weighing.plan import Draft
from qaflora_edge.weighing.strategy import Query, parse_strategy

NAMES = ("math", "es", "med", "ru")
USUAL = {"mean": log(0.01), "spread": 0.5}
PLACES = ("added_last", "added_question", "added_text")
LATER = ("later_last", "later_question")
ALL = (*PLACES, *LATER)


MOVED = np.array([-1.2, 0.3, -0.4])  # spreads, at the last token; in the question by half of it


class Places:
    """A probe that found these numbers [n_adapter] at each layer, and so many nats."""

    def __init__(self, last: list[float], question: list[float], nats: float) -> None:
        self.found, self.nats = (last, question), nats

    def neutral(self) -> Any:
        """Neutral prompts, and what the system prompt adds to them: MOVED, with noise."""
        usual = np.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 0.0, -1.0]])
        noise = np.array([[0.2, 0.1, 0.0], [-0.2, 0.0, 0.3], [0.0, -0.1, -0.3]])
        behind = [usual + MOVED + noise, usual + 0.5 * MOVED]
        extents = USUAL["mean"] + USUAL["spread"] * np.array([[usual, usual], behind])
        return np.repeat(np.exp(extents)[..., None], 2, axis=-1)

    def added(self) -> Any:
        return np.repeat(np.array(self.found)[:, :, None], 2, axis=2)

    def surprise(self) -> float:
        return self.nats


def plan_of(text: str, probe: Any, typical: dict[str, Any], **how: Any) -> Any:
    """The plan of a strategy for a chat of two tokens, and two layers."""
    choice = parse_strategy(text, [*typical])
    query = Query((1, 2), tuple(typical), 2, "norm", "last", typical)
    probe.query = replace(query, options=choice.options, **{"is_chat": True, **how})
    choice.strategy.check(probe.query)
    return choice.strategy.plan(probe)


def mixed(
    text: str,
    last: list[float],
    question: list[float],
    *,
    known: Any = None,
    nats: float = 25,  # half of what is needed for the plain threshold
    **how: Any,
) -> Any:
    """The mix for what adapters do, the same at both layers."""
    typical = dict.fromkeys(NAMES[: len(last)], known or dict.fromkeys(ALL, USUAL))
    return plan_of(text, Places(last, question, nats), typical, **how)


def weighed(text: str, last: list[float], question: list[float], **options: Any) -> list[float]:
    """Weights [n_adapter] for what adapters do."""
    mix = mixed(text, last, question, **options)
    if mix.divergence is not None:
        np.testing.assert_allclose(mix.divergence[:, 0], last, rtol=1e-5)
    assert (mix.weights[:, 0] == mix.weights[:, 1]).all()
    return [round(float(x), 5) for x in mix.weights[:, 0]]


def at(z: float) -> float:
    """What is z standard deviations above what is usual."""
    return exp(USUAL["mean"] + z * USUAL["spread"])


def last_of(both: float, question: float) -> float:
    """What is so much at the last token that it is `both` together with the question's."""
    return at(sqrt(2) * both - question)


def test_one_adapter_comes_from_each_place() -> None:
    last, question = [at(1), at(0), at(3)], [at(0.2), at(1.3), at(2)]
    assert weighed("two-place", last, question) == [0, 0.5, 1]
    assert weighed("two-place:answer=0.7,question=0.8", last, question) == [0, 0.8, 0.7]


def test_a_later_turn_is_compared_with_later_turns() -> None:
    found = [at(3), at(0)], [at(2), at(0)]
    later = {"mean": USUAL["mean"] + 2, "spread": 0.5}
    known = dict.fromkeys(PLACES, USUAL) | dict.fromkeys(LATER, later)
    assert weighed("two-place", *found, known=known) == [1, 0]
    assert weighed("two-place", *found, known=known, is_later=True) == [0, 0]


def behind_system(last: list[float], question: list[float], **how: Any) -> Any:
    """The mix of three, in standard deviations, behind the system prompt of Places.neutral."""
    neutral = ((Prompt((1,)), Prompt((2,))),)
    return mixed("two-place", [*map(at, last)], [*map(at, question)], neutral=neutral, **how)


def test_what_a_system_prompt_adds_is_taken_out() -> None:
    last = np.array([3.0, -1.0, 0.5])
    question = np.array([1.0, 1.5, -0.5])
    expected = mixed("two-place", [*map(at, last)], [*map(at, question)])
    mix = behind_system(last + MOVED, question + 0.5 * MOVED)
    assert expected.weights[:, 0].tolist() == [1, 0.5, 0]
    np.testing.assert_allclose(mix.divergence, expected.divergence)
    assert mix.because == expected.because
    # Behind other turns it does half of that.
    mix = behind_system(last + 0.5 * MOVED, question + 0.25 * MOVED, is_later=True)
    np.testing.assert_allclose(mix.divergence, expected.divergence)


def test_what_a_system_prompt_asks_for_stays(monkeypatch) -> None:
    monkeypatch.setitem(globals(), "MOVED", np.array([-1.2, 0.8, -0.4]))
    mix = behind_system(np.zeros(3), np.zeros(3))
    moved = np.log(mix.divergence[:, 0] / at(0)) / USUAL["spread"]
    assert moved == pytest.approx([1.2, 0, 0.4])


def test_neutral_prompts_are_read_behind_each_system_prompt_once(calibrated, monkeypatch) -> None:
    """Oracle: what is measured of each neutral prompt in turn, as a conversation."""
    system = {"role": "system", "content": "Be on time, " * 8}
    turn = {"role": "user", "content": "the thing"}
    texts = [*all_neutral("prompts")[9::12], *all_neutral("turns")[12::16]]
    with Engine(calibrated.folder, strategy="two-place") as engine:
        prompt = engine.read(Chat([system, turn]))
        found = probe(engine, prompt.tokens, prompt.question, neutral=prompt.neutral).neutral()
        for said, places in zip(([], [system]), found, strict=True):
            for at, text in enumerate(texts):
                read = engine.read(Chat([*said, {"role": "user", "content": text}]))
                assert prompt.neutral[at][len(said)] == replace(read, neutral=())
                alone = probe(engine, read.tokens, read.question).added()
                np.testing.assert_allclose(places[:, at], alone, rtol=2e-3, atol=1e-9)
        counts = count_decoded(monkeypatch)
        engine.weights(prompt.tokens)
        assert sum(counts) <= len(prompt.tokens)

        # What the prompt has in common with them is prefilled once.
        del counts[:]
        other = engine.read(Chat([system | {"content": "Go " * 60}, turn]))
        engine.weights(other.tokens)
        n_same = min(n_common(other.tokens, behind.tokens) for _, behind in other.neutral)
        n_neutral = sum(len(behind.tokens) - n_same for _, behind in other.neutral)
        assert sum(counts) == len(other.tokens) + n_neutral

        assert not engine.read(Chat([turn])).neutral
        reader = replace(engine.memory.current.reader, system=system["content"])
        assert not reader.read(Chat([turn])).neutral  # as if the bundle had it


def test_behind_a_tools_result_the_mix_is_that_of_the_question(tmp_path, monkeypatch) -> None:
    template = QWEN.replace("{{ m.role }}", "{{ 'user' if m.role == 'tool' else m.role }}")
    made = make_bundle(tmp_path, calibrate=True, chat_template=template, n_ctx=1024)
    function = {"name": "time", "arguments": {}}
    calls = [{"id": "1", "type": "function", "function": function}]
    called = {"role": "assistant", "content": "the ", "tool_calls": calls}
    result = {"role": "tool", "tool_call_id": "1", "content": '{"ring": "in the air"}'}
    asked: list[Any] = [{"role": "user", "content": "the thing on a ring"}]
    mixes: list[FusionWeights] = []
    tools = [{"type": "function", "function": {"name": "time"}}]
    options: Any = {"tools": tools, "max_tokens": 1, "strategy": "two-place:abstain=never"}
    with Engine(made.folder, n_ctx=1024) as engine:
        n_before = engine.chat(asked, **options, on_weights=mixes.append).usage.prompt_tokens
        counts = count_decoded(monkeypatch)
        for messages in ([*asked, called, result], [*asked, called, result, called, result]):
            del counts[:]
            usage = engine.chat(messages, **options, on_weights=mixes.append).usage
            # The question is not read again: only what is new, and the rows that a mix reads.
            assert sum(counts) <= usage.prompt_tokens - n_before + 3 * 16
            n_before = usage.prompt_tokens
    first, *later = mixes
    for mix in later:
        assert mix.why == first.why
        np.testing.assert_array_equal(mix.weights, first.weights)


@pytest.mark.parametrize(
    ("of_mix", "of_base", "is_mixed"),
    [
        ('{"name": "time"', "Noon", False),
        ('```json\n{ "name"', "It is <tool_call>", False),
        ("<tool_call>", "<tool_call>", True),
        ("Noon", "<tool_call>", True),
        ('{"answer": "noon"', "Noon", True),
    ],
)
def test_a_tool_is_called_where_the_base_would_call_one(of_mix, of_base, is_mixed) -> None:
    class Drafting(Places):
        def drafts(self, names: Sequence[str], n_token: int, answer: Any) -> list[Draft]:
            texts = dict(zip(names, (of_mix, of_base), strict=True))
            return [Draft(name, (1,), text, (0.0,), False) for name, text in texts.items()]

    tool = {"type": "function", "function": {"name": "time"}}
    calls = calls_of(QWEN, Tools([tool]))
    typical = dict.fromkeys(NAMES[:2], dict.fromkeys(ALL, USUAL))
    places = Drafting([at(3.0), at(0.0)], [at(3.0), at(0.0)], 25)
    plan = plan_of("two-place", places, typical, calls=calls, can_draft=True)
    assert bool(plan.weights.any()) is is_mixed
    assert ("would call a tool" in plan.because) is not is_mixed


def test_what_raises_all_adapters_is_no_surprise() -> None:
    """Oracle: the distance from its regression on the other's, and that error's spread, by hand."""
    from qaflora_edge.weighing.calibration import unusual

    def z(*each: list[float], keys: Sequence[str] = ("added_last",)) -> list[float]:
        known = [dict.fromkeys(keys, USUAL | {"each": e}) for e in each]
        typical = dict(zip(NAMES, known, strict=False))
        query = Query((1,), tuple(typical), 2, "norm", "last", typical)
        found = np.repeat([[at(3)], [at(2)], [at(1)]], 2, axis=1)[: len(each)]
        return [round(float(x), 4) for x in unusual(query, dict.fromkeys(keys, found))]

    up, apart = [1.0, -1.0, 1.0, -1.0], [1.0, -1.0, -1.0, 1.0]
    half = [1.0, -1.0, 0.0, 0.0]  # goes with both by 0.5
    assert z(up, up) == [3, 2]  # versions of one adapter
    assert z(up, apart) == [3, 2]
    slope = 0.75 * 0.5 / 0.5
    assert z(up, half)[0] == round((3 - slope * 2) / (1 - slope**2 * 0.5) ** 0.5, 4)
    # The third goes with the mean of the first two, by 0.5 of a mean that varies by 0.5.
    assert z(up, apart, half)[2] == round((1 - slope * 2.5) / (1 - slope**2 * 0.5) ** 0.5, 4)
    assert z(up) == [3]
    assert z(up, []) == [3, 2]  # as older bundles have it
    both = ("added_last", "added_question")  # two measures that correlate: of variance 4
    assert z(up, keys=both) == [3]
    assert z(up, [], keys=both) == [round(6 / 2**0.5, 4), round(4 / 2**0.5, 4)]


def test_a_second_one_has_to_do_more_in_the_question_than_is_usual() -> None:
    assert weighed("two-place", [at(3), at(0), at(0)], [at(2), at(0.9), at(-1)]) == [1, 0, 0]
    lower = "two-place:second=0.8"
    assert weighed(lower, [at(3), at(0), at(0)], [at(2), at(0.9), at(-1)]) == [1, 0.5, 0]
    assert weighed("two-place:answer=0.7", [at(3)], [at(3)]) == [0.7]


@pytest.mark.parametrize(
    ("z", "nats", "is_mixed"),
    [
        (2.49, 25, False),
        (2.51, 25, True),
        (6.24, 0, False),
        (6.26, 0, True),
        (1.24, 99, False),
        (1.26, 50, True),
    ],
)
def test_the_base_answers_where_none_does_more_than_is_usual(z, nats, is_mixed) -> None:
    question = [0, 1.3, 0]
    last = [last_of(z, question[0]), at(0), at(0)]
    question = [*map(at, question)]
    found = weighed("two-place", last, question, nats=nats)
    assert found == ([1, 0.5, 0] if is_mixed else [0, 0, 0])


def test_plain_text_gets_the_most_unusual_one_that_stands_out() -> None:
    last, question = [at(2), at(2.6), at(-3)], [at(5), at(0), at(0)]
    assert weighed("two-place", last, question, is_chat=False) == [0, 1, 0]
    assert weighed("two-place:answer=0.5", last, question, is_chat=False) == [0, 0.5, 0]
    assert weighed("two-place:abstain=1.4", last, question, is_chat=False) == [0, 0, 0]
    assert weighed("two-place:abstain=never", [at(-2)] * 3, question, is_chat=False) == [1, 0, 0]


SAYS = "standard deviations above its typical prompt."
BASE = "The base answers alone: no adapter stands out"


# fmt: off
CASES = [
    ([3.1, 0.2, 0.1, 0], [0.4, 2.2, 0.1, 0],
     f"math: 3.1 {SAYS} es: 2.2 in the question. The others are typical."),
    ([2.75, 0, 2.6], [0, 0.9, 0], f"math: 2.8 {SAYS} The others are lower."),
    ([0.25, 1.24], [0, 9], f"{BASE} (es most: 1.24, needed: above 1.25)."),
    ([0.25, 2.4], [0, 9], "The base answers alone: it is sure of its answer (es most: 2.40)."),
    ([3], [9], "math is the only adapter in use."),
]
# fmt: on


@pytest.mark.parametrize(("both", "question", "because"), CASES)
def test_it_says_why_with_the_numbers_that_decide(both, question, because) -> None:
    mix = mixed("two-place", [*map(last_of, both, question)], [*map(at, question)])
    assert mix.because == because
    for i, found in enumerate(mix.why.values()):
        assert found.scores == pytest.approx({"answer": both[i], "question": question[i]}, abs=1e-6)
        assert found.thresholds == {"answer": 2.5, "question": 1.25}
        assert bool(found.taken_as) == bool(mix.weights[i, 0])


def test_new_bundles_are_weighed_by_it_where_it_has_something_to_go_by(
    calibrated, tmp_path
) -> None:
    mlp = tiny.write_tiny_adapter(tmp_path / "mlp.gguf", calibrated.base, targets=["ffn_up"])
    place = {"targets": ["attn_v"], "layers": [1]}
    one_layer = tiny.write_tiny_adapter(tmp_path / "v.gguf", calibrated.base, **place)
    es, base = calibrated.adapter.path, calibrated.base.path

    def strategy_of(*adapters: Path, **options: Any) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        options = {"engine": Engine, **options}
        create_bundle(folder, base, {path.stem: path for path in adapters}, **options)
        with Engine(folder, n_ctx=128) as engine:
            engine.weights("the thing")
            return engine.strategy

    assert strategy_of(es, one_layer.path) == "relay"
    assert strategy_of(es, engine=None) == "qa-flora"
    assert strategy_of(es, mlp.path) == "qa-flora"
    assert strategy_of(es, strategy="static") == "static"
    assert strategy_of() == "qa-flora"
    with pytest.raises(QafloraError, match="Strategy '' is not known; expected one of two-place"):
        strategy_of(es, strategy="")


def test_what_adapters_would_add_is_their_delta_times_what_the_base_reads(calibrated) -> None:
    """Oracle: the deltas multiplied out, and the inputs of the base one token at a time.

    The surprise of the 16 tokens after the question's first comes with it.
    """
    with Engine(calibrated.folder, kv_type="f32", flash_attn=False) as engine:
        tokens, span, backend = [60 + i % 48 for i in range(300)], (248, 290), engine._core
        measured = probe(engine, tokens, span, is_chat=True)
        found, nats = measured.added(), 0.0
        inputs = []
        with Context(backend.model, backend.pack, n_ctx=512, **backend.options) as context:
            for at, token in enumerate(tokens):
                context.capture_begin("inputs")
                context.decode([token], start=at)
                inputs.append(context.inputs(0, 1)[0].astype(np.float64))
                if 248 <= at < 264:
                    likely = np.exp(context.logits().astype(np.float64))
                    nats -= log(likely[tokens[at + 1]] / likely.sum())
        assert measured.surprise() == pytest.approx(nats, rel=1e-3)
        n_layer = engine.n_layer
    for ia, path in enumerate(load_bundle(calibrated.folder).adapter_paths.values()):
        deltas = tiny.stored_deltas(path)
        for layer in range(n_layer):
            names = [f"blk.{layer}.attn_{kind}.weight" for kind in "qkv"]
            modules = [deltas[name] for name in names if name in deltas]
            sizes = [[np.linalg.norm(m @ x[layer]) for x in inputs] for m in modules]
            last = exp(np.mean([log(each[-1]) for each in sizes])) if sizes else 0
            question = exp(np.mean([log(np.mean(each[248:290])) for each in sizes])) if sizes else 0
            assert found[0, ia, layer] == pytest.approx(last, rel=1e-3)
            assert found[1, ia, layer] == pytest.approx(question, rel=1e-3)


def test_a_bundle_knows_what_is_usual_in_its_places(calibrated) -> None:
    """Oracle: what is measured of the neutral prompts one by one."""
    typical = load_bundle(calibrated.folder).known.typical
    assert all(set(typical[name]) == set(KEYS) for name in ("math", "es"))
    extents: dict[str, list[Any]] = {key: [] for key in ALL}
    with Engine(calibrated.folder) as engine:

        def note(key: str, measured: Any) -> None:
            extents[key].append(np.log(np.asarray(measured, float) + 1e-12).mean(axis=1))

        def note_chat(keys: Sequence[str], text: str, *said: Any) -> None:
            prompt = engine.read(Chat([*said, {"role": "user", "content": text}]))
            assert prompt.is_later == bool(said)
            measured = probe(engine, prompt.tokens, prompt.question).added()
            for key, found in zip(keys, measured, strict=True):
                note(key, found)

        texts, exchanges = [*neutral("prompts"), *neutral("turns")], neutral("exchanges")
        for text in texts:
            note_chat(PLACES[:2], text)
        for at, said in enumerate(exchanges):
            for text in texts[at :: len(exchanges)]:
                note_chat(LATER, text, *said)
        for prompt in neutral("prompts"):
            note("added_text", probe(engine, engine.tokenize(prompt)).added()[0])
    for key, values in extents.items():
        for ia, name in enumerate(("math", "es")):
            mean, spread = np.mean(values, axis=0)[ia], np.std(values, axis=0)[ia]
            assert typical[name][key]["mean"] == pytest.approx(mean, abs=2e-3)
            assert typical[name][key]["spread"] == pytest.approx(max(spread, 0.01), abs=2e-3)
            distances = (np.array(values)[:, ia] - mean) / max(spread, 0.01)
            np.testing.assert_allclose(typical[name][key]["each"], distances, atol=0.2)


def test_prompts_are_measured_in_one_batch(calibrated, monkeypatch) -> None:
    """What all chats have before their questions is prefilled once."""
    prompts, turns = ["the thing", "a ring in the air"], ["on"]
    with Engine(calibrated.folder) as engine:
        texts = [*prompts, *turns]
        before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        chats, later = (
            [engine.chat_tokens([*said, {"role": "user", "content": t}]) for t in texts]
            for said in ([], before)
        )
        plain = [engine.tokenize(text) for text in prompts]
        counts = count_decoded(monkeypatch)
        measure(engine.memory.current, prompts, turns, [before], PLACES)
    n_same, n_later = (min(n_common(c[0], chat) for chat in c) for c in (chats, later))
    assert n_same == 5 < n_later
    read = [sum(len(chat) - n for chat in c) for c, n in ((chats, n_same), (later, n_later))]
    assert counts == [n_same, read[0], sum(map(len, plain)), n_later, read[1]]


def test_an_engine_follows_it_in_one_pass_of_the_base(calibrated, monkeypatch) -> None:
    typical = load_bundle(calibrated.folder).known.typical
    with Engine(calibrated.folder, strategy="two-place:abstain=never") as engine:
        tokens = engine.chat_tokens([{"role": "user", "content": "the thing on a ring"}])
        counts = count_decoded(monkeypatch)
        fusion = engine.weights(tokens)
        assert sum(counts) == len(tokens)
        text = engine.weights("the thing", raw=True).weights
        calibrated = engine.weights(tokens, strategy="calibrated:pool=question")
        plain = np.asarray(engine.weights(tokens, strategy="qa-flora:pool=question").divergence)
    assert set(fusion.weights.sum(axis=0).tolist()) in ({1.0}, {1.5})
    assert sorted(text[:, 0].tolist()) == [0.0, 1.0]
    ratio = plain / [typical[name]["question_norm"] for name in ("math", "es")]
    np.testing.assert_allclose(calibrated.weights, ratio / ratio.sum(axis=0), rtol=1e-4)


def test_an_older_bundle_is_asked_to_be_measured_again(calibrated, tmp_path) -> None:
    old = make_bundle(tmp_path, calibrate=True)

    def forget(raw: dict[str, Any]) -> None:
        for values in raw["fusion"]["typical"].values():
            for key in {*values} - {"norm", "raw"}:
                del values[key]

    rewrite(old.folder, forget)
    with Engine(old.folder, strategy="calibrated") as engine:
        assert engine.weights("a").strategy == "calibrated"
        for strategy in ("two-place", "calibrated:pool=question"):
            message = refused(StrategyError, engine.weights, "a", strategy=strategy)
            assert message.startswith(f"Strategy {strategy.partition(':')[0]} needs to know")
            assert "was not measured of math, es. " in message
    calibrate(old.folder, Engine)
    assert load_bundle(old.folder).known.typical == load_bundle(calibrated.folder).known.typical
