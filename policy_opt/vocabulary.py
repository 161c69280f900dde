"""What a need's quantities mean, on the full distribution: small vocabularies, and the definition for chunked ones."""

from __future__ import annotations

import math

from torch import Tensor

from policy_opt.need import Entropy, LogProb, TopKIds, TopKLogProb


def evaluate(what: LogProb | Entropy | TopKLogProb | TopKIds, logp: Tensor, tokens: Tensor) -> Tensor:
    """A functional of log-probs [..., V] at each position; tokens [...] int64, what was drawn there.

    [...], or [..., min(k, V)] for the top-k ones. A probability of 0 (log-prob -inf) adds no entropy.
    """
    if isinstance(what, LogProb):
        return logp.gather(-1, tokens[..., None]).squeeze(-1)
    if isinstance(what, Entropy):
        lowest = math.log(what.floor) if what.floor else None
        log = logp.clamp(min=lowest) if lowest is not None else logp.where(logp > -math.inf, logp.new_zeros(()))
        return -(logp.exp() * log).sum(-1)
    top = logp.topk(min(what.k, logp.shape[-1]))
    return top.values if isinstance(what, TopKLogProb) else top.indices
