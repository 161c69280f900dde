"""Drives an optimizer through a case of its vector file: fixed gradients, one tensor, everything recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from policy_opt.bank import Optim
from policy_opt.errors import RecipeError, unknown


def refuse_others(params: Mapping[str, Any], known: Iterable[str]) -> None:
    """RecipeError with a suggestion on a param that the method does not know."""
    strange = params.keys() - set(known)
    if strange:
        raise RecipeError(unknown("param", min(strange), known))


def drive(
    optim: Optim,
    inputs: Mapping[str, Any],
    lr: float,
    lr_schedule: Sequence[float] | None = None,
    noise: Callable[[str, int, Tensor], Tensor] | None = None,
) -> dict[str, list[list[float]]]:
    """[S, D] lists by name: theta, the buffers and what the direction shows of itself, after every step.

    inputs: theta0 [D], grads [S, D]. lr_schedule: [S], in place of lr. noise: in place of the direction's own.
    """
    theta_D = torch.nn.Parameter(torch.tensor(inputs["theta0"], dtype=torch.float64))
    stepper: Any = optim.build([("theta", theta_D)], lr)
    if noise is not None:
        stepper.direction = replace(stepper.direction, noise=noise)
    found: dict[str, list[list[float]]] = defaultdict(list)

    def note(seen: Mapping[str, list[Tensor]]) -> None:
        for name, (value_D,) in seen.items():
            found[name].append(value_D.tolist())

    stepper.watch = note
    for number, grad in enumerate(inputs["grads"]):
        theta_D.grad = torch.tensor(grad, dtype=torch.float64)
        if lr_schedule is not None:
            stepper.param_groups[0]["lr"] = lr_schedule[number]
        stepper.step()
        found["theta"].append(theta_D.tolist())
        for name, value in stepper.state[theta_D].items():
            found[name].append(value.tolist())
    return found
