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

from qaflora_edge.backend import library
from qaflora_edge.config import MAX_SEED
from qaflora_edge.dialects.openai_shapes import answer_chunks, answer_dict, answer_head
from qaflora_edge.dialects.openai_text import SHAPE
from qaflora_edge.dialects.options import check_off
from qaflora_edge.engine import Engine
from qaflora_edge.files import AnyPath

# Options that change no answer, of Llama() and of its methods.
_UNUSED = frozenset(
    {"n_batch", "n_ubatch", "n_threads_batch", "use_mmap", "use_mlock", "verbose", "f16_kv"}
    | {"last_n_tokens_size", "n_parts", "offload_kqv", "numa", "main_gpu", "op_offload"}
    | {"split_mode", "tensor_split", "swa_full", "no_perf", "lora_scale"}
    | {"model", "mirostat_tau", "mirostat_eta"}
)
# Every other option has to be off, or at this default.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "rope_freq_base": (10000.0,),  # LangChain always gives it and the next one
    "rope_freq_scale": (1.0,),
    "yarn_attn_factor": (1.0,),
    "yarn_beta_fast": (32.0,),
    "yarn_beta_slow": (1.0,),
    "typical_p": (1.0,),
    "tfs_z": (1.0,),
    "chat_format": ("chat_template.default",),
}
_DEFAULTS: dict[str, Any] = {
    **{"top_p": 0.95, "min_p": 0.05, "top_k": 40, "stop": (), "repeat_penalty": 1.0},
    **{"frequency_penalty": 0.0, "presence_penalty": 0.0, "seed": None, "grammar": None},
}
_OF_CHAT = ("response_format", "tools", "tool_choice")


class Llama:
    """Answer as llama-cpp-python's Llama does, from a bundle; each prompt is weighed.

    model_path    a bundle folder, or a base GGUF
    n_ctx         tokens of prompt and answer together; 0: see Engine
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
        _check("Llama", others)
        self.model_path = os.fspath(model_path)
        is_bundle = Path(model_path).is_dir()
        self.engine = Engine(
            model_path if is_bundle else None,
            base=None if is_bundle else model_path,
            n_ctx=n_ctx or None,
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

        echo  put the prompt before a whole answer
        """
        check_off("a streamed create_completion", {"echo": echo and stream}, {})
        sampling = _sampling("create_completion", options, max_tokens=16, temperature=0.8)
        generation = self.engine.generate(prompt, parse_special=True, **sampling)
        head = answer_head("text_completion", self.model_path)
        if stream:
            return answer_chunks(head, [generation], SHAPE)
        answer = answer_dict(head, [generation], SHAPE)
        if echo:
            start = prompt if isinstance(prompt, str) else self.detokenize(prompt).decode("utf-8")
            answer["choices"][0]["text"] = start + answer["choices"][0]["text"]
        return answer

    __call__ = create_completion

    def create_chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, stream: bool = False, **options: Any
    ) -> Any:
        """Answer a conversation under the base's chat template; see Engine.chat."""
        asked = {name: options.pop(name, None) for name in _OF_CHAT}
        sampling = _sampling("create_chat_completion", options, max_tokens=None, temperature=0.2)
        return self.engine.chat(messages, stream=stream, **asked, **sampling)

    # tokens

    @property
    def context_params(self) -> SimpleNamespace:
        """Give the one of llama.cpp's context parameters that others read (LlamaIndex does)."""
        return SimpleNamespace(n_ctx=self.engine.n_ctx)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Tokenize UTF-8 text."""
        with self.engine.model() as model:
            return model.tokenize(text.decode("utf-8"), add_special=add_bos, parse_special=special)

    def detokenize(self, tokens: Sequence[int], special: bool = False) -> bytes:
        """Spell tokens, without the space that a vocabulary puts before the first word."""
        with self.engine.model() as model:
            text = model.detokenize(tokens, special=special)
            is_begin = [*tokens[:1]] == [model._lib.llama_vocab_bos(model.vocab)]
        return text.removeprefix(b" ") if is_begin else text

    def n_ctx(self) -> int:
        """Count the tokens of the context."""
        return self.engine.n_ctx


def replace_llama_cpp() -> None:
    """Let `llama_cpp.Llama` be this Llama, for LangChain, LlamaIndex and others that make one.

    Call it before such a program is imported. Raises LibraryError as the first Engine does.
    """
    library.load()  # llama_cpp binds the library that it finds when it is first imported
    import_module("llama_cpp").Llama = Llama  # type: ignore[attr-defined]


def _check(method: str, others: Mapping[str, Any]) -> None:
    used = {name: value for name, value in others.items() if name not in _UNUSED}
    check_off(method, used, _HARMLESS)


def _sampling(
    method: str, options: Mapping[str, Any], *, max_tokens: int | None, temperature: float
) -> dict[str, Any]:
    """Return options of a call as Engine.generate takes them, with llama-cpp-python's defaults.

    Raises OptionError for an option that cannot be followed.
    """
    defaults = {**_DEFAULTS, "max_tokens": max_tokens, "temperature": temperature}
    _check(method, {name: options[name] for name in options.keys() - defaults.keys()})
    sampling = {name: options.get(name, default) for name, default in defaults.items()}
    limit = sampling["max_tokens"]
    grammar = sampling["grammar"]
    if grammar is not None and not isinstance(grammar, str):
        grammar = str(grammar._grammar)  # a LlamaGrammar's text
    return sampling | {
        "max_tokens": None if limit is None or limit <= 0 else limit,
        "top_k": max(0, sampling["top_k"]),
        "stop": sampling["stop"] or (),
        "seed": _seed(sampling["seed"]),
        "grammar": grammar,
    }


def _seed(seed: int | None) -> int | None:
    """Return None for llama.cpp's two seeds that mean a new seed each time."""
    return None if seed is None or seed in (-1, MAX_SEED) else seed
