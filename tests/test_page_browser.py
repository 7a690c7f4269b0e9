"""The page of the server in a real browser: conversations, the mix, settings, the keyboard."""

import json
from pathlib import Path

import axe
import pytest
from bundles import qaflora
from desk import ANSWER, ENTER, ESCAPE, NEEDS_CHROMIUM, QUESTION, TAB, UP, Desk, desk_at
from patience import wait_until
from scripted_server import N_LAYER, SHA256, layers

from qaflora_edge.evaluation.tasks import read_task
from qaflora_edge.prompt.conversation import Conversation, load_session, save_session

IDENTITY = {"name": "demo", "base_sha256": SHA256["base"], "adapters": SHA256["adapters"]}
pytestmark = NEEDS_CHROMIUM


def test_a_conversation(desk) -> None:
    assert desk.text("#empty h2") == "demo"
    assert desk.texts("#empty .entry") == ["math", "es", "med"]
    desk.ask()
    assert desk.text(".said") == QUESTION
    assert desk.texts(".markdown p, .markdown li") == ["There are 42 rolls.", "bake", "sell"]
    assert desk.text(".markdown strong") == "42"
    assert desk.text(".markdown pre") == "print(42)"
    assert desk.texts(".markdown pre .function, .markdown pre .number") == ["print", "42"]
    assert desk.texts(".markdown td") == ["1", "2"]
    assert desk.text(".foot .facts") == (
        f"qa-flora · weighed in 379 ms · {len(ANSWER) // 4} tokens · 22.1 tokens/s"
    )
    assert desk.window.run("return document.getElementById('empty').checkVisibility()") is False
    desk.ask("And then?")
    assert desk.texts(".said") == [QUESTION, "And then?"]
    assert [body["messages"] for body in desk.script.asked] == [
        [{"role": "user", "content": QUESTION}],
        [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
            {"role": "user", "content": "And then?"},
        ],
    ]
    first = desk.script.asked[0]
    assert isinstance(first.pop("seed"), int)
    assert {*desk.script.paths} == {"/", "/v1/models", "/v1/chat/completions"}
    assert {key: first[key] for key in first if key != "messages"} == {
        "model": "demo",
        "fusion": {"return": "layers"},
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,
    }
    assert desk.window.log() == []


def test_the_mix_is_a_bar_that_opens_into_layers(desk) -> None:
    desk.ask()
    rows = layers(["math", "es", "med"], "qa-flora")
    means = [sum(row) / N_LAYER for row in rows]
    assert desk.texts("button.mix .entry") == [
        f"{name}\n×{round(mean, 2):g}"
        for name, mean in zip(("math", "es", "med"), means, strict=True)
    ]
    shares = desk.window.run(
        "const parts = [...document.querySelectorAll('.bar > span')];"
        "const widths = parts.map(e => e.getBoundingClientRect().width);"
        "const all = widths.reduce((a, b) => a + b); return widths.map(w => w / all)"
    )
    rest = 1 - sum(means)  # the base's
    assert shares == pytest.approx([*means, rest], abs=0.01)
    expanded = "return document.querySelector('button.mix').getAttribute('aria-expanded')"
    assert desk.window.run(expanded) == "false"
    desk.window.run("document.querySelector('button.mix').focus()")
    desk.window.press(ENTER)
    assert desk.window.run(expanded) == "true"
    titles = desk.window.run("return [...document.querySelectorAll('.cell')].map(e => e.title)")
    assert titles == [
        f"{name}, layer {layer}: weight {weight:.3f}"
        for name, row in zip(("math", "es", "med"), rows, strict=True)
        for layer, weight in enumerate(row)
    ]
    desk.click("button.mix")
    assert desk.window.run(expanded) == "false"


def test_strategy_adapters_and_other_settings_go_into_the_request(desk) -> None:
    options = desk.texts("#strategy option")
    assert options == [
        *("the bundle's own (qa-flora)", "spectr", "static", "base"),
        *("manual", "only math", "only es", "only med"),
    ]
    desk.set("#strategy", "spectr")
    assert "what each adapter adds" in desk.text("#strategy + .hint")
    desk.click("li:nth-child(2) input[type=checkbox]")
    desk.set("#system", "Be short.")
    desk.set("#temperature", "0.5")
    desk.set("#max-tokens", "64")
    desk.set("#seed", "7")
    desk.ask()
    body = desk.script.asked[-1]
    assert body["fusion"] == {"return": "layers", "strategy": "spectr", "adapters": ["math", "med"]}
    assert body["messages"][0] == {"role": "system", "content": "Be short."}
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.5, 64, 7)
    assert desk.texts("button.mix bdi") == ["math", "med"]
    for number in (1, 3):
        desk.set(f"li:nth-child({number}) input[type=checkbox]", False)
    assert desk.window.run("return document.activeElement.id") == "use-med"
    assert desk.text(".field legend") == "Adapters in use: 0 of 3"
    assert desk.texts(".adapters + .hint") == ["None is ticked: the base answers alone."]
    desk.ask()
    assert desk.script.asked[-1]["fusion"] == {"return": "layers", "strategy": "base"}
    desk.set("#temperature", "9")  # outside what the field takes
    desk.set("#strategy", "single:es")
    desk.ask()
    body = desk.script.asked[-1]
    assert body["fusion"] == {"return": "layers", "strategy": "single:es"}
    assert "temperature" not in body
    desk.set("#bundle", "code")
    desk.ask()
    assert desk.script.asked[-1]["model"] == "code"


def test_weights_by_hand(desk) -> None:
    desk.set("#strategy", "manual")
    desk.set("li:nth-child(1) input[type=range]", "1.25")
    desk.set("li:nth-child(2) input[type=range]", "0")
    assert desk.texts(".adapters output") == ["1.25", "0.00", "0.50"]
    desk.ask()
    assert desk.script.asked[-1]["fusion"] == {
        "return": "layers",
        "weights": {"math": 1.25, "es": 0, "med": 0.5},
    }
    assert desk.texts("button.mix .entry") == ["math\n×1.25", "med\n×0.5"]


def test_the_base_has_its_share_of_the_bar(desk) -> None:
    desk.script.weights = {"math": 0.02, "es": 0.3, "med": 0.0}
    reasons = {"scores": {"answer": 0.5}, "thresholds": {"answer": 1.5}, "taken_as": ""}
    desk.script.why = {"because": "So <b>.", "why": dict.fromkeys(desk.script.weights, reasons)}
    desk.ask()
    assert desk.texts(".mix .entry") == ["es\n×0.3", "math\n×0.02"]
    widths = desk.window.run(
        "const [bar] = document.querySelectorAll('.bar'), { width } = bar.getBoundingClientRect();"
        "return [...bar.children].map(e => e.getBoundingClientRect().width / width)"
    )
    assert widths == pytest.approx([0.3, 0.02, 0.68], abs=0.01)
    desk.click("button.mix")
    assert desk.texts(".why, .cell") == ["So <b>."]
    assert desk.texts(".reasons tr")[1].split() == ["math", "0.02", "0.50"]
    desk.script.weights = dict.fromkeys(desk.script.weights, 0.0)
    desk.ask()
    assert desk.texts(".mix .entry")[2:] == ["base"]


def test_a_formula_is_drawn_and_read_aloud(desk) -> None:
    desk.script.answers["?"] = (
        "It is \\(\\frac{1}{2}\\).\n\n\\[x_1\\]\n\nOr $5 and $10.\n#### 72\n####"
    )
    desk.ask("?")
    assert desk.window.run(
        "const [over] = document.querySelectorAll('.markdown mfrac');"
        "const [top, bottom] = [...over.children].map(e => e.getBoundingClientRect());"
        "return over.namespaceURI.endsWith('MathML') && top.bottom <= bottom.top + 3"
    )
    assert desk.texts(".markdown p")[-3:] == ["Or $5 and $10.", "72", ""]
    assert desk.text("#spoken").startswith("It is \\frac{1}{2}.")


PRESSED = (
    "return [...document.querySelectorAll('.versions .chip')].filter(e => e.ariaPressed)"
    ".map(e => e.ariaPressed)"
)


def test_versions_stand_side_by_side(desk) -> None:
    desk.script.answers["Which?"] = "By {strategy}."
    desk.ask("Which?")
    desk.ask_again("static")
    assert desk.texts(".answer-head") == ["qa-flora", "static"]
    assert desk.texts(".markdown") == ["By qa-flora.", "By static."]
    first, second = desk.window.run(
        "return [...document.querySelectorAll('.answer')].map(e => e.getBoundingClientRect())"
        ".map(b => [b.left, b.top, b.width])"
    )
    assert first[1] == second[1]
    assert first[0] + first[2] < second[0]
    assert first[2] == pytest.approx(second[2], abs=1)
    assert desk.script.asked[0]["seed"] == desk.script.asked[1]["seed"]
    desk.ask_again("only math")
    assert desk.texts(".markdown") == ["By qa-flora.", "By single:math."]
    assert desk.window.run(PRESSED) == ["true", "false", "true"]
    desk.click(".versions .chip:nth-of-type(2)")
    assert desk.texts(".markdown") == ["By qa-flora.", "By static."]
    desk.click(".versions .chip:nth-of-type(1)")
    assert desk.texts(".markdown") == ["By static."]
    desk.ask("Next?")
    assert desk.script.asked[-1]["messages"][1]["content"] == "By static."
    desk.reload()
    desk.wait_for_texts()
    assert desk.texts(".turn:first-child .markdown") == ["By static."]


def test_every_strategy_is_offered_once_below_the_button(desk) -> None:
    desk.ask()
    desk.window.run("document.querySelector('.another').focus()")
    place = "return document.activeElement.getBoundingClientRect().left"
    before = desk.window.run(place)
    desk.window.press(ENTER)
    names = ["the bundle's own (qa-flora)", "spectr", "static", "base", "manual"]
    assert desk.texts(".versions .choices .chip") == [*names, "only math", "only es", "only med"]
    assert desk.window.run(place) == before
    assert desk.window.run(
        "const [ways, box] = ['.versions .choices', '.box'].map(e => document.querySelector(e));"
        "return ways.getBoundingClientRect().bottom <= box.getBoundingClientRect().top"
    )
    desk.window.press(TAB, ESCAPE)
    assert desk.texts(".versions .choices:not([hidden])") == []
    assert desk.window.run("return document.activeElement.textContent") == "Another version"


def test_an_answer_teaches_who_should_have_answered(desk) -> None:
    desk.ask()
    assert desk.window.run("return document.querySelector('.teach').checkVisibility()") is False
    desk.script.taught = []
    desk.set("#system", "Be short.")
    desk.reload()
    desk.wait_for_texts()
    desk.ask("And then?")
    said = "return document.querySelector('.turn:last-child .taught').innerText"
    focus = "document.querySelector('.turn:last-child .teach').focus()"
    focused = "return document.activeElement.textContent"

    def teach(*keys: str) -> str:
        """What the answer says once somebody chose with the keyboard."""
        desk.window.run(focus)
        desk.window.press(ENTER, *keys, ENTER)
        desk.window.until(f"{said}.startsWith('From')")
        return desk.window.run(said)

    desk.window.run(focus)
    desk.window.press(ENTER, TAB)
    assert desk.texts(".teaching .choices .chip") == ["base", "math", "es", "med"]
    desk.window.press(ESCAPE)
    assert desk.window.run(focused) == "Should have been"
    assert teach(TAB, TAB) == "From the next question on: math (1 example). Undo"
    question = {"role": "user", "content": QUESTION}
    messages = [{"role": "system", "content": "Be short."}, question]
    messages += [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": "And then?"}]
    taught = {"model": "demo", "messages": messages, "adapter": "math"}
    assert desk.script.taught == [taught]
    assert teach(TAB, TAB) == "From the next question on: math (2 examples). Undo"
    desk.click(".turn:last-child .taught button")
    desk.window.until(f"{said} === 'Undone: math.'")
    assert desk.script.taught == [taught]
    # Only what was taught last can be taken back.
    teach(TAB)
    desk.click(".teach")
    desk.click(".teaching .choices .chip:last-child")
    first = "return document.querySelector('.taught').innerText"
    desk.window.until(f"{first} === 'From the next question on: med (1 example). Undo'")
    assert desk.window.run(said) == "From the next question on: base (1 example)."
    desk.script.taught = None
    desk.click(".taught button")
    desk.window.until(f"{first}.startsWith('This server takes no teaching.')")


def many(n: int = 64) -> dict[str, list[str]]:
    return {"demo": [f"a{i}" for i in range(n)]}


def test_of_many_adapters_the_first_five_are_offered(desk, monkeypatch) -> None:
    monkeypatch.setattr("scripted_server.ADAPTERS", many())
    desk.reload()
    desk.ask()
    desk.click(".another")
    ways = ["the bundle's own (qa-flora)", "spectr", "static", "base", "manual"]
    ways += [f"only a{i}" for i in range(5)]
    assert desk.texts(".versions .choices .chip") == [*ways, "59 others"]
    desk.click(".versions .choices .chip:last-child")
    assert desk.texts(".versions .choices .chip")[-1] == "only a63"


def test_many_adapters_are_filtered_and_ticked_together(desk, monkeypatch) -> None:
    monkeypatch.setattr("scripted_server.ADAPTERS", {"demo": [*many(63)["demo"], "es"]})
    desk.reload()
    shown = ".adapters li:not([hidden]) bdi"
    assert len(desk.texts(shown)) == 64
    none, every = ".field > .chips :last-child", ".field > .chips :first-child"
    desk.click(none)
    desk.set("#adapter-filter", "span")  # of its description
    assert desk.texts(shown) == ["es"]
    assert desk.text(".adapters .hint") == "Spanish"
    desk.click(every)
    desk.set("#adapter-filter", "a6")
    assert desk.texts(shown) == ["a6", "a60", "a61", "a62"]
    desk.set("#use-a60", True)
    assert desk.window.run("return document.activeElement.id") == "use-a60"
    assert desk.text("fieldset legend") == "Adapters in use: 2 of 64"
    desk.ask()
    assert desk.script.asked[-1]["fusion"]["adapters"] == ["a60", "es"]
    desk.set("#adapter-filter", "")
    desk.click(every)
    desk.ask()
    assert "adapters" not in desk.script.asked[-1]["fusion"]


def test_how_long_many_adapters_are_weighed_is_said_before(desk, monkeypatch) -> None:
    monkeypatch.setattr("scripted_server.ADAPTERS", many())
    desk.reload()
    asked = "Before each answer the {} adapters in use are asked one by one: {}."
    hint = "#panel .weighing"
    assert desk.text(hint).startswith(asked.format(64, "that may take long"))
    desk.script.probe_ms = 25_600
    desk.ask()
    assert desk.text(hint).startswith(asked.format(64, "about 25.6 s, by the last answer"))
    for number in range(32):
        desk.set(f"#use-a{number}", False)
    assert desk.text(hint).startswith(asked.format(32, "about 12.8 s, by the last answer"))
    desk.set("#strategy", "spectr")
    assert desk.texts(f"{hint}:not([hidden])") == []


def test_a_relay_is_drawn_as_two_who_take_turns(desk) -> None:
    desk.script.weights = {"math": 0.0, "es": 1.0, "med": 0.0}
    reasons = {"scores": {"answer": 0.5}, "thresholds": {"answer": 1.5}, "taken_as": ""}
    desk.script.why = {"because": "So.", "why": dict.fromkeys(desk.script.weights, reasons)}
    relay = {"knower": "math", "writer": "es", "draft": "It is <b>42</b>, I say."}
    desk.script.relay = relay | {"draft_tokens": 9, "draft_ms": 320.0}
    desk.script.pause_s = 2.0  # long enough to be seen on a busy machine
    desk.type(QUESTION)
    desk.window.press(ENTER)
    draft = ".draft:not([hidden]) div"
    desk.window.until(
        f"return document.querySelector('{draft}')?.textContent === 'It is <b>42</b>, '"
    )
    assert desk.texts(".draft p, .note") == ["Draft of math · 9 tokens · 320 ms", "math drafts"]
    assert desk.text(".markdown") == ""
    desk.script.pause_s = 0.0
    desk.wait()
    assert desk.texts(".draft:not([hidden])") == []
    assert desk.texts(".mix .entry") == ["math\ndrafts", "es\nwrites"]
    hues = (
        "[...document.querySelectorAll('.bar > span')].map(e => [e.className, e.offsetWidth > 50])"
    )
    assert desk.window.run(f"return {hues}") == [["hue-0", True], ["hue-1", True]]
    lines = "[...document.querySelectorAll('.line > *')].map(e => e.getBoundingClientRect().top)"
    assert (
        desk.window.run(f"const tops = {lines}; return Math.max(...tops) - Math.min(...tops)") < 8
    )
    desk.click("button.mix")
    assert desk.text(draft) == "It is <b>42</b>, I say."
    rows = [row.split() for row in desk.texts(".reasons tr")]
    assert rows[:4] == [
        ["adapter", "part", "answer"],
        *(["math", "drafts", "0.50"], ["es", "writes", "0.50"], ["med", "-", "0.50"]),
    ]


def test_what_is_expected_while_drafts_decide_is_called_a_draft(desk) -> None:
    desk.script.probe_s = 60
    step = {"stage": "drafting", "total": 1, "processed": 0, "time_ms": 900.0}
    desk.script.progress = step | {"expected": "It is 41."}
    desk.type(QUESTION)
    desk.window.press(ENTER)
    desk.window.until("return document.querySelector('.draft:not([hidden])')")
    assert desk.texts(".draft p, .draft div") == ["Draft, not decided yet", "It is 41."]
    assert desk.texts(".note, .markdown") == ["", "Drafting"]
    desk.window.press(ESCAPE)
    desk.wait()
    assert desk.texts(".draft:not([hidden])") == []


def test_the_better_answer_goes_on_and_into_a_task(desk, made, tmp_path) -> None:
    desk.window.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    desk.set("#system", "Be short.")
    for question in ("Which?", "And then?"):
        desk.script.answers[question] = "By {strategy}."
        desk.click("#new")
        desk.ask(question)
        desk.ask_again("static")
        desk.click(".answer:nth-child(1) .foot .chip")
        desk.click(".answer:nth-child(2) .foot .chip")
    desk.ask("Next?")
    assert desk.script.asked[-1]["messages"][2]["content"] == "By static."
    desk.click("#save-judged")
    path = saved(tmp_path, "jsonl", "judged")
    task = read_task(path)
    assert task.metric == "choice"
    asked = [item["messages"] for item in task.items]
    assert [messages[0]["content"] for messages in asked] == ["Be short."] * 2
    assert {messages[1]["content"] for messages in asked} == {"Which?", "And then?"}
    for item in task.items:
        assert item["choices"] == ["By static.", "By qa-flora."]
        assert task.expected(item) == "By static."
    result = qaflora("eval", made.folder, path, "--strategies", "base,static")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "judged: choice, points")


def test_files_go_with_the_question(desk) -> None:
    desk.script.documents["notes.txt"] = "The code is 7."
    drop(desk, "notes.txt", "x.png")
    desk.window.until("return !document.getElementById('trouble').hidden")
    assert desk.text("#trouble") == "Cannot read x.png: it is no text."
    assert desk.text(".file .facts") == "3,500 tokens"
    desk.ask("Which code?")
    assert desk.texts("#files .file") == []
    assert desk.texts(".question .file bdi") == ["notes.txt"]
    content = 'notes.txt:\n"""\nThe code is 7.\n"""\n\nWhich code?'
    assert desk.script.asked[-1]["messages"][-1]["content"] == content
    desk.ask("Sure?")
    assert desk.script.asked[-1]["messages"][0]["content"] == content


def test_a_file_that_is_longer_than_the_context_says_so(desk) -> None:
    desk.script.documents["long.txt"] = "word " * 1000
    drop(desk, "long.txt")
    desk.window.until("return !document.getElementById('trouble').hidden")
    assert desk.text("#trouble").startswith("The model reads 4,096 tokens at once")
    desk.click(".file button")
    assert desk.text("#trouble") == ""


def drop(desk: Desk, *names: str) -> None:
    """Drop files of these names; the page is not left for them."""
    assert desk.window.run(
        "const data = new DataTransfer();"
        "for (const name of arguments[0]) data.items.add(new File(['x'], name));"
        "const how = {dataTransfer: data, bubbles: true, cancelable: true};"
        "const event = new DragEvent('drop', how);"
        "document.body.dispatchEvent(event); return event.defaultPrevented",
        names,
    )


def test_stop_keeps_what_was_written(desk) -> None:
    desk.script.pause_s = 0.02
    for stop in (lambda: desk.window.press(ESCAPE), lambda: desk.click("#send")):
        n = len(desk.texts(".answer"))
        desk.type("long")
        desk.window.press(ENTER)
        desk.window.until(f"return document.querySelectorAll('.answer').length === {n + 1}")
        desk.window.until(
            "const [last] = [...document.querySelectorAll('.answer')].slice(-1);"
            "return last.innerText.includes('Paragraph 0')"
        )
        assert desk.window.run("return document.getElementById('send').title") == "Stop"
        stop()
        desk.wait()
        answer = desk.texts(".answer")[-1]
        assert "Paragraph 0" in answer
        assert "Paragraph 119" not in answer
        assert desk.texts(".note")[-1] == "Stopped."
    desk.window.until("return true")
    assert desk.script.n_left == 2


def test_what_a_long_prompt_waits_for_is_shown(desk) -> None:
    desk.script.probe_s = 60
    desk.script.progress = {"stage": "weighing", "total": 300, "processed": 101, "time_ms": 2500.0}
    desk.type(QUESTION)
    desk.window.press(ENTER)
    shown = "Weighing the adapters 33 %, 5 s more"
    desk.window.until(f"return document.querySelector('.note')?.innerText === {shown!r}")
    desk.window.press(ESCAPE)
    desk.wait()


def test_edit_asks_again_and_forgets_what_came_after(desk) -> None:
    for question in ("one", "two", "three"):
        desk.ask(question)
    desk.click(".turn:nth-child(2) [title='Edit the question']")
    assert desk.window.run("return document.activeElement.value") == "two"
    desk.window.press(ESCAPE)
    assert desk.texts(".said") == ["one", "two", "three"]
    desk.click(".turn:nth-child(2) [title='Edit the question']")
    desk.set(".question textarea", "zwei")
    desk.window.press(ENTER)
    desk.wait()
    assert desk.texts(".said") == ["one", "zwei"]
    messages = desk.script.asked[-1]["messages"]
    assert [each["content"] for each in messages] == ["one", "An answer.", "zwei"]
    desk.window.press(UP)  # in the empty box: the last question
    assert desk.window.run("return document.activeElement.value") == "zwei"


def test_an_answer_is_edited_and_the_chat_goes_on_with_it(desk) -> None:
    desk.ask()
    desk.click("[title='Edit the answer']")
    assert desk.window.run("return document.activeElement.value") == ANSWER
    desk.window.press(ESCAPE)
    assert desk.window.run("return document.activeElement.title") == "Edit the answer"
    assert "42" in desk.text(".markdown")
    desk.click("[title='Edit the answer']")
    desk.set(".answer textarea", "**41** <b>rolls")
    desk.window.run("document.querySelector('.answer textarea').focus()")
    desk.window.press(TAB, TAB, ENTER)
    assert desk.text(".markdown") == "41 <b>rolls"
    assert "edited" in desk.text(".foot .facts")
    assert desk.window.run("return document.querySelector('.editor').checkVisibility()") is False
    desk.ask("Sure?")
    assert desk.script.asked[-1]["messages"][1]["content"] == "**41** <b>rolls"
    desk.reload()
    desk.wait_for_texts()
    assert desk.texts(".markdown strong") == ["41"]


def test_a_cut_answer_goes_on_under_its_mix(desk) -> None:
    desk.script.answers |= {QUESTION: "There are **4", "There are **4": "2** rolls."}
    desk.script.reason = "length"
    desk.set("#strategy", "spectr")
    desk.set("#max-tokens", "7")
    desk.ask()
    [kept] = desk.kept()
    fusion = kept["turns"][0]["answers"][0]["fusion"]
    desk.set("#strategy", "base")
    desk.script.reason = "stop"
    desk.click(".more:not([hidden])")
    desk.wait()
    assert desk.texts(".markdown p, .markdown strong") == ["There are 42 rolls.", "42"]
    assert desk.texts(".note:not([hidden]), .more:not([hidden])") == []
    asked = desk.script.asked[-1]
    assert [each["content"] for each in asked["messages"]] == [QUESTION, "There are **4"]
    assert asked["max_tokens"] == 7
    names = ["math", "es", "med"]
    rows = [fusion["layers"][name] for name in names]
    assert asked["fusion"] == {"adapters": names, "weights": rows, "return": "none"}
    assert desk.text(".foot .facts").startswith("spectr · weighed in 379 ms · 5 tokens")
    assert desk.kept()[0]["turns"][0]["answers"][0]["fusion"] == fusion


def test_the_writer_of_a_relay_goes_on_with_the_draft_in_view(desk) -> None:
    desk.script.weights = {"math": 0.0, "es": 1.0, "med": 0.0}
    desk.script.relay = {"knower": "math", "writer": "es", "draft": "It is 42."}
    desk.script.reason = "length"
    desk.ask()
    desk.click(".more:not([hidden])")
    desk.wait()
    messages = desk.script.asked[-1]["messages"]
    assert messages[0]["content"] == f"(It is 42.)\n\n{QUESTION}"
    desk.ask("Sure?")
    assert desk.script.asked[-1]["messages"][0]["content"] == QUESTION


def test_system_prompts_are_kept_under_names(desk) -> None:
    for name, text in (("short", "Be short."), ("<b>", "Be bold.")):
        desk.set("#system", text)
        desk.click("details.hint summary")
        desk.window.run("document.getElementById('preset-name').focus()")
        desk.window.command("Input.insertText", text=name)
        desk.window.press(ENTER)
        desk.window.until(f"return document.getElementById('preset').value === {name!r}")
    desk.reload()
    assert desk.texts("#preset option") == ["Another prompt", "short", "<b>"]
    desk.set("#preset", "short")
    desk.ask()
    assert desk.script.asked[-1]["messages"][0]["content"] == "Be short."
    desk.set("#system", "Be short. Or not.")
    assert desk.window.run("return document.getElementById('preset').value") == ""
    desk.set("#preset", "<b>")
    for _ in range(2):  # the second press means it
        desk.click("[title='Delete this system prompt']")
    assert desk.texts("#preset option") == ["Another prompt", "short"]
    assert desk.window.run("return document.getElementById('system').value") == "Be bold."


def test_a_reload_keeps_the_chat_and_new_chat_ends_it(desk) -> None:
    desk.set("#system", "Be short.")
    desk.ask()
    whole = desk.texts(".turn")
    desk.reload()
    desk.wait_for_texts()
    assert desk.texts(".turn") == whole
    assert desk.window.run("return document.getElementById('system').value") == "Be short."
    desk.click("#new")
    assert desk.texts(".turn") == []
    desk.reload()
    assert desk.texts(".turn") == []
    desk.ask()
    assert [m["role"] for m in desk.script.asked[-1]["messages"]] == ["system", "user"]


def test_copy(desk) -> None:
    desk.window.command(
        "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    desk.ask()
    for title, expected in (
        ("Copy the answer", ANSWER),
        ("Copy this code", "print(42)"),
        ("Copy the question", QUESTION),
    ):
        desk.click(f"[title='{title}']")
        desk.window.until(f"return document.querySelector(\"[title='{title}'] .icon-check\")")
        desk.window.run(
            "window.pasted = null; navigator.clipboard.readText().then(t => { window.pasted = t; })"
        )
        assert desk.window.until("return window.pasted") == expected


def test_save_as_markdown_and_as_json(desk, tmp_path) -> None:
    desk.window.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    desk.set("#system", "Be short.")
    desk.ask()
    for kind in ("markdown", "json"):
        desk.click("#save")
        desk.click(f"#save-{kind}")
    markdown, document = (saved(tmp_path, ending) for ending in ("md", "json"))
    means = [sum(row) / N_LAYER for row in layers(["math", "es", "med"], "qa-flora")]
    mixed = zip(("math", "es", "med"), means, strict=True)
    mix = " · ".join(f"{name} ×{round(mean, 2):g}" for name, mean in mixed)
    assert markdown.read_text("utf-8") == (
        f"## System\n\nBe short.\n\n## Question\n\n{QUESTION}\n\n"
        f"## Answer\n\n*demo · qa-flora · {mix}*\n\n{ANSWER}\n"
    )
    found = [message["content"] for message in load_session(document).messages("")]
    assert found == ["Be short.", QUESTION, ANSWER, ""]
    session = json.loads(document.read_text("utf-8"))
    assert session["bundle"] == IDENTITY
    assert (session["strategy"], session["adapters"]) == ("qa-flora", ["math", "es", "med"])
    assert len(session["messages"][-1]["fusion"]["layers"]["math"]) == N_LAYER


def test_a_chat_that_was_saved_here_is_opened_as_it_was(desk, tmp_path) -> None:
    desk.window.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    desk.set("#system", "Be short.")
    desk.script.thought = "I <b> see"
    desk.ask()
    desk.ask_again("static")
    assert desk.texts(".thought summary") == ["Thought"] * 2
    desk.set("#strategy", "spectr")
    desk.ask("And then?")
    desk.click(".answer:nth-child(2) .foot .chip")
    desk.click("#save-json")
    path = saved(tmp_path, "json")
    before = desk.texts(".said, .markdown, .mix, .facts")
    desk.click("#new")
    desk.set("#system", "")
    desk.set("#strategy", "")
    open_chat(desk, path)
    assert sorted(desk.texts(".said, .markdown, .mix, .facts")) == sorted(before)
    assert desk.window.run("return document.getElementById('system').value") == "Be short."
    thoughts = "[...document.querySelectorAll('.thought div')].map(each => each.textContent)"
    assert desk.window.run(f"return {thoughts}") == ["I <b> see"] * 3
    desk.ask("And now?")
    asked = desk.script.asked[-1]
    assert "I <b> see" not in str(asked)
    assert asked["fusion"]["strategy"] == "spectr"
    roles = ["system", *(["user", "assistant"] * 2), "user"]
    assert [each["role"] for each in asked["messages"]] == roles
    assert desk.window.log() == []


def test_a_chat_of_the_terminal_is_opened(desk, tmp_path) -> None:
    path, talk = tmp_path / "talk.json", Conversation("")
    talk.add(QUESTION, ANSWER)
    talk.add("And then?", "Nothing", "length")
    for strategy, option in (("manual:math=0.7,med=1", ""), ("static", "static")):
        save_session(path, talk, bundle=IDENTITY, strategy=strategy, adapters=("math", "med"))
        open_chat(desk, path)
        assert desk.texts(".said") == [QUESTION, "And then?"]
        assert desk.texts(".markdown strong") == ["42"]
        assert desk.text(".note:not([hidden])") == "Cut at the longest answer; see the settings."
        assert desk.window.run("return document.getElementById('strategy').value") == option
    desk.ask("And now?")
    asked = desk.script.asked[-1]
    assert len(asked["messages"]) == 5
    assert desk.window.log() == []


def test_another_file_is_refused(desk, tmp_path) -> None:
    desk.ask()
    path = tmp_path / "talk.json"
    save_session(path, Conversation(), bundle=IDENTITY, strategy="static", adapters=())
    text = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**text, "bundle": {"name": 3}}), "utf-8")
    open_chat(desk, path, says="trouble")
    found = desk.text("#trouble")
    assert found.startswith("Cannot open talk.json: ")
    assert "The field bundle.name is 3, expected a text." in found
    assert found.endswith("Choose a file that this page or `qaflora chat` has saved.")
    assert desk.texts(".said") == [QUESTION]


def saved(place: Path, ending: str, name: str = "chat") -> Path:
    """The one file that the page has saved there, once it is whole."""

    def whole() -> list[Path]:
        found = place.glob(f"{name}-*.{ending}")
        return [path for path in found if path.read_bytes().endswith(b"\n")]

    wait_until(whole)
    return whole()[0]


def open_chat(desk: Desk, path: Path, says: str = "") -> None:
    """Choose a file, and wait until it is shown, or what is wrong with it."""
    desk.window.run(
        "document.getElementById('chat-file').hidden = false;"
        "document.querySelectorAll('.turn').forEach(each => { each.dataset.before = ''; });"
    )
    element = next(iter(desk.window.find("#chat-file").values()))
    desk.window.send("POST", f"/element/{element}/value", {"text": str(path)})
    if says:
        desk.window.until("return !document.getElementById('trouble').hidden")
    else:
        desk.window.until(
            "return document.querySelector('.turn')"
            " && !document.querySelector('.turn[data-before]')"
        )
        desk.wait_for_texts()


def test_a_server_that_is_busy_says_so(desk) -> None:
    desk.script.refusal = (503, "All 8 places are taken.", {"Retry-After": "5"})
    desk.ask()
    assert desk.text(".note") == "All 8 places are taken. Try again in 5 s."
    desk.script.refusal = None
    desk.click("[title^='Ask again']")
    desk.wait()
    assert "42" in desk.text(".answer")


def test_too_long_a_chat_is_told_without_options_of_a_command(desk) -> None:
    message = "The prompt has 9 tokens; raise the context (--ctx, n_ctx)."
    desk.script.refusal = (400, message, {"code": "context_length_exceeded"})
    desk.ask()
    assert desk.text(".note").startswith("This chat is longer than the model can read. Begin")


def test_an_answer_that_breaks_off_is_no_whole_one(desk) -> None:
    desk.script.is_broken = True
    desk.ask()
    assert desk.text(".note") == "The server ended the answer before its end."
    assert "There are 42 rolls." in desk.text(".markdown")


def test_a_key_is_asked_for_and_kept_in_the_tab(desk) -> None:
    desk.script.key = "secret"
    desk.window.open(desk.address)
    desk.window.until("return document.getElementById('key-dialog').open")
    desk.window.command("Input.insertText", text="wrong")
    desk.window.press(ENTER)
    desk.window.until("return !document.getElementById('key-wrong').hidden")
    assert desk.window.run("return document.getElementById('key-dialog').open")
    desk.window.command("Input.insertText", text="secret")
    desk.window.press(ENTER)
    desk.window.until("return document.querySelectorAll('#bundle option').length")
    desk.ask()
    assert "42" in desk.text(".answer")
    desk.reload()
    assert desk.window.run("return document.getElementById('key-dialog').open") is False
    assert desk.window.run("return Object.values(localStorage).join().includes('secret')") is False


@pytest.mark.parametrize(("is_dark", "width"), [(False, 360), (True, 1100)])
def test_axe_finds_nothing_serious(window, is_dark, width) -> None:
    if not axe.source():
        pytest.skip("axe-core cannot be had: npm or the network is missing")
    window.prefer(is_dark=is_dark)
    with desk_at(window, width) as desk:
        desk.script.taught = []
        desk.reload()
        assert axe.findings(window) == []
        desk.ask()
        desk.click("button.mix")
        desk.ask_again("static")
        desk.click(".teach")
        desk.click(".teaching .chip")
        desk.click(".teach")
        desk.script.refusal = (503, "Busy.", {})
        desk.ask()
        assert axe.findings(window) == []
        desk.set("#strategy", "manual")
        desk.click("#save")
        assert axe.findings(window) == []
        desk.click("#open-chats")
        window.until("return document.querySelectorAll('.past').length")
        assert axe.findings(window) == []
        desk.click("#close-chats")
        if width < 900:
            desk.click("#open-panel")
            assert axe.findings(window) == []
        desk.script.key = "secret"
        window.open(desk.address)
        window.until("return document.getElementById('key-dialog').open")
        assert axe.findings(window) == []


def test_a_phone_shows_everything_without_scrolling_sideways(desk) -> None:
    wide = "return document.documentElement.scrollWidth"
    desk.script.answers["wide"] = (
        f"$$x{' + x' * 99}$$\n\n$x{' + x' * 99}$\n\n"
        f"{'x' * 200}\n\n```\n{'y' * 200}\n```\n\n# {'w' * 90}\n\n"
        f"| {'a | ' * 20}\n|{'---|' * 20}\n| {'long-word | ' * 20}"
    )
    desk.open(360, 640)
    assert desk.window.run(wide) == 360
    desk.ask("wide")
    desk.ask_again("static")
    for place in (1, 2):
        desk.click(f".answer:nth-child({place}) button.mix")
    assert desk.window.run(wide) == 360
    n_top = desk.window.run(  # of the cells of each row of the heatmaps
        "const topsOf = row => [...row.children].filter(cell => cell.checkVisibility())"
        ".map(cell => cell.getBoundingClientRect().top);"
        "return [...document.querySelectorAll('.grid > div')].map(row => new Set(topsOf(row)).size)"
    )
    assert {*n_top} == {1}
    assert desk.window.run("return document.getElementById('panel').checkVisibility()") is False
    desk.click("#open-panel")
    assert desk.window.run("return document.getElementById('panel').checkVisibility()")
    has_focus = "return document.getElementById('panel').contains(document.activeElement)"
    assert desk.window.run(has_focus)
    assert desk.window.run("return document.querySelector('.talk').inert")
    desk.window.press(ESCAPE)
    assert desk.window.run("return document.getElementById('panel').checkVisibility()") is False
    assert desk.window.run("return document.activeElement.id") == "open-panel"
    assert desk.window.run("return document.querySelector('.talk').inert") is False
    sizes = desk.window.run(
        "return [...document.querySelectorAll('button, select, input[type=checkbox]')]"
        ".filter(e => e.checkVisibility()).map(e => e.getBoundingClientRect())"
        ".map(b => Math.min(b.width, b.height))"
    )
    assert min(sizes) >= 22
