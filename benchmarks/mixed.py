"""Time the first final word and the whole answer of mixed questions under `relay`.

    python benchmarks/mixed.py BUNDLE [--repeat 3]

mixed.json has fifty: greetings, everyday questions, code, sums, facts of the demo's shop, forms and
follow-ups, whose first turn is asked before, untimed, as in a chat. Both strategies take turns,
and other chats come between, so that no KV state of one serves the next. The first round is thrown
away. A word is final where no draft can change it any more. Prints medians of seconds under
`two-place`, and ratios of `relay` to it within a round.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from qaflora_edge import Engine
from qaflora_edge.prompt.neutral import neutral

STRATEGIES = ("two-place", "relay")
QUESTIONS = Path(__file__).with_suffix(".json")
ROLES = ("user", "assistant")
MAX_TOKENS = 48


@dataclass(frozen=True)
class Timed:
    """Seconds of one answer, and to its first final word; and how many adapters drafted."""

    first: float
    whole: float
    n_draft: int


@dataclass(frozen=True)
class Ratios:
    """Medians of one question: relay to two-place, and seconds under two-place."""

    first: float
    whole: float
    plain_s: float
    n_draft: int


def main() -> None:
    """Print a line for each kind of question, and one for all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    args = parser.parse_args()
    kinds = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    everything: list[Ratios] = []
    with Engine(args.bundle, n_ctx=2048) as engine:
        for kind, questions in kinds.items():
            found = [ratios(engine, chat(question), args.repeat) for question in questions]
            everything += found
            print_row(kind, found)
    print_row("all", everything)


def chat(question: str | list[str]) -> list[dict[str, str]]:
    """Give messages: of one question, or of turns."""
    turns = [question] if isinstance(question, str) else question
    return [{"role": ROLES[at % 2], "content": text} for at, text in enumerate(turns)]


def ratios(engine: Engine, messages: Any, repeat: int) -> Ratios:
    turns = [messages[:1], messages] if len(messages) > 1 else [messages]
    prompts = [engine.chat_tokens(turn) for turn in turns]
    rounds: list[dict[str, Timed]] = []
    for turn in range(1 + repeat):
        order = STRATEGIES if turn % 2 else STRATEGIES[::-1]
        rounds.append({strategy: answer(engine, prompts, strategy) for strategy in order})
    pairs = [(runs["relay"], runs["two-place"]) for runs in rounds[1:]]
    return Ratios(
        first=median(relay.first / plain.first for relay, plain in pairs),
        whole=median(relay.whole / plain.whole for relay, plain in pairs),
        plain_s=median(plain.first for _, plain in pairs),
        n_draft=pairs[-1][0].n_draft,
    )


def answer(engine: Engine, prompts: list[list[int]], strategy: str) -> Timed:
    """Time the answer to the last of a chat's prompts."""
    *before, tokens = prompts
    for prompt in before:
        engine.generate(prompt, strategy=strategy, max_tokens=1).text()
    for other in neutral("turns")[:4]:  # in every slot
        engine.generate(other, strategy="base", max_tokens=1).text()
    start = time.perf_counter()
    generation = engine.generate(tokens, strategy=strategy, max_tokens=MAX_TOKENS)
    next(generation, None)
    first = time.perf_counter() - start
    generation.text()
    return Timed(first, time.perf_counter() - start, len(generation.fusion.plan.known))


def print_row(kind: str, found: list[Ratios]) -> None:
    n_silent = sum(each.n_draft == 0 for each in found)
    first = median(each.first for each in found)
    whole = median(each.whole for each in found)
    plain_s = median(each.plain_s for each in found)
    print(
        f"{kind}: first word {first:.2f}, whole {whole:.2f} of two-place's {plain_s:.2f} s; "
        f"nobody drafts for {n_silent} of {len(found)}",
        flush=True,
    )


if __name__ == "__main__":
    main()
