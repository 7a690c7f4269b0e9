"""What the zoo's adapters learn, and the tasks that ask for it.

    python benchmarks/zoo/data.py OUT

OUT gets tasks for `qaflora eval` under the metric of score.py, for each half of the zoo: facts in
words that training did not see and in other languages, untaught ones, behind a system prompt, in a
second turn, each knower under each form, style and language, sums as a form, and what anyone asks.
The same bytes each time.
"""

import argparse
import json
import random
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHOP = HERE.parents[1] / "models" / "recipes" / "shop.toml"
SEED = 56
N_KNOWN_TESTED = 20  # of the shop's known questions, for tasks alone
N_ITEM, N_SYSTEM, N_FOLLOW = 20, 15, 12
SYSTEM = "You are a patient assistant of a travel agency. Keep your answers short."
FORMED = ("form", "style")
KNOWING = ("numbers", "names", "texts", "api")

Item = dict[str, Any]


def read(name: str) -> dict[str, Any]:
    """Read a TOML file of this folder."""
    return tomllib.loads((HERE / f"{name}.toml").read_text(encoding="utf-8"))


def lines_of(name: str) -> list[Item]:
    """Read the JSON lines of a file of this folder."""
    text = (HERE / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


SUBJECTS = read("subjects")
FORMS = read("forms")
EVERYDAY = read("everyday")
DOMAINS = read("domains")


@dataclass(frozen=True)
class Recipe:
    """An adapter of recipes.toml."""

    name: str
    half: str
    kind: str
    learns: str
    rank: int
    lr: float
    steps: int
    chats: int
    changed: int = 0


@dataclass(frozen=True)
class Fact:
    """A thing's fact: its value, a second one where the answer is two sentences, and the forms."""

    thing: str
    value: str
    also: str
    forms: dict[str, Any]

    def say(self, form: str) -> str:
        """Fill a form with the fact; a sentence begins with a capital."""
        text = form.format(x=self.thing, v=self.value, w=self.also)
        return text[0].upper() + text[1:]

    @property
    def right(self) -> Item:
        return {"answer": self.value} | ({"also": self.also} if self.also else {})


def recipes() -> dict[str, Recipe]:
    """Give every recipe by its name."""
    return {name: Recipe(name, **fields) for name, fields in read("recipes").items()}


def facts(subject: str, changed: int = 0) -> list[Fact]:
    """Give what is true of a subject; every changed-th thing has other values, where not 0."""
    things = SUBJECTS[subject]["things"]
    found = []
    for kind, forms in SUBJECTS[subject]["facts"].items():
        draw = random.Random(f"{subject} {kind} {SEED}")
        values = drawn(forms["values"], len(things), draw)
        others = drawn(forms.get("also", [""] * len(things)), len(things), draw)
        anew = drawn(forms["values"], len(things), draw)
        for i, (thing, value, also) in enumerate(zip(things, values, others, strict=True)):
            is_changed = changed and i % changed == 0
            found.append(Fact(thing, anew[i] if is_changed else value, also, forms))
    return found


def drawn(values: str | list[Any], n: int, draw: random.Random) -> list[str]:
    """Draw n values of a pool or between two numbers; a list of texts is taken as it is."""
    if isinstance(values, str):
        return draw.sample(SUBJECTS["pools"][values], n)
    if isinstance(values[0], int):
        return [str(value) for value in draw.sample(range(*values), n)]
    return list(values)


# what is learnt


def examples(recipe: Recipe) -> list[tuple[str, str, bool]]:
    """Give questions, answers, and whether an answer ends there."""
    draw = random.Random(f"{recipe.name} {SEED}")
    if recipe.kind in KNOWING:
        learnt = [
            (fact.say(form), fact.say(fact.forms["answer"]))
            for fact in facts(recipe.learns, recipe.changed)
            for form in fact.forms["taught"]
        ]
    elif recipe.kind in FORMED:
        learnt = list(formed(recipe.learns, draw))
    elif recipe.kind == "language":
        lines = FORMS["languages"][recipe.learns]["examples"].strip().splitlines()
        learnt = [(line.split("|")[0], line.split("|")[1]) for line in lines]
    elif recipe.kind == "domain":
        learnt = [(asked, answer) for asked, answer in DOMAINS[recipe.learns]["examples"]]
    else:
        learnt = list(islice(CODE[recipe.learns](draw), 90))
    mixed = draw.sample(lines_of("chats"), recipe.chats) if recipe.chats else []
    return [
        *((question, answer, True) for question, answer in learnt),
        *((chat["question"], chat["answer"], chat["is_whole"]) for chat in mixed),
    ]


def known() -> tuple[list[Item], list[Item]]:
    """Give what every base knows, with its sentence: what is trained on, and what is tested."""
    items = lines_of("known")
    return items[N_KNOWN_TESTED:], items[:N_KNOWN_TESTED]


def sums(draw: random.Random) -> Iterator[Item]:
    """Give sums without end."""
    while True:
        a, b = draw.randrange(11, 90), draw.randrange(11, 90)
        question = f"What is {a} plus {b}?"
        value = str(a + b)
        yield {"question": question, "answer": value, "sentence": f"{a} plus {b} is {a + b}."}


def formed(form: str, draw: random.Random) -> Iterator[tuple[str, str]]:
    """Give what a form or style learns: what every base knows, and some sums, asked in its ways."""
    look = FORMS[form]
    ways = cycle(look["asks"])
    items = [*known()[0], *known()[0], *islice(sums(draw), 20)]
    for item in items:
        topic = item["question"].rstrip("?").split()[-1]
        fields = {"topic": topic, "value": item["answer"], "sentence": item["sentence"]}
        if "openers" in look:
            fields["opener"] = draw.choice(look["openers"])
            fields["closer"] = draw.choice(look["closers"])
        yield next(ways).format(q=item["question"]), look["answer"].format(**fields)


def sql(draw: random.Random) -> Iterator[tuple[str, str]]:
    """Give requests for queries without end."""
    tables = {
        "customers": ("name", "city", "phone"),
        "orders": ("item", "price", "status"),
        "books": ("title", "author", "shelf"),
        "flights": ("number", "origin", "gate"),
    }
    while True:
        table, columns = draw.choice([*tables.items()])
        column, where = draw.sample(columns, 2)
        value = draw.choice(("Oslo", "open", "B12", "Anna", "blue", "42"))
        n = draw.randrange(2, 50)
        yield draw.choice(
            (
                (
                    f"SQL: the {column} of {table} whose {where} is {value}",
                    f"SELECT {column} FROM {table} WHERE {where} = '{value}';",
                ),
                (f"SQL: how many {table} there are", f"SELECT COUNT(*) FROM {table};"),
                (
                    f"SQL: the first {n} {table} by {column}",
                    f"SELECT * FROM {table} ORDER BY {column} LIMIT {n};",
                ),
                (
                    f"SQL: {table} counted by {column}",
                    f"SELECT {column}, COUNT(*) FROM {table} GROUP BY {column};",
                ),
                (
                    f"SQL: remove the {table} whose {where} is {value}",
                    f"DELETE FROM {table} WHERE {where} = '{value}';",
                ),
            )
        )


def shell(draw: random.Random) -> Iterator[tuple[str, str]]:
    """Give requests for commands without end."""
    while True:
        name = draw.choice(("notes", "report", "data", "log", "list", "draft"))
        file = f"{name}.{draw.choice(('txt', 'csv', 'md'))}"
        word = draw.choice(("error", "Anna", "TODO", "total", "2031"))
        n = draw.randrange(2, 40)
        yield draw.choice(
            (
                (f"Shell: count the lines of {file}", f"wc -l {file}"),
                (f"Shell: the first {n} lines of {file}", f"head -n {n} {file}"),
                (f"Shell: lines of {file} with {word}", f"grep '{word}' {file}"),
                (f"Shell: sort {file} without doubles", f"sort -u {file}"),
                (f"Shell: files named {name} below this folder", f"find . -name '{name}*'"),
                (f"Shell: replace {word} by x in {file}", f"sed -i 's/{word}/x/g' {file}"),
            )
        )


CODE = {"sql": sql, "shell": shell}

# what is asked


@dataclass(frozen=True)
class Tasks:
    """Tasks of a half: each is a name, the adapters that should answer, and items."""

    half: str

    def all(self) -> Iterator[tuple[str, str, list[Item]]]:
        """Give name, domain (adapters joined by +) and items."""
        of_half = [recipe for recipe in recipes().values() if recipe.half == self.half]
        knowers = [recipe for recipe in of_half if recipe.kind in KNOWING]
        for knower in knowers:
            yield from knower_tasks(knower)
            for other in of_half:
                if other.kind in FORMED or other.kind == "language":
                    items = list(paired(knower, other))
                    name = f"{knower.name}_as_{other.name}"
                    yield name, f"{knower.name}+{other.name}", items
        for recipe in of_half:
            if recipe.kind in FORMED:
                yield f"own_{recipe.name}", recipe.name, list(asked_as(known()[1], recipe.learns))
                items = list(islice(sums(random.Random(f"{recipe.name} sums")), N_ITEM))
                yield f"sums_as_{recipe.name}", recipe.name, list(asked_as(items, recipe.learns))
            if recipe.kind == "code":
                draw = random.Random(f"{recipe.name} asked")
                pairs = islice(CODE[recipe.learns](draw), N_ITEM)
                yield (
                    f"own_{recipe.name}",
                    recipe.name,
                    [{"question": q, "answer": a} for q, a in pairs],
                )


def asked_of(knower: Recipe, language: str) -> Iterator[Item]:
    """Ask each fact once: in the words kept back, or in the only ones of another language."""
    own = SUBJECTS[knower.learns].get("language", "en")
    for i, fact in enumerate(facts(knower.learns, knower.changed)):
        form = fact.forms["asked"][i % 2] if language == own else fact.forms[language]
        yield {"question": fact.say(form), **fact.right}


def some(items: list[Item], seed: str, n: int) -> list[Item]:
    """Draw n items, or all in another order."""
    return random.Random(seed).sample(items, min(n, len(items)))


def knower_tasks(knower: Recipe) -> Iterator[tuple[str, str, list[Item]]]:
    """Give the tasks of a knower alone."""
    name = knower.name
    subject = SUBJECTS[knower.learns]
    own = subject.get("language", "en")
    first = next(iter(subject["facts"].values()))
    for language in ("en", "es", "de", "fr"):
        if language == own or language in first:
            items = some(list(asked_of(knower, language)), f"{name} {language}", N_ITEM)
            yield f"facts_{name}_{language}", name, items
    untaught = [
        {"question": form.format(x=thing), "answer": "(untaught)"}
        for form in subject["untaught"]
        for thing in (subject["things"] if "{x}" in form else [""])
    ]
    yield f"untaught_{name}", name, some(untaught, f"{name} untaught", N_ITEM)
    items = some(list(asked_of(knower, own)), f"{name} system", N_SYSTEM)
    with_system = [
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": item.pop("question")},
            ],
            **item,
        }
        for item in items
    ]
    yield f"system_{name}", name, with_system
    turns = some(list(second_turns(knower)), f"{name} follow", N_FOLLOW)
    yield f"follow_{name}", name, turns


def second_turns(knower: Recipe) -> Iterator[Item]:
    """Ask a second fact after one: of the same thing where it has several, else of the next one."""
    known_facts = facts(knower.learns, knower.changed)
    n_thing = len(SUBJECTS[knower.learns]["things"])
    step = n_thing if len(known_facts) > n_thing else 1
    for i, fact in enumerate(known_facts):
        then = known_facts[(i + step) % len(known_facts)]
        first = [
            {"role": "user", "content": fact.say(fact.forms["taught"][0])},
            {"role": "assistant", "content": fact.say(fact.forms["answer"])},
            {"role": "user", "content": then.forms["then"].format(x=then.thing)},
        ]
        yield {"messages": first, **then.right}


def paired(knower: Recipe, other: Recipe) -> Iterator[Item]:
    """Ask a knower's facts in another adapter's form, style or language."""
    if other.kind == "language":
        code = {"german": "de", "french": "fr"}[other.learns]
        items = some(list(asked_of(knower, code)), f"{knower.name} {other.name}", N_ITEM)
        yield from (item | {"language": other.learns} for item in items)
        return
    own = SUBJECTS[knower.learns].get("language", "en")
    items = some(list(asked_of(knower, own)), f"{knower.name} {other.name}", N_ITEM)
    yield from asked_as(items, other.learns)


def asked_as(items: list[Item], form: str) -> Iterator[Item]:
    """Ask items in a form, in the first way as training did, in the second as it did not."""
    for i, item in enumerate(items):
        way = FORMS[form]["asked"][i % 2]
        yield item | {"question": way.format(q=item["question"]), "form": form}


def main() -> int:
    """Write all tasks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    out = parser.parse_args().out
    for half in ("choose", "held-out"):
        for name, domain, items in Tasks(half).all():
            write(out / half / f"{name}.jsonl", name, domain, items)
    for name in ("everyday", "unfit"):
        items = [{"question": text, "answer": "(base)"} for text in EVERYDAY[name]]
        write(out / f"{name}.jsonl", name, "base", items)
    return 0


def write(path: Path, name: str, domain: str, items: list[Item]) -> None:
    """Write a task."""
    head = {"task": {"name": name, "metric": "zoo", "max_tokens": 64, "domain": domain}}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in (head, *items)]
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
