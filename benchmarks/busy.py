"""How fast a bundle decodes next to another process that decodes.

    python benchmarks/busy.py models/demo [--repeat 5]

Medians of tokens a second: alone, then next to the other process, and the share that is left.
"""

import argparse
import statistics
import subprocess
import sys

from qaflora_edge import Engine

N_TOKEN = 64
RIVAL = """
import sys; from qaflora_edge import Engine
engine = Engine(sys.argv[1], strategy="static", n_ctx=256)
while True:
    print(len(engine.generate("1, 2, 3", max_tokens=16).text()), flush=True)
"""


def median_speed(engine: Engine, n_run: int) -> float:
    """Decode the same answer n_run times; tokens a second. The end of an answer is ruled out."""
    ends = dict.fromkeys(filter(engine._model.is_end, range(engine.n_vocab)), -100.0)
    speeds = []
    for _ in range(n_run):
        answer = engine.generate("1, 2, 3", max_tokens=N_TOKEN, logit_bias=ends)
        answer.text()
        speeds.append(answer.timings.tokens_per_second)
    return statistics.median(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    command = [sys.executable, "-c", RIVAL, args.bundle]
    with Engine(args.bundle, strategy="static", n_ctx=256, guesses=0) as engine:
        median_speed(engine, 1)
        alone = median_speed(engine, args.repeat)
        with subprocess.Popen(command, stdout=subprocess.PIPE) as rival:
            try:
                if not rival.stdout or not rival.stdout.readline():
                    raise SystemExit("The process next to which decoding is measured died.")
                beside = median_speed(engine, args.repeat)
            finally:
                rival.kill()
    print(f"alone {alone:.1f} tok/s, next to another {beside:.1f}: {beside / alone:.2f}")


if __name__ == "__main__":
    main()
