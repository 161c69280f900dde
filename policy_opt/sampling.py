"""Rules by which a sampler sets every token's temperature: what a recipe's `Sampler.hook` may name.

An engine that serves a hook asks `temperatures` at every decoding step, draws from softmax(logits / T), and
records log-probs at the plain temperature (`Sampler.temperature`): scored that way, sampler and trainer agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from policy_opt.errors import RecipeError, unknown
from policy_opt.protocols import Sampler

Rule = Callable[[Tensor, float, Mapping[str, float]], Tensor]
"""(entropy in nats of each token's distribution, plain temperature, options) -> temperature of each token."""


def entropy_temperature(entropy: Tensor, temperature: float, options: Mapping[str, float]) -> Tensor:
    """HAPO: T = T_0 (1 + tau h), h in [-1, 1] the entropy's place among the tokens of the last batch.

        e = log max(H, 1e-6),   x = (e - median) / (std + 1e-6),   h = scale_pos x if x > 0, else scale_neg x

    options: median, std, scale_pos, scale_neg (of the last batch) and tau; none of them: T_0.
    Liu et al. 2025, arXiv 2509.16591; as in the authors' vLLM sampler.
    """
    if not options:
        return torch.full_like(entropy, temperature)
    x = (entropy.clamp(min=1e-6).log() - options["median"]) / (options["std"] + 1e-6)
    h = (x * torch.where(x > 0, options["scale_pos"], options["scale_neg"])).clamp(-1, 1)
    return temperature * (1 + options["tau"] * h)


RULES: dict[str, Rule] = {"entropy_temperature": entropy_temperature}


def temperatures(sampler: Sampler, logits: Tensor) -> Tensor:
    """Temperature of every token from its raw logits [..., V] (no temperature applied; banned ids -inf): [...].

    RecipeError where the sampler names a rule that there is none of.
    """
    if sampler.hook is None:
        return logits.new_full(logits.shape[:-1], sampler.temperature)
    if sampler.hook not in RULES:
        raise RecipeError(unknown("sampler rule", sampler.hook, RULES))
    logp = logits.log_softmax(-1)
    entropy = -torch.where(logp > -torch.inf, logp.exp() * logp, 0).sum(-1)
    return RULES[sampler.hook](entropy, sampler.temperature, sampler.options)
