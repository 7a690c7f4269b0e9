"""The native library under damaged files: it may refuse them, and must not end the process."""

import os
import signal
import sys
import traceback
from functools import cache
from pathlib import Path

import numpy as np

from qaflora_edge.backend.context import Context
from qaflora_edge.backend.library import load
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.errors import BackendError, QafloraError
from qaflora_edge.formats.adapter import read_adapter_gguf
from qaflora_edge.formats.base import read_base
from qaflora_edge.formats.gguf import read_values

TOKENS = (72, 101, 108, 108)
# The build with sanitizers has asserts, and ggml's are against activations that are not finite.
HAS_ASSERTS = "ASAN_OPTIONS" in os.environ
LARGEST_TAME = 100.0
SECONDS_PER_BASE = 20
REFUSED = 3  # exit code of a child


@cache
def _model(path: Path) -> Model:
    return Model(read_base(path), gpu_layers=0)


def use_adapter(base_path: Path, adapter_path: Path) -> None:
    """Load an adapter and decode some tokens with it; the numbers may be of any size."""
    model = _model(base_path)
    with Pack(model, [adapter_path]) as pack, Context(model, pack, n_ctx=32, threads=1) as context:
        if HAS_ASSERTS and not _is_tame(adapter_path):
            return  # loading is all that can be tried
        context.set_weights(np.ones((1, model.n_layer), np.float32))
        context.decode(TOKENS)
        assert context.logits().shape == (model.n_vocab,)


def _is_tame(path: Path) -> bool:
    """Tell whether an adapter leaves activations finite in a tiny base."""
    info = read_adapter_gguf(path)
    return all(  # False for NaN
        max(1.0, abs(info.alpha)) * float(np.abs(read_values(path, tensor)).max()) <= LARGEST_TAME
        for tensor in info.tensors.values()
    )


def use_base(path: Path) -> None:
    """Load a base and decode some tokens with it, in a child process, which may die.

    Raises BackendError when the library or we refuse it, AssertionError when it ends the child.
    """
    load()  # is loaded once, here; nothing of it has run when the child begins
    said_path = path.with_name("said.txt")
    child = os.fork()
    if child == 0:
        _use_base_and_exit(path, said_path)
    _, status = os.waitpid(child, 0)
    said = said_path.read_text(encoding="utf-8", errors="replace")
    said_path.unlink()
    code = os.waitstatus_to_exitcode(status)
    if code == REFUSED:
        raise BackendError(said)
    assert code == 0, f"the child ended with {code}\n{said[-3000:]}"


def _use_base_and_exit(path: Path, said_path: Path) -> None:
    code = 1
    try:
        signal.alarm(SECONDS_PER_BASE)  # whose default is to end the process, also in native code
        said = os.open(said_path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ["GGML_NO_BACKTRACE"] = "1"  # which starts a debugger
        _use_base(path)
        code = 0
    except QafloraError as error:
        print(error, flush=True)
        code = REFUSED
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _use_base(path: Path) -> None:
    model = Model(read_base(path), gpu_layers=0)
    tokens = model.tokenize("Hello wörld <|im_end|> 1", add_special=True, parse_special=True)
    for token in range(min(model.n_vocab, 400)):
        model.piece(token, special=True)
        model.is_end(token)
    assert len(model.special_tokens) <= model.n_vocab
    with Pack(model, []) as pack, Context(model, pack, n_ctx=32, threads=1) as context:
        context.decode((tokens or [0])[:8])
        assert context.logits().shape == (model.n_vocab,)
