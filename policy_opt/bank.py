"""The bank: named models and heads beside the policy, as data. The learner builds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any, Literal

import torch

from policy_opt.errors import RecipeError, unknown

OURS = ("lion", "lion_k", "momentum", "stosignsgd")
"""Optimizers of policy_opt.optimizers."""
_UNFIT = ("optimizer", "lbfgs", "muon", "sparseadam")
"""Of torch's: those that want a closure, matrices only, or sparse gradients."""
OWN_OPTIONS = {"decoupled": "lion", "kappa": "lion_k", "direction": "stosignsgd", "forget": "stosignsgd"}
"""Options that one optimizer has."""


@cache
def torch_optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """Those of torch.optim that step a tensor of any shape by its gradient, by lower-case name."""
    kinds = {n.lower(): kind for n, kind in vars(torch.optim).items() if isinstance(kind, type)}
    return {name: kind for name, kind in sorted(kinds.items()) if name not in _UNFIT}


OPTIMIZERS = (*OURS, *torch_optimizers())
"""Names of all optimizers."""


@dataclass(frozen=True)
class Optim:
    """An optimizer by name, with its options; the learning rate is the trainer's unless given."""

    name: str = "adamw"
    """Which update rule: lion, lion_k, momentum, stosignsgd, or one of torch.optim: adamw, adam, sgd, ..."""
    lr: float | None = None
    """Learning rate; None: the trainer's."""
    lr_scale: float = 1.0
    """Factor on the trainer's learning rate, where lr is None."""
    betas: tuple[float, float] | None = None
    """Decay rates of the moments; the first one is the momentum of sgd, momentum and stosignsgd. None: (0.9, 0.95),
    of lion, lion_k and stosignsgd (0.9, 0.99)."""
    weight_decay: float = 0.0
    """Decoupled for adamw, lion, lion_k, momentum and stosignsgd, L2 for the others."""
    eps: float | None = None
    """Added to a denominator, by optimizers of torch that have one; None: theirs."""
    decoupled: bool = False
    """lion: divide weight_decay by the first learning rate, so that decay does not depend on the base rate."""
    kappa: Any = None
    """lion_k: the convex function, e.g. huber(e=0.05); None: l1, which is lion."""
    direction: Optim | None = None
    """stosignsgd: the optimizer whose direction is converted, e.g. adam(); None: momentum."""
    forget: float = 0.0
    """stosignsgd: share of the largest |direction| that is lost per step."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise RecipeError(unknown("optimizer", self.name, OPTIMIZERS))
        for option, owner in OWN_OPTIONS.items():
            if self.name != owner and getattr(self, option) not in (None, False, 0.0):
                raise RecipeError(f"`{option}` is an option of {owner}; {self.name} has none of that name")
        if self.eps is not None and not isinstance(self.accepted().get("eps"), float):
            raise RecipeError(f"{self.name} has no option `eps`")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"{self.name}: betas are at least 0 and below 1, not {self.betas}")
        if not 0 <= self.forget < 1:
            raise RecipeError(f"{self.name}: forget is at least 0 and below 1, not {self.forget}")
        if self.direction is not None:
            self.check_direction(self.direction)

    def check_direction(self, inner: Optim) -> None:
        """RecipeError where the converted optimizer has options that mean nothing there."""
        if inner.name == "stosignsgd":
            raise RecipeError("stosignsgd: its direction is no sign already")
        if (inner.lr, inner.lr_scale, inner.weight_decay) != (None, 1.0, 0.0):
            raise RecipeError("stosignsgd: rate and weight decay are its own, not its direction's")
        if self.betas is not None:
            raise RecipeError("stosignsgd: with a direction given, betas are the direction's")

    @property
    def momenta(self) -> tuple[float, float]:
        """betas, or what stands in for None."""
        return self.betas or ((0.9, 0.99) if self.name in OURS else (0.9, 0.95))

    def accepted(self) -> dict[str, Any]:
        """Options of torch's optimizer with their defaults; none of ours."""
        kind = torch_optimizers().get(self.name)
        return {n: p.default for n, p in signature(kind).parameters.items()} if kind else {}

    def build(self, params: Any, lr: float, seed: int = 0, fused: bool = False) -> torch.optim.Optimizer:
        """A torch optimizer over params at the trainer's learning rate `lr`.

        params: tensors, (name, tensor) pairs, or groups of either. seed: of the run, for rules that draw noise;
        names make the noise independent of the order. fused: one kernel per step, by those of torch that can.
        """
        rate = self.lr if self.lr is not None else lr * self.lr_scale
        if self.name in OURS:
            from policy_opt.optimizers import build

            return build(self, params, rate, seed)
        wanted: dict[str, Any] = {
            "betas": self.momenta, "momentum": self.momenta[0], "eps": self.eps, "fused": fused or None,
            "weight_decay": self.weight_decay,
        }  # fmt: skip
        known = self.accepted()
        options = {name: value for name, value in wanted.items() if name in known and value is not None}
        return torch_optimizers()[self.name](params, lr=rate, **options)


@dataclass(frozen=True)
class ModelSpec:
    """One model of the bank."""

    role: Literal["copy", "critic", "teacher", "reward", "probe", "seat"]
    """copy: the policy's architecture and weights (reference, EMA); critic: a value head on its own trunk;
    ...
    """
    source: str = "policy"
    """Where the weights come from at the start: `policy`, or a path or model id."""
    optimizer: Optim | None = None
    """None: frozen. Otherwise it is stepped with the policy."""
    sync_every: int | None = None
    """Copy the policy's weights into it after every so many iterations."""
    ema: float | None = None
    """After every optimizer step: weights <- ema * weights + (1 - ema) * policy."""


REFERENCE = ModelSpec("copy")
"""The policy as it stood before training, frozen."""
CRITIC = ModelSpec("critic", optimizer=Optim())
"""A value head, stepped with the policy."""
WITH_REFERENCE = {"ref": REFERENCE}
"""The models of a part that needs log-probs of the reference."""
WITH_CRITIC = {"critic": CRITIC}
"""The models of a part that needs values."""
