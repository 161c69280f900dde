"""Lion-K: Lion with any convex K in place of the l1 norm. Chen et al. 2023, arXiv 2310.05898.

Every step goes along a sub-gradient of K at the interpolated momentum. Weight decay lambda turns this into
constrained or penalised optimisation: f(theta) + K*(lambda theta) / lambda, K* the convex conjugate. Outside the
feasible set the distance to it shrinks at least by (1 - lr lambda) per step; inside, the objective falls.

    z     = b1 m + (1 - b1) g
    theta <- (1 - lr lambda) theta - lr grad K(z)
    m     <- b2 m + (1 - b2) g

    K               grad K(z)                               bound
    l1              sign(z)                                 |theta|_inf <= 1/lambda     (this is Lion)
    l2              z / |z|_2                               |theta|_2 <= 1/lambda
    lp(p)           sign(z) (|z| / |z|_p)^(p-1)             |theta|_q <= 1/lambda, 1/p + 1/q = 1
    l1_threshold(e) sign(z) [|z| > e]                       as l1, and e |theta|_1
    huber(e)        clip(z/e, -1, 1)                        as l1, and e lambda/2 |theta|^2
    topk(k)         sign(z) on the k largest |z|            as l1, and |theta|_1 <= k/lambda
    half_sq         z                                       none; lambda/2 |theta|^2
    nuclear         U V^T of z                              spectral norm <= 1/lambda

Norms are per tensor. The theory wants b2 > b1. Another K is a class with `gradient`, `value` and `dual`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from policy_opt.bank import Optim
from policy_opt.errors import RecipeError
from policy_opt.optimizers.golden import drive, refuse_others
from policy_opt.optimizers.kappa import L1, Kappa
from policy_opt.optimizers.stepper import Card, Seen, buffers

card = Card(
    slug="lion_k",
    title="Lion along the sub-gradient of any convex function, with the bound that it implies",
    cite="Chen et al. 2023, arXiv 2310.05898",
    evidence="update read in a secondary page by the same group; bound in the abstract; the K's are derived",
    deviations="norms are per tensor; group norms of the paper's table are not there",
)


_L1 = L1()


@dataclass(frozen=True)
class Interpolated:
    """grad K at the momentum interpolated with the gradient; the memory has a decay rate of its own."""

    betas: tuple[float, float] = (0.9, 0.99)
    """Of the interpolation, of the memory."""
    kappa: Kappa = _L1

    def __call__(
        self, grads: list[Tensor], states: Sequence[dict[str, Tensor]], names: Sequence[str], seen: Seen | None
    ) -> list[Tensor]:
        """The update uses the memory as it was before this gradient entered it."""
        b1, b2 = self.betas
        memory = buffers(states, "exp_avg", grads)
        zs = list(torch._foreach_mul(memory, b1))
        torch._foreach_add_(zs, grads, alpha=1 - b1)
        torch._foreach_mul_(memory, b2)
        torch._foreach_add_(memory, grads, alpha=1 - b2)
        return self.kappa.gradient(zs)


def golden(inputs: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of one case of the vector file."""
    from policy_opt.catalog import find

    refuse_others(params, ("lr", "beta1", "beta2", "weight_decay", "kappa", "p", "e", "k"))
    options = {name: params[name] for name in ("p", "e", "k") if params.get(name) is not None}
    try:
        kappa = find("kappa", params.get("kappa", "l1"))(**options)
    except TypeError as error:
        raise RecipeError(f"lion_k: {error}") from None
    optim = Optim(
        "lion_k",
        betas=(params.get("beta1", 0.9), params.get("beta2", 0.99)),
        weight_decay=params.get("weight_decay", 0.0),
        kappa=kappa,
    )
    steps = drive(optim, inputs, params.get("lr", 1e-4))
    return {name: steps[name] for name in ("theta", "exp_avg", "direction")}
