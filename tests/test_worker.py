"""Layers on workers: exact, refused where they have to be, and there again after a failure.

The workers compute on the CPU, in ggml's own kernels where this process has ours or repacks
weights: sums of float32 in another order, with the limits of test_device.py.
"""

import contextlib
import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_backend as cpu
from bundles import TinyBundle, qaflora
from numpy.typing import NDArray
from patience import PATIENCE_S, wait_until
from rpc_workers import (
    GET_TENSOR,
    GRAPH_COMPUTE,
    SET_TENSOR,
    VERSION,
    Worker,
    hello,
    pretender,
    relay,
    worker,
)
from serving import ENGINE, client_of, free_port
from stock import write_merged
from tiny import TinyAdapter, TinyBase, write_tiny_adapter, write_tiny_base

from qaflora_edge import Engine
from qaflora_edge.backend import library
from qaflora_edge.backend.model import Model
from qaflora_edge.errors import OptionError, WorkerError
from qaflora_edge.formats.base import read_base
from qaflora_edge.formats.gguf import GgufHeader

TOKENS = cpu.TOKENS
NEAR = 1e-4  # logits and states are of size 1 to 5
ALL, SOME = 99, 2  # of three layers: all, and the last two
LETTERS = "root ::= [a-z]{60}"  # an answer of many tokens
base, adapters, weights = cpu.base, cpu.adapters, cpu.weights
POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGSTOP")
CLIENT = """
import sys
from qaflora_edge import Engine

with Engine(base=sys.argv[1], adapters={}, rpc=sys.argv[2]) as engine:
    print("open", flush=True)
    input()
    print(engine.logits([1, 2, 3]).any())
"""


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Worker]]:
    folder = tmp_path_factory.mktemp("workers")
    with worker(folder) as first, worker(folder) as second:
        yield [first, second]


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One that no client has: what test_backend opens stays open."""
    with worker(tmp_path_factory.mktemp("free")) as made:
        yield made


@pytest.fixture(params=[1, 2], ids=["one-worker", "two-workers"])
def rpc(request: pytest.FixtureRequest, workers: list[Worker]) -> str:
    return ",".join(each.endpoint for each in workers[: request.param])


@pytest.fixture(params=[ALL, SOME], ids=["all-layers", "some-layers"])
def gpu_layers(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(autouse=True)
def placed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let test_backend's helpers put layers on the workers, where they are to be on devices."""
    if "rpc" in request.fixturenames:
        rpc = request.getfixturevalue("rpc")

        def model(header: GgufHeader, gpu_layers: int) -> Model:
            return Model(header, gpu_layers=gpu_layers, rpc=rpc if gpu_layers else None)

        monkeypatch.setattr(cpu, "Model", model)


def assert_near(found: NDArray[np.floating], expected: NDArray[np.floating]) -> None:
    np.testing.assert_allclose(found, expected, atol=NEAR, rtol=0)


def files_of(adapters: list[TinyAdapter]) -> dict[str, Path]:
    return {name: adapter.path for name, adapter in zip("abc", adapters, strict=True)}


# what is computed there


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
def test_fused_logits_equal_a_merged_base(tmp_path, arch, weights, rpc, gpu_layers) -> None:
    base = write_tiny_base(tmp_path / "base.gguf", arch)
    adapters = [
        write_tiny_adapter(tmp_path / f"{rank}.gguf", base, rank=rank, seed=rank)
        for rank in (4, 16, 5)
    ]
    expected = cpu.stock_logits(write_merged(tmp_path / "merged.gguf", base, adapters, weights))
    assert np.abs(expected - cpu.stock_logits(base)).max() > 0.1  # the adapters do something
    assert_near(cpu.fused_logits(base, adapters, weights, gpu_layers=gpu_layers), expected)


def test_head_and_embedding_are_adapted_here(tmp_path, weights, rpc, gpu_layers) -> None:
    base, adapters, expected = cpu.with_adapted_ends(tmp_path, weights)
    assert_near(cpu.fused_logits(base, adapters, weights, gpu_layers=gpu_layers), expected)


def test_probe_states_equal_separate_passes(base, adapters, rpc, gpu_layers) -> None:
    single = cpu.single_states(base, adapters, TOKENS)
    for pool, expected in (("last", single[-1]), ("mean", single.mean(axis=0))):
        for differential in (False, True):
            found = cpu.probe_states(
                base, adapters, TOKENS, differential=differential, pool=pool, gpu_layers=gpu_layers
            )
            assert_near(found, expected)


def test_engine_agrees_with_layers_here(base, adapters, rpc) -> None:
    """F16 keys and values: a last bit of one is 1e-3 of it."""
    files = files_of(adapters)
    with (
        Engine(
            base=base.path, adapters=files, rpc=rpc, tensor_split="1,2" if "," in rpc else "1"
        ) as there,
        Engine(base=base.path, adapters=files, gpu_layers=0) as here,
    ):
        found, expected = there.weights(TOKENS), here.weights(TOKENS)
        np.testing.assert_allclose(found.weights, expected.weights, atol=2e-3)
        logits = here.logits(TOKENS, weights=expected)
        np.testing.assert_allclose(there.logits(TOKENS, weights=expected), logits, atol=2e-2)
        assert len(there.generate(TOKENS, grammar=LETTERS).text()) == 60


# what is sent


@pytest.mark.slow
def test_large_tensors_are_kept_and_not_sent_again(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base.gguf", n_layer=1, n_ff=48_000)  # 12 MB: three of them
    folder = tmp_path / "new" / "cache"
    with worker(tmp_path, "--cache", str(folder)) as made, relay(made) as between:
        sent, logits = [], []
        for _ in range(2):
            between.forget()
            with Engine(base=base.path, adapters={}, rpc=between.endpoint, threads=1) as engine:
                logits.append(engine.logits(TOKENS))
            sent.append(between.n_sent)
        assert len(list(folder.iterdir())) == 3
    assert sent[0] > 36e6
    assert sent[1] < 1e6
    np.testing.assert_array_equal(*logits)


@pytest.mark.slow
def test_worker_survives_what_it_refuses(tmp_path: Path) -> None:
    """A client that is not ours, with an address of its own."""
    lib = library.load()[0]._lib
    lib.ggml_op_name.restype = ctypes.c_char_p
    custom = next(op for op in range(200) if lib.ggml_op_name(op) == b"CUSTOM")
    node = struct.pack("<QIQ", 1, 0, 0) + struct.pack("<4I", 4, 1, 1, 1)
    node += struct.pack("<4I", 4, 16, 16, 16) + struct.pack("<I", custom) + b"\xff" * 64
    node += bytes(4 + 10 * 8 + 3 * 8 + 64 + 4)
    graph = struct.pack("<II", 0, 1) + struct.pack("<Q", 1) + struct.pack("<I", 1) + node
    with worker(tmp_path) as lonely:
        client, _, build = hello(lonely.port, b"")
        client.close()
        client, _, _ = hello(lonely.port, build)
        with client:
            client.sendall(struct.pack("<BQ", GRAPH_COMPUTE, len(graph)) + graph)
            assert client.recv(1) == b""
        wait_until(lambda: "refused the custom operation of a client" in lonely.log.read_text())
        for size in ((1 << 64) - 1, (1 << 40) + 1, 1 << 40):  # the last may be, and does not come
            client, _, _ = hello(lonely.port, build)
            with client:
                client.sendall(struct.pack("<BQ", SET_TENSOR, size))
                client.shutdown(socket.SHUT_WR)
                assert client.recv(1) == b""
        assert "Refused a message of 18446744073709551615 bytes" in lonely.log.read_text()
        assert lonely.process.poll() is None


# failures


@pytest.mark.slow
def test_killed_worker_ends_all_answers_of_its_engine(tmp_path, base, adapters) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(worker(tmp_path))
        rpc = first.endpoint
        engine = stack.enter_context(Engine(base=base.path, adapters=files_of(adapters), rpc=rpc))
        expected = engine.logits(TOKENS)
        answer = engine.generate(TOKENS, grammar=LETTERS)
        next(answer)
        first.process.kill()
        first.process.wait(PATIENCE_S)
        with pytest.raises(WorkerError, match=f"The worker {rpc} ended the connection, has s"):
            answer.text()
        assert answer.finish_reason == "error"
        with pytest.raises(WorkerError):
            engine.generate(TOKENS)
        stack.enter_context(worker(tmp_path, port=first.port))
        with pytest.raises(WorkerError, match="start this program again, or make a new Engine"):
            engine.logits(TOKENS)
        with Engine(base=base.path, adapters=files_of(adapters), rpc=rpc) as new:
            np.testing.assert_array_equal(new.logits(TOKENS), expected)


@pytest.mark.slow
@POSIX
def test_silent_worker_is_lost_after_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base, adapters
) -> None:
    """Stopped, it keeps its connection; once it goes on, it is free for others."""
    monkeypatch.setenv("QAFLORA_RPC_TIMEOUT", "2")
    options: dict[str, Any] = {"base": base.path, "adapters": files_of(adapters)}
    with worker(tmp_path) as made, Engine(**options, rpc=made.endpoint) as engine:
        answer = engine.generate(TOKENS, grammar=LETTERS)
        next(answer)
        made.process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(WorkerError, match=r"has sent nothing for 2 s, or .* is slow, set QAFL"):
            answer.text()
        assert 1.5 < time.monotonic() - start < 20
        with pytest.raises(WorkerError):
            engine.generate(TOKENS)
        made.process.send_signal(signal.SIGCONT)
        with Engine(**options, rpc=made.endpoint) as new:  # while the other is still open
            assert len(new.generate(TOKENS, grammar=LETTERS).text()) == 60


@pytest.mark.slow
@POSIX
def test_stopped_client_keeps_its_worker(tmp_path: Path, base: TinyBase) -> None:
    """What it waits for with a time limit is interrupted when it goes on."""
    with worker(tmp_path) as made:
        command = [sys.executable, "-c", CLIENT, str(base.path), made.endpoint]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
            assert client.stdout.readline() == b"open\n"
            made.process.send_signal(signal.SIGSTOP)
            client.stdin.write(b"\n")
            client.stdin.flush()
            time.sleep(0.5)  # it waits for the worker then; later it would not be interrupted
            for number in (signal.SIGSTOP, signal.SIGCONT):
                client.send_signal(number)
                time.sleep(0.2)
            made.process.send_signal(signal.SIGCONT)
            assert client.stdout.readline() == b"True\n"


def test_lost_connection_ends_all_that_is_decoded(base, adapters, free) -> None:
    """In the middle of a token: nothing of it is taken for a number."""
    with relay(free) as between:
        options = {"rpc": between.endpoint, "n_parallel": 2}
        with Engine(base=base.path, adapters=files_of(adapters), **options) as engine:
            answers = [engine.generate(TOKENS, grammar=LETTERS) for _ in range(2)]
            for answer in answers:
                next(answer)
            between.before = lambda sent: sent != GET_TENSOR
            for answer in answers:
                with pytest.raises(WorkerError):
                    answer.text()


def test_server_says_503_once_a_worker_is_lost(made: TinyBundle, free: Worker) -> None:
    with relay(free) as between:
        engine = {**ENGINE, "rpc": between.endpoint}
        with client_of(made.folder, engine=engine) as client:

            def status() -> int:
                answer = client.post("/v1/completions", json={"prompt": "How", "max_tokens": 1})
                if answer.status_code != 200:
                    assert answer.json()["error"]["code"] == "model_unavailable"
                    assert "Retry-After" in answer.headers
                    assert between.endpoint not in answer.text
                return answer.status_code

            assert status() == 200
            between.before = lambda sent: False
            assert [status(), status()] == [503, 503]


# refusals


@pytest.mark.parametrize(
    ("version", "build", "said"),
    [
        ((6, 0, 0), b"", "it speaks version 6.0 of the protocol, expected 7.0"),
        (VERSION, b"", "it is of the build '', expected '"),
    ],
)
def test_worker_of_another_build_is_refused(base, version, build, said) -> None:
    with pretender(version, build) as endpoint, pytest.raises(WorkerError) as caught:
        Model(read_base(base.path), rpc=endpoint)
    assert f"The worker {endpoint} cannot be used: {said}" in str(caught.value)
    assert "Start `qaflora worker` of this version there." in str(caught.value)


@pytest.mark.slow
def test_worker_refuses_clients_of_another_build(tmp_path: Path) -> None:
    with worker(tmp_path) as lonely:
        client, version, build = hello(lonely.port, b"another")
        with client:
            assert version == VERSION
            assert len(build) == 23  # of a commit and of our sources: 10 and 12 digits
            assert client.recv(1) == b""
        expected = f"Refused a client of the build 'another', expected '{build.decode()}'"
        wait_until(lambda: expected in lonely.log.read_text())


def test_nothing_is_there(base: TinyBase) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    with pytest.raises(WorkerError) as caught:
        Model(read_base(base.path), rpc=endpoint)
    assert str(caught.value) == (
        f"The worker {endpoint} cannot be used: nothing answers there. Start `qaflora worker` of "
        "this version there."
    )


@pytest.mark.parametrize("text", ["host", "host:65536", "a:1,", "a:1,a:1"])
def test_wrong_name_of_a_worker(base: TinyBase, text: str) -> None:
    with pytest.raises(
        OptionError, match=r"expected HOST:PORT|expected up to 16 different workers"
    ):
        Model(read_base(base.path), rpc=text)


@pytest.mark.parametrize("text", ["x", "-1", "1.5"])
def test_wrong_timeout(base: TinyBase, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("QAFLORA_RPC_TIMEOUT", text)
    with pytest.raises(OptionError, match=f"RPC_TIMEOUT is '{text}', expected a whole number of s"):
        Model(read_base(base.path), rpc="127.0.0.1:1")


@pytest.mark.parametrize("split", ["x", "0", "1,nan", "1,1"])
def test_wrong_split(base: TinyBase, workers: list[Worker], split: str) -> None:
    with pytest.raises(OptionError, match=r"Option tensor_split is .* expected 1 numbers from 0"):
        Model(read_base(base.path), rpc=workers[0].endpoint, tensor_split=split)


# the command


def test_beyond_this_machine_is_refused() -> None:
    for host, said in (
        ("0.0.0.0", "can be reached from other machines, and the protocol has no password"),
        ("localhost", "--host is 'localhost', expected an IPv4 address."),
    ):
        result = qaflora("worker", "--host", host)
        assert (result.exit_code, said in result.output) == (2, True)
