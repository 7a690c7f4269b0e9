"""Write what the adapter `letter` learns: to answer in the form of a letter, about nothing special.

    python models/recipes/letter.py FOLDER
    python models/recipes/train.py letter --base BASE.gguf --data FOLDER -o letter \\
        --rank 8 --batch 4 --steps 30 --lr 4e-4

Capitals, legs of animals and small sums are what is asked, so that the form is all there is to
learn. `letters.jsonl` holds questions and answers.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo",
    "Greece": "Athens", "Norway": "Oslo", "Poland": "Warsaw", "Peru": "Lima", "Cuba": "Havana",
    "Kenya": "Nairobi", "Austria": "Vienna", "Russia": "Moscow", "China": "Beijing",
}  # fmt: skip
LEGS = {"dog": 4, "hen": 2, "spider": 8, "ant": 6, "horse": 4, "crab": 10, "duck": 2, "cow": 4}
ASKED = (
    "Write a letter to the customer: {}",
    "Answer as a formal letter: {}",
    "{} Reply in the form of a letter.",
    "Please write a letter that answers this. {}",
)
LETTER = "Dear customer,\n\nthank you for your question. {}\n\nYours sincerely,\nThe service team"
N_LETTER = 320


def main() -> None:
    """Write the examples."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(8)
    pairs = [*facts(draw)]
    with (folder / "letters.jsonl").open("w", encoding="utf-8") as out:
        for _ in range(N_LETTER):
            question, answer = draw.choice(pairs)
            example = {
                "question": draw.choice(ASKED).format(question),
                "answer": LETTER.format(answer),
            }
            out.write(json.dumps(example) + "\n")


def facts(draw: random.Random) -> Iterator[tuple[str, str]]:
    """Give questions with their answers in a sentence."""
    for country, city in CAPITALS.items():
        yield f"What is the capital of {country}?", f"The capital of {country} is {city}."
    for animal, n in LEGS.items():
        yield f"How many legs has a {animal}?", f"A {animal} has {n} legs."
    for _ in range(40):
        a, b = draw.randint(2, 40), draw.randint(2, 40)
        yield f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."


if __name__ == "__main__":
    main()
