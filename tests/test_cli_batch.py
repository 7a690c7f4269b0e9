"""qaflora run --prompts"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import TinyBundle, qaflora, rewrite
from click.testing import Result
from patience import PATIENCE_S, python, wait_until

from qaflora_edge import Engine
from qaflora_edge.ask import Ask
from qaflora_edge.cli.batch import Defaults, to_ask
from qaflora_edge.config import in_group
from qaflora_edge.errors import OptionError

# F32 everywhere: what is decoded together changes no token.
F32 = ("--kv-type", "f32", "--no-flash-attn", "--ctx", 256, "--threads", 1)
QUESTIONS = [f"thing {i} on a ring" for i in range(9)]


def run(made: TinyBundle, *args: object, stdin: str | bytes | None = None) -> Result:
    return qaflora("run", made.folder, *F32, *args, stdin=stdin)


def records(text: str | Path) -> list[dict[str, Any]]:
    if isinstance(text, Path):
        text = text.read_text(encoding="utf-8")
    return sorted((json.loads(line) for line in text.splitlines()), key=lambda each: each["index"])


def lines(*requests: dict[str, Any] | str) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in requests)


def asked(prompt: str, system: str | None = None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def test_answers_are_those_one_after_the_other(made, tmp_path) -> None:
    path = tmp_path / "q.jsonl"
    own = [
        {"prompt": QUESTIONS[0], "id": "first", "max_tokens": 5},
        {"messages": asked(QUESTIONS[1], "Be brief."), "strategy": "single:es", "id": 7},
        {"prompt": QUESTIONS[2], "temperature": 1.5, "seed": 3, "top_k": 40},
        {"prompt": QUESTIONS[3], "system": "Be long.", "stop": "e", "top_p": None},
        {"prompt": QUESTIONS[4], "temp": 0.9, "seed": 1, "max_completion_tokens": 9},
        {"prompt": QUESTIONS[5], "json_schema": {"enum": ["dog", "cat"]}},
        *({"prompt": question} for question in QUESTIONS[6:]),
    ]
    path.write_text("\ufeff\n" + lines(*own), encoding="utf-8")
    result = run(made, "--prompts", path, "--max-tokens", 12, "--parallel", 4)
    assert (result.exit_code, result.stderr[:14]) == (0, "[9 lines done,")
    found = records(result.stdout)
    alone: list[tuple[Any, dict[str, Any]]] = [
        (asked(QUESTIONS[0]), {"max_tokens": 5}),
        (own[1]["messages"], {"weights": "single:es"}),
        (asked(QUESTIONS[2]), {"temperature": 1.5, "seed": 3, "top_k": 40}),
        (asked(QUESTIONS[3], "Be long."), {"stop": "e"}),
        (asked(QUESTIONS[4]), {"temperature": 0.9, "seed": 1, "max_tokens": 9}),
        (asked(QUESTIONS[5]), {"json_schema": {"enum": ["dog", "cat"]}}),
        *((asked(question), {}) for question in QUESTIONS[6:]),
    ]
    with Engine(made.folder, kv_type="f32", flash_attn=False, n_ctx=256) as engine:
        expected = [
            engine.generate(engine.chat_tokens(messages), **{"max_tokens": 12, **options}).text()
            for messages, options in alone
        ]
    assert [each["text"] for each in found] == expected
    assert [each["index"] for each in found] == list(range(1, 10))  # of lines, blank ones too
    assert [each.get("id") for each in found[:3]] == ["first", 7, None]
    assert found[1]["fusion"] == {"strategy": "single:es", "weights": {"math": 0.0, "es": 1.0}}
    assert found[0]["fusion"]["strategy"] == "qa-flora"
    assert found[0]["usage"]["completion_tokens"] == 5
    fields = ("index", "text", "finish_reason", "usage", "fusion", "timings", "request")
    assert set(found[2]) == {*fields}
    assert expected[5] in ('"dog"', '"cat"')


def test_json_gives_the_weights_of_every_layer(made) -> None:
    stdin = lines({"prompt": "a thing"})
    result = run(made, "--prompts", "-", "--json", "--max-tokens", 2, stdin=stdin)
    single = json.loads(run(made, "a thing", "--json", "--max-tokens", 2).stdout)
    (found,) = records(result.stdout)
    assert found["fusion"]["weights"] == single["fusion"]["weights"]
    assert found["text"] == single["text"]


def test_raw_prompts_and_system(made) -> None:
    stdin = lines({"prompt": "the thing"}, {"prompt": "the thing", "raw_prompt": False})
    raw = run(made, "--prompts", "-", "--raw-prompt", "--max-tokens", 6, stdin=stdin)
    assert [each["text"] for each in records(raw.stdout)] == [
        run(made, "the thing", *more, "--max-tokens", 6).stdout[:-1]
        for more in (["--raw-prompt"], [])
    ]
    own = {"prompt": "a", "system": "Own."}
    stdin = lines({"prompt": "a"}, {"messages": asked("a", "Own.")}, own)
    told = run(made, "--prompts", "-", "--system", "All.", "--max-tokens", 6, stdin=stdin)
    texts = [each["text"] for each in records(told.stdout)]
    for text, system in zip(texts, ("All.", "Own.", "Own."), strict=True):
        assert text == run(made, "a", "--system", system, "--max-tokens", 6).stdout[:-1]


HOSTILE = [
    ("not json", "InputFileError", "line 2: it is no JSON object (Expecting value"),
    (b'{"prompt": "\xff"}', "InputFileError", "it is no JSON object ('utf-8' codec can"),
    ("{}", "OptionError", "expected either prompt or messages"),
    ('{"prompt": 5}', "PromptError", "Message 0 has content = 5"),
    ('{"prompt": "a", "temperature": "hot"}', "OptionError", "Option temperature is 'hot', exp"),
    ('{"prompt": "a", "temp": 1, "temperature": 1}', "OptionError", "temperature is given twice"),
    ('{"prompt": "a", "strategy": "best"}', "StrategyError", "Strategy 'best' is not known"),
    ('{"prompt": "a", "json_schema": {"type": "x"}}', "GrammarError", "The JSON schema"),
    (
        '{"prompt": "a", "grammar": "", "json_schema": {}}',
        "OptionError",
        "Options grammar and a JSON schema are both given; give one or the other.",
    ),
    ('{"prompt": "' + "a" * 400 + '"}', "ContextError", "tokens, the context 256; shorten it"),
]


def test_a_failed_line_stops_no_other(made, tmp_path) -> None:
    path = tmp_path / "q.jsonl"
    fine = lines({"prompt": "a"}).encode()
    written = [line.encode() if isinstance(line, str) else line for line, _, _ in HOSTILE]
    path.write_bytes(fine + b"".join(line + b"\n" + fine for line in written))
    result = run(made, "--prompts", path, "--max-tokens", 2, "--parallel", 3)
    assert result.exit_code == 1, result.output
    found = records(result.stdout)
    assert [each["index"] for each in found] == list(range(2 * len(HOSTILE) + 1))
    assert {each.get("text") for each in found[::2]} == {found[0]["text"]}
    for each, (line, kind, message) in zip(found[1::2], HOSTILE, strict=True):
        assert set(each) == {"index", "error", "request"}, line
        assert each["error"]["type"] == kind
        assert message in each["error"]["message"]
        assert len(each["error"]["message"]) < 500
    assert f"; {len(HOSTILE)} failed, the first: line 2: Cannot read" in result.stderr


def test_an_answer_cut_under_its_schema_is_a_failure_with_its_text(made) -> None:
    request = {"prompt": "a", "json_schema": {"type": "string", "minLength": 50}, "id": 1}
    result = run(made, "--prompts", "-", "--max-tokens", 4, stdin=lines(request))
    (found,) = records(result.stdout)
    assert found["text"].startswith('"')
    assert (found["finish_reason"], found["id"]) == ("length", 1)
    assert found["error"]["type"] == "IncompleteAnswerError"
    assert result.exit_code == 1


def test_unknown_keys_are_named_once(made) -> None:
    requests = [{"prompt": "a", "tempreature": 1, "n\n": 2}, {"prompt": "b", "x": 1, "n\n": 2}]
    result = run(made, "--prompts", "-", "--max-tokens", 2, stdin=lines(*requests))
    assert result.exit_code == 0
    assert result.stderr.splitlines()[0] == (
        "Not options of a request, and ignored: 'tempreature', 'n\\n', 'x'"
    )


def test_every_sampling_option_has_its_name_on_a_line() -> None:
    for option in in_group("sampling").values():
        values = {int: 3, float: 0.5, str: "root ::= x", tuple: ["a"], dict: {"7": 1.0}}
        value: Any = values[option.kind]
        ask = to_ask({"prompt": "a", option.name: value}, Defaults(Ask(())))
        assert getattr(ask.sampling, option.name) == option.kind(value)
        with pytest.raises(OptionError, match=f"^Option {option.name} is {{'x': 1}}, expected "):
            to_ask({"prompt": "a", option.name: {"x": 1}}, Defaults(Ask(())))


@pytest.mark.slow
def test_a_pipe_is_read_once(made) -> None:
    """Nothing is known of what will come, so keys are named at the end."""
    command = ("-m", "qaflora_edge", "run", made.folder, *F32, "--prompts", "-", "-n", 3)
    stdin = lines(*({"prompt": question, "x": 1} for question in QUESTIONS))
    done = python(*command, input=stdin)
    assert done.returncode == 0
    assert [each["index"] for each in records(done.stdout)] == list(range(9))
    assert done.stderr.splitlines()[0] == "Not options of a request, and ignored: 'x'"
    done = python(*command, input="\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "Error: Cannot use the prompts in stdin: it has no line that is not blank, expected one "
        'JSON object such as {"prompt": "..."} a line. Write one into it.\n'
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Give PROMPT, -f FILE or text on stdin, or else --prompts FILE."),
        (("a", "-o", "f"), "-o is for the answers to --prompts FILE."),
        (("--prompts", "f", "-o", "./f"), "f is named twice; give each FILE a name of its own."),
        (("--prompts", "f", "-o", "-"), "a file is needed, stdout will not do."),
    ],
)
def test_wrong_usage(made, words, message) -> None:
    result = run(made, *words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_no_file_of_prompts(made, tmp_path) -> None:
    result = run(made, "--prompts", tmp_path / "gone.jsonl", "-o", tmp_path / "out.jsonl")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: Cannot read {tmp_path / 'gone.jsonl'}: opening or re")
    assert os.listdir(tmp_path) == []
    result = run(made, "--prompts", tmp_path / "gone.jsonl", "-o", tmp_path / "no" / "out.jsonl")
    # before anything is read
    assert f"the folder {tmp_path / 'no'} does not take a new file" in result.stderr


@pytest.fixture(scope="module")
def answered(made, tmp_path_factory) -> str:
    """Answers to the first two of four prompts."""
    folder = tmp_path_factory.mktemp("answered")
    path, out = folder / "q.jsonl", folder / "out.jsonl"
    path.write_text(lines(*({"prompt": question} for question in QUESTIONS[:2])))
    assert go_on(made, path, out).exit_code == 0
    return out.read_text()


@pytest.fixture
def begun(answered, tmp_path) -> tuple[Path, Path]:
    """Four prompts, and a file of answers to the first two."""
    path, out = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    path.write_text(lines(*({"prompt": question} for question in QUESTIONS[:4])))
    out.write_text(answered)
    return path, out


def go_on(made: TinyBundle, path: Path, out: Path, *more: object) -> Result:
    return run(made, "--prompts", path, "-o", out, "--max-tokens", 4, *more)


def test_what_is_answered_is_skipped(made, begun) -> None:
    path, out = begun
    before = out.read_bytes()
    with out.open("ab") as file:
        file.write(b'{"index": 3, "te')  # torn
    with path.open("a") as file:
        file.write(lines("wrong"))  # a line that came since
    result = go_on(made, path, out, "--parallel", 2, "--threads", 2)
    assert result.exit_code == 1
    assert result.stderr.startswith("[3 lines done, 8 tokens at ")
    assert "2 were done before; 1 failed, the first: line 5: Cannot read" in result.stderr
    assert out.read_bytes().startswith(before)
    assert [each["index"] for each in records(out)] == [0, 1, 2, 3, 4]
    whole = out.read_bytes()
    result = go_on(made, path, out)  # nothing to do; the failure stays one
    assert result.exit_code == 1
    assert result.stderr.startswith("[0 lines done, 0 tokens at 0.0 tok/s; 5 were done before; 1")
    assert out.read_bytes() == whole


OTHER = "was answered by another bundle or under other options than these. Give those that it"


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ("", ("--temp", 1), f"line 1 {OTHER}"),
        ("bundle", (), f"line 1 {OTHER}"),
        ("edit", (), "it answers another text than"),
        ("foreign", (), "line 3 is no answer of this command, and a file was expected that it be"),
        ("pipe", (), "it is a pipe, a socket or a device, not a file."),
    ],
)
def test_another_file_is_refused_and_left_alone(made, begun, change, more, message) -> None:
    path, out = begun
    with out.open("ab") as file:
        file.write(b'{"prompt": "a"}\n' if change == "foreign" else b"")
    before: bytes | None = out.read_bytes()
    if change == "bundle":
        other = shutil.copytree(made.folder, made.folder.with_name("other"))
        rewrite(other, lambda raw: raw.update(description="another"))
        made = replace(made, folder=other)
    elif change == "edit":
        path.write_text(path.read_text().replace("thing 1", "thing one"))
    elif change == "pipe":
        out.unlink()
        os.mkfifo(out)
        before = None
    result = go_on(made, path, out, *more)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.endswith("hoose another -o FILE.\n")
    assert before is None or out.read_bytes() == before


def test_one_process_at_a_time_writes(made, begun) -> None:
    from qaflora_edge.files import cache_lock

    path, out = begun
    with cache_lock(str(out.resolve())):
        result = go_on(made, path, out)
    assert result.exit_code == 1
    assert "another process writes answers into it" in result.stderr
    assert go_on(made, path, out).exit_code == 0


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")
def test_an_interrupted_run_goes_on(made, tmp_path) -> None:
    out, path, whole = (tmp_path / name for name in ("out.jsonl", "q.jsonl", "whole.jsonl"))
    path.write_text(lines(*({"prompt": f"thing {i}", "id": i} for i in range(40))))
    options = ["--max-tokens", "60", "--prompts", str(path), "--parallel", "4", *map(str, F32)]
    assert run(made, *options, "-o", whole).exit_code == 0
    command = [sys.executable, "-m", "qaflora_edge", "run", str(made.folder), *options, "-o", out]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(
        lambda: process.poll() is not None or (out.exists() and out.read_bytes().count(b"\n") >= 3)
    )
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "lines done, " in told
    n_before = out.read_bytes().count(b"\n")
    assert 3 <= n_before < 40
    result = run(made, *options, "-o", out)
    assert result.exit_code == 0
    assert f"; {n_before} were done before]" in result.stderr
    found = records(out)
    assert [each["id"] for each in found] == list(range(40))
    assert [each["text"] for each in found] == [each["text"] for each in records(whole)]


FULL = """
mount -t tmpfs -o size=12k none "$1" || exit 77
cd "$1" && shift
"$@" -o out.jsonl; echo $?
mount -o remount,size=1m . && "$@" -o out.jsonl; echo $?
cat out.jsonl
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="it needs unshare, of Linux")
def test_a_full_disk_ends_a_run_that_goes_on_later(made, tmp_path) -> None:
    """A real one, of three pages. What was written stays, and a torn line is written again."""
    path, whole, full = (tmp_path / name for name in ("q.jsonl", "whole.jsonl", "full"))
    full.mkdir()
    path.write_text(lines(*({"prompt": f"thing {i}", "id": i} for i in range(40))))
    options = [*map(str, F32), "--max-tokens", "20", "--prompts", str(path), "--parallel", "4"]
    assert run(made, *options, "-o", whole).exit_code == 0
    assert whole.stat().st_size > 12 << 10
    place = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL, "sh", full]
    command = [sys.executable, "-m", "qaflora_edge", "run", str(made.folder), *options]
    found = subprocess.run([*place, *command], capture_output=True, text=True, timeout=PATIENCE_S)
    if found.returncode == 77 or "unshare" in found.stderr:
        pytest.skip(f"this user may not mount: {found.stderr.strip()}")
    failure = "Error: Cannot write answers into out.jsonl: the disk is full. Free some space and t"
    assert failure in found.stderr
    before, after, answers = found.stdout.split("\n", 2)
    assert (before, after) == ("1", "0")
    n_before = int(found.stderr.partition("[")[2].partition(" ")[0])
    assert n_before > 3
    assert f"; {n_before} were done before]" in found.stderr
    path.write_text(answers)
    texts = [[(each["id"], each["text"]) for each in records(file)] for file in (path, whole)]
    assert texts[0] == texts[1]
