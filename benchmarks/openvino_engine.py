"""OpenVINO GenAI beside this package: the same base and adapters at fixed weights, on Intel.

    python -m venv other && other/bin/pip install openvino-genai gguf safetensors
    other/bin/python benchmarks/openvino_engine.py BASE.gguf --adapter A.gguf... [--k 0,2,6]

Its reader takes the GGUF, where it knows the architecture and the types; that it does not is a
result too. Each of the first K adapters is in the mix at 1/K. A run is one answer to a prompt that
no run had before, greedy, of --max-tokens tokens. Prints JSON: the first token's milliseconds and
tokens a second after it, as medians with the lowest and highest, or why a base did not load.
`qaflora bench BUNDLE --only decode` measures this package's with as many tokens.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from statistics import median

from as_peft import write_peft

WORDS = ("river", "stone", "lamp", "seven", "green", "window", "paper", "north", "bridge", "summer")


def prompt_text(n_word: int, run: int) -> str:
    """Write words whose begin differs from run to run, so that no state of a run is reused."""
    return " ".join(WORDS[(run + place * (run + 1)) % len(WORDS)] for place in range(n_word))


def measured(values: list[float]) -> dict[str, float]:
    return {
        "median": round(median(values), 2),
        "lowest": round(min(values), 2),
        "highest": round(max(values), 2),
    }


def measure(
    base: Path, adapters: list[Path], n_word: int, n_token: int, repeat: int
) -> dict[str, object]:
    """Load the base with adapters at equal weights, and answer; `error` is why it did not load."""
    import openvino_genai

    config = openvino_genai.AdapterConfig()
    for path in adapters:
        config.add(openvino_genai.Adapter(str(path)), 1.0 / len(adapters))
    begin_s = time.perf_counter()
    try:
        pipeline = openvino_genai.LLMPipeline(str(base), "CPU", adapters=config)
    except RuntimeError as error:
        return {"error": str(error).strip().splitlines()[-1][:300]}
    opened_s = time.perf_counter() - begin_s
    first_ms = []
    speeds = []
    text = ""
    for run in range(repeat + 1):
        result = pipeline.generate(
            [prompt_text(n_word, run)], max_new_tokens=n_token, ignore_eos=True, do_sample=False
        )
        text = str(result.texts[0])
        if run:  # the first one compiles
            first_ms.append(result.perf_metrics.get_ttft().mean)
            speeds.append(result.perf_metrics.get_throughput().mean)
    return {
        "opened_s": round(opened_s, 1),
        "first_token_ms": measured(first_ms),
        "tokens_per_second": measured(speeds),
        "text": text[:120],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--adapter", type=Path, action="append", default=[])
    parser.add_argument("--k", default="0,2,6")
    parser.add_argument("--words", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        paths = [
            write_peft(adapter, Path(place) / str(index))
            for index, adapter in enumerate(options.adapter)
        ]
        for k in map(int, options.k.split(",")):
            row: dict[str, object] = {"adapters": k}
            row |= measure(
                options.base, paths[:k], options.words, options.max_tokens, options.repeat
            )
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(json.dumps({"base": options.base.name, "machine": platform.processor(), "rows": rows}))


if __name__ == "__main__":
    main()
