"""How a token is chosen: greedy or drawn, freely or under a grammar."""

from __future__ import annotations

import codecs
import ctypes
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from qaflora_edge.backend.context import Context
from qaflora_edge.backend.library import said
from qaflora_edge.backend.model import Model
from qaflora_edge.errors import BackendError, GrammarError, OptionError
from qaflora_edge.grammar.gbnf import ROOT, check_gbnf
from qaflora_edge.grammar.json_schema import json_schema_to_gbnf

MAX_SEED = 2**32 - 1  # llama.h LLAMA_DEFAULT_SEED: a new one each time
_N_PENALISED = 64  # tokens
_COLDEST = 1e-6  # temperatures below overflow float32 logits
# llama.h struct llama_token_data
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop.

    max_tokens   None: until the context is full
    temperature  0, or below 1e-6: greedy
    seed         None: a new one each time
    stop         texts that end the answer; they are not part of it
    grammar      a GBNF text that the answer follows, or None
    top_k        draw from so many likeliest tokens; 0: all
    min_p        draw from tokens at least so likely as this part of the likeliest
    repeat_penalty, frequency_penalty, presence_penalty  for tokens among the last 64 of the answer;
                 1, 0 and 0: none
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            expected, kind = _KINDS[field.name]
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, kind):
                raise OptionError(f"Option {field.name} is {value!r}, expected {expected}.")
        checks = (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 0, ">= 0"),
            ("temperature", 0.0 <= self.temperature < float("inf"), ">= 0"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("seed", self.seed is None or 0 <= self.seed < MAX_SEED, "from 0 to 4294967294"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "from 0 to 1"),
            ("repeat_penalty", 0.0 < self.repeat_penalty < 100.0, "above 0 and below 100"),
            ("frequency_penalty", abs(self.frequency_penalty) < 100.0, "within ±100"),
            ("presence_penalty", abs(self.presence_penalty) < 100.0, "within ±100"),
            ("stop", all(self.stop), "texts that are not empty"),
        )
        for name, is_good, expected in checks:
            if not is_good:
                raise OptionError(f"Option {name} is {getattr(self, name)!r}, expected {expected}.")


_KINDS: dict[str, tuple[str, type]] = {
    "max_tokens": ("a whole number or None", Integral),
    "temperature": ("a number", Real),
    "top_p": ("a number", Real),
    "seed": ("a whole number or None", Integral),
    "stop": ("texts", tuple),
    "grammar": ("GBNF text or None", str),
    "top_k": ("a whole number", Integral),
    "min_p": ("a number", Real),
    "repeat_penalty": ("a number", Real),
    "frequency_penalty": ("a number", Real),
    "presence_penalty": ("a number", Real),
}


def make_sampling(stop: Any, **options: Any) -> Sampling:
    """Sampling of options as a caller gave them: stop as one text, several or None.

    Raises OptionError for one that does not exist, or has a wrong value.
    """
    for name, value in options.items():
        if name not in _KINDS:
            raise OptionError(
                f"Option {name} is {value!r}, expected no such option; those of sampling are "
                f"{', '.join(_KINDS)}."
            )
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, (list, tuple)) or not all(isinstance(text, str) for text in stops):
        raise OptionError(f"Option stop is {stop!r}, expected a text or a list of texts.")
    return Sampling(stop=tuple(stops), **options)


def grammar_text(grammar: str | None, json_schema: Mapping[str, Any] | bool | None) -> str | None:
    """The grammar an answer follows: as given, or of a JSON schema; None without either."""
    if grammar is not None and json_schema is not None:
        raise OptionError(
            "Options grammar and a JSON schema are both given; give one or the other."
        )
    return grammar if json_schema is None else json_schema_to_gbnf(json_schema)


class Sampler:
    """What draws tokens for one answer: a llama_sampler chain, and a grammar beside it.

    It is freed by close(), or when nothing uses it any more.

    Raises GrammarError for a grammar that cannot be followed.
    """

    def __init__(self, model: Model, sampling: Sampling) -> None:
        self.sampling, self._model, self._lib = sampling, model, model._lib
        self._pointers: list[Any] = []
        self._finalizer = weakref.finalize(self, _free, self._lib, self._pointers)
        self._finalizer.atexit = False
        self._chain = self._lib.llama_sampler_chain_init(
            self._lib.llama_sampler_chain_default_params()
        )
        self._pointers.append(self._chain)
        self._fill_chain()
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._grammar = None if sampling.grammar is None else self._init_grammar(sampling.grammar)

    def _fill_chain(self) -> None:
        lib, sampling = self._lib, self.sampling
        penalties = (
            sampling.repeat_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )
        if penalties != (1.0, 0.0, 0.0):
            self._add(
                lib.llama_sampler_init_penalties(self._model.n_vocab, _N_PENALISED, *penalties)
            )
        if sampling.temperature < _COLDEST:
            self._add(lib.llama_sampler_init_greedy())
            return
        if sampling.top_k > 0:
            self._add(lib.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1.0:
            self._add(lib.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0.0:
            self._add(lib.llama_sampler_init_min_p(sampling.min_p, 1))
        self._add(lib.llama_sampler_init_temp(sampling.temperature))
        self._add(lib.llama_sampler_init_dist(MAX_SEED if sampling.seed is None else sampling.seed))

    def _add(self, sampler: Any) -> None:
        self._lib.llama_sampler_chain_add(self._chain, sampler)

    def _init_grammar(self, text: str) -> Any:
        check_gbnf(text)
        pointer = self._lib.llama_sampler_init_grammar(
            self._model.vocab, text.encode("utf-8"), ROOT.encode()
        )
        if not pointer:
            raise GrammarError(f"The grammar cannot be followed: {said()}. Write it more simply.")
        self._pointers.append(pointer)
        return pointer

    def sample(self, context: Context) -> int:
        """A token for what follows in the context; the grammar, if any, moves on by it.

        Raises BackendError when no token of the vocabulary can follow under the grammar.
        """
        if self._grammar is None:
            return context.sample(self._chain)
        logits = context.logits()
        candidates = np.zeros(len(logits), _CANDIDATE)
        candidates["id"] = np.arange(len(logits))
        candidates["logit"] = logits
        token = self._draw(candidates.copy())
        # Most tokens are allowed, and one is checked much faster than all of them.
        if not self._allows(token):
            token = self._draw_allowed(candidates)
        self._lib.llama_sampler_accept(self._grammar, token)
        self._lib.llama_sampler_accept(self._chain, token)
        self._decoder.decode(self._model.piece(token))
        return token

    def _allows(self, token: int) -> bool:
        one = np.zeros(1, _CANDIDATE)
        one["id"] = token
        self._apply(self._grammar, one)
        return bool(np.isfinite(one["logit"][0])) and self._is_written(token)

    def _is_written(self, token: int) -> bool:
        """Whether a token writes what the grammar takes it for.

        Control tokens write nothing. Bytes that are no UTF-8, such as surrogates and overlong
        forms, pass for characters in llama-grammar.cpp decode_utf8.
        """
        done, _ = before = self._decoder.getstate()
        if self._model.is_end(token):
            return not done
        piece = self._model.piece(token)
        try:
            self._decoder.decode(piece)
            open_bytes, _ = self._decoder.getstate()
        except UnicodeDecodeError:
            return False
        finally:
            self._decoder.setstate(before)
        # Python refuses a surrogate at its third byte only; by then there is no way on.
        return bool(piece) and not b"\xed\xa0" <= open_bytes < b"\xee"

    def can_end(self) -> bool:
        """Whether what was drawn so far is whole under the grammar; True without one."""
        if self._grammar is None:
            return True
        ends = (token for token in range(self._model.n_vocab) if self._model.is_end(token))
        return any(self._allows(token) for token in ends)

    def _draw(self, candidates: np.ndarray[Any, Any]) -> int:
        return int(candidates["id"][self._apply(self._chain, candidates)])

    def _draw_allowed(self, candidates: np.ndarray[Any, Any]) -> int:
        self._apply(self._grammar, candidates)
        while np.isfinite(candidates["logit"]).any():
            token = self._draw(candidates[np.isfinite(candidates["logit"])])
            if self._is_written(token):
                return token
            candidates["logit"][token] = -np.inf
        raise BackendError(
            "No token of the base's vocabulary can follow here under the grammar, expected at "
            "least one; allow other characters at this place of the grammar."
        )

    def _apply(self, sampler: Any, candidates: np.ndarray[Any, Any]) -> int:
        """Let a sampler change or choose among candidates in place; the index of its choice."""
        array = self._lib.llama_token_data_array(
            data=candidates.ctypes.data_as(ctypes.POINTER(self._lib.llama_token_data)),
            size=len(candidates),
            selected=-1,
            sorted=False,
        )
        self._lib.llama_sampler_apply(sampler, ctypes.byref(array))
        return int(array.selected)

    def close(self) -> None:
        self._finalizer()


def _free(lib: Any, pointers: list[Any]) -> None:
    while pointers:
        lib.llama_sampler_free(pointers.pop())
