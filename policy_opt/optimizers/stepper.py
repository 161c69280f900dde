"""The one step of every optimizer here: theta <- (1 - lr lambda) theta - lr d, with a pluggable direction d."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Seen = dict[str, list[Tensor]]
"""Intermediate quantities by name, one tensor per parameter."""


class Direction(Protocol):
    """Gradients and state -> directions. State is a dict of tensors per parameter, empty at the start."""

    def __call__(
        self, grads: list[Tensor], states: Sequence[dict[str, Tensor]], names: Sequence[str], seen: Seen | None
    ) -> list[Tensor]:
        """Directions of the gradients' shapes; the states move on. What is worth a look goes
        into `seen`, where somebody looks."""
        ...


@dataclass(frozen=True)
class Card:
    """Where an optimizer comes from, as a recipe says it of itself."""

    slug: str
    title: str
    """The idea in a line."""
    cite: str
    """Authors, year, identifier."""
    evidence: str
    """Where the formulas were read."""
    deviations: str = "none"
    """Where it departs from the paper or the authors' code."""
    reconstructed: bool = False
    """Formulas that could not be read were reconstructed."""


class Stepper(torch.optim.Optimizer):
    """A torch optimizer around a direction.

    Parameters without gradient are left alone, decay included. Buffers and arithmetic are at least float32.

    Args:
        params: tensors, (name, tensor) pairs, or groups of either; a parameter without name is called by its
            place, "group.position".
        direction: what is stepped along.
        lr: learning rate; 0 moves the state only.
        weight_decay: lambda, decoupled from the gradient.
        decoupled: divide lambda by the rate at construction, so that decay does not depend on the base rate.
    """

    def __init__(
        self,
        params: Any,
        direction: Direction,
        lr: float,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ) -> None:
        if not lr >= 0 or not weight_decay >= 0:
            raise ValueError(f"learning rate and weight decay must be >= 0, not {lr} and {weight_decay}")
        if decoupled and lr == 0:
            raise ValueError("decoupled weight decay is relative to the first learning rate, which is 0")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "initial_lr": lr})
        self.direction, self.decoupled = direction, decoupled
        self.watch: Callable[[Seen], None] | None = None
        """Called in every step with the directions and what they were made of, before they are applied."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group; returns the closure's value, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            self._step(group, number)
        return loss

    def _step(self, group: Mapping[str, Any], number: int) -> None:
        everyone: list[Tensor] = group["params"]
        names = group.get("param_names") or [f"{number}.{i}" for i in range(len(everyone))]
        live = [(p, name) for p, name in zip(everyone, names, strict=True) if p.grad is not None]
        if not live:
            return
        params = [p for p, _ in live]
        grads = [p.grad.to(precise(p)) for p in params if p.grad is not None]
        seen: Seen | None = {} if self.watch else None
        states = [self.state[p] for p in params]
        directions = self.direction(grads, states, [name for _, name in live], seen)
        if self.watch and seen is not None:
            self.watch({**seen, "direction": directions})
        lr, decay = group["lr"], group["lr"] * group["weight_decay"]
        if self.decoupled:
            decay = decay / group["initial_lr"]
        if decay:
            torch._foreach_mul_(params, 1 - decay)
        steps = [d.to(p.dtype) for d, p in zip(directions, params, strict=True)]
        torch._foreach_add_(params, steps, alpha=-lr)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but buffers keep their type: torch rounds them to the parameter's."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for index, entry in state_dict["state"].items():
            p = params[index]
            self.state[p] = {k: (v.to(p.device) if v.ndim else v).clone() for k, v in entry.items()}


def precise(p: Tensor) -> torch.dtype:
    """The type of a parameter's buffers: its own, float32 for half precision."""
    return torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype


def buffers(states: Sequence[dict[str, Tensor]], name: str, like: Sequence[Tensor]) -> list[Tensor]:
    """The states' tensors of that name, zeros at first."""
    for state, tensor in zip(states, like, strict=True):
        if name not in state:
            state[name] = torch.zeros_like(tensor)
    return [state[name] for state in states]
