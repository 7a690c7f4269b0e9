"""An assistant that works offline: it sorts a request into a form, then answers it.

python examples/offline_assistant.py demo "A shirt costs 12 dollars. What do seven cost?"
"""

import json
import sys

from qaflora_edge import Engine, FusionWeights, QafloraError

FORM = {
    "type": "object",
    "properties": {"language": {"enum": ["English", "Spanish"]}, "urgent": {"type": "boolean"}},
    "required": ["language", "urgent"],
    "additionalProperties": False,
}


def show(fusion: FusionWeights) -> None:
    means = zip(fusion.adapters, fusion.weights.mean(axis=1), strict=True)
    print("mix:", ", ".join(f"{name} {mean:.2f}" for name, mean in means))


def main(bundle: str, request: str) -> None:
    user = [{"role": "user", "content": request}]
    response_format = {"type": "json_schema", "json_schema": {"schema": FORM}}
    with Engine(bundle, n_ctx=1024) as engine:
        form = engine.chat(user, response_format=response_format, max_tokens=64)
        print("form:", json.loads(form["choices"][0]["message"]["content"]))
        for chunk in engine.chat(user, stream=True, max_tokens=64, on_weights=show):
            print(chunk["choices"][0]["delta"].get("content", ""), end="", flush=True)
        print()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except QafloraError as error:
        sys.exit(f"Error: {error}")
