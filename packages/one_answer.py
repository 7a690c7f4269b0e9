"""Weigh and answer once, and say what computed it: `every_cpu.py` runs this on each processor.

    python packages/one_answer.py BASE QUANTISED NAME=ADAPTER...

Prints JSON: `backend`, the file of ggml's CPU backend; `kernels`, those of adapters; `weights`
[n_adapter, n_layer]; `logits` [n_step, n_vocab] of greedy steps under them, and `tokens` [n_step];
`quantised` [n_vocab], logits of the same prompt from the quantised base, under weights of 1.
"""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np

from qaflora_edge import Engine, QafloraError
from qaflora_edge.backend import library as native

PROMPT = "The cat sat on the mat, and the dog in the garden."
N_STEP = 8


def mapped() -> list[str]:
    """Files of ggml's CPU backend in this process's memory."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {Path(line.split()[-1]) for line in lines if "/" in line}
    return sorted(str(path) for path in paths if path.name.startswith("libggml-cpu"))


def kernels(base: str, adapters: dict[str, str]) -> str:
    """The fastest kernels of ours that this processor has: a refusal names them in this order."""
    os.environ["QAFLORA_CPU_KERNELS"] = "none"
    try:
        Engine(base=base, adapters=adapters).close()
    except QafloraError as error:
        return re.search(r"one of ggml, (\w+)", str(error))[1]
    finally:
        del os.environ["QAFLORA_CPU_KERNELS"]
    raise AssertionError("unknown kernels were accepted")


def main() -> None:
    base, quantised, *named = sys.argv[1:]
    adapters = dict(item.split("=", 1) for item in named)
    tokens, logits = [], []
    with Engine(base=base, adapters=adapters, n_ctx=128, threads=1, kv_type="f32") as engine:
        prompt = list(engine.tokenize(PROMPT))
        fusion = engine.weights(prompt)
        for _ in range(N_STEP):
            logits.append(engine.logits([*prompt, *tokens], weights=fusion))
            tokens.append(int(np.argmax(logits[-1])))
    with Engine(base=quantised, adapters=adapters, n_ctx=128, threads=1) as engine:
        rounded = engine.logits(PROMPT, weights=dict.fromkeys(adapters, 1.0))
    [backend] = mapped()
    assert Path(backend).parent == native.library_dir().resolve()
    answer = {
        "backend": Path(backend).stem.removeprefix("libggml-"),
        "kernels": kernels(base, adapters),
        "weights": fusion.weights.tolist(),
        "logits": np.array(logits).tolist(),
        "tokens": tokens,
        "quantised": rounded.tolist(),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
