"""Llama: an Engine with the methods of llama-cpp-python's Llama.

Code written for that class runs on a bundle by changing where Llama comes from. What cannot be
done is refused by name, and never ignored; what only steers speed or memory is taken and unused.
"""

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from qaflora_edge import Engine
from qaflora_edge.backend import library
from qaflora_edge.config import MAX_SEED
from qaflora_edge.files import AnyPath
from qaflora_edge.openai.completions import answer_head, text_chunks, text_dict
from qaflora_edge.openai.options import check_fixed

# Of Llama(): what changes no answer, and what has to stay at these values (the default first).
_UNUSED = frozenset(
    {"n_batch", "n_ubatch", "n_threads_batch", "use_mmap", "use_mlock", "verbose", "f16_kv"}
    | {"last_n_tokens_size", "n_parts", "offload_kqv", "numa", "main_gpu", "op_offload"}
    | {"split_mode", "tensor_split", "swa_full", "no_perf", "lora_scale"}
)
_FIXED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("logits_all", "vocab_only", "embedding", "spm_infill"), (False,)),
    **dict.fromkeys(("lora_path", "lora_base", "chat_handler", "draft_model"), (None,)),
    **dict.fromkeys(("kv_overrides", "tokenizer"), (None,)),
    **dict.fromkeys(("type_k", "type_v"), (None,)),  # engine_options={"kv_type": ...}
    **dict.fromkeys(("rope_scaling_type", "pooling_type", "attention_type"), (-1,)),
    "chat_format": (None, "chat_template.default"),
    "rope_freq_base": (0.0, None, 10000.0),  # the last ones are what LangChain always gives
    "rope_freq_scale": (0.0, None, 1.0),
    **{"yarn_ext_factor": (-1.0,), "yarn_attn_factor": (1.0,), "yarn_orig_ctx": (0,)},
    **{"yarn_beta_fast": (32.0,), "yarn_beta_slow": (1.0,)},
}
# Of create_completion() and create_chat_completion().
_FIXED_IN_CALLS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("top_logprobs", "stopping_criteria", "logits_processor"), (None,)),
    **dict.fromkeys(("functions", "function_call"), (None,)),
    **{"suffix": (None, ""), "logprobs": (None, False), "logit_bias": (None, {})},
    **{"typical_p": (1.0,), "tfs_z": (1.0,), "mirostat_mode": (0,)},
}
_DEFAULTS: dict[str, Any] = {
    **{"top_p": 0.95, "min_p": 0.05, "top_k": 40, "stop": (), "repeat_penalty": 1.0},
    **{"frequency_penalty": 0.0, "presence_penalty": 0.0, "seed": None, "grammar": None},
}
_UNUSED_IN_CALLS = frozenset({"model", "mirostat_tau", "mirostat_eta"})


class Llama:
    """A bundle that answers as llama-cpp-python's Llama does; each prompt is weighed.

    model_path    a bundle folder, or a base GGUF
    n_ctx         tokens of prompt and answer together
    n_gpu_layers, n_threads, seed, flash_attn  as there
    engine_options  further options of Engine: adapters (for a base GGUF), strategy, lens, pool, ...

    `engine` is the Engine behind it. Raises OptionError for options that it cannot follow.
    """

    def __init__(
        self,
        model_path: AnyPath,
        *,
        n_ctx: int = 512,
        n_gpu_layers: int = 0,
        n_threads: int | None = None,
        seed: int = MAX_SEED,
        flash_attn: bool | None = None,
        engine_options: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        check_fixed("Llama", others, _FIXED, unused=_UNUSED)
        self.model_path = os.fspath(model_path)
        is_bundle = Path(model_path).is_dir()
        self.engine = Engine(
            model_path if is_bundle else None,
            base=None if is_bundle else model_path,
            n_ctx=n_ctx,
            gpu_layers=n_gpu_layers,
            threads=n_threads or None,
            flash_attn=flash_attn,
            seed=_seed(seed),
            **(engine_options or {}),
        )

    def close(self) -> None:
        """Free everything."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # answers

    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        echo: bool = False,
        stream: bool = False,
        **options: Any,
    ) -> Any:
        """Go on with a text: a dict, or chunks with stream=True.

        Control tokens spelt out in it are control tokens, as there.
        """
        sampling, others = _sampling(options, max_tokens=16, temperature=0.8)
        check_fixed("create_completion", others, _FIXED_IN_CALLS, unused=_UNUSED_IN_CALLS)
        generation = self.engine.generate(prompt, parse_special=True, **sampling)
        start = ""
        if echo:
            start = prompt if isinstance(prompt, str) else self.detokenize(prompt).decode("utf-8")
        if stream:
            head = answer_head("text_completion", self.model_path)
            return text_chunks(head, [(start, generation)])
        return text_dict(self.model_path, [(start, generation)])

    __call__ = create_completion

    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        response_format: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        stream: bool = False,
        **options: Any,
    ) -> Any:
        """Answer a conversation under the base's chat template; see Engine.chat."""
        sampling, others = _sampling(options, max_tokens=None, temperature=0.2)
        check_fixed("create_chat_completion", others, _FIXED_IN_CALLS, unused=_UNUSED_IN_CALLS)
        asked: dict[str, Any] = {"tools": tools, "tool_choice": tool_choice}
        asked |= {"response_format": response_format, "stream": stream}
        return self.engine.chat(messages, **asked, **sampling)

    # tokens

    @property
    def context_params(self) -> SimpleNamespace:
        """The one of llama.cpp's context parameters that others read (LlamaIndex does): n_ctx."""
        return SimpleNamespace(n_ctx=self.engine.n_ctx)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Tokenize UTF-8 text."""
        with self.engine._core.call():
            return self.engine._model.tokenize(
                text.decode("utf-8"), add_special=add_bos, parse_special=special
            )

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """Spell tokens, without the space that a vocabulary puts before the first word."""
        with self.engine._core.call():
            text = self.engine._model.detokenize(tokens, special=special)
        is_begin = not prev_tokens and bool(tokens) and tokens[0] == self.token_bos()
        return text[1:] if is_begin and text[:1] == b" " else text

    def n_ctx(self) -> int:
        return self.engine.n_ctx

    def token_bos(self) -> int:
        return self._token("bos")

    def token_eos(self) -> int:
        return self._token("eos")

    def _token(self, name: str) -> int:
        with self.engine._core.call():
            model = self.engine._model
            return int(getattr(model._lib, f"llama_vocab_{name}")(model.vocab))


def replace_llama_cpp() -> None:
    """Let `llama_cpp.Llama` be this Llama, for LangChain, LlamaIndex and others that make one.

    Call it before such a program is imported. Raises LibraryError as the first Engine does.
    """
    library.load()  # llama_cpp binds the library that it finds when it is first imported
    import_module("llama_cpp").Llama = Llama  # type: ignore[attr-defined]


def _sampling(
    options: Mapping[str, Any], *, max_tokens: int | None, temperature: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return options of a call as Engine.generate takes them, with the defaults there; the others.

    max_tokens, temperature  defaults of this call
    """
    found = {**_DEFAULTS, "max_tokens": max_tokens, "temperature": temperature}
    found |= {name: value for name, value in options.items() if name in found}
    others = {name: value for name, value in options.items() if name not in found}
    limit, grammar = found["max_tokens"], found["grammar"]
    found["max_tokens"] = None if limit is None or limit <= 0 else limit
    found["top_k"] = max(0, found["top_k"])
    found["stop"] = found["stop"] or ()
    found["seed"] = _seed(found["seed"])
    if grammar is not None and not isinstance(grammar, str):
        found["grammar"] = str(grammar._grammar)  # a LlamaGrammar's text
    return found, others


def _seed(seed: int | None) -> int | None:
    """None for llama.cpp's "a new one each time", which is also -1."""
    return None if seed is None or seed in (-1, MAX_SEED) else seed
