"""Send what clients send to llama-server and to `qaflora serve`, and count what each refuses.

    python benchmarks/refusals.py --llama-server URL --qaflora URL

The requests are those of results/client-requests.json: the fields that the newest clients and
agents sent with their defaults for the model `demo`; messages, tools and schemas in them are short
ones. Where they name no number of tokens, a few are asked for. Refused is an answer with a status
of 400 or more. Both servers should have the same base.

With Qwen2.5-Coder-0.5B on 30 November, of 82 llama-server (7e4c0a9) accepted 62, `qaflora serve`
all: Ollama's API, embeddings without a flag and one model's facts are not llama-server's.
"""

import argparse
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUESTS = Path(__file__).resolve().parent / "results" / "client-requests.json"
N_TOKEN = 8
TIMEOUT_S = 600


@dataclass(frozen=True)
class Asked:
    """One request of a client, and the status that each server answers with."""

    client: str
    method: str
    path: str
    statuses: tuple[int, int]


def status(url: str, method: str, path: str, body: Any) -> int:
    """Ask a server, read its whole answer, and give the status; 400 for an error in a stream."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer x"}
    request = urllib.request.Request(url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            is_broken = b'data: {"error"' in answer.read()
            return 400 if is_broken else int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def short(path: str, body: Any) -> Any:
    """Ask for a few tokens where a request of texts names no number."""
    if not isinstance(body, dict):
        return body
    if path == "/v1/responses":
        return {"max_output_tokens": N_TOKEN, **body}
    if path in ("/v1/chat/completions", "/v1/completions") and "max_completion_tokens" not in body:
        return {"max_tokens": N_TOKEN, **body}
    if path in ("/api/chat", "/api/generate"):
        return {**body, "options": {"num_predict": N_TOKEN, **(body.get("options") or {})}}
    return body


def print_table(rows: Sequence[Asked]) -> None:
    """Print what is accepted by client, then what one server alone refuses."""
    print("| client | requests | llama-server accepts | qaflora accepts | llama-server alone |")
    print("|---|--:|--:|--:|--:|")
    for client in dict.fromkeys(row.client for row in rows):
        theirs = [row.statuses for row in rows if row.client == client]
        there = sum(first < 400 for first, _ in theirs)
        here = sum(second < 400 for _, second in theirs)
        alone = sum(first < 400 <= second for first, second in theirs)
        print(f"| {client} | {len(theirs)} | {there} | {here} | {alone} |")
    for row in rows:
        if (row.statuses[0] < 400) != (row.statuses[1] < 400):
            print(f"{row.client}: {row.method} {row.path}: {row.statuses}")


def main() -> None:
    """Ask both servers for everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--llama-server", required=True, metavar="URL")
    parser.add_argument("--qaflora", required=True, metavar="URL")
    args = parser.parse_args()
    rows = []
    for line in json.loads(REQUESTS.read_text(encoding="utf-8")):
        method = line["method"]
        path = line["path"]
        body = short(path, line["body"])
        urls = (args.llama_server, args.qaflora)
        first, second = (status(url, method, path, body) for url in urls)
        rows.append(Asked(line["client"], method, path, (first, second)))
    print_table(rows)


if __name__ == "__main__":
    main()
