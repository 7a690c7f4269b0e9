"""Run llama.cpp's own tests of its server against ours: a plugin of their pytest, and a starter.

    python tests/llama_server_tests.py FOLDER [--write] [pytest's options]

FOLDER gets the pinned source (benchmarks/llama_server.py unpacks it). Their class that starts
llama-server starts our app in a thread instead; their options become ours. Models of the Hub become
a tiny base that ends texts soon, with the same chat template; their adapter becomes one made here.
Two things are given way to: paths without /v1, and model names that we do not have. NOT_OURS says
which tests are left out, and why. The table of docs/server.md has to say what was counted; --write
writes it there.
"""

import contextlib
import json
import os
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "server.md"
MARKS = ("<!-- llama-server's tests: begin -->\n", "<!-- llama-server's tests: end -->")
# The words of the table, and what they mean.
REASONS = {
    "model": "what a model of the Hub writes, knows or counts; a tiny one takes its place",
    "formats": "chat templates that write tools in another form, or know none: tools are refused",
    "shapes": "paths and fields that only llama-server has, such as `/props`, `/slots`, `n_probs`",
    "APIs": "embeddings, reranking, pictures, code infill, Anthropic's and Google's API",
    "features": "router, MCP and other tools that the server runs, proxies, sleep, drafts, files "
    "of slots, streams to resume, context shift",
    "rules": "decided otherwise: which KV state is reused, types of errors, which origins may ask, "
    "scales for all requests, dates of templates",
}
_TOOL = "tool_call.test_completion_with_required_tool_real_model["
# Reason -> tests: FILE, FILE.FUNCTION, or with the beginning of its parameters; * is any text.
NOT_OURS: dict[str, tuple[str, ...]] = {
    "model": (
        *("chat_completion.test_chat_completion", "chat_completion.test_chat_completion_stream"),
        "chat_completion.test_chat_completion_with_openai_library",
        "chat_completion.test_completion_with_response_format[response_format1",
        "compat_oai_responses.test_responses_with_openai_library",
        *("completion.test_completion", "completion.test_completion_stream"),
        "completion.test_completion_with_openai_library",
        "completion.test_completion_stream_with_openai_library",
        "completion.test_completion_stream_with_openai_library_stops",
        *("completion.test_completion_prompt_cache", "tokenize.test_tokenize_with_bos"),
        "ctx_shift.test_ctx_shift_disabled_short_prompt[-1",
        *("tool_call.test_weather", "tool_call.test_hello_world", "tool_call.test_calc_result"),
        "tool_call.test_thoughts",
    ),
    "formats": (
        *(f"{_TOOL}*{each}" for each in ("-chatml-", "gemma", "Phi", "functionary", "DeepSeek")),
        "tool_call.test_completion_without_tool_call_slow[meetkai-functionary-medium-v3.1",
        "tool_call.test_completion_without_tool_call_slow[meetkai-functionary-medium-v3.2*tools1",
        *("template.test_reasoning[deepseek*tools2", "template.test_reasoning[Cohere*tools2"),
    ),
    "shapes": (
        *("basic.test_server_props", "basic.test_server_slots", "basic.test_load_split_model"),
        *("basic.test_server_multiple_addresses", "basic.test_server_model_aliases_and_tags"),
        *("basic.test_no_ui", "chat_completion.test_chat_template"),
        "chat_completion.test_apply_chat_template",
        "chat_completion.test_chat_completion_with_timings_per_token",
        *(
            "chat_completion.test_return_progress",
            "chat_completion.test_chat_completions_token_count",
        ),
        "compat_oai_responses.test_responses_stream_with_llama_telemetry",
        *("completion.test_completion_with_tokens_input", "completion.test_cancel_request"),
        *("completion.test_completion_response_fields", "completion.test_n_probs"),
        *("completion.test_n_probs_stream", "completion.test_n_probs_post_sampling"),
        "completion.test_n_probs_post_backend_sampling",
        *(f"completion.test_logit_bias[{each}" for each in ("False", "True-False")),
        *("ignore_eos", "metrics", "tokenize.test_tokenize_with_pieces"),
        "security.test_access_static_assets_without_api_key",
    ),
    "APIs": (
        *("compat_anthropic", "compat_gcp", "embedding", "infill", "rerank", "vision_api"),
        "completion.test_json_prompt_no_mtmd",
        *(f"security.test_local_media_file[../../../tools-file:{p}" for p in ("//mtmd/t", "////")),
    ),
    "features": (
        *("ctx_shift.test_ctx_shift_enabled", "kv_keep_only_active", "mcp_servers", "proxy"),
        *("router", "sleep", "slot_save", "speculative", "stream", "tools_builtin"),
        "security.test_cors_proxy_only_forwards_explicit_proxy_headers",
        "security.test_cors_origins_defaults_to_localhost_with_tools_enabled",
    ),
    "rules": (
        *("basic.test_server_models", "lora.test_lora", "template.test_date_inside_prompt"),
        "chat_completion.test_chat_completion_cached_tokens",
        "chat_completion.test_chat_template_assistant_prefill[prefill1",
        *("chat_completion.test_context_size_exceeded",),
        "chat_completion.test_context_size_exceeded_stream",
        "ctx_shift.test_ctx_shift_disabled_long_prompt",
        *("security.test_incorrect_api_key", "security.test_cors_options"),
        *("security.test_cors_origins_localhost_reflects",),
        *("security.test_cors_origins_localhost_rejects",),
    ),
}


# the plugin, inside their pytest


sys.modules["wget"] = wget = types.ModuleType("wget")  # with it they would fetch models
counts: dict[str, Counter[str]] = {}  # FILE -> outcome or reason -> tests


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    left_out = {item: why for item in items for why in NOT_OURS if _is_one(item, NOT_OURS[why])}
    entries = [entry for entries in NOT_OURS.values() for entry in entries]
    unused = [entry for entry in entries if not any(_is_one(item, (entry,)) for item in left_out)]
    if len({item.path for item in items}) > 1:
        assert not unused, f"there are no such tests: {unused}"
    for item in items:
        counts.setdefault(_file(item), Counter())[left_out.get(item, "")] += 1
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _file(item: Any) -> str:
    return str(item.path.stem.removeprefix("test_"))


def _is_one(item: Any, entries: tuple[str, ...]) -> bool:
    """Whether a test is one of these entries of NOT_OURS."""
    names = (_file(item), f"{_file(item)}.{item.originalname}")
    for each in entries:
        begin, *parts = each.split("*")
        name = f"{_file(item)}.{item.name}"
        if each in names or (
            "[" in each and name.startswith(begin) and all(part in name for part in parts)
        ):
            return True
    return False


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
        if server.debug and isinstance(data, dict):  # --verbose
            data = {"verbose": True, **data}
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
    "Mistral-Nemo": "mistralai-Mistral-Nemo-Instruct-2407",
    "gemma-2": "google-gemma-2-2b-it",
    "Phi-3.5": "microsoft-Phi-3.5-mini-instruct",
    "DeepSeek-R1-Distill-Qwen": "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
}


def _served(server: Any, place: Path) -> Path:
    """What is served in place of a model of theirs."""
    import tiny

    if server.lora_files:
        return _speaking(place)
    template, file = tiny.QWEN, server.chat_template_file
    if server.chat_template == "chatml":
        template = tiny.CHATML
    elif not file and server.model_hf_repo:
        model = server.model_hf_repo.partition("/")[2]
        named = (TEMPLATES[each] for each in TEMPLATES if model.startswith(each))
        file = next((f"../../../models/templates/{each}.jinja" for each in named), None)
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
    origins = (server.cors_origins,) if server.cors_origins else ()
    options = make_options(
        engine=engine, sampling=sampling, api_key=server.api_key, cors_origins=origins
    )
    app = make_app([place], options)
    bundle = next(iter(app.state.models.by_name.values()))
    app.state.models.find = lambda model: (bundle, None)
    return listening_app(_without_v1(app))


def _without_v1(app: Any) -> Any:
    """Their paths are ours, with or without /v1; /completions is their /completion."""

    async def asked(scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path")
        if path in ("/chat/completions", "/models", "/responses", "/embeddings"):
            scope = {**scope, "path": f"/v1{path}"}
        if path == "/completions":
            scope = {**scope, "path": "/completion"}
        await app(scope, receive, send)

    return asked


# outside


def table(counts: dict[str, dict[str, int]]) -> str:
    """What was counted: FILE -> outcome or reason -> tests."""
    total: Counter[str] = Counter()
    lines = ["", "| file | tests | pass | skipped | left out |", "|---|---|---|---|---|"]
    for name, found in [*sorted(counts.items()), ("all", total)]:
        whys = ", ".join(f"{why} {found[why]}" for why in REASONS if found.get(why))
        n_test = sum(found.get(each, 0) for each in ("", *REASONS))
        lines.append(
            f"| {name} | {n_test} | {found.get('passed', 0)} | {found.get('skipped', 0)} | {whys} |"
        )
        total.update(found)
    return "\n".join([*lines, "", *(f"* **{why}**: {REASONS[why]}." for why in REASONS), "", ""])


def main() -> int:
    folder, *more = sys.argv[1:]
    sys.path.insert(0, str(TESTS.parent / "benchmarks"))
    from llama_server import unpack

    Path(folder).mkdir(parents=True, exist_ok=True)
    theirs = unpack(Path(folder)).resolve() / "tools" / "server" / "tests"
    found = Path(folder).resolve() / "counts.json"
    options = [each for each in more if each != "--write"]
    command = [sys.executable, "-m", "pytest", "-p", "llama_server_tests", "-p", "no:cacheprovider"]
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "QAFLORA_COUNTS": str(found)}
    done = subprocess.run([*command, *(options or ["-q", "unit"])], cwd=theirs, env=environment)
    if done.returncode or options:
        return done.returncode
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    old, after = rest.split(MARKS[1])
    new = table(json.loads(found.read_text(encoding="utf-8")))
    if "--write" in more:
        PAGE.write_text(before + MARKS[0] + new + MARKS[1] + after, encoding="utf-8")
    elif new != old:
        print(f"{PAGE} has another table than was counted; --write writes this one:\n{new}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
