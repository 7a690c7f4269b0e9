"""Run llama.cpp's own tests of its server against ours: a plugin of their pytest, and a starter.

    python tests/llama_server_tests.py FOLDER [pytest's options]

FOLDER gets the pinned source (benchmarks/llama_server.py unpacks it). Their class that starts
llama-server starts our app in a thread instead, over a tiny base; their options become ours. Two
things are given way to: paths without /v1, and model names that we do not have. NOT_OURS says which
tests are left out, and why.
"""

import contextlib
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
FILES = (
    *("basic", "chat_completion", "completion", "compat_oai_responses", "ctx_shift", "ignore_eos"),
    *("security", "tokenize"),
)
# Why -> tests: FILE.FUNCTION, or with the beginning of its parameters.
NOT_OURS: dict[str, tuple[str, ...]] = {
    "paths of llama-server's own: /completion, /props, /slots, /apply-template, /cors-proxy": (
        *("basic.test_server_props", "basic.test_server_slots", "basic.test_load_split_model"),
        *("chat_completion.test_chat_template", "chat_completion.test_apply_chat_template"),
        "chat_completion.test_chat_completions_token_count",
        *("completion.test_completion", "completion.test_completion_stream"),
        "completion.test_completion_stream_vs_non_stream",
        *("completion.test_consistent_result_same_seed", "completion.test_cancel_request"),
        "completion.test_different_result_different_seed",
        "completion.test_consistent_result_different_batch_size",
        *("completion.test_nocache_long_input_prompt", "completion.test_json_prompt_no_mtmd"),
        "completion.test_json_prompt_mtm_error_when_not_supported",
        "completion.test_completion_with_tokens_input",
        *("completion.test_completion_parallel_slots", "completion.test_completion_unified"),
        *("completion.test_completion_response_fields", "completion.test_completion_prompt_cache"),
        *("completion.test_n_probs", "completion.test_n_probs_stream"),
        *("completion.test_n_probs_post_sampling", "completion.test_logit_bias"),
        "completion.test_n_probs_post_backend_sampling",
        *("ignore_eos.test_ignore_eos_populates_logit_bias", "ctx_shift.test_ctx_shift_enabled"),
        "ignore_eos.test_ignore_eos_false_no_logit_bias",
        *("ctx_shift.test_ctx_shift_disabled_short_prompt", "security.test_correct_api_key"),
        "ctx_shift.test_ctx_shift_disabled_long_prompt",
        "security.test_cors_proxy_only_forwards_explicit_proxy_headers",
    ),
    "texts and counts of the model that they fetch": (
        *("chat_completion.test_chat_completion", "chat_completion.test_chat_completion_stream"),
        "chat_completion.test_chat_completion_with_openai_library",
        "completion.test_completion_with_openai_library",
        "completion.test_completion_stream_with_openai_library",
        "completion.test_completion_stream_with_openai_library_stops",
        "compat_oai_responses.test_responses_with_openai_library",
        "tokenize.test_tokenize_with_bos",
        "chat_completion.test_completion_with_response_format[response_format1",
    ),
    # Prefilled answers, counts of a cache (in progress too), timings and texts of each token,
    # labels of models, several addresses, keys in X-Api-Key, pictures.
    "what we do not have": (
        "chat_completion.test_chat_template_assistant_prefill",
        "chat_completion.test_chat_template_continue_final_message_vllm_compat",
        "chat_completion.test_chat_template_continue_final_message_mutual_exclusion",
        "chat_completion.test_chat_completion_cached_tokens",
        "tokenize.test_tokenize_with_pieces",
        "chat_completion.test_chat_completion_with_timings_per_token",
        *("chat_completion.test_return_progress", "chat_completion.test_verbose_debug"),
        "compat_oai_responses.test_responses_stream_with_llama_telemetry",
        *("basic.test_server_multiple_addresses", "basic.test_server_model_aliases_and_tags"),
        *("basic.test_no_ui", "security.test_correct_api_key_anthropic_header"),
        "security.test_access_static_assets_without_api_key",
        "security.test_local_media_file[../../../tools-file://mtmd/test-1.jpeg",
        "security.test_local_media_file[../../../tools-file:////mtmd",
    ),
    # A model for each strategy, OpenAI's types of errors, origins by name, two answers in a row.
    "another rule here": (
        "basic.test_server_models",
        "chat_completion.test_context_size_exceeded",
        "chat_completion.test_context_size_exceeded_stream",
        "chat_completion.test_invalid_chat_completion_req[messages7",
        *("security.test_incorrect_api_key", "security.test_cors_options"),
        *("security.test_cors_origins_localhost_reflects",),
        *("security.test_cors_origins_localhost_rejects",),
        "security.test_cors_origins_defaults_to_localhost_with_tools_enabled",
    ),
}


# the plugin, inside their pytest


sys.modules.setdefault("wget", types.ModuleType("wget"))  # with it they would fetch models


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    entries = [entry for entries in NOT_OURS.values() for entry in entries]
    left_out = [item for item in items if any(_is_of(item, entry) for entry in entries)]
    unused = [entry for entry in entries if not any(_is_of(item, entry) for item in left_out)]
    assert not unused, f"there are no such tests: {unused}"
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _is_of(item: Any, entry: str) -> bool:
    """Whether a test is an entry of NOT_OURS: FILE.FUNCTION, or the beginning of its parameters."""
    file, _, name = entry.partition(".")
    is_here = item.path.stem == f"test_{file}"
    return is_here and (item.name.startswith(name) if "[" in name else item.originalname == name)


def pytest_sessionstart(session: Any) -> None:
    import tiny
    import utils  # theirs

    path = session.config._tmp_path_factory.mktemp("base") / "tiny.gguf"
    tiny.write_tiny_base(path, n_ctx=2048, chat_template=tiny.QWEN)
    running: dict[Any, contextlib.ExitStack] = {}

    def start(server: Any, timeout_seconds: int = 60) -> None:
        running[server] = stack = contextlib.ExitStack()
        url = stack.enter_context(_listening(server, path))
        server.server_port = int(url.rpartition(":")[2])
        utils.server_instances.add(server)

    def stop(server: Any) -> None:
        if server in running:
            running.pop(server).close()

    utils.ServerProcess.start = start
    utils.ServerProcess.stop = stop
    utils.ServerPreset.load_all = staticmethod(lambda: None)


def _listening(server: Any, path: Path) -> contextlib.AbstractContextManager[str]:
    """Our server over a base, with the options of theirs."""
    from serving import listening_app, make_options

    from qaflora_edge.server.app import make_app

    n_slot = server.n_slots or 1
    engine = {"n_ctx": (server.n_ctx or 512) // n_slot, "n_parallel": n_slot, "threads": 1}
    sampling = {"temperature": server.temperature, "seed": server.seed}
    if server.n_predict and server.n_predict > 0:
        sampling["max_tokens"] = server.n_predict
    origins = (server.cors_origins,) if server.cors_origins else ()
    options = make_options(
        engine=engine, sampling=sampling, api_key=server.api_key, cors_origins=origins
    )
    app = make_app([path], options)
    bundle = next(iter(app.state.models.by_name.values()))
    app.state.models.find = lambda model: (bundle, None)
    return listening_app(_without_v1(app))


def _without_v1(app: Any) -> Any:
    """Their paths are ours, with or without /v1."""

    async def asked(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] in (
            *("/chat/completions", "/completions", "/models", "/responses", "/embeddings"),
        ):
            scope = {**scope, "path": f"/v1{scope['path']}"}
        await app(scope, receive, send)

    return asked


# outside


def main() -> int:
    folder, *more = sys.argv[1:]
    sys.path.insert(0, str(TESTS.parent / "benchmarks"))
    from llama_server import unpack

    Path(folder).mkdir(parents=True, exist_ok=True)
    theirs = unpack(Path(folder)).resolve() / "tools" / "server" / "tests"
    files = [f"unit/test_{name}.py" for name in FILES]
    command = [sys.executable, "-m", "pytest", "-p", "llama_server_tests", "-p", "no:cacheprovider"]
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *(more or ["-q"]), *files], cwd=theirs, env={**os.environ, "PYTHONPATH": paths}
    )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
