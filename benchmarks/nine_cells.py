"""Write the nine composite tasks of docs/results.md, and three of text, for `qaflora eval`.

    python benchmarks/nine_cells.py DATA OUT [--answers] [--unused]

DATA holds `math_L.jsonl` (MGSM: question, answer), `code_L.jsonl` (HumanEval-XL: prompt,
entry_point, test), `medical_L.jsonl` (question, choices, answer) for L in es, ru, zh, and
`medical_sentences.jsonl` (a sentence in each language). OUT gets a file for each task. A question
is asked in its own language. The same data give the same bytes.

With --unused each task has every second question: those that no rule was chosen on.

With --answers items also have what should be answered (`continuation`), for lorahub.py and
lora_flow.py: of maths the last line, for MGSM has no steps, of code the canonical solution.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LANGUAGES = ("es", "ru", "zh")
ANSWER = {"es": "Respuesta: {}", "ru": "Ответ: {}", "zh": "答案：{}"}
CODE = {
    "es": "Completa la función. Responde solo con el código de Python.",
    "ru": "Допиши функцию. В ответе напиши только код на Python.",
    "zh": "请补全这个函数。只用 Python 代码回答。",
}
MATH_TOKENS, CODE_TOKENS = 256, 384


def main() -> None:
    """Write all tasks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--answers", action="store_true", help="with what should be answered")
    parser.add_argument("--unused", action="store_true", help="every second question alone")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, header, items in tasks(args.data, has_answers=args.answers):
        lines = [{"task": {"name": name, **header}}, *(items[1::2] if args.unused else items)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(items)} items")


def tasks(
    data: Path, *, has_answers: bool = False
) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Name, header and items of each task."""
    found = []
    for language in LANGUAGES:
        # The question alone: asked for a form, so small a base gives that without the steps.
        math = {
            "metric": "number",
            "template": "{question}",
            "max_tokens": MATH_TOKENS,
            **about(language, "math"),
        }
        items = picked(data / f"math_{language}.jsonl", ("question", "answer"))
        if has_answers:
            last = ANSWER[language]
            items = [{**item, "continuation": last.format(item["answer"])} for item in items]
        found.append((f"math_{language}", math, items))
    for language in LANGUAGES:
        code = {
            "metric": "code",
            "template": f"{CODE[language]}\n\n```python\n{{prompt}}```",
            "max_tokens": CODE_TOKENS,
            **about(language, "code"),
        }
        keys = ("task_id", "prompt", "entry_point", "test")
        items = picked(data / f"code_{language}.jsonl", keys)
        if has_answers:
            solved = read(data / f"code_{language}.jsonl")
            items = [
                {**item, "continuation": solution(each)}
                for item, each in zip(items, solved, strict=True)
            ]
        found.append((f"code_{language}", code, items))
    for language in LANGUAGES:
        medical = {
            "metric": "choice",
            # The choices are scored and not shown: so small a base does not pick among letters.
            "template": "{question}",
            **about(language, "med"),
        }
        keys = ("question", "choices", "answer")
        items = picked(data / f"medical_{language}.jsonl", keys)
        found.append((f"medical_{language}", medical, items))
    sentences = read(data / "medical_sentences.jsonl")
    for language in LANGUAGES:
        text = {"metric": "loss", "raw_prompt": True, **about(language, "med")}
        items = [halves(sentence[language], language) for sentence in sentences]
        found.append((f"medical_text_{language}", text, items))
    return found


def about(language: str, domain: str) -> dict[str, str]:
    """The names of the two adapters that should know a task."""
    return {"language": language, "domain": domain}


def solution(item: Mapping[str, Any]) -> str:
    """The block of code that solves an item of HumanEval-XL."""
    return f"```python\n{item['prompt']}{item['canonical_solution'].rstrip()}\n```"


def halves(sentence: str, language: str) -> dict[str, str]:
    """The first half of a sentence as prompt, by words, or by characters where it has none."""
    parts = list(sentence.strip()) if language == "zh" else sentence.split()
    join = "" if language == "zh" else " "
    middle = len(parts) // 2
    return {
        "prompt": join.join(parts[:middle]),
        "continuation": join + join.join(parts[middle:]),
    }


def picked(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The items of a file with these fields only."""
    return [{key: item[key] for key in keys} for item in read(path)]


def read(path: Path) -> list[Mapping[str, Any]]:
    """The objects of a file of JSON lines."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


if __name__ == "__main__":
    main()
