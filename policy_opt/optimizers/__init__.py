"""Optimizers as rows of the table: a direction, weight decay that is decoupled, and a learning rate.

    --set 'optimizer=lion(lr=3e-5, weight_decay=0.1)'
    --set 'optimizer=lion_k(kappa=huber(e=0.05), weight_decay=0.1)'
    --set 'optimizer=stosignsgd(direction=adam(betas=(0.9, 0.99)))'

Every one of them is a `Stepper` over a direction: a map from gradients and state to a step of length one.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from policy_opt.optimizers import lion, lion_k, stosignsgd
from policy_opt.optimizers.lion_k import Interpolated
from policy_opt.optimizers.stepper import Stepper
from policy_opt.optimizers.stosignsgd import Momentum, SignConversion, Uniform

if TYPE_CHECKING:
    from policy_opt.bank import Optim

METHODS: dict[str, ModuleType] = {"lion": lion, "lion_k": lion_k, "stosignsgd": stosignsgd}
"""The published ones: each module has a docstring, a `card`, and `golden` for its vector file."""


def build(optim: Optim, params: Any, lr: float, seed: int = 0) -> Stepper:
    """The stepper that `optim` describes, over params (tensors, (name, tensor) pairs, or groups of either).

    seed: of the run; noise is a function of it, of a parameter's name and of its number of steps.
    """
    direction: Any
    if optim.name == "stosignsgd":
        inner = optim.direction or type(optim)("momentum", betas=optim.momenta)
        direction = SignConversion(inner, optim.forget, Uniform(seed))
    elif optim.name == "momentum":
        direction = Momentum(optim.momenta[0])
    elif optim.name == "lion_k" and optim.kappa is not None:
        direction = Interpolated(optim.momenta, optim.kappa)
    else:
        direction = Interpolated(optim.momenta)
    return Stepper(params, direction, lr, optim.weight_decay, optim.decoupled)
