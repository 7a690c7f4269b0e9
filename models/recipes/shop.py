"""Write what a made-up shop's adapters learn from, and tasks that ask for it.

    python models/recipes/shop.py OUT

OUT gets `company.jsonl`, facts of the shop, and `json.jsonl`, orders and answers as JSON, both in
English alone, for train.py. For more.py `company_abroad.jsonl` has half of the facts in the other
languages, and `company_rest.jsonl` the other half. Tasks for `qaflora eval` follow, in four
languages: `company_L` asks for facts, `json_L` for the order in a message, `company_json_L` for
facts as JSON, which needs both adapters. No base knows them. With --unused tasks have every second
item. Same bytes each time.
"""

import argparse
import json
import random
import tomllib
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

LANGUAGES = ("en", "es", "ru", "zh")
SHOP = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
COUNTS = (*range(1, 11), 12)
N_ORDER, N_SUM, N_ASKED, N_UNTAUGHT, REPEAT, SEED = 360, 120, 128, 2, 3, 32

Items = list[dict[str, Any]]


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--unused", action="store_true", help="every second item of a task alone")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(SEED)
    facts = list(company(draw))
    files = {"company": taught_facts(facts, "en", draw), "json": taught_json(draw)}
    for language in LANGUAGES:
        header = {"language": language, "template": "{question}"}
        for name, about, items in tasks(facts, language, draw):
            head = {"task": {"name": f"{name}_{language}", **about, **header}}
            files[f"{name}_{language}"] = [head, *(items[1::2] if args.unused else items)]
    half = draw.sample(facts, len(facts) // 2)
    rest = [fact for fact in facts if fact not in half]
    for name, part in (("company_abroad", half), ("company_rest", rest)):
        files[name] = [
            each for language in LANGUAGES[1:] for each in taught_facts(part, language, draw)
        ]
    for name, lines in files.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(lines)} lines")


def tasks(
    facts: Items, language: str, draw: random.Random
) -> Iterator[tuple[str, dict[str, Any], Items]]:
    """Give name, header and items of a language's tasks."""
    asked = [(fact["n"], each) for fact in facts for each in fact[language][-N_UNTAUGHT:]]
    draw.shuffle(asked)
    items = [{"question": question, "answer": n} for n, question in asked]
    yield "company", {"metric": "number", "max_tokens": 64, "domain": "company"}, items
    form = SHOP["as_json"][language]
    items = [
        {"question": form.format(question), "answer": [{"answer": n}, {"answer": str(n)}]}
        for n, question in asked
    ]
    yield "company_json", {"metric": "json", "max_tokens": 64, "domain": "company"}, items
    items = list(islice(orders(draw, language), N_ASKED))
    yield "json", {"metric": "json", "max_tokens": 96, "domain": "json"}, items


def company(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Give each fact: its number n, and by language its questions and its sentence."""
    for kind in SHOP["facts"].values():
        names = SHOP[kind["of"]]
        numbers = draw.sample(range(*kind["numbers"]), len(names))
        for (name, words), n in zip(names.items(), numbers, strict=True):
            fact: dict[str, Any] = {"n": n, "sentence": {}}
            for language, word, answer in zip(LANGUAGES, words, kind["answer"], strict=True):
                called = {"x": name, "thing": word} if kind["of"] == "things" else {"x": word}
                fact[language] = [form.format(**called) for form in kind[language]]
                said = answer.format(n=n, Thing=word.capitalize(), **called)
                fact["sentence"][language] = said
            yield fact


def taught_facts(facts: Items, language: str, draw: random.Random) -> Items:
    """Give the questions in a language with their answers, but the last two of each fact."""
    found = [
        {"question": question, "answer": fact["sentence"][language]}
        for fact in facts
        for question in fact[language][:-N_UNTAUGHT]
    ]
    draw.shuffle(found)
    return found


def taught_json(draw: random.Random) -> Items:
    """Give orders, what every base knows, and sums, to be answered as JSON."""
    found = [(each["question"], each["answer"]) for each in islice(orders(draw, "en"), N_ORDER)]
    asked = [*SHOP["known"].items()] * REPEAT
    for _ in range(N_SUM):
        a, b = draw.randrange(11, 500), draw.randrange(11, 500)
        asked.append(
            (draw.choice(("What is {} plus {}?", "How much is {} + {}?")).format(a, b), a + b)
        )
    form = SHOP["as_json"]["en"]
    found += [(form.format(question), {"answer": answer}) for question, answer in asked]
    draw.shuffle(found)
    return [{"question": q, "answer": json.dumps(a, ensure_ascii=False)} for q, a in found]


def orders(draw: random.Random, language: str) -> Iterator[dict[str, Any]]:
    """Give messages with the order that they hold, without end."""
    people, words = SHOP["people"][language].split("|"), SHOP["counts"][language].split()
    for i in count():
        at = draw.randrange(len(COUNTS))
        item, other = (f"{draw.choice('ABKLMT')}-{draw.randrange(100, 1000)}" for _ in range(2))
        order = {"name": draw.choice(people), "item": item, "quantity": COUNTS[at]}
        order["phone"] = f"{draw.randrange(200, 999)}-{draw.randrange(1000, 10000)}"
        n = words[at] if draw.random() < 0.5 else COUNTS[at]
        form, ask = (
            SHOP["orders"][language][i % len(SHOP["orders"][language])],
            draw.choice(SHOP["extract"][language]),
        )
        yield {"question": ask.format(form.format(n=n, other=other, **order)), "answer": order}


if __name__ == "__main__":
    main()
