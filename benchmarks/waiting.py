"""How long a user waits: a chat's second turn, a known system prompt, and another user's question.

    python benchmarks/waiting.py models/demo [--repeat 5]

Every round has new text. Times are of `Engine.generate` to the first token, medians in ms, next to
the same prompt on an Engine that knows nothing of it.
"""

import argparse
import itertools
import random
import statistics
import threading
import time
from collections.abc import Callable

from qaflora_edge import Engine

WORDS = [f"{word} " for word in ("river", "copper", "window", "quiet", "seven", "garden", "letter")]
N_HISTORY, N_SYSTEM, N_NEW, N_QUESTION = 300, 400, 40, 1000


def text(engine: Engine, n_token: int, seed: object) -> list[int]:
    """Tokens of random words."""
    rng = random.Random(str(seed))
    return engine.tokenize("".join(rng.choices(WORDS, k=n_token)))[:n_token]


def timed(engine: Engine, tokens: list[int]) -> float:
    """Milliseconds to the first token."""
    start = time.perf_counter()
    engine.generate(tokens, max_tokens=1).text()
    return 1e3 * (time.perf_counter() - start)


def known_beginning(
    engine: Engine, fresh: Engine, n_known: int, seed: object
) -> tuple[float, float]:
    """A prompt after its beginning was answered, and the same prompt on the other Engine."""
    known = text(engine, n_known, ("known", seed))
    prompt = known + text(engine, N_NEW, ("new", seed))
    engine.generate(known, max_tokens=1).text()
    fresh.generate(text(engine, n_known, ("other", seed)), max_tokens=1).text()
    return timed(engine, prompt), timed(fresh, prompt)


def pause(engine: Engine, seed: object) -> tuple[float, float]:
    """The longest and the median time between two tokens while another's question is answered."""
    answer = engine.generate(text(engine, 42, ("own", seed)), max_tokens=400)
    thread = threading.Thread(target=answer.text)
    thread.start()
    while answer.n_completion < 8 and not answer.is_done:
        time.sleep(1e-3)
    start = time.perf_counter()
    engine.generate(text(engine, N_QUESTION, ("question", seed)), max_tokens=1).text()
    end = time.perf_counter()
    answer.cancel()
    thread.join()
    times = [at for at in answer.timings.token_s]
    gaps = [1e3 * (b - a) for a, b in itertools.pairwise(times) if b > start and a < end]
    alone = [1e3 * (b - a) for a, b in itertools.pairwise(times) if b <= start]
    return max(gaps), statistics.median(alone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    with Engine(args.bundle, n_parallel=2) as engine, Engine(args.bundle, n_parallel=2) as fresh:
        parts: dict[tuple[str, str], Callable[[int], tuple[float, float]]] = {
            (f"second turn, {N_HISTORY} + {N_NEW} tokens", "on a new engine"): (
                lambda seed: known_beginning(engine, fresh, N_HISTORY, ("turn", seed))
            ),
            (f"system prompt, {N_SYSTEM} + {N_NEW} tokens", "on a new engine"): (
                lambda seed: known_beginning(engine, fresh, N_SYSTEM, ("system", seed))
            ),
            (f"longest pause next to {N_QUESTION} tokens", "a token alone"): (
                lambda seed: pause(engine, seed)
            ),
        }
        for (name, other), measure in parts.items():
            runs = [measure(seed) for seed in range(1 + args.repeat)][1:]
            own, others = (statistics.median(values) for values in zip(*runs, strict=True))
            print(f"{name:36} {own:8.1f} ms    {other} {others:8.1f} ms    {own / others:.2f}")


if __name__ == "__main__":
    main()
