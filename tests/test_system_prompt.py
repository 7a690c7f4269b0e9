"""A bundle's system prompt: where it is said, and that it is read once for all Engines."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import TinyBundle, bundle_json, make_bundle, make_sources, rewrite, snapshot
from click.testing import CliRunner
from decoded import count_decoded

from qaflora_edge import Engine
from qaflora_edge.bundles.create import create_bundle
from qaflora_edge.cli import main
from qaflora_edge.errors import ChatTemplateError
from qaflora_edge.inference import prefix_file
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.strategy import Query, parse_strategy

SYSTEM = "You are the king of the sea, and answer what the people ask you. " * 6
QUESTION = [{"role": "user", "content": "How far is the moon?"}]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QAFLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / prefix_file.FOLDER


@pytest.fixture
def made(tmp_path: Path, cache: Path) -> TinyBundle:
    made = make_sources(tmp_path, dtype="q8_0", n_ctx=2048)
    adapters = {"math": made.peft, "es": made.adapter.path}
    create_bundle(made.folder, made.base.path, adapters, system=SYSTEM, calibrate=False)
    return made


@pytest.fixture
def calibrated(tmp_path: Path, cache: Path) -> TinyBundle:
    """One whose adapters can be weighed by any strategy; nothing is kept yet."""
    made = make_bundle(tmp_path, calibrate=True, dtype="q8_0", n_ctx=2048)
    rewrite(made.folder, lambda raw: raw.update(system=SYSTEM))
    return made


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of the first sequence in every decode."""
    return count_decoded(monkeypatch, first_only=True)


def weighed(engine: Engine, counts: list[int], messages: Any = QUESTION) -> tuple[Any, int, int]:
    """How a conversation is weighed, how many tokens were read for it, and how many it has."""
    tokens = engine.chat_tokens(messages)
    counts.clear()
    found = measured(engine.weights(tokens))
    return found, sum(counts), len(tokens)


def measured(fusion: FusionWeights) -> Any:
    """Weights, and what they come from, which differs where weights are few numbers."""
    return fusion.weights if fusion.divergence is None else [fusion.weights, fusion.divergence]


def without_file(made: TinyBundle) -> Any:
    """How the question is weighed without what was kept."""
    (path,) = (made.folder.parent / "cache" / prefix_file.FOLDER).glob("*.kv")
    moved = path.rename(path.with_suffix(".away"))
    with Engine(made.folder, n_ctx=1024) as engine:
        found = measured(engine.weights(engine.chat_tokens(QUESTION)))
    moved.rename(path)
    return found


def test_the_first_question_of_an_engine_is_read_from_where_the_system_prompt_ends(
    made: TinyBundle, counts: list[int]
) -> None:
    expected = without_file(made)
    with Engine(made.folder, n_ctx=1024) as engine:
        found, n_read, n_token = weighed(engine, counts)
        assert n_token > 150
        assert n_read < 60
        assert np.array_equal(found, expected)
        engine.use_adapters(["es"])  # nothing is kept of these
        assert weighed(engine, counts)[1] == n_token


def test_conversations_without_a_system_message_begin_with_it(made: TinyBundle) -> None:
    with Engine(made.folder, n_ctx=1024) as engine:
        assert engine.system == SYSTEM
        told = engine.chat_tokens([{"role": "system", "content": SYSTEM}, *QUESTION])
        assert engine.chat_tokens(QUESTION) == told
        for role in ("system", "developer"):
            own = [{"role": role, "content": "Be short."}, *QUESTION]
            with Engine(base=made.base.path, n_ctx=1024) as plain:
                assert engine.chat_tokens(own) == plain.chat_tokens(own)
                assert plain.system == ""


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied", "other facts"])
def test_a_damaged_file_is_removed_and_read_anew(
    made: TinyBundle, cache: Path, counts: list[int], damage: str
) -> None:
    expected = without_file(made)
    (path,) = cache.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "changed":
        data[-5] ^= 1
    elif damage == "other facts":
        data = data.replace(b'"kernels": "', b'"kernels": "x', 1)
    path.write_bytes(data[:-5] if damage == "cut" else b"" if damage == "emptied" else data)
    with Engine(made.folder, n_ctx=1024) as engine:
        assert not path.exists()
        found, n_read, n_token = weighed(engine, counts)
        assert n_read == n_token
        assert np.array_equal(found, expected)
        engine.keep_system(if_read=True)
    assert path.is_file()
    with Engine(made.folder, n_ctx=1024) as engine:
        assert weighed(engine, counts)[1] < 60


def test_each_way_of_computing_has_a_file_of_its_own(
    made: TinyBundle, cache: Path, counts: list[int]
) -> None:
    with Engine(made.folder, n_ctx=1024, kv_type="f32") as engine:
        _, n_read, n_token = weighed(engine, counts)
        assert n_read == n_token
        engine.keep_system()
    assert len(list(cache.iterdir())) == 2
    with Engine(made.folder, n_ctx=1024, kv_type="f32") as engine:
        assert weighed(engine, counts)[1] < 60


def test_nothing_is_kept_where_nothing_was_probed(made: TinyBundle, cache: Path) -> None:
    for path in cache.iterdir():
        path.unlink()
    with Engine(made.folder, n_ctx=1024, strategy="static") as engine:
        engine.chat(QUESTION, max_tokens=1)
        engine.keep_system(if_read=True)
    assert list(cache.iterdir()) == []


def test_files_used_the_longest_ago_are_removed(
    made: TinyBundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = cache.iterdir()
    monkeypatch.setattr(prefix_file, "_MAX_BYTES", first.stat().st_size * 3 // 2)
    with Engine(made.folder, n_ctx=1024, flash_attn=False) as engine:
        engine.keep_system()
    (second,) = cache.iterdir()
    assert second != first


def test_create_by_command_and_show(tmp_path: Path, cache: Path) -> None:
    made = make_sources(tmp_path)
    (tmp_path / "system.txt").write_text(SYSTEM + "\n", encoding="utf-8")
    args = ["bundle", "create", str(made.folder), "--base", str(made.base.path), "--adapter"]
    args += [f"es={made.adapter.path}", "--no-calibrate", "--system", str(tmp_path / "system.txt")]
    result = CliRunner().invoke(main, args)
    assert (result.exit_code, len(list(cache.iterdir()))) == (0, 1), result.stderr
    text = bundle_json(made.folder)
    assert text["system"] == SYSTEM.strip()
    shown = CliRunner().invoke(main, ["bundle", "show", str(made.folder)])
    assert f"system     {SYSTEM.strip()}\n" in shown.stdout


def test_a_base_without_a_template_is_refused(tmp_path: Path, cache: Path) -> None:
    made = make_sources(tmp_path, chat_template=None)
    before = snapshot(tmp_path)
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        create_bundle(
            made.folder, made.base.path, {"es": made.adapter.path}, system="x", calibrate=False
        )
    assert {path: v for path, v in snapshot(tmp_path).items() if "cache" not in path} == before


def test_run_keeps_what_it_read(made: TinyBundle, cache: Path) -> None:
    for path in cache.iterdir():
        path.unlink()
    line = ["run", str(made.folder), "How far?", "--ctx", "1024", "--max-tokens", "1"]
    assert CliRunner().invoke(main, line).exit_code == 0
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("strategy", ["two-place", "norm", "qa-flora:first=1"])
def test_where_the_base_alone_reads_it_nothing_else_is_kept(
    calibrated: TinyBundle, cache: Path, counts: list[int], strategy: str
) -> None:
    with Engine(calibrated.folder, n_ctx=1024, strategy=strategy) as engine:
        expected, n_read, n_token = weighed(engine, counts)
        assert n_read >= n_token
        counts.clear()
        engine.keep_system(if_read=True)
        assert counts == []  # it was read for the question
        assert np.array_equal(weighed(engine, counts)[0], expected)
    (path,) = cache.iterdir()
    with Engine(calibrated.folder, n_ctx=1024, strategy=strategy) as engine:
        found, n_read, n_token = weighed(engine, counts)
        assert np.array_equal(found, expected)
        assert n_read < (60 if "first" not in strategy else n_token + 60)
    with Engine(calibrated.folder, n_ctx=1024, strategy="qa-flora") as engine:
        weighed(engine, counts)
        counts.clear()
        engine.keep_system(if_read=True)
        assert sum(counts) < 60
    (of_all,) = set(cache.iterdir()) - {path}
    assert path.stat().st_size < of_all.stat().st_size / 2


def test_what_is_kept_before_any_question_is_read_by_the_base_once(
    calibrated: TinyBundle, counts: list[int]
) -> None:
    with Engine(calibrated.folder, n_ctx=1024, strategy="two-place") as engine:
        expected, _, n_token = weighed(engine, counts)
    with Engine(calibrated.folder, n_ctx=1024, strategy="two-place") as engine:
        counts.clear()
        engine.keep_system()
        n_kept = sum(counts)
        assert n_token - 60 < n_kept < n_token
        with Engine(calibrated.folder, n_ctx=1024, strategy="two-place") as other:
            for each in (engine, other):
                found, n_read, _ = weighed(each, counts)
                assert n_read == n_token - n_kept
                assert np.array_equal(found, expected)


def test_nothing_is_kept_that_would_be_summed_up_in_another_order(
    tmp_path: Path, cache: Path, counts: list[int]
) -> None:
    made = make_bundle(tmp_path, calibrate=True, arch="gemma3", window=64, n_layer=6, n_ctx=2048)
    rewrite(made.folder, lambda raw: raw.update(system=SYSTEM))
    with Engine(made.folder, n_ctx=1024, strategy="two-place") as engine:
        weighed(engine, counts)
        counts.clear()
        engine.keep_system(if_read=True)
        assert counts == []
    assert not cache.exists()


def test_another_strategy_reads_it_anew_and_has_a_file_of_its_own(
    calibrated: TinyBundle, cache: Path, counts: list[int]
) -> None:
    with Engine(calibrated.folder, n_ctx=1024, strategy="qa-flora") as engine:
        of_all = weighed(engine, counts)[0]
    with Engine(calibrated.folder, n_ctx=1024, strategy="two-place") as engine:
        of_base = weighed(engine, counts)[0]
        engine.keep_system()
    with Engine(calibrated.folder, n_ctx=1024, strategy="two-place") as engine:
        engine.use_strategy("qa-flora")
        found, n_read, n_token = weighed(engine, counts)
        assert np.array_equal(found, of_all)
        assert n_read == n_token
        engine.keep_system(if_read=True)
        assert len(list(cache.iterdir())) == 2
        engine.use_strategy("two-place")
        found, n_read, _ = weighed(engine, counts)
        assert np.array_equal(found, of_base)
        assert n_read < 60


@pytest.mark.parametrize(
    "strategy", ["static", "base", "single:es", "manual:es=1", "two-place", "qa-flora:pool=mean"]
)
def test_nothing_is_kept_where_the_strategy_reads_nothing_twice(
    calibrated: TinyBundle, cache: Path, counts: list[int], strategy: str
) -> None:
    with Engine(calibrated.folder, n_ctx=1024, strategy=strategy) as engine:
        if strategy == "two-place":
            engine.use_adapters(["es"])
        weighed(engine, counts)
        counts.clear()
        engine.keep_system(if_read=True)
        engine.keep_system()
        assert counts == []
    assert not cache.exists()


@pytest.mark.parametrize(
    ("strategy", "reads"),
    [
        ("qa-flora", "all"),
        ("qa-flora:first=2", "all"),
        ("qa-flora:first=1", "base"),
        ("calibrated", "all"),
        ("cosine:pool=mean", "none"),
        ("two-place", "base"),
        ("two-place:by=cosine", "all"),
        ("norm:1", "base"),
        ("static", "none"),
    ],
)
def test_a_strategy_says_what_reads_a_prompt(strategy: str, reads: str) -> None:
    names = ("math", "es")
    chosen = parse_strategy(strategy, names)
    pool = chosen.options.get("pool", "last")
    query = Query((), names, 2, "norm", pool, typical={}, options=chosen.options)
    assert chosen.strategy.reads(query) == reads
    alone = replace(query, adapters=("es",), options={})
    assert strategy != "two-place" or chosen.strategy.reads(alone) == "none"
