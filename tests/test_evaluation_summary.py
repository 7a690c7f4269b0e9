"""What is made of results: differences, the best adapter, who leads, verdicts, sections."""

import math
from pathlib import Path

import numpy as np
import pytest
from made_results import PAIRS, drawn, header, record, write

from qaflora_edge.cli.eval_table import table
from qaflora_edge.errors import ResultsFileError
from qaflora_edge.evaluation.cells import Cell, sections
from qaflora_edge.evaluation.lines import Line, found_share
from qaflora_edge.evaluation.results import Results
from qaflora_edge.evaluation.statistics import difference, mean, mean_of_means
from qaflora_edge.evaluation.summary import Summary, summarise

RIGHT = {  # strategy -> which of six items it answers rightly
    "base": "000001",
    "single:math": "111000",
    "single:es": "100001",
    "static": "110000",
    "qa-flora": "111100",
}
LOSS = {"static": [3.0, 2.0, 4.0], "single:math": [2.5, 2.5, 3.0], "qa-flora": [2.0, 2.0, 3.5]}


def scored(task: str, scores: dict[str, list[float]]) -> list[dict[str, object]]:
    return [
        record(task, item, strategy, score)
        for strategy, values in scores.items()
        for item, score in enumerate(values)
    ]


def number_records(task: str) -> list[dict[str, object]]:
    return scored(task, {name: [float(c) for c in marks] for name, marks in RIGHT.items()})


def one_cell(records: list[dict[str, object]], metric: str = "number") -> Summary:
    head = header([("t", metric, "es", "math")], ["math", "es"])
    [found] = summarise([("a.jsonl", Results(head, tuple(records)))])
    return found


def line(summary: Summary, strategy: str, cell: int = 0) -> Line:
    [found] = [each for each in summary.cells[cell].lines if each.strategy == strategy]
    return found


def test_points_over_static_and_over_the_best_single_adapter_by_hand() -> None:
    summary = one_cell(number_records("t"))
    assert summary.cells[0].best_single == "single:math"
    found = line(summary, "qa-flora")
    assert found.over_static is not None
    assert found.over_single is not None
    assert found.score.value == pytest.approx(100 * 4 / 6)
    assert found.over_static.value == pytest.approx(100 * 2 / 6)
    assert found.over_single.value == pytest.approx(100 * 1 / 6)
    assert found.over_single.n_item == 6
    assert (found.over_single.low, found.over_single.high) == pytest.approx(
        [100 * end for end in bonett_price(6, 1, 0)]
    )
    static = line(summary, "static")
    assert static.over_static is None
    assert line(summary, "single:math").over_single is None
    assert (found.seconds, found.prefills) == pytest.approx((0.5, 3.0))


def bonett_price(n: int, n_more: int, n_less: int) -> tuple[float, float]:
    """D. G. Bonett and R. M. Price (2012), adjusted Wald interval of paired shares."""
    p, q = (n_more + 1) / (n + 2), (n_less + 1) / (n + 2)
    half = 1.959963984540054 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return p - q - half, p - q + half


def test_of_losses_less_is_better() -> None:
    summary = one_cell(scored("t", LOSS), "loss")
    assert summary.cells[0].best_single == "single:math"
    found = line(summary, "qa-flora")
    assert found.score.value == pytest.approx(2.5)
    assert found.over_static is not None
    assert found.over_single is not None
    assert found.over_static.value == pytest.approx(0.5)
    expected = mean_of_means([np.array([0.5, 0.5, -0.5])])
    assert (found.over_single.low, found.over_single.high) == (expected.low, expected.high)


def test_differences_are_of_the_items_that_both_have_a_score_for() -> None:
    records = [*number_records("t")[:-1], record("t", 5, "qa-flora", None, error="too long")]
    found = line(one_cell(records), "qa-flora")
    assert (found.score.n_item, found.n_failed) == (5, 1)
    assert found.over_static is not None
    assert (found.over_static.n_item, found.over_static.value) == (5, pytest.approx(40.0))


def test_a_probe_costs_what_it_does_where_none_came_before() -> None:
    """Others share what the first has measured."""
    times = [(900.0, 0.0), (2.0, 900.0), (1000.0, 0.0), (3.0, 800.0)]
    records = [
        record("t", item, "qa-flora", 1.0, probe_ms=probe, probe_before_ms=before)
        for item, (probe, before) in enumerate(times)
    ]
    found = line(one_cell(records), "qa-flora")
    assert (found.probe_ms, found.prefills, found.seconds) == pytest.approx((950, 95, 1.42))
    scored = line(one_cell(records, "choice"), "qa-flora")
    assert math.isnan(scored.prefills)
    assert math.isnan(line(one_cell(records[1:2]), "qa-flora").seconds)


def test_strategies_stand_as_they_were_asked_for_and_equal_adapters_as_loaded() -> None:
    """Files have them in the order that answers ended."""
    records = scored("t", {name: [1.0, 0.0] for name in ("qa-flora", "single:es", "single:math")})
    asked = ["qa-flora", "base", "single:math", "single:es"]
    head = header([("t", "number", "es", "math")], ["math", "es"], asked)
    [found] = summarise([("a", Results(head, tuple(records)))])
    assert [each.strategy for each in found.cells[0].lines] == [
        *("single:math", "single:es", "qa-flora"),
    ]
    assert found.cells[0].best_single == "single:math"


def test_choices_have_a_score_by_sum_and_by_mean() -> None:
    scores = [(1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0)]
    records = [
        record("t", item, "static", score, score_mean=by_mean, score_sum=by_sum)
        for item, (score, by_mean, by_sum) in enumerate(scores)
    ]
    assert line(one_cell(records, "choice"), "static").others == {"by sum": 50.0, "by mean": 50.0}
    records[1]["score_sum"] = 1.0
    assert line(one_cell(records, "choice"), "static").others["by sum"] == 75.0
    assert line(one_cell(number_records("t")), "static").others == {}


def test_a_strategy_without_a_score_has_no_number() -> None:
    records = [*number_records("t"), record("t", 0, "norm", None, error="no projections")]
    found = line(one_cell(records), "norm")
    assert math.isnan(found.score.value)
    assert (found.score.n_item, found.n_failed, found.over_static) == (0, 1, None)


def test_right_adapters_are_those_named_like_language_and_domain() -> None:
    def role(adapters: tuple[str, ...], what: str, wanted: str | None) -> str | None:
        return Cell({"name": "t", "metric": "number", what: wanted}, adapters).role(what)

    assert role(("math", "es"), "language", "es") == "es"
    assert role(("Med", "es"), "domain", "medical") == "Med"
    assert role(("es-r64", "med_r16"), "language", "es") == "es-r64"
    assert role(("med", "medicine"), "domain", "medicine") is None  # which of them?
    assert role(("e", "math"), "language", "es") is None  # too short to be an abbreviation
    assert role(("math", "es"), "language", None) is None


def test_share_of_items_whose_two_heaviest_adapters_are_the_right_ones() -> None:
    mixes = [
        (0.4, 0.3, 0.2, 0.1),
        (0.3, 0.2, 0.4, 0.1),
        (0.3, 0.3, 0.3, 0.1),
        (0.1, 0.8, 0.05, 0.05),
    ]
    names = ("math", "es", "ru", "med")
    cell = Cell({"name": "t", "metric": "number", "language": "es", "domain": "math"}, names)
    for strategy in ("qa-flora", "static", "manual:es=1,math=1", "fitted:five"):
        cell.rows[strategy] = {
            item: record("t", item, strategy, 1.0, weights=dict(zip(names, mix, strict=True)))
            for item, mix in enumerate(mixes)
        }
    assert found_share(cell, "qa-flora") == 0.5
    cell.rows["qa-flora"][4] = record("t", 4, "qa-flora", None, weights={}, error="too long")
    assert found_share(cell, "qa-flora") == 0.5  # that one was not weighed
    for strategy in ("static", "manual:es=1,math=1", "fitted:five"):
        assert found_share(cell, strategy) is None
    assert found_share(Cell(cell.task, names[:2], cell.rows), "qa-flora") is None


def test_verdict_counts_tasks_alike_and_names_the_worst() -> None:
    """Two tasks in points, one in nats, which counts for itself."""
    head = header(PAIRS, ["math", "es"], n_item=6)
    worse = {name: [1.0 - float(c) for c in marks] for name, marks in RIGHT.items()}
    records = [
        *number_records("math_es"),
        *scored("math_ru", worse),
        *scored("med_text_es", LOSS),
    ]
    [summary] = summarise([("a", Results(head, tuple(records)))])
    verdicts = {(found.strategy, found.unit): found for found in summary.verdicts}
    assert [name for name, _ in verdicts] == ["base", "qa-flora", "qa-flora"]
    found = verdicts["qa-flora", "points"]
    gains = [np.array([0, 0, 1, 1, 0, 0.0]), -np.array([0, 0, 1, 1, 0, 0.0])]
    expected = mean_of_means(gains).times(100)
    assert (found.n_cell, found.over_static) == (2, expected)
    assert found.worst is not None
    assert found.worst[0] == "math_ru"  # single:es is right in four there, qa-flora in two
    assert found.worst[1].value == pytest.approx(100 * -2 / 6)
    assert not found.is_shown
    nats = verdicts["qa-flora", "nats a token"]
    assert nats.over_static is not None
    assert nats.over_static.value == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("static", "best", "mix", "is_shown", "below"),
    [
        (0.2, 0.5, 0.5, True, ()),
        (0.46, 0.5, 0.5, False, ()),  # 4 points
        (0.2, 0.9, 0.5, False, ("math_es",)),  # worse than the best adapter
    ],
)
def test_a_strategy_is_shown_where_it_is_5_points_over_static_and_nowhere_worse(
    static: float, best: float, mix: float, is_shown: bool, below: tuple[str, ...]
) -> None:
    shares = {"static": static, "single:math": best, "single:es": 0.1, "qa-flora": mix}
    scores = {name: [float(i < 100 * share) for i in range(100)] for name, share in shares.items()}
    head = header(PAIRS[:1], ["math", "es"], n_item=100)
    [summary] = summarise([("a", Results(head, tuple(scored("math_es", scores))))])
    [found] = [each for each in summary.verdicts if each.strategy == "qa-flora"]
    assert (found.is_shown, found.below) == (is_shown, below)


def test_files_of_one_base_and_as_many_adapters_are_one_section(tmp_path: Path) -> None:
    def results(
        tasks: list[tuple[str, str, str, str]], adapters: list[str], **more: object
    ) -> Results:
        head = header(tasks, adapters, **more)
        return Results(head, tuple(drawn({"static": 0.2, "qa-flora": 0.4}, head)))

    pairs = [results([task], ["math", "es"]) for task in PAIRS[:2]]
    six = results(PAIRS, ["math", "es", "ru", "med"])
    other = results(PAIRS[:1], ["math", "es"], base={"name": "larger", "sha256": "3" * 64})
    warm = results(PAIRS[:1], ["math", "es"], options={"seed": 1})
    files = [(str(i), each) for i, each in enumerate((*pairs, six, other, warm))]
    found = summarise(files)
    assert [[cell.cell.name for cell in each.cells] for each in found] == [
        ["math_es", "math_ru"],
        ["math_es", "math_ru", "med_text_es"],
        ["math_es"],
        ["math_es"],
    ]
    text = table(found)
    assert "six: tiny, 2 adapters loaded: math, es\n" in text
    assert "six: larger, 2 adapters loaded: math, es\n" in text


def test_files_that_were_made_otherwise_stand_apart_or_together() -> None:
    """Options have to agree where both files say them, adapters of one name and tasks always."""
    head = header(PAIRS[:1], ["math", "es"], n_item=6)
    records = number_records("math_es")
    mine = Results(head, tuple(row for row in records if row["strategy"] != "qa-flora"))
    its = tuple(row for row in records if row["strategy"] == "qa-flora")
    trained = header(PAIRS[:1], ["math", "es"], options={"seed": 0, "epochs": 3}, n_item=6)
    [found] = summarise([("a", mine), ("b", Results(trained, its))])
    assert found.cells[0].lines == one_section(records).cells[0].lines
    other = {"name": "es", "sha256": "9" * 64, "bytes": 1000}
    longer = {**head["tasks"][0], "max_tokens": 128}
    asked = {"options": head["options"] | {"system": "Be brief."}}
    changes = [{"adapters": [head["adapters"][0], other]}, {"tasks": [longer]}, asked]
    for changed in changes:
        files = [("a", mine), ("b", Results(head | changed, its))]
        assert [len(each.cells) for each in summarise(files)] == [1, 1]


def test_what_was_fitted_anew_is_not_put_together() -> None:
    """The other strategies do not go by it."""
    files = []
    for name, fit, scores in (
        ("a", "1", {"fitted:f": [1.0]}),
        ("b", "2", {"fitted:f": [0.0]}),
        ("c", "2", {"static": [0.0]}),
    ):
        head = header(PAIRS[:1], ["math", "es"], [*scores], n_item=6)
        head["measured"] = {"fitted.f": fit, "typical": "3"}
        files.append((name, Results(head, tuple(scored("math_es", scores)))))
    assert [sorted(each.cells[0].rows) for each in sections(files)] == [
        ["fitted:f", "static"],
        ["fitted:f"],
    ]


def test_the_best_single_adapter_was_asked_more_than_a_few() -> None:
    scores = {"single:es": [1.0], "single:math": [1.0, 1.0, 0.0, 0.0]}
    assert one_cell(scored("t", scores)).cells[0].best_single == "single:math"
    scores = {"single:es": [1.0, 1.0, 1.0], "single:math": [1.0, 1.0, 0.0, 0.0]}
    assert one_cell(scored("t", scores)).cells[0].best_single == "single:es"


def one_section(records: list[dict[str, object]]) -> Summary:
    head = header(PAIRS[:1], ["math", "es"], n_item=6)
    [found] = summarise([("whole", Results(head, tuple(records)))])
    return found


def test_many_adapters_are_compared_with_few_by_item() -> None:
    """The same task under two sets of adapters, and a task that only one of them was asked."""
    few = header(PAIRS[:1], ["math", "es"], n_item=6)
    many = header(PAIRS[:2], ["math", "es", "ru"], n_item=6)
    more = {"static": "110000", "qa-flora": "111000", "base": RIGHT["base"], "norm": "111111"}
    records = [
        *scored("math_es", {name: [float(c) for c in marks] for name, marks in more.items()}),
        *number_records("math_ru"),
    ]
    files = [Results(many, tuple(records)), Results(few, tuple(number_records("math_es")))]
    found = summarise([("many", files[0]), ("few", files[1])])
    assert [each.fewer for each in found] == [found[1].section, None]
    loaded = {each.strategy: each for each in found[0].loaded}
    assert list(loaded) == ["static", "qa-flora"]  # few were not asked under norm
    gain = loaded["qa-flora"].gain  # 111000 against 111100
    assert gain.value == pytest.approx(-100 / 6)
    assert (gain.low, gain.high) == pytest.approx([100 * end for end in bonett_price(6, 0, 1)])
    assert loaded["qa-flora"].worst == ("math_es", gain)
    assert loaded["static"].gain.value == 0
    alone = Results(header(PAIRS[:1], [], n_item=6), tuple(scored("math_es", {"base": [0.0]})))
    found = summarise([("alone", alone), ("many", files[0]), ("few", files[1])])
    assert [each.fewer for each in found] == [None, found[2].section, None]  # no mix of none
    changed = header(PAIRS[:1], ["math", "es"], options={"seed": 1}, n_item=6)
    other = Results(changed, tuple(number_records("math_es")))
    assert summarise([("many", files[0]), ("other", other)])[0].fewer is None


def test_files_of_one_task_add_strategies_to_each_other() -> None:
    head = header(PAIRS[:1], ["math", "es"], n_item=6)
    records = number_records("math_es")
    parts = [
        Results(head, tuple(row for row in records if (row["strategy"] == "qa-flora") is is_mix))
        for is_mix in (False, True)
    ]
    [whole] = summarise([("whole", Results(head, tuple(records)))])
    [found] = summarise([("a", parts[0]), ("b", parts[1])])
    assert found.cells[0].lines == whole.cells[0].lines


def test_rounding_is_no_other_score() -> None:
    """What was computed in another batch may differ in its last digits; the first file counts."""
    head = header([("t", "loss", None, None)], ["math", "es"])
    files = [
        (name, Results(head, (record("t", 3, "static", score),)))
        for name, score in (("a", 2.3141), ("b", 2.3142))
    ]
    [found] = summarise(files)
    assert line(found, "static").score.value == 2.3141
    failed = Results(head, (record("t", 3, "static", None, error="too long"),))
    with pytest.raises(ResultsFileError):
        summarise([files[0], ("b", failed)])


def test_other_scores_of_one_item_are_refused() -> None:
    head = header(PAIRS[:1], ["math", "es"])
    files = [
        (name, Results(head, (record("math_es", 3, "static", score),)))
        for name, score in (("a.jsonl", 1.0), ("b.jsonl", 0.0))
    ]
    with pytest.raises(ResultsFileError) as failure:
        summarise(files)
    assert str(failure.value) == (
        "Cannot use b.jsonl: the score of item 3 of math_es under static is 0.0, and 1.0 in a file "
        "before it; expected the same. Leave one of the files out."
    )


def test_difference_of_right_and_wrong_answers_keeps_a_width() -> None:
    for gains in ([1, 1, 1, 0, 0, -1], [0] * 20, [1] * 9):
        values = np.array(gains, np.float64)
        found = difference([values], is_right=True)
        low, high = bonett_price(len(gains), gains.count(1), gains.count(-1))
        assert found.value == pytest.approx(values.mean())
        assert (found.low, found.high) == pytest.approx((max(-1, low), min(1, high)))
    halves = [np.array([0.5, -1.0, 0.25]), np.array([1.0, 0.0])]
    assert difference(halves[:1], is_right=False) == mean_of_means(halves[:1])
    equal = np.zeros(20)  # losses of one mix under two names
    assert difference([equal], is_right=False) == mean_of_means([equal])
    for several in (halves, [halves[1], halves[1]]):
        assert difference(several, is_right=True) == mean_of_means(several)


def test_table_says_numbers_intervals_and_what_they_are() -> None:
    text = table([one_cell(number_records("t"))])
    low, high = (100 * end for end in bonett_price(6, 1, 0))
    score = mean(np.array([1, 1, 1, 1, 0, 0.0]))
    shown = f"66.7 ({100 * score.low:.1f} to {100 * score.high:.1f})"
    assert text.startswith("t: number, 6 items\n")
    row = next(each for each in text.splitlines() if each.startswith("qa-flora"))
    assert shown in row
    assert f"+16.7 ({low:+.1f} to {high:+.1f})" in row
    assert row.split()[-3:] == ["0.50", "3.0", "-"]
    assert "over single:math *" in text
    assert "in hindsight" in text


def test_table_obeys_no_text_of_a_file(tmp_path: Path) -> None:
    head = header([("t\x1b[2J", "number", None, None)], ["math\u202e"], n_item=2)
    records = [
        record("t\x1b[2J", item, "single:math\u202e", 1.0, weights={"math\u202e": 1.0})
        for item in range(2)
    ]
    text = table(summarise([("a", Results(head, tuple(records)))]))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "t\\x1b[2J" in text
    assert write(tmp_path / "a.jsonl", head, records).exists()


def test_the_base_and_single_adapters_are_the_same_whatever_else_is_loaded() -> None:
    """A section without them has those of one that was asked alike, and no other's."""

    def file(adapters: list[str], strategies: list[str], **changed: object) -> Results:
        head = header([("t", "number", "es", "math")], adapters, **changed)
        rights = {name: [float(c) for c in RIGHT[name]] for name in strategies}
        return Results(head, tuple(scored("t", rights)))

    many = file(["math", "es", "med"], ["base", "single:math", "single:es", "static"])
    two = file(["math", "med"], ["static", "qa-flora"])
    other = file(["math", "med"], ["static"], options={"lens": "raw"})
    found = summarise([("many", many), ("two", two), ("other", other)])
    assert [sorted(each.section.cells[0].rows) for each in found] == [
        ["base", "single:es", "single:math", "static"],
        ["base", "qa-flora", "single:math", "static"],
        ["static"],
    ]
    over_single = line(found[1], "qa-flora").over_single
    assert over_single is not None
    assert over_single.value == pytest.approx(100 * 1 / 6)
