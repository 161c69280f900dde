"""StoSignSGD: sign descent that is right on average. Yu et al. 2026, arXiv 2604.15416.

The sign of a direction is biased: it forgets size. Uniform noise, scaled by the largest |u| that a coordinate has
seen, makes the expected sign proportional to u, while every step still has length lr in every coordinate.

    u     = direction before the learning rate; by default m <- b1 m + (1 - b1) g, u = m
    G     <- max(G, |u|)
    n     ~ uniform on [-1, 1], independent per coordinate and step
    s     = sign(u + G n)                      E[s] = u / G;  P(s = 1) = (1 + u/G) / 2;  s = 0 where G = 0
    theta <- theta - lr s - lr lambda theta

`direction` converts another optimizer: its step at learning rate 1 and weight decay 0 is u (adam:
m^ / (sqrt(v^) + eps); lion_k(kappa=...); any optimizer of the catalogue). At a new maximum of |u|, the first step
included, s = sign(u). G never shrinks, so that a spike of the gradient shortens the expected step for good;
`forget` lets it: G <- max((1 - forget) G, |u|).

The noise is a function of (seed of the run, name of the parameter, its number of steps): the same on all replicas,
after a resume, and for any order of parameters. Written down from a summary of the paper; the conversion of other
optimizers is reconstructed from its abstract, and the paper's hyper-parameters were not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from policy_opt.bank import Optim
from policy_opt.errors import RecipeError
from policy_opt.optimizers.golden import drive, refuse_others
from policy_opt.optimizers.stepper import Card, Seen, buffers
from policy_opt.part import Ctx

card = Card(
    slug="stosignsgd",
    title="sign of any optimizer's direction plus noise, so that its mean is the direction",
    cite="Yu et al. 2026, arXiv 2604.15416",
    evidence="read in a secondary summary that writes the algorithm as equations; conversion from the abstract",
    deviations="hyper-parameters are ours; `forget` (off) is ours",
    reconstructed=True,
)


@dataclass(frozen=True)
class Momentum:
    """The exponential moving average of gradients from 0, without bias correction."""

    beta: float = 0.9

    def __call__(
        self, grads: list[Tensor], states: Sequence[dict[str, Tensor]], names: Sequence[str], seen: Seen | None
    ) -> list[Tensor]:
        """m <- beta m + (1 - beta) g."""
        memory = buffers(states, "exp_avg", grads)
        torch._foreach_mul_(memory, self.beta)
        torch._foreach_add_(memory, grads, alpha=1 - self.beta)
        return memory


Noise = Callable[[str, int, Tensor], Tensor]
"""(name of a parameter, steps that it has taken, a tensor) -> uniform numbers of the tensor's shape and type."""


@dataclass(frozen=True)
class Uniform:
    """Uniform on [-1, 1), drawn on the parameter's own device."""

    seed: int = 0
    """Of the run."""

    def __call__(self, name: str, step: int, like: Tensor) -> Tensor:
        """Numbers of the shape and type of `like`."""
        number = Ctx(seed=self.seed).generator(f"stosignsgd/{name}", step).initial_seed()
        stream = torch.Generator(like.device).manual_seed(number)
        drawn = torch.rand(like.shape, generator=stream, dtype=like.dtype, device=like.device)
        return drawn.mul_(2).sub_(1)


@dataclass(frozen=True)
class SignConversion:
    """The unbiased random sign of another optimizer's direction."""

    inner: Optim
    """Whose direction."""
    forget: float
    """Share of G that is lost per step."""
    noise: Noise

    def __call__(
        self, grads: list[Tensor], states: Sequence[dict[str, Tensor]], names: Sequence[str], seen: Seen | None
    ) -> list[Tensor]:
        """Signs in {-1, 0, 1}."""
        us = direction_of(self.inner, grads, states, names)
        largest = buffers(states, "max_buffer", grads)
        if self.forget:
            torch._foreach_mul_(largest, 1 - self.forget)
        torch._foreach_maximum_(largest, list(torch._foreach_abs(us)))
        drawn = []
        for state, name, u in zip(states, names, us, strict=True):
            draws = state.setdefault("draws", torch.zeros((), dtype=torch.int64))
            drawn.append(self.noise(name, int(draws), u))
            draws += 1
        if seen is not None:
            seen["expected_sign"] = [expected(u, g) for u, g in zip(us, largest, strict=True)]
        signs = list(torch._foreach_mul(largest, drawn))
        torch._foreach_add_(signs, us)
        torch._foreach_sign_(signs)
        return signs


_OWN = ("max_buffer", "draws")
"""State of the conversion; the rest of a parameter's state is the inner optimizer's."""


def direction_of(
    inner: Optim, grads: Sequence[Tensor], states: Sequence[dict[str, Tensor]], names: Sequence[str]
) -> list[Tensor]:
    """What `inner` would step along: it takes one step of length 1 from 0, on its part of the states."""
    zeros = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    optimizer = inner.build(list(zip(names, zeros, strict=True)), 1.0)
    for zero, grad, state in zip(zeros, grads, states, strict=True):
        zero.grad = grad
        kept = {name: value for name, value in state.items() if name not in _OWN}
        if kept:
            optimizer.state[zero] = kept
    optimizer.step()
    for zero, state in zip(zeros, states, strict=True):
        state.update(optimizer.state[zero])
    return list(torch._foreach_neg([zero.detach() for zero in zeros]))


def expected(u: Tensor, largest: Tensor) -> Tensor:
    """The mean of the sign over the noise: u / G, 0 where G = 0."""
    return torch.where(largest > 0, u / largest, torch.zeros_like(u))


def golden(inputs: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of one case of the vector file; its noise takes the place of the drawn one."""
    refuse_others(params, ("base", "beta1", "beta2", "eps", "lr", "weight_decay"))
    base = params.get("base", "momentum")
    if base not in ("momentum", "adam"):
        raise RecipeError(f"stosignsgd: base {base!r} is neither momentum nor adam")
    beta2 = params.get("beta2")  # momentum has none
    betas = (float(params.get("beta1", 0.9)), 0.999 if beta2 is None else float(beta2))
    inner = Optim(base, betas=betas, eps=params.get("eps") if base == "adam" else None)
    optim = Optim("stosignsgd", weight_decay=params.get("weight_decay", 0.0), direction=inner)

    def given(name: str, step: int, like: Tensor) -> Tensor:
        return torch.tensor(inputs["noise"][step], dtype=like.dtype)

    steps = drive(optim, inputs, params.get("lr", 1e-4), noise=given)
    found = {name: steps[name] for name in ("theta", "max_buffer", "expected_sign")}
    return {**found, "sign_update": steps["direction"]}
