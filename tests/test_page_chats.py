"""Chats that the page keeps in the browser: past ones, deletions, and a browser that keeps none."""

import pytest
from desk import ENTER, ESCAPE, NEEDS_CHROMIUM, QUESTION, Desk

pytestmark = NEEDS_CHROMIUM


def listed(desk: Desk, n: int) -> list[str]:
    if not desk.window.run("return document.body.classList.contains('has-chats')"):
        desk.click("#open-chats")
    desk.window.until("return document.querySelectorAll('.past').length === arguments[0]", n)
    return desk.texts(".past bdi")


def test_past_chats_are_opened_and_go_on(desk) -> None:
    for question in ("one", "two\nlines"):
        desk.click("#new")
        desk.ask(question)
    assert listed(desk, 2) == ["two lines", "one"]
    desk.click("li:nth-child(2) > .past")
    desk.window.until("return document.querySelector('.said').innerText === 'one'")
    assert desk.texts(".past[aria-current=true]") == ["one"]
    desk.ask("again")
    desk.window.open(f"{desk.address}?new-tab")
    desk.window.until("return document.querySelectorAll('.turn').length")
    assert desk.texts(".said") == ["one", "again"]
    assert listed(desk, 2) == ["one", "two lines"]
    assert [len(chat["turns"]) for chat in desk.kept(2)] in ([1, 2], [2, 1])
    assert desk.window.log() == []


def test_chats_are_in_view_and_found_by_their_words(desk) -> None:
    desk.script.answers["two"] = "It is a <b>Dragon</b>."
    desk.open(1280)
    for question in ("one", "two", "three"):
        desk.click("#new")
        desk.ask(question)
    desk.window.until("return document.querySelectorAll('.past').length === 3")
    assert desk.texts(".chats-list h3") == ["Today"]
    assert desk.window.run("return document.querySelector('.past').checkVisibility()")
    for words, found in (("dragon IT", ["two"]), ("thr", ["three"]), ("nothing so", [])):
        desk.set("#chats-search", words)
        assert desk.texts(".past") == found
    assert desk.text("#chats-note") == "No chat has these words."
    desk.set("#chats-search", "")
    assert desk.texts(".past") == ["three", "two", "one"]
    desk.click("#open-chats")
    desk.reload()
    assert desk.window.run("return document.getElementById('chats').checkVisibility()") is False
    assert desk.window.log() == []


def test_a_telephone_closes_the_list_for_the_chat_that_is_opened(desk) -> None:
    desk.open(390)
    desk.ask("one")
    desk.click("#new")
    desk.ask("two")
    desk.click("#open-chats")
    assert desk.window.run("return document.activeElement.id") == "close-chats"
    desk.window.until("return document.querySelectorAll('.past').length === 2")
    desk.click("li:nth-child(2) > .past")
    desk.window.until("return document.querySelector('.said').innerText === 'one'")
    assert desk.window.run("return document.getElementById('chats').checkVisibility()") is False


def test_chats_are_deleted(desk) -> None:
    for question in ("one", "two", "three"):
        desk.click("#new")
        desk.ask(question)
    listed(desk, 3)
    desk.click("#chats-list li:nth-child(2) > :last-child")
    assert desk.texts("#chats-list li > :last-child") == ["", "Really?", ""]
    desk.click("#chats-list li:nth-child(2) > :last-child")
    desk.window.until("return document.querySelectorAll('.past').length === 2")
    assert desk.texts(".past bdi") == ["three", "one"]
    assert desk.texts(".said") == ["three"]
    for _ in range(2):
        desk.click("#delete-chats")
    desk.window.until("return !document.querySelectorAll('.past').length")
    assert desk.texts(".said") == []
    assert desk.kept(0) == []


def test_a_chat_that_is_deleted_while_it_is_answered_stays_deleted(desk) -> None:
    desk.script.pause_s = 0.02
    desk.type("long")
    desk.window.press(ENTER)
    desk.kept()
    listed(desk, 1)
    for _ in range(2):
        desk.click("#delete-chats")
    desk.window.until("return !document.querySelectorAll('.past').length")
    desk.window.until("return document.getElementById('send').title === 'Send'")
    desk.window.press(ESCAPE)
    desk.script.pause_s = 0
    desk.ask()
    assert [turn["question"] for turn in desk.kept()[0]["turns"]] == [QUESTION]


def test_a_chat_that_another_tab_changed_is_kept_under_both(desk) -> None:
    desk.ask("one")
    desk.kept()
    desk.window.run(
        "indexedDB.open('qaflora').onsuccess = ({ target: { result } }) => {"
        " const store = result.transaction('chats', 'readwrite').objectStore('chats');"
        " store.getAll().onsuccess = ({ target: { result: [chat] } }) => {"
        "  store.put({ ...chat, revision: 'other' });"
        "  store.transaction.oncomplete = () => { window.isPut = true; }; } }"
    )
    desk.window.until("return window.isPut")
    desk.ask("two")
    assert sorted(len(chat["turns"]) for chat in desk.kept(2)) == [1, 2]


def test_a_chat_of_the_tab_is_carried_over_and_none_is_kept_unless_wanted(desk) -> None:
    desk.set("#system", "Be short.")
    desk.ask()
    [chat] = desk.kept()
    desk.click("#open-chats")
    desk.click("#is-keeping")
    for _ in range(2):
        desk.click("#delete-chats")
    desk.click("#close-chats")
    desk.kept(0)
    desk.ask("secret")
    desk.reload()
    desk.window.until("return document.querySelectorAll('.turn').length")
    assert desk.texts(".said") == ["secret"]
    assert desk.kept(0) == []
    desk.window.run(  # as pages without a database have left it
        "sessionStorage.setItem('chat', JSON.stringify({turns: arguments[0]}));"
        "localStorage.removeItem('settings')",
        chat["turns"],
    )
    desk.reload()
    assert [turn["question"] for turn in desk.kept()[0]["turns"]] == [QUESTION]
    assert desk.texts(".said") == [QUESTION]


@pytest.mark.parametrize("call", ["get() { throw new DOMException('It is denied.') }", "value: {}"])
def test_a_browser_without_a_database_says_so_once(desk, call) -> None:
    script = desk.window.command(
        "Page.addScriptToEvaluateOnNewDocument",
        source=f"Object.defineProperty(window, 'indexedDB', {{ {call} }})",
    )
    desk.reload()
    desk.ask()
    told = "return document.getElementById('trouble').innerText"
    assert desk.window.until(told).startswith("The browser keeps no chats of this page: ")
    desk.ask("And then?")
    desk.reload()
    desk.window.until("return document.querySelectorAll('.turn').length === 2")
    assert desk.window.run(told) == ""
    desk.click("#open-chats")
    desk.window.until("return document.getElementById('chats-note').innerText.includes('no chats')")
    desk.window.command("Page.removeScriptToEvaluateOnNewDocument", **script)
