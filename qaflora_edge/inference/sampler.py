"""How a token is chosen: greedy or drawn, freely or under a grammar."""

import ctypes
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.backend.model import Model
from qaflora_edge.errors import BackendError, OptionError
from qaflora_edge.inference.request import MAX_SEED, Sampling

if TYPE_CHECKING:
    from qaflora_edge.inference.constraint import Constraint

_N_PENALISED = 64  # tokens
_COLDEST = 1e-6  # temperatures below overflow float32 logits
# llama.h struct llama_token_data
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Logits(Protocol):
    """Logits of the last decode: of backend.context.Context."""

    def logits(self, row: int = -1) -> Any: ...
    def logits_view(self, row: int = -1) -> Any: ...
    def sample(self, sampler: Any, row: int = -1) -> int: ...


class Sampler:
    """What draws tokens for one answer: a llama_sampler chain, and what it has to follow.

    It is freed by close(), or when nothing uses it any more.

    Raises GrammarError for a grammar that cannot be followed, OptionError for the bias of a token
    that is none.
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
        self.constraint: Constraint | None = None
        if sampling.grammar is not None:
            from qaflora_edge.inference import constraint

            grammar = constraint.chosen_grammar(sampling.grammar)
            self.constraint = constraint.Constraint(model, grammar)

    @property
    def _is_plain(self) -> bool:
        """Whether the likeliest token is chosen, whatever came before."""
        sampling = self.sampling
        penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        is_changed = bool(sampling.logit_bias) or penalties != (1.0, 0.0, 0.0)
        return sampling.temperature < _COLDEST and not is_changed

    @staticmethod
    def _argmax(context: Logits, row: int) -> int:
        logits = context.logits_view(row)
        token = int(logits.argmax())
        if np.isnan(logits[token]):  # numpy takes NaN for the largest
            raise BackendError(
                "The logits after the answer so far are NaN, expected numbers: an adapter or the "
                "base is damaged. Convert or fetch it again, or leave it out."
            )
        return token

    def _fill_chain(self) -> None:
        lib, sampling = self._lib, self.sampling
        if sampling.logit_bias:
            self._add_bias({int(token): bias for token, bias in sampling.logit_bias.items()})
        penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
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

    def _add_bias(self, biases: Mapping[int, float]) -> None:
        n_vocab = self._model.n_vocab
        if max(biases) >= n_vocab:
            raise OptionError(
                f"Option logit_bias has the token {max(biases)}, expected ids below {n_vocab}, "
                "the base's vocabulary.",
                "logit_bias",
            )
        pairs = (self._lib.llama_logit_bias * len(biases))(*biases.items())
        self._add(self._lib.llama_sampler_init_logit_bias(n_vocab, len(biases), pairs))

    def _add(self, sampler: Any) -> None:
        self._lib.llama_sampler_chain_add(self._chain, sampler)

    def sample(self, context: Logits, row: int = -1, mask: NDArray[np.uint32] | None = None) -> int:
        """A token for what follows a row of the context; the constraint, if any, goes on behind it.

        mask  uint32 [ceil(n_vocab / 32)] of the constraint, where it was worked out before

        Raises BackendError when no token of the vocabulary can follow under the grammar, or the
        logits are NaN.
        """
        likeliest = self._argmax(context, row)
        if self.constraint is None:
            return likeliest if self._is_plain else context.sample(self._chain, row)
        mask = self.constraint.mask() if mask is None else mask
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[: self._model.n_vocab])
        if not len(allowed):
            raise BackendError(
                "No token of the base's vocabulary can follow here under the grammar, expected at "
                "least one; allow other characters at this place of the grammar."
            )
        candidates = np.zeros(len(allowed), _CANDIDATE)
        candidates["id"] = allowed
        candidates["logit"] = context.logits_view(row)[allowed]
        token = int(candidates["id"][self._apply(candidates)])
        self._lib.llama_sampler_accept(self._chain, token)
        self.constraint.accept(token)
        return token

    def can_end(self) -> bool:
        """Whether what was drawn so far is whole under the grammar; True without one."""
        return self.constraint is None or self.constraint.can_end()

    def _apply(self, candidates: np.ndarray[Any, Any]) -> int:
        """Let the chain choose among candidates, changed in place; the index of its choice."""
        array = self._lib.llama_token_data_array(
            data=candidates.ctypes.data_as(ctypes.POINTER(self._lib.llama_token_data)),
            size=len(candidates),
            selected=-1,
            sorted=False,
        )
        self._lib.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.selected)

    def close(self) -> None:
        self._finalizer()


def _free(lib: Any, pointers: list[Any]) -> None:
    while pointers:
        lib.llama_sampler_free(pointers.pop())
