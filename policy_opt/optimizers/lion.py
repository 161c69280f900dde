"""Lion: evolved sign momentum. Chen et al. 2023, arXiv 2302.06675; code: google/automl, lion/lion_pytorch.py.

Every coordinate moves by the learning rate, whatever the size of its gradient; one buffer, no second moment, no
epsilon. Global norm clipping has no effect unless its factor changes over time.

    theta <- theta (1 - lr lambda)
    u     = sign(b1 m + (1 - b1) g)          b1 interpolates for the update, with m before this gradient
    theta <- theta - lr u
    m     <- b2 m + (1 - b2) g               b2 is the memory's

sign(0) = 0. The rate is 3 to 10 times below AdamW's and lambda as much above; betas (0.95, 0.98) for language
models. `decoupled` (lucidrains/lion-pytorch) divides lambda by the first learning rate, so that the decay of a step
is lambda lr_t / lr_0: it follows the schedule, but not the base rate. With lambda > 0, |theta| is drawn into
[-1/lambda, 1/lambda]: see lion_k.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policy_opt.bank import Optim
from policy_opt.optimizers.golden import drive, refuse_others
from policy_opt.optimizers.stepper import Card

card = Card(
    slug="lion",
    title="sign of interpolated momentum: every coordinate moves by the learning rate",
    cite="Chen et al. 2023, arXiv 2302.06675",
    evidence="read in the authors' code (google/automl lion_pytorch.py); `decoupled` in lucidrains/lion-pytorch",
)


def golden(inputs: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of one case of the vector file."""
    refuse_others(params, ("lr", "beta1", "beta2", "weight_decay", "decoupled", "lr_schedule"))
    optim = Optim(
        "lion",
        betas=(params.get("beta1", 0.9), params.get("beta2", 0.99)),
        weight_decay=params.get("weight_decay", 0.0),
        decoupled=params.get("decoupled", False),
    )
    steps = drive(optim, inputs, params.get("lr", 1e-4), params.get("lr_schedule"))
    return {name: steps[name] for name in ("theta", "exp_avg")}
