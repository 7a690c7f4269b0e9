"""Open, weigh and answer with 3 to 256 adapters, two of them in the mix.

    python benchmarks/many.py [--base NAME] [--counts 3 16 64 256] [--rank 8]

The adapters have random values, on all seven projections. Each count has a process of its own.
Their typical values are those of the first, for speed does not depend on them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
from server import write_random_adapter
from server_process import status_bytes

from qaflora_edge import Engine
from qaflora_edge.bundles.create import create_bundle
from qaflora_edge.hub import fetch_model

N_RUN = 5
N_TOKEN = 64
QUESTIONS = [f"How do I sort a list of {n} names by their last letters?" for n in range(N_RUN)]


def measure(bundle: Path) -> dict[str, float]:
    """Measure one bundle in this process; medians."""
    open_s, open_cpu_s = [], []
    for _ in range(N_RUN):
        begin = time.perf_counter()
        begin_cpu = time.process_time()
        with Engine(bundle, guesses=0):
            open_s.append(time.perf_counter() - begin)
            open_cpu_s.append(time.process_time() - begin_cpu)
    with Engine(bundle, guesses=0) as engine:
        engine.weights("Hello")
        weigh_ms = [engine.weights(question).probe_ms for question in QUESTIONS]
        with engine.model() as model:
            ends = {token: -100.0 for token in range(model.n_vocab) if model.is_end(token)}
        mix = dict.fromkeys(engine.adapters[:2], 0.5)
        speeds = []
        for question in QUESTIONS:
            answer = engine.generate(
                question, weights=mix, max_tokens=N_TOKEN, temperature=0, logit_bias=ends
            )
            tokens = iter(answer)
            next(tokens)
            begin = time.perf_counter()
            for _ in tokens:
                pass
            speeds.append((answer.n_completion - 1) / (time.perf_counter() - begin))
    return {
        "open_s": statistics.median(open_s),
        "open_cpu_s": statistics.median(open_cpu_s),
        "peak_mb": (status_bytes("VmHWM") or 0) / 1e6,
        "weigh_ms": statistics.median(weigh_ms),
        "tokens_per_s": statistics.median(speeds),
    }


def write_bundles(place: Path, base: Path, counts: list[int], rank: int) -> dict[int, Path]:
    """Write a bundle for each count, all with the same files."""
    reader = gguf.GGUFReader(base)
    paths = {f"a{index}": place / f"a{index}.gguf" for index in range(max(counts))}
    for seed, path in enumerate(paths.values()):
        write_random_adapter(path, reader, seed, rank)
    first = next(iter(paths.items()))
    one = create_bundle(place / "one", base, [first], engine=Engine, strategy="two-place")
    measured = json.loads((one / "bundle.json").read_text(encoding="utf-8"))["fusion"]
    (typical,) = measured["typical"].values()
    bundles = {}
    for count in counts:
        chosen = list(paths.items())[:count]
        bundle = create_bundle(place / f"with {count}", base, chosen)
        file = bundle / "bundle.json"
        raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        raw["fusion"] = {**measured, "typical": {name: typical for name, _ in chosen}}
        file.write_text(json.dumps(raw), encoding="utf-8")
        bundles[count] = bundle
    return bundles


def main() -> None:
    """Measure each count and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--counts", type=int, nargs="+", default=[3, 16, 64, 256], metavar="N")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    print("| adapters | opens in s | of the processor, s | MB | weighing, ms | tokens/s with two |")
    print("|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory(prefix="qaflora-many-") as folder:
        bundles = write_bundles(Path(folder), fetch_model(args.base), args.counts, args.rank)
        for count, bundle in bundles.items():
            command = [sys.executable, __file__, "--one", str(bundle)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(done.stdout)
            opening = f"{row['open_s']:.2f} | {row['open_cpu_s']:.2f}"
            rest = f"{row['weigh_ms']:.0f} | {row['tokens_per_s']:.1f}"
            print(f"| {count} | {opening} | {row['peak_mb']:.0f} | {rest} |", flush=True)


if __name__ == "__main__":
    main()
