"""qaflora chat --server: what it answers is what the same chat answers with the bundle itself."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from bundles import bundle_json, make_bundle
from click.testing import CliRunner, Result
from patience import wait_until
from serving import ENGINE, listening

from qaflora_edge.backend.context import Context
from qaflora_edge.cli import main
from qaflora_edge.cli.chat.remote import RemoteEngine, Server
from qaflora_edge.cli.chat.reply import Reply
from qaflora_edge.errors import PromptError, ServerError, StrategyError

KEY = "correct-horse"
GREEDY = ("--temp", "0", "--max-tokens", "6")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("remote"), n_ctx=512).folder


@pytest.fixture(scope="module")
def address(bundle: Path) -> Iterator[str]:
    with listening(bundle) as address:
        yield address


def chat(lines: str, *args: str, **more: str) -> Result:
    return CliRunner().invoke(main, ["chat", *args, *GREEDY], input=lines, env=more)


def without_times(text: str) -> str:
    return re.sub(r"[\d.]+ (tok/s|s\b)", r"N \1", text)


@pytest.mark.parametrize(
    "lines",
    [
        "the thing\n\nand then\n",
        "the thing\n/retry\n/undo\nanother\n",
        "the thing\n/strategy static\n/retry\n/strategy single:es\nand then\n",
        "the thing\n/off es\nand then\n/on es\n/adapters\n",
        "/system be\nthe thing\n/context\n",
        "/strategy manual:es=0.5,math=-0.25\nthe thing\n/retry\nand then\n",
        "/strategy base\n/adapters off\nthe thing\n/retry\n/weights\n",
        "the thing\n/strategy calibrated\n/strategy nothing\n/off who\nand then\n",
    ],
)
def test_the_same_lines_give_the_same_answers(bundle: Path, address: str, lines: str) -> None:
    local = chat(lines, str(bundle), "--ctx", "512", "--kv-type", "f32", "--threads", "1")
    remote = chat(lines, "--server", address)
    assert (remote.exit_code, remote.stdout) == (local.exit_code, local.stdout)
    ours, theirs = (without_times(each.stderr).splitlines() for each in (local, remote))
    same = [line for line in ours if "cannot be followed" not in line and "calibrated" not in line]
    assert set(same) <= set(theirs)
    assert len(ours) == len(theirs)


def test_long_conversations_lose_their_oldest_turns(bundle: Path, address: str) -> None:
    lines = "".join(f"{i} {'the thing ' * 12}\n" for i in range(6))
    local = chat(lines, str(bundle), "--ctx", "512", "--kv-type", "f32", "--threads", "1")
    remote = chat(lines, "--server", address)
    assert "the context is full: the oldest" in remote.stderr
    assert remote.stdout == local.stdout


def test_progress_is_told_as_by_the_engine(bundle: Path, address: str) -> None:
    from qaflora_edge import Engine

    theirs: list[tuple[str, int, int]] = []
    ours: list[tuple[str, int, int]] = []
    remote = RemoteEngine(Server(address), None)
    tokens = remote.tokenize("how far is it " * 20)
    answer = remote.generate(tokens, max_tokens=3, on_progress=lambda *told: theirs.append(told))
    with Engine(bundle, **ENGINE) as engine:  # type: ignore[arg-type]
        expected = engine.generate(
            tokens, max_tokens=3, on_progress=lambda *told: ours.append(told)
        )
        assert np.array_equal(answer.fusion.weights, expected.fusion.weights)
        assert "".join(answer) == expected.text()
    assert theirs == list(dict.fromkeys(ours))
    assert {stage for stage, _, _ in theirs} == {"weighing", "reading"}


def test_a_session_goes_on_on_the_other_side(bundle: Path, address: str, tmp_path: Path) -> None:
    path = str(tmp_path / "talk.json")
    assert chat(f"the thing\n/save {path}\n", "--server", address, "tiny").exit_code == 0
    own = (str(bundle), "--ctx", "512", "--kv-type", "f32", "--threads", "1")
    local = chat("and then\n", *own, "--load", path)
    assert "saved with another bundle" not in local.stderr
    assert local.stdout == chat("and then\n", "--server", address, "--load", path).stdout


def test_a_strategy_may_be_part_of_the_name(address: str) -> None:
    by_name = chat("the thing\n", "--server", address, "tiny:single:es")
    by_option = chat("the thing\n", "--server", f"{address}/v1", "--strategy", "single:es")
    assert by_name.exit_code == by_option.exit_code == 0
    assert by_name.stdout == by_option.stdout
    assert "es 100 %" in by_name.stderr


def test_weights_by_hand_may_be_the_servers_default(bundle: Path, address: str) -> None:
    with listening(bundle, engine={**ENGINE, "strategy": "manual:es=0.5"}) as other:
        ours = chat("the thing\n", "--server", other)
    theirs = chat("the thing\n", "--server", address, "--strategy", "manual:es=0.5")
    assert (ours.exit_code, ours.stdout) == (0, theirs.stdout)
    assert ours.stdout.strip()


def test_a_base_alone_answers(bundle: Path) -> None:
    base = bundle / bundle_json(bundle)["base"]["file"]
    local = chat("the thing\n/retry\n", str(base), "--ctx", "512", "--kv-type", "f32")
    with listening(base) as address:
        remote = chat("the thing\n/retry\n", "--server", address)
    assert (remote.exit_code, remote.stdout) == (0, local.stdout)


class _Other(BaseHTTPRequestHandler):
    """A server of something else."""

    body, n_byte = b"", 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(self.n_byte or len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("body", "n_byte", "message"),
    [
        (b"<html>", 0, "answers with what cannot be read, expected the JSON of `qaflora serve`."),
        (b"[1]", 0, "answers with what cannot be read, expected the JSON of `qaflora serve`."),
        (b'{"data": [{"id": 3}]}', 0, "answers with what cannot be read, expected the JSON of"),
        (b'{"data', 99, "cannot be reached: IncompleteRead(6 bytes read, 93 more expected)."),
    ],
)
def test_what_is_no_server_of_ours_is_said(body: bytes, n_byte: int, message: str) -> None:
    handler = type("Other", (_Other,), {"body": body, "n_byte": n_byte})
    with HTTPServer(("127.0.0.1", 0), handler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{other.server_port}"
            result = chat("the thing\n", "--server", address)
        finally:
            other.shutdown()
            thread.join()
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: The server {address} {message}")


def test_the_key_comes_from_the_environment(bundle: Path) -> None:
    with listening(bundle, api_key=KEY) as address:
        assert chat("the thing\n", "--server", address, QAFLORA_API_KEY=KEY).exit_code == 0
        result = chat("the thing\n", "--server", address, QAFLORA_API_KEY="wrong-horse")
        assert result.exit_code == 1
        assert result.stderr == (
            f"Error: The server {address} answered 401: The API key is missing or wrong, expected "
            "the header Authorization: Bearer KEY. Set QAFLORA_API_KEY.\n"
        )


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "Error: Missing argument 'DIR'."),
        (("--server", "ftp://x"), 1, "Error: Option server is 'ftp://x', expected an address such"),
        (("--server", "http://[::1"), 1, "Error: Option server is 'http://[::1', expected an add"),
        (("--server", "http://a b"), 1, "Error: Option server is 'http://a b', expected an addres"),
        (("--server", "a:port"), 1, "Error: Option server is 'a:port', expected an address such"),
        (("--server", "a..b"), 1, "Error: The server http://a..b cannot be reached:"),
        (("--server", "127.0.0.1:1"), 1, "Error: The server http://127.0.0.1:1 cannot be reached:"),
        (("--server", "ADDRESS", "other"), 1, "Error: The model is 'other', and ADDRESS has tiny,"),
        (("--server", "ADDRESS", "--ctx", "9"), 2, "Error: --ctx is the server's matter: give it"),
        (("--server", "ADDRESS", "--keep-history"), 2, "Error: --keep-history is the server's mat"),
        (("--server", "ADDRESS", "--strategy", "x"), 1, "Error: Strategy 'x' is not known;"),
    ],
)
def test_what_cannot_be_is_said(
    address: str, words: tuple[str, ...], code: int, message: str
) -> None:
    result = chat("the thing\n", *(address if word == "ADDRESS" else word for word in words))
    assert result.exit_code == code
    assert result.stderr.splitlines()[-1].startswith(message.replace("ADDRESS", address))


def test_commands_that_are_the_servers_matter_say_so(address: str) -> None:
    result = chat("/ctx 100\n/keep-history on\nthe thing\n", "--server", address)
    assert "The context of 512 tokens is the server's; start that with another --ctx." in (
        result.stderr
    )
    assert "a server reads each turn under its own weights" in result.stderr
    assert result.stdout.strip()


def test_an_answer_is_stopped_there_too(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []
    decode = Context.decode_spans

    def slow(self: Context, spans: object) -> object:
        times.append(time.monotonic())
        time.sleep(0.02)
        return decode(self, spans)  # type: ignore[arg-type]

    monkeypatch.setattr(Context, "decode_spans", slow)
    engine = RemoteEngine(Server(address), None)
    tokens = engine.tokenize("the thing")
    options = {"temperature": 0.0, "logit_bias": {"65": 100}}
    reply = Reply(lambda: engine.generate(tokens, **options), engine.cancel)  # type: ignore[arg-type,return-value]
    with reply:
        for piece in reply.pieces(lambda: None):
            assert piece.strip("A") == ""
            if len(reply.text) > 3:
                reply.stop()
    wait_until(lambda: times[-1] < time.monotonic() - 0.3)
    assert len(times) < 400
    assert engine.generate(tokens, max_tokens=2, **options).fusion.adapters == ("math", "es")
    engine.close()


@pytest.mark.parametrize("left", [b"", b'data: {"choices": [{"te', b"data: {}\n\n"])
def test_a_server_that_goes_away_is_no_stop(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bytes
) -> None:
    def readline(self: HTTPResponse, limit: int) -> bytes:
        line = read(self, limit)
        return left if b'"usage":{' in line else line

    read = HTTPResponse.readline
    monkeypatch.setattr(HTTPResponse, "readline", readline)
    result = chat(f"the thing\n/save {tmp_path}/a.json\n", "--server", address)
    reason = "answers with what" if left.endswith(b"\n") else "cannot be reached: it went away"
    assert result.stderr.startswith(f"Error: The server {address} {reason}")
    assert "[0 turns saved" in result.stderr


def test_what_the_server_says_of_a_failure_is_told(address: str) -> None:
    engine = RemoteEngine(Server(address), "tiny")
    with pytest.raises(PromptError) as wrong:
        engine.generate([99999], temperature=0.0)
    assert str(wrong.value) == "Token 0 of the prompt is 99999, expected an id from 0 to 270."
    with pytest.raises(ServerError) as caught:
        engine.generate([65], temperature=-1.0)
    assert str(caught.value) == (
        f"The server {address} answered 400: Option temperature is -1.0, expected a number from 0 "
        "up."
    )
    with pytest.raises(StrategyError, match="Strategy 'calibrated' cannot be followed by tiny at"):
        engine.use_strategy("calibrated")
    engine.use_adapters(["es"])
    answer = engine.generate(engine.tokenize("the"), temperature=0.0, max_tokens=3)
    text = "".join(answer)
    assert answer.fusion.adapters == ("es",)
    assert (answer.n_prompt, answer.n_completion) == (1, 3) or answer.finish_reason == "stop"
    assert text
