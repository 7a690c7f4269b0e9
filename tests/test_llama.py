"""Code written for llama-cpp-python's Llama runs on a bundle."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import TinyBundle

from qaflora_edge import Llama
from qaflora_edge.config import MAX_SEED
from qaflora_edge.errors import OptionError

# What langchain_community.llms.LlamaCpp gives to Llama() and to each call, by its own defaults.
LANGCHAIN_INIT: dict[str, Any] = {
    **dict.fromkeys(("lora_path", "lora_base"), None),
    **dict.fromkeys(("f16_kv", "use_mmap", "verbose"), True),
    **dict.fromkeys(("logits_all", "vocab_only", "use_mlock"), False),
    **{"rope_freq_scale": 1.0, "rope_freq_base": 10000.0, "n_parts": -1, "seed": -1},
    **{"n_ctx": 256, "n_threads": 1, "n_batch": 8, "last_n_tokens_size": 64},
}
LANGCHAIN_CALL: dict[str, Any] = {
    **{"suffix": None, "logprobs": None, "echo": False, "stop": [], "max_tokens": 8},
    **{"temperature": 0.8, "top_p": 0.95, "repeat_penalty": 1.1, "top_k": 40},
}
USER = [{"role": "user", "content": "the thing?"}]


@pytest.fixture(scope="module")
def llama(made: TinyBundle) -> Iterator[Llama]:
    with Llama(str(made.folder), n_ctx=256, seed=3) as llama:
        yield llama


def test_completion_has_the_shape_of_the_original(llama: Llama) -> None:
    whole = llama("the king", max_tokens=6, temperature=0)
    assert set(whole) == {"id", "object", "created", "model", "choices", "usage"}
    assert whole["object"] == "text_completion"
    (choice,) = whole["choices"]
    assert set(choice) == {"text", "index", "logprobs", "finish_reason"}
    assert choice["text"] == llama.engine.generate("the king", max_tokens=6).text()
    assert whole["usage"]["completion_tokens"] == 6
    chunks = list(llama("the king", max_tokens=6, temperature=0, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"] == "length"
    assert len({chunk["id"] for chunk in chunks}) == 1
    echoed = llama("the king", max_tokens=6, temperature=0, echo=True)
    assert echoed["choices"][0]["text"] == "the king" + choice["text"]
    tokens = llama.tokenize(b"the king")
    assert llama(tokens, max_tokens=6, temperature=0)["choices"][0]["text"] == choice["text"]


def test_chat_completion_is_the_engines(llama: Llama) -> None:
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
    found = llama.create_chat_completion(USER, **options)
    expected = llama.engine.chat(USER, max_tokens=6)
    assert found["choices"] == expected["choices"]
    chunks = llama.create_chat_completion(messages=USER, stream=True, **options)
    assert next(iter(chunks))["object"] == "chat.completion.chunk"
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    response_format = {"type": "json_object", "schema": schema}
    found = llama.create_chat_completion(USER, response_format=response_format, max_tokens=99)
    assert json.loads(found["choices"][0]["message"]["content"])["n"] in (1, 2)


def test_grammar_objects_of_the_original_are_taken(llama: Llama) -> None:
    from llama_cpp import LlamaGrammar

    grammar = LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)
    for each in (grammar, 'root ::= "yes" | "no"'):
        assert llama("is it?", grammar=each)["choices"][0]["text"] in ("yes", "no")


def test_tokens_go_back_and_forth(llama: Llama, made: TinyBundle) -> None:
    tokens = llama.tokenize("ñandú <|im_end|>".encode(), special=True)
    assert tokens[-1] == made.base.tokens.index("<|im_end|>")
    assert llama.detokenize(tokens, special=True) == "ñandú <|im_end|>".encode()
    assert llama.detokenize(tokens) == "ñandú ".encode()
    assert llama.n_ctx() == 256


def test_seeds_repeat_answers(llama: Llama) -> None:
    def text(**options: Any) -> str:
        options |= {"temperature": 1.5, "max_tokens": 8}
        return str(llama("the king", **options)["choices"][0]["text"])

    assert text(seed=5) == text(seed=5) != text(seed=6)
    assert text() == text(seed=3)  # the seed of Llama()


def test_call_pattern_of_langchain_works(made: TinyBundle) -> None:
    with Llama(str(made.folder), **LANGCHAIN_INIT, n_gpu_layers=0) as llama:
        result = llama(prompt="the king", **LANGCHAIN_CALL)
        assert result["choices"][0]["text"]


@pytest.mark.slow
def test_llama_cpp_is_replaced_in_a_fresh_process(made: TinyBundle) -> None:
    """Without a library of its own, llama_cpp cannot be imported first."""
    code = (
        "import sys; from qaflora_edge import Llama, replace_llama_cpp\n"
        "replace_llama_cpp(); import llama_cpp; assert llama_cpp.Llama is Llama\n"
        "with llama_cpp.Llama(model_path=sys.argv[1], n_ctx=64) as llama:\n"
        "    print(llama.context_params.n_ctx, len(llama('the king', max_tokens=2)['choices']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(made.folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "64 1\n"


def test_base_alone_and_further_options(made: TinyBundle) -> None:
    adapters = {"es": made.adapter.path}
    with Llama(made.base.path, engine_options={"adapters": adapters}, n_ctx=64) as llama:
        assert llama.engine.adapters == ("es",)
    with Llama(made.folder, engine_options={"strategy": "static"}) as llama:
        assert llama.engine.strategy == "static"


@pytest.mark.parametrize(
    ("name", "value"),
    [("logits_all", True), ("rope_freq_base", 1e6), ("chat_format", "chatml"), ("n_contexts", 3)],
)
def test_what_cannot_be_followed_is_refused(made: TinyBundle, name: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        Llama(made.folder, **{name: value})
    assert str(caught.value) == (
        f"Option {name} of Llama is {value!r}, expected nothing: it cannot be followed here. "
        "Leave it out."
    )


@pytest.mark.parametrize("name", ["logprobs", "mirostat_mode", "suffix"])
def test_calls_that_cannot_be_followed_are_refused(llama: Llama, name: str) -> None:
    for call, first in ((llama.create_completion, "a"), (llama.create_chat_completion, USER)):
        with pytest.raises(OptionError, match=f"Option {name} of .* is 2, expected"):
            call(first, **{name: 2})  # type: ignore[arg-type]


def original_defaults(method: str) -> dict[str, Any]:
    """Parameters of a method of llama-cpp-python's own Llama, and their defaults."""
    import ast
    import importlib.util

    package = importlib.util.find_spec("llama_cpp")
    assert package is not None
    assert package.submodule_search_locations is not None
    tree = ast.parse((Path(package.submodule_search_locations[0]) / "llama.py").read_text("utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    args = next(node.args for node in functions if node.name == method)
    names = [*args.args[len(args.args) - len(args.defaults) :], *args.kwonlyargs]
    constants = {
        "llama_cpp.LLAMA_DEFAULT_SEED": MAX_SEED,
        "llama_cpp.LLAMA_SPLIT_MODE_LAYER": 1,
        "llama_cpp.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED": -1,
        "llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED": -1,
        "llama_cpp.LLAMA_ATTENTION_TYPE_UNSPECIFIED": -1,
    }
    return {
        name.arg: constants.get(text) if text in constants else ast.literal_eval(text)
        for name, default in zip(names, [*args.defaults, *args.kw_defaults], strict=True)
        if (text := ast.unparse(default) if default else "None")
    }


def test_every_default_of_the_original_is_taken(made: TinyBundle) -> None:
    with Llama(made.folder, **original_defaults("__init__")) as llama:
        for method, first in (("create_completion", "a"), ("create_chat_completion", USER)):
            options = original_defaults(method)
            assert len(options) > 20
            assert getattr(llama, method)(first, **(options | {"max_tokens": 2, "top_k": -1}))
