"""Teaching who answers: the command line, a model card, a chat and a server; bundle check"""

import json
from pathlib import Path
from typing import Any

import pytest
from bundles import TinyBundle, make_bundle, make_sources, qaflora, said_by
from serving import client_of
from test_cli_chat import chat
from tiny import USER, write_tiny_adapter

from qaflora_edge import Engine
from qaflora_edge.cli.examples import read_lesson
from qaflora_edge.peft.folder import read_card

pytestmark = pytest.mark.usefixtures("own_cache")
CARD = """---
license: mit
widget:
- text: How many eggs are three and four?
- messages:
  - role: user
    content: What is 2 + 2?
- image: 1.png
---
# Model Card for math

<!-- Provide a quick summary. -->
This model is a fine-tuned version of [base](https://example.org).

Solves **word problems** step
by step. It was trained for an hour.
"""


@pytest.fixture
def taught(tmp_path) -> TinyBundle:
    """A bundle of a test's own, that can be taught."""
    return make_bundle(tmp_path, calibrate=True)


def write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def taught_in(folder: Path) -> dict[str, int]:
    with Engine(folder, n_ctx=512, threads=1) as engine:
        return dict(engine.taught)


def test_a_bundle_is_taught_by_files_and_forgets(taught, tmp_path) -> None:
    file = write(tmp_path / "q.txt", "the thing on a ring", "", "and then")
    said = said_by(qaflora("bundle", "teach", taught.folder, "math", file))
    assert said == f"math has 2 example questions in {taught.folder}, 2 of {file}.\n"
    long = "\n".join(f"the {number}" for number in range(100))
    said = said_by(qaflora("bundle", "teach", taught.folder, "base", "-", stdin=long))
    assert said.endswith("32 of stdin, 32 of its 100 lines, evenly.\n")
    assert taught_in(taught.folder) == {"math": 2, "base": 32}
    said = said_by(qaflora("bundle", "teach", taught.folder, "math", "--forget"))
    assert said == "math has forgotten 2 example questions.\n"
    assert taught_in(taught.folder) == {"base": 32}


def test_json_lines_have_questions_messages_and_answers(tmp_path) -> None:
    turn = {"role": "user", "content": "and then"}
    training = {"messages": [turn, {"role": "assistant", "content": "nothing"}]}
    lesson = read_lesson("a", str(write(tmp_path / "q", {"question": "2?", "answer": 2}, training)))
    assert (lesson.questions, lesson.answers) == (["2?", [turn]], ["2", None])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "it has no line that is not blank, expected a question a line"),
        (b"ok\n\xff\n", "line 2: it is not UTF-8"),
        (b'{"question": "a"}\n[]\n', "line 2: it is no JSON object"),
        (
            b'{"question": " "}\n',
            'line 1: field question is " ", expected a text',
        ),
        (b'{"messages": [{"role": "pope"}]}\n', "line 1: Message 0 has role = 'pope'"),
        (
            b'{"question": "a", "answer": []}\n',
            "line 1: field answer is [], expected a text",
        ),
    ],
)
def test_a_wrong_file_is_refused_by_line(made, tmp_path, content, message) -> None:
    file = tmp_path / "q"
    file.write_bytes(content)
    said = said_by(qaflora("bundle", "teach", made.folder, "math", file), 1)
    assert str(file) in said
    assert message in said


def test_create_takes_examples_and_what_a_model_card_says(tmp_path) -> None:
    made = make_sources(tmp_path)
    (made.peft / "README.md").write_text(CARD, encoding="utf-8")
    file = write(tmp_path / "q.txt", "the thing")
    result = qaflora(
        *("bundle", "create", made.folder, "--base", made.base.path),
        *("--adapter", f"math={made.peft}", "--adapter", f"es={made.adapter.path}"),
        *("--examples", f"es={file}", "--about", "es=Answers in Spanish."),
    )
    assert said_by(result).splitlines()[:4] == [
        "math is described by its README.md: Solves word problems step by step.",
        "math has 2 example questions from its README.md.",
        "es is described by --about: Answers in Spanish.",
        f"es has 1 example question from {file}.",
    ]
    assert taught_in(made.folder) == {"math": 2, "es": 1}


@pytest.mark.parametrize(
    "card", ["---\na: [\n---\nHi.", "---\n- a\n---\nHi.", "[More Information Needed]", "\x00", ""]
)
def test_a_card_that_says_nothing_or_is_broken_is_left_out(tmp_path, card) -> None:
    (tmp_path / "adapter_config.json").touch()
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    read = read_card(tmp_path)
    assert read.questions == ()
    assert not any(map(str.isalpha, read.sentence))


def test_check_tests_answers_and_tells_adapters_that_do_not_act(taught, tmp_path) -> None:
    qaflora("bundle", "add", taught.folder, f"still={_strong(taught, tmp_path, 0.0)}")
    qaflora("bundle", "add", taught.folder, f"loud={_strong(taught, tmp_path, 30.0)}")
    file = write(tmp_path / "q.jsonl", {"question": "the thing", "answer": "no such word"})
    qaflora("bundle", "teach", taught.folder, "math", file)
    result = qaflora("bundle", "check", taught.folder)
    rows = {words[0]: words[1:6] for words in map(str.split, result.stdout.splitlines()[1:])}
    assert rows["math"] == ["yes", "1", "0", "0", "0"]
    assert rows["es"] == ["yes", "-", "-", "-", "-"]
    assert (rows["still"][0], rows["loud"][0], result.exit_code) == ("no", "no", 1)
    assert "still moves nothing: its answers are the base's. loud makes noise" in result.stderr


def _strong(made: TinyBundle, place: Path, strength: float) -> Path:
    path = place / f"{strength:g}.gguf"
    write_tiny_adapter(path, made.base, targets=("output",), strength=strength)
    return path


def test_a_chat_teaches_its_last_question(taught) -> None:
    lines = ("/teach es", "the thing", "/teach nobody", "/teach es", "/teach undo", "/teach base")
    told = chat(taught.folder, *lines).stderr
    assert "[nothing has been asked yet]" in told
    assert "Error: " in told
    assert "[es is for questions as this one; examples of it 1]" in told
    assert "[taken back: a question of es]" in told
    assert taught_in(taught.folder) == {"base": 1}


def test_a_server_is_taught_where_it_says_so(taught) -> None:
    body = {"model": "tiny", "messages": USER, "adapter": "es"}
    undo = {"model": "tiny", "undo": True}
    with client_of(taught.folder) as client:
        assert client.get("/v1/models/tiny").json()["meta"]["takes_teaching"] is False
        refused = client.post("/v1/teach", json=body)
        assert refused.status_code == 403
        assert "--teach" in refused.json()["error"]["message"]
    with client_of(taught.folder, takes_teaching=True) as client:
        assert client.get("/v1/models/tiny").json()["meta"]["takes_teaching"] is True
        assert client.post("/v1/teach", json=body).json() == {"adapter": "es", "taught": 1}
        assert client.post("/v1/teach", json=undo).json() == {"adapter": "es", "undone": True}
        wrong = (undo, body | undo, {"undo": False}, {"messages": USER}, body | {"adapter": "x"})
        fields = []
        for one in wrong:
            answer = client.post("/v1/teach", json=one)
            assert answer.status_code == 400
            fields.append(answer.json()["error"]["param"])
        assert fields == ["undo", "messages", "messages", "adapter", "adapter"]


def test_others_teach_only_with_a_key(monkeypatch, made) -> None:
    served: list[Any] = []
    monkeypatch.setattr("qaflora_edge.server.run.run", lambda *how: served.append(how[-1]))
    everywhere = ("serve", made.folder, "--host", "0.0.0.0")
    said = said_by(qaflora(*everywhere, "--insecure", "--teach"), 2)
    assert "so it needs an API key" in said
    key = ("--api-key", "abcdefgh")
    here = ("serve", made.folder)
    proxied = (*here, "--allow-host", "example.org")
    for words in ((*everywhere, *key), proxied, (*here, "--no-teach")):
        qaflora(*words)
    qaflora(*everywhere, *key, "--teach")
    qaflora(*here)
    assert [options.takes_teaching for options in served] == [False, False, False, True, True]
