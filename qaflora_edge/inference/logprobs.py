"""How likely tokens are: natural logarithms of the base's own probabilities."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.arrays import F32


@dataclass(frozen=True)
class TokenLogprob:
    """One token, and how likely it was.

    data     its bytes; of a control token its spelling
    logprob  in nats, before temperature, penalties, biases and grammar
    top      the likeliest tokens at its place, in order
    n_shown  bytes that the text has of it: none of a control token
    """

    token: int
    data: bytes
    logprob: float
    top: tuple[Self, ...] = ()
    n_shown: int = 0


def log_softmax(logits: F32) -> NDArray[np.float64]:
    """float64 [n_vocab], of logits float32 [n_vocab]."""
    z = logits.astype(np.float64)
    z -= z.max()
    return np.asarray(z - np.log(np.exp(z).sum()))


def token_logprob(
    logits: F32, token: int, n_top: int, piece: Callable[[int], bytes], n_shown: int
) -> TokenLogprob:
    """How likely a token is that was chosen by logits.

    logits  float32 [n_vocab]
    piece   the bytes of a token
    n_shown  see TokenLogprob
    """
    log_p = log_softmax(logits)

    def entry(each: int) -> TokenLogprob:
        return TokenLogprob(each, piece(each), float(log_p[each]))

    n_top = min(n_top, len(log_p))
    likeliest = np.argpartition(-log_p, n_top - 1)[:n_top] if n_top else np.zeros(0, np.int64)
    ordered = likeliest[np.argsort(-log_p[likeliest], kind="stable")]
    return replace(entry(token), top=tuple(entry(int(i)) for i in ordered), n_shown=n_shown)
