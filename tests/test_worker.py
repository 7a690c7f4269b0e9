"""Layers on workers: exact, refused where they have to be; a lost one ends the process.

The workers compute on the CPU, in ggml's own kernels where this process has ours or repacks
weights: sums of float32 in another order, with the limits of test_device.py.
"""

import contextlib
import ctypes
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import test_backend as cpu
import test_device as device
from bundles import qaflora
from numpy.typing import NDArray
from patience import PATIENCE_S, wait_until
from refusals import refused
from rpc_workers import GRAPH_COMPUTE, Worker, hello, pretender, relay, worker
from serving import free_port
from tiny import TinyAdapter, TinyBase, write_tiny_base

from qaflora_edge import Engine
from qaflora_edge.backend import devices, library
from qaflora_edge.backend.model import Model
from qaflora_edge.errors import OptionError, WorkerError
from qaflora_edge.formats.base import read_base
from qaflora_edge.formats.gguf import GgufHeader

TOKENS = cpu.TOKENS
NEAR = 1e-4  # logits and states are of size 1 to 5
LETTERS = "root ::= [a-z]{60}"  # an answer of many tokens
base, adapters, weights = cpu.base, cpu.adapters, cpu.weights
gpu_layers = device.gpu_layers
POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGSTOP")
CLIENT = """
import sys
from qaflora_edge import Engine

with Engine(base=sys.argv[1], adapters={}, rpc=sys.argv[2]) as engine:
    print("open", flush=True)
    input()
    print(engine.logits([1, 2, 3]).any(), flush=True)
"""


@pytest.fixture(scope="module")
def workers(tmp_path_factory) -> Iterator[list[Worker]]:
    folder = tmp_path_factory.mktemp("workers")
    with worker(folder) as first, worker(folder) as second:
        yield [first, second]


@pytest.fixture(params=[1, 2], ids=["one-worker", "two-workers"])
def rpc(request, workers) -> str:
    return ",".join(each.endpoint for each in workers[: request.param])


@pytest.fixture(autouse=True)
def placed(request, monkeypatch) -> None:
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


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
def test_fused_logits_equal_a_merged_base(tmp_path, arch, weights, rpc, gpu_layers) -> None:
    base, adapters, expected = cpu.with_adapters(tmp_path, arch, weights)
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


@pytest.mark.slow
def test_large_tensors_are_kept_and_not_sent_again(tmp_path) -> None:
    base = write_tiny_base(tmp_path / "base.gguf", n_layer=1, n_ff=48_000)  # 12 MB: three of them
    folder = tmp_path / "new" / "cache"
    with worker(tmp_path, "--cache", str(folder)) as made, relay(made) as between:
        sent, logits = [], []
        for _ in range(2):
            before = between.n_sent
            with Engine(base=base.path, adapters={}, rpc=between.endpoint, threads=1) as engine:
                logits.append(engine.logits(TOKENS))
            sent.append(between.n_sent - before)
        assert len(list(folder.iterdir())) == 3
    assert sent[0] > 36e6
    assert sent[1] < 1e6
    np.testing.assert_array_equal(*logits)


@pytest.mark.slow
def test_worker_refuses_custom_operations(tmp_path) -> None:
    """Of a client that is not ours, with an address of its own."""
    lib = library.load()[0]._lib
    lib.ggml_op_name.restype = ctypes.c_char_p
    custom = next(op for op in range(200) if lib.ggml_op_name(op) == b"CUSTOM")
    node = struct.pack("<QIQ", 1, 0, 0) + struct.pack("<4I", 4, 1, 1, 1)
    node += struct.pack("<4I", 4, 16, 16, 16) + struct.pack("<I", custom) + b"\xff" * 64
    node += bytes(4 + 10 * 8 + 3 * 8 + 64 + 4)
    graph = struct.pack("<II", 0, 1) + struct.pack("<Q", 1) + struct.pack("<I", 1) + node
    with worker(tmp_path) as lonely:
        client, build = hello(lonely.port)
        with client:
            assert build.decode() == devices.build()
            client.sendall(struct.pack("<BQ", GRAPH_COMPUTE, len(graph)) + graph)
            assert client.recv(1) == b""
        wait_until(lambda: "refused the custom operation of a client" in lonely.log.read_text())
        assert lonely.process.poll() is None


@contextlib.contextmanager
def client_of(base: TinyBase, worker: Worker, **environment: str) -> Iterator[subprocess.Popen]:
    """A process that has a base on a worker, and computes once it is given a line."""
    command = [sys.executable, "-c", CLIENT, str(base.path), worker.endpoint]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes, env={**os.environ, **environment}) as client:
        assert client.stdout.readline() == b"open\n"
        yield client
        client.kill()


@pytest.mark.slow
@pytest.mark.parametrize("is_silent", [False, pytest.param(True, marks=POSIX)])
def test_lost_worker_ends_the_process(tmp_path, base, is_silent) -> None:
    """Stopped, it keeps its connection; once it goes on, it is free for others."""
    with worker(tmp_path) as made, client_of(base, made, QAFLORA_RPC_TIMEOUT="2") as client:
        made.process.send_signal(signal.SIGSTOP if is_silent else signal.SIGKILL)
        output, said = client.communicate(b"\n", PATIENCE_S)
        assert (client.returncode, output) == (1, b"")
        why = "has sent nothing for 2 s" if is_silent else "ended the connection, or its machine"
        assert said.decode().startswith(f"Error: The worker {made.endpoint} {why}")
        if is_silent:
            made.process.send_signal(signal.SIGCONT)
            with client_of(base, made) as other:
                assert other.communicate(b"\n", PATIENCE_S)[0] == b"True\n"


@pytest.mark.slow
@POSIX
def test_stopped_client_keeps_its_worker(tmp_path, base) -> None:
    """What it waits for with a time limit is interrupted when it goes on."""
    with worker(tmp_path) as made, client_of(base, made, QAFLORA_RPC_TIMEOUT="20") as client:
        made.process.send_signal(signal.SIGSTOP)
        client.stdin.write(b"\n")
        client.stdin.flush()
        time.sleep(0.5)  # it waits for the worker then; later it would not be interrupted
        for number in (signal.SIGSTOP, signal.SIGCONT):
            client.send_signal(number)
            time.sleep(0.2)
        made.process.send_signal(signal.SIGCONT)
        assert client.stdout.readline() == b"True\n"


def test_worker_of_another_build_is_refused(base) -> None:
    with pretender(b"another") as endpoint:
        assert refused(WorkerError, Model, read_base(base.path), rpc=endpoint) == (
            f"The worker {endpoint} cannot be used: it is of the build 'another', expected "
            f"'{devices.build()}'. Start `qaflora worker` of this version there."
        )


def test_busy_worker_is_refused(tmp_path, base, monkeypatch) -> None:
    monkeypatch.setattr(devices, "GREETING_S", 0.2)
    with worker(tmp_path) as lonely:
        client, _ = hello(lonely.port)
        with client, pytest.raises(WorkerError, match="as a worker: it serves another client"):
            Model(read_base(base.path), rpc=lonely.endpoint)


def test_nothing_is_there(base) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    assert refused(WorkerError, Model, read_base(base.path), rpc=endpoint) == (
        f"The worker {endpoint} cannot be used: nothing answers there. Start `qaflora worker` of "
        "this version there."
    )


@pytest.mark.parametrize("text", ["host", "host:65536", "a:1,", "a:1,a:1"])
def test_wrong_name_of_a_worker(base, text) -> None:
    told = "expected HOST:PORT|expected up to 16 different workers"
    with pytest.raises(OptionError, match=told):
        Model(read_base(base.path), rpc=text)


@pytest.mark.parametrize("text", ["x", "-1", "1.5"])
def test_wrong_timeout(base, monkeypatch, text) -> None:
    monkeypatch.setenv("QAFLORA_RPC_TIMEOUT", text)
    with pytest.raises(OptionError, match=f"RPC_TIMEOUT is '{text}', expected a whole number of s"):
        Model(read_base(base.path), rpc="127.0.0.1:1")


@pytest.mark.parametrize("split", ["x", "0", "1,nan", "1,1"])
def test_wrong_split(base, workers, split) -> None:
    with pytest.raises(OptionError, match=r"Option tensor_split is .* expected 1 numbers from 0"):
        Model(read_base(base.path), rpc=workers[0].endpoint, tensor_split=split)


def test_beyond_this_machine_is_refused() -> None:
    for host, said in (
        ("0.0.0.0", "can be reached from other machines, and the protocol has no password"),
        ("localhost", "--host is 'localhost', expected an IPv4 address."),
    ):
        result = qaflora("worker", "--host", host)
        assert (result.exit_code, said in result.output) == (2, True)
