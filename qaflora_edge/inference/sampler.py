"""How a token is chosen: greedy or drawn, freely or under a grammar."""

import ctypes
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from qaflora_edge.ask import Sampling
from qaflora_edge.backend.model import Model
from qaflora_edge.config import MAX_SEED
from qaflora_edge.errors import BackendError, OptionError

if TYPE_CHECKING:
    from qaflora_edge.inference.constraint import Constraint

_N_PENALISED = 64  # tokens
_NO_PENALTIES = (1.0, 0.0, 0.0)  # repeat, frequency, presence
_COLDEST = 1e-6  # temperatures below overflow float32 logits
# llama.h struct llama_token_data
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Sampler:
    """Draw the tokens of one answer: a llama_sampler chain, and a grammar's constraint.

    Without close() it is freed when it is collected.

    is_plain attribute: whether the likeliest token is always chosen, where no constraint is
    is_free  attribute: whether the constraint waits, as it does within a thought
    forced   attribute: tokens that come next, whatever the constraint says

    Raises GrammarError for a grammar that is not taken, OptionError for an unknown token in a bias.
    """

    def __init__(self, model: Model, sampling: Sampling) -> None:
        self._model = model
        self._lib = model._lib
        params = self._lib.llama_sampler_chain_default_params()
        self._chain = self._lib.llama_sampler_chain_init(params)
        self._finalizer = weakref.finalize(self, self._lib.llama_sampler_free, self._chain)
        self._finalizer.atexit = False
        for sampler in self._links(sampling):
            self._lib.llama_sampler_chain_add(self._chain, sampler)
        self.is_free = False
        self.forced: list[int] = []
        self.constraint: Constraint | None = None
        if sampling.grammar is not None:
            from qaflora_edge.inference import constraint

            assert isinstance(sampling.grammar, constraint.Grammar)
            self.constraint = constraint.Constraint(model, sampling.grammar)

    def _links(self, sampling: Sampling) -> Iterator[Any]:
        """Make the samplers of the chain; llama.cpp makes empty ones of what changes nothing."""
        lib = self._lib
        n_vocab = self._model.n_vocab
        if sampling.logit_bias:
            biases = {int(token): bias for token, bias in sampling.logit_bias.items()}
            if max(biases) >= n_vocab:
                raise OptionError(
                    f"Option logit_bias has the token {max(biases)}, expected ids below {n_vocab}, "
                    "the base's vocabulary.",
                    "logit_bias",
                )
            pairs = (lib.llama_logit_bias * len(biases))(*biases.items())
            yield lib.llama_sampler_init_logit_bias(n_vocab, len(biases), pairs)
        penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        yield lib.llama_sampler_init_penalties(n_vocab, _N_PENALISED, *penalties)
        is_greedy = sampling.temperature < _COLDEST
        # The likeliest token is chosen, whatever came before.
        self.is_plain = is_greedy and not sampling.logit_bias and penalties == _NO_PENALTIES
        if is_greedy:
            yield lib.llama_sampler_init_greedy()
            return
        yield lib.llama_sampler_init_top_k(sampling.top_k)
        yield lib.llama_sampler_init_top_p(sampling.top_p, 1)
        yield lib.llama_sampler_init_min_p(sampling.min_p, 1)
        yield lib.llama_sampler_init_temp(sampling.temperature)
        seed = MAX_SEED if sampling.seed is None else sampling.seed
        yield lib.llama_sampler_init_dist(seed)

    def sample(self, context: Any, row: int = -1) -> int:
        """Draw the token that follows a row of the context, and advance the constraint.

        context  backend.context.Context

        Raises BackendError when no token can follow under the grammar, or the logits are NaN.
        """
        logits = context.logits_view(row)
        likeliest = int(logits.argmax())
        if np.isnan(logits[likeliest]):  # numpy takes NaN for the largest
            raise no_numbers("The logits after the answer so far")
        if self.forced:
            token = self.forced.pop(0)
            self._lib.llama_sampler_accept(self._chain, token)
            return token
        if self.constraint is None or self.is_free:
            return likeliest if self.is_plain else context.sample(self._chain, row)
        bits = np.unpackbits(self.constraint.mask().view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[: self._model.n_vocab])
        if not len(allowed):
            raise BackendError(
                "No token of the base's vocabulary can follow here under the grammar, expected at "
                "least one; allow other characters at this place of the grammar."
            )
        candidates = np.zeros(len(allowed), _CANDIDATE)
        candidates["id"] = allowed
        candidates["logit"] = logits[allowed]
        token = int(candidates["id"][self._apply(candidates)])
        self._lib.llama_sampler_accept(self._chain, token)
        self.constraint.accept(token)
        return token

    def can_end(self) -> bool:
        """Tell whether the tokens so far are whole under the grammar; True without one."""
        return self.constraint is None or self.constraint.can_end()

    def _apply(self, candidates: np.ndarray[Any, Any]) -> int:
        """Let the chain choose among candidates, changed in place; give the index of its choice."""
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


def no_numbers(what: str, adapters: str = "") -> BackendError:
    """Make the error of logits that are NaN; adapters: names in brackets, after a space."""
    return BackendError(
        f"{what} are NaN, expected numbers: an adapter that weighs more than 0 here{adapters}, or "
        "the base, is damaged. Convert or fetch it again, or leave it out."
    )
