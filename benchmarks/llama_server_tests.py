"""Run llama.cpp's own tests of its server against ours: a plugin of their pytest, and a starter.

    python benchmarks/llama_server_tests.py FOLDER [--write] [pytest's options]

FOLDER gets the pinned source (llama_server.py unpacks it). Their class that starts
llama-server starts our app in a thread instead; their options become ours. Models of the Hub become
a tiny base that ends texts soon, with the same chat template; their adapter becomes one made here.
Two things are given way to: paths without /v1, and model names that we do not have. NOT_OURS, a
file beside this one, says which tests are left out, and why. The table in results/ has to say what
was counted; --write writes it there.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE / "results" / "llama-server-tests.md"
HEAD = "# Tests of llama-server that pass here\n"
# Reason, as the table has it -> what it means, and its tests: FILE, FILE.FUNCTION, or with the
# beginning of its parameters; * is any text.
NOT_OURS: dict[str, Any] = json.loads((HERE / "llama_server_tests.json").read_text("utf-8"))


sys.modules["wget"] = wget = types.ModuleType("wget")  # with it they would fetch models
counts: dict[str, Counter[str]] = {}  # FILE -> outcome or reason -> tests


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    entries = [(entry, why) for why, each in NOT_OURS.items() for entry in each["tests"]]
    left_out = {item: why for item in items for entry, why in entries if _is_one(item, entry)}
    unused = [entry for entry, _ in entries if not any(_is_one(item, entry) for item in left_out)]
    assert not unused or len(items) < 500, f"there are no such tests: {unused}"
    for item in items:
        counts.setdefault(_file(item), Counter())[left_out.get(item, "")] += 1
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _file(item: Any) -> str:
    return str(item.path.stem.removeprefix("test_"))


def _is_one(item: Any, entry: str) -> bool:
    """Whether a test is this entry of NOT_OURS, or one of it."""
    begin, *parts = entry.split("*")
    name, function = f"{_file(item)}.{item.name}", f"{_file(item)}.{item.originalname}"
    is_part = "[" in entry and name.startswith(begin) and all(part in name for part in parts)
    return is_part or entry in (_file(item), function)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.skipped:
        file = Path(report.fspath).stem.removeprefix("test_")
        counts[file][report.outcome] += 1


def pytest_sessionfinish(session: Any) -> None:
    if found := os.environ.get("QAFLORA_COUNTS"):
        Path(found).write_text(json.dumps(counts), encoding="utf-8")


def pytest_sessionstart(session: Any) -> None:
    import utils  # theirs

    place = session.config._tmp_path_factory.mktemp("bases")
    running: dict[Any, contextlib.ExitStack] = {}

    def start(server: Any, timeout_seconds: int = 60) -> None:
        running[server] = stack = contextlib.ExitStack()
        url = stack.enter_context(_listening(server, _served(server, place)))
        server.server_port = int(url.rpartition(":")[2])
        utils.server_instances.add(server)

    def stop(server: Any) -> None:
        if server in running:
            running.pop(server).close()

    def make_request(server: Any, method: str, path: str, data: Any = None, *more: Any, **how: Any):
        if server.reasoning:  # --reasoning
            data = {"chat_template_kwargs": {"enable_thinking": server.reasoning != "off"}, **data}
        return asked(server, method, path, data, *more, **how)

    asked = utils.ServerProcess.make_request
    utils.ServerProcess.make_request = make_request
    utils.ServerProcess.start = start
    utils.ServerProcess.stop = stop
    utils.ServerPreset.load_all = staticmethod(lambda: None)
    wget.download = lambda url, out: Path(out).parent.mkdir(exist_ok=True) or Path(out).touch()


# What the Hub's models have as chat templates: the beginning of a name -> of a file of llama.cpp.
TEMPLATES = {
    "Meta-Llama-3.1-8B": "meta-llama-Llama-3.1-8B-Instruct",
    "Llama-3.2": "meta-llama-Llama-3.2-3B-Instruct",
    "Qwen2.5": "Qwen-Qwen2.5-7B-Instruct",
}


def _served(server: Any, place: Path) -> Path:
    """What is served in place of a model of theirs."""
    import tiny

    if server.lora_files:
        return _speaking(place)
    template, file = tiny.QWEN, server.chat_template_file
    hub, _, model = (server.model_hf_repo or "").partition("/")
    if hub == "bartowski" and not file:
        named = next(TEMPLATES[each] for each in TEMPLATES if model.startswith(each))
        file = f"../../../models/templates/{named}.jinja"
    if file:
        template = Path(file).read_text(encoding="utf-8")
    path = place / f"{abs(hash((template, server.jinja)))}.gguf"
    likely = {'"': 20.0, "}": 15.0, ",": 14.0} if server.jinja else {}  # JSON ends soon

    def logits(token: str) -> float:  # it writes ASCII, and does not end by itself
        is_plain = token.replace("Ġ", "").isascii() and token not in tiny.CONTROLS
        return likely.get(token, 0.0) if is_plain else -30.0

    if not path.exists():
        replace = {"output.bias": tiny.constant_logits(logits)["output.bias"]}
        tiny.write_tiny_base(path, "qwen2", n_ctx=8192, chat_template=template, replace=replace)
    return path


def _speaking(place: Path) -> Path:
    """A bundle whose base says what test_lora expects, by the weight of the one adapter.

    The last state is 1 + s u, with s the weight and u = +1, -1, ...; a word's logit is
    2 s s0 - s0^2 times a positive number, so that the word with the nearest s0 is said.
    """
    import numpy as np
    import tiny

    from qaflora_edge.bundles.create import create_bundle

    words = {0.0: "many bright", 0.3: "special", 0.7: "far", 1.0: "eye"}
    n_embd, n_ff, u = 64, 96, np.resize([1.0, -1.0], 64)
    path, folder = place / "speaking.gguf", place / "speaking"
    if folder.exists():
        return folder
    options: Any = {"n_layer": 1, "tied": False, "user_defined": tuple(words.values())}
    shapes = tiny.write_tiny_base(path, **options).tensors
    replace = {name: np.ones_like(each) for name, each in shapes.items() if "norm" in name}
    replace["token_embd.weight"] = np.ones_like(shapes["token_embd.weight"])
    for stem, value in (("attn_output", 0), ("ffn_down", 0), ("ffn_gate", 1), ("ffn_up", 1)):
        name = f"blk.0.{stem}.weight"
        replace[name] = np.full_like(shapes[name], value / n_embd)
    output = np.full_like(shapes["output.weight"], -1.0)
    for at, s0 in zip(range(-len(words), 0), words, strict=True):
        output[at] = -s0 * s0 + 2 * s0 * u
    tiny.write_tiny_base(path, replace={**replace, "output.weight": output}, **options)
    silu = 1 / (1 + np.exp(-1.0))
    pair = (np.full((1, n_ff), 1 / (n_ff * silu)), u[:, None] / 8)  # alpha is 8
    names = (f"blk.0.ffn_down.weight.lora_{side}" for side in "ab")
    tensors = {name: each.astype(np.float32) for name, each in zip(names, pair, strict=True)}
    adapter = tiny.write_pairs(place / "shakespeare.gguf", tensors)
    create_bundle(folder, path, {"shakespeare": adapter})
    return folder


def _listening(server: Any, place: Path) -> contextlib.AbstractContextManager[str]:
    """Our server, with the options of theirs."""
    from serving import listening_app, make_options

    from qaflora_edge.server.app import make_app

    n_slot = server.n_slots or 1
    n_ctx = (server.n_ctx or 512) // (1 if server.kv_unified else n_slot)
    if server.chat_template_file or n_ctx > 8192:  # a token for each letter of a template
        n_ctx = 8192
    engine = {"n_ctx": n_ctx, "n_parallel": n_slot, "threads": 1}
    sampling = {"temperature": server.temperature, "seed": server.seed}
    if server.n_predict and server.n_predict > 0:
        sampling["max_tokens"] = server.n_predict
    who = {"api_key": server.api_key, "cors_origins": tuple(filter(None, [server.cors_origins]))}
    app = make_app([place], make_options(engine=engine, sampling=sampling, **who))
    bundle = next(iter(app.state.models.by_name.values()))
    app.state.models.find = lambda model: (bundle, None)
    return listening_app(_without_v1(app))


def _without_v1(app: Any) -> Any:
    """Their paths are ours, with or without /v1; /completions is their /completion."""

    ours = {path: f"/v1{path}" for path in ("/chat/completions", "/models", "/responses")}
    ours["/completions"] = "/completion"

    async def asked(scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path")
        await app({**scope, "path": ours.get(path, path)}, receive, send)

    return asked


def table(counts: dict[str, dict[str, int]]) -> str:
    """What was counted: FILE -> outcome or reason -> tests."""
    total: Counter[str] = Counter()
    lines = ["", "| file | tests | pass | skipped | left out |", "|---|---|---|---|---|"]
    for name, found in [*sorted(counts.items()), ("all", total)]:
        whys = ", ".join(f"{why} {found[why]}" for why in NOT_OURS if found.get(why))
        n_test = sum(found.get(each, 0) for each in ("", *NOT_OURS))
        n_passed, n_skipped = found.get("passed", 0), found.get("skipped", 0)
        if n_passed:  # the others count in the last row alone
            lines.append(f"| {name} | {n_test} | {n_passed} | {n_skipped} | {whys} |")
        total.update(found)
    means = [f"* **{why}**: {each['means']}." for why, each in NOT_OURS.items()]
    return "\n".join([*lines, "", *means, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--write", action="store_true", help="write the table that was counted")
    asked, options = parser.parse_known_args()
    from llama_server import unpack

    asked.folder.mkdir(parents=True, exist_ok=True)
    theirs = unpack(asked.folder).resolve() / "tools" / "server" / "tests"
    found = asked.folder.resolve() / "counts.json"
    command = [sys.executable, "-m", "pytest", "-p", "llama_server_tests", "-p", "no:cacheprovider"]
    paths = os.pathsep.join(
        [str(HERE), str(HERE.parent / "tests"), os.environ.get("PYTHONPATH", "")]
    )
    environment = {**os.environ, "PYTHONPATH": paths, "QAFLORA_COUNTS": str(found)}
    done = subprocess.run([*command, *(options or ["-q", "unit"])], cwd=theirs, env=environment)
    if done.returncode or options:
        return done.returncode
    new = HEAD + table(json.loads(found.read_text(encoding="utf-8")))
    if asked.write:
        PAGE.write_text(new, encoding="utf-8")
    elif new != PAGE.read_text(encoding="utf-8"):
        print(f"{PAGE} has another table than was counted; --write writes this one:\n{new}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
