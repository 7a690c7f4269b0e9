"""qaflora serve: as a program that is started, asked and ended."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from bundles import make_bundle, qaflora
from patience import PATIENCE_S, wait_until

READY = r"Page: (http://\S+:\d+)/  API: \1/v1  Models: tiny, tiny:base$"
SLOW: dict[str, Any] = {"n_layer": 16, "n_embd": 256, "n_ff": 1024, "n_head": 8, "n_head_kv": 8}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """So large that an answer of its whole context takes a while."""
    return make_bundle(tmp_path_factory.mktemp("serve"), n_ctx=8192, **SLOW).folder


@contextlib.contextmanager
def serving(
    *words: str, program: Sequence[str] = ("-m", "qaflora_edge")
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program, and its address."""
    command = [sys.executable, *program, "serve", *words, "--port", "0"]
    command += ["--threads", "1", "--parallel", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(READY, line):
                    break
            else:
                raise AssertionError("it did not listen")
            yield process, found[1]
        finally:
            process.kill()


def long_body(**more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "the thing?"}]
    return {"messages": messages, "stream": True, "logit_bias": {"65": 100}, **more}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_lets_end_what_runs(bundle, number, code) -> None:
    with serving(str(bundle), "--ctx", "600") as (process, address):
        url = f"{address}/v1/chat/completions"
        body = long_body(max_tokens=100)
        with httpx.stream("POST", url, json=body, timeout=PATIENCE_S) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(number)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        text = [json.loads(line.removeprefix("data: "))["choices"][0] for line in rest[:-1]]
        assert "".join(choice["delta"].get("content", "") for choice in text) == "A" * 100
        assert process.wait(PATIENCE_S) == code
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health", timeout=PATIENCE_S)


@pytest.mark.slow
def test_a_stuck_step_ends_with_the_process(bundle) -> None:
    """After the announced time, whatever still computes."""
    code = (
        "import time\n"
        "from qaflora_edge.server import respond, run; run.DRAIN_S = run.CUT_S = 0.3\n"
        "def fail(*a, **k): time.sleep(999)\n"
        "respond.Engine.submit_all = fail\n"
        "from qaflora_edge.cli import main; main()"
    )
    with serving(str(bundle), "--ctx", "600", program=["-c", code]) as (process, address):
        url = f"{address}/v1/chat/completions"
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.stream("POST", url, json=long_body(), timeout=PATIENCE_S) as response,
        ):
            lines = response.iter_lines()
            assert next(lines) == ": ping"
            process.send_signal(signal.SIGTERM)
            list(lines)
        assert process.wait(PATIENCE_S) == 1


def is_deaf(address: str) -> bool:
    """Whether it listens no more; who stood in the queue as it ended is reset, and asks again."""
    try:
        httpx.get(f"{address}/health", timeout=PATIENCE_S)
    except httpx.TransportError as error:
        return isinstance(error, httpx.ConnectError)
    return False


@pytest.mark.slow
def test_a_second_signal_ends_at_once(bundle) -> None:
    with serving(str(bundle), "--ctx", "8000") as (process, address):
        url = f"{address}/v1/chat/completions"
        seen: list[str] = []
        begun = threading.Event()

        def ask() -> None:
            with (
                contextlib.suppress(httpx.TransportError),
                httpx.stream("POST", url, json=long_body(), timeout=PATIENCE_S) as response,
            ):
                for line in response.iter_lines():
                    seen.append(line)
                    begun.set()

        thread = threading.Thread(target=ask)
        thread.start()
        assert begun.wait(PATIENCE_S)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: is_deaf(address))
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        thread.join()
        assert "data: [DONE]" not in seen
        assert process.stderr is not None
        log = process.stderr.read()
        assert "Traceback" not in log
        assert "ended in the middle of an answer" in log


def test_a_port_that_is_taken_is_named(bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = qaflora("serve", bundle, "--port", port)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f"Error: Cannot listen at 127.0.0.1 port {port}: Address already in use. Choose an address "
        "of this machine and a free port (--host, --port)."
    )


@pytest.mark.parametrize("spoil", ["sys.modules['starlette'] = None", "sys.path.insert(0, '.')"])
def test_a_missing_or_broken_extra_is_told(bundle, spoil, tmp_path) -> None:
    (tmp_path / "uvicorn.py").write_text("raise ImportError('libssl is too old')\n")
    lines = f"import sys; {spoil}; from qaflora_edge.cli import main"
    command = [sys.executable, "-c", f"{lines}; main()", "serve", str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert re.match("Error: qaflora serve cannot load a package: .*(starlette|libssl)", done.stderr)
    assert done.stderr.endswith("Install them with: pip install 'qaflora-edge[server]'.\n")
