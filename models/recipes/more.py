"""Go on with an adapter of six.py: what it has not learnt yet comes more often.

    python models/recipes/more.py --base BASE --gguf NAME --data FOLDER --shop shop \\
        --steps 60 --rate 4e-4 OUT NAME [NAME ...]

OUT has peft/NAME, from which it goes on and which it replaces, and gets adapters/NAME.gguf. All of
an adapter's own examples are read once, and their losses say how often each is drawn. A third of
the tokens of `company` and `json` are near questions of others.toml.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import six
import torch
import transformers
from peft import PeftModel

SHARE = 1 / 3  # of the tokens of a step, that are near questions
LEAST = 0.1  # of the mean loss, that is added to each: what is learnt is still drawn
GUESSED = 2.0  # nats of a learnt token that was not read yet
N_READ = 24  # examples that are read at once
N_WARM = 4
N_LATER = 12  # of an adapter's own examples of JSON, that follow a turn in JSON


@dataclass
class Pool:
    """Examples, and the nats that each answer took when it was last read."""

    read: list[Any]
    nats: list[float]

    def draw(self, n_token: float, random_: random.Random) -> list[int]:
        """Give places of examples of about n_token tokens, those of larger loss more often."""
        least = LEAST * sum(self.nats) / len(self.nats)
        odds = [nats + least for nats in self.nats]
        chosen: list[int] = []
        used = 0
        while used < n_token and len(chosen) < len(self.read):
            (place,) = random_.choices(range(len(self.read)), odds)
            if place in chosen:
                continue
            chosen.append(place)
            used += len(self.read[place].prompt) + len(self.read[place].answer)
        return chosen


def main() -> int:
    """Go on with each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, help="GGUF, or folder of transformers")
    parser.add_argument("--gguf", required=True, help="registry's name of the base, for conversion")
    parser.add_argument("--data", type=Path, required=True, help="folder with the recipes' files")
    parser.add_argument("--shop", type=Path, required=True, help="what shop.py has written")
    parser.add_argument(
        "--also", type=Path, action="append", default=[], help="more of its own; repeatable"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=4e-4, help="highest learning rate")
    parser.add_argument("--tokens", type=int, default=320, help="a step, about (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("names", nargs="+", metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    sys.path.insert(0, str(six.ZOO))
    zoo = six.module("zoo_train", six.ZOO / "train.py")
    (args.out / "adapters").mkdir(parents=True, exist_ok=True)
    model, tokenizer = zoo.load(args.base)
    for name in args.names:
        lesson = six.LESSONS[name]
        own = list(islice(six.own(name, lesson, args.data, args.shop), lesson.n_own))
        if name == "json":
            own += [(six.after_json(*own[-1][:2], asked), *rest) for asked, *rest in own[:N_LATER]]
        own += [example for file in args.also for example in examples(file)]
        near = six.not_own(name, zoo, model, tokenizer, args.out)
        folder = args.out / "peft" / name
        tuned = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
        pools = [pool_of(zoo.read_all(tokenizer, each)) for each in (own, near) if each]
        head = zoo.read_all(tokenizer, own).head
        facts = fit(tuned, head, pools, args)
        tuned.save_pretrained(str(folder))
        tuned.unload()
        model.__dict__.pop("peft_config", None)
        zoo.to_gguf(name, args.out, args.gguf)
        with open(args.out / "STATUS", "a", encoding="utf-8") as status:
            status.write(json.dumps({"name": name, "more": True, **facts}) + "\n")
    return 0


def examples(file: Path) -> list[tuple[str, str, bool]]:
    """Give what a file of JSON lines teaches: question, answer, and that it ends there."""
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [(row["question"], row["answer"], True) for row in rows]


def pool_of(lesson: Any) -> Pool:
    """Give examples whose losses are not known yet: of each token GUESSED nats."""
    return Pool(list(lesson.read), [GUESSED * len(each.answer) for each in lesson.read])


def fit(tuned: Any, head: Sequence[int], pools: Sequence[Pool], args: Any) -> dict[str, Any]:
    """Train; give steps, tokens, seconds, and the mean nats of an own answer before and after."""
    start_s = time.monotonic()
    trained = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.rate, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, N_WARM, args.steps)
    random_ = random.Random(args.seed)
    if len(pools) > 1:  # else texts, of which few are read at all
        for pool in pools:
            measure(tuned, head, pool)
    before = sum(pools[0].nats) / len(pools[0].nats)
    print(f"own {before:.3f} nats an answer, {time.monotonic() - start_s:.0f} s", flush=True)
    shares = (1 - SHARE, SHARE) if len(pools) > 1 else (1.0,)
    n_token = 0
    for i in range(args.steps):
        drawn = [
            pool.draw(share * args.tokens, random_)
            for pool, share in zip(pools, shares, strict=True)
        ]
        losses, n_read = nats_of(tuned, head, pools, drawn)
        torch.cat(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        keep(pools, drawn, losses)
        n_token += n_read
        if i < 3 or i % 10 == 9:
            now = time.strftime("%H:%M:%S")
            speed = n_token / (time.monotonic() - start_s)
            means = " ".join(f"{sum(pool.nats) / len(pool.nats):.3f}" for pool in pools)
            print(now, i + 1, f"nats an answer {means}, {speed:.0f} tokens/s", flush=True)
    if len(pools) > 1:
        measure(tuned, head, pools[0])
    after = sum(pools[0].nats) / len(pools[0].nats)
    return {
        "steps": args.steps,
        "tokens": n_token,
        "seconds": round(time.monotonic() - start_s),
        "nats_before": round(before, 3),
        "nats_after": round(after, 3),
    }


def nats_of(
    tuned: Any, head: Sequence[int], pools: Sequence[Pool], drawn: Sequence[Sequence[int]]
) -> tuple[list[torch.Tensor], int]:
    """Give the nats of each learnt token, by example, and how many tokens were read."""
    import packed

    examples = [
        pool.read[place] for pool, places in zip(pools, drawn, strict=True) for place in places
    ]
    together = packed.pack(head, examples)
    nats = packed.nats_of(tuned, together)
    lengths = [len(example.answer) for example in examples]
    return list(nats.split(lengths)), together.ids.shape[1]


def keep(
    pools: Sequence[Pool], drawn: Sequence[Sequence[int]], losses: Sequence[torch.Tensor]
) -> None:
    """Write what each answer took."""
    left = iter(losses)
    for pool, places in zip(pools, drawn, strict=True):
        for place in places:
            pool.nats[place] = float(next(left).detach().sum())


def measure(tuned: Any, head: Sequence[int], pool: Pool) -> None:
    """Read all examples once."""
    with torch.no_grad():
        for first in range(0, len(pool.read), N_READ):
            places = range(first, min(first + N_READ, len(pool.read)))
            losses, _ = nats_of(tuned, head, [pool], [places])
            keep([pool], [places], losses)


if __name__ == "__main__":
    sys.exit(main())
