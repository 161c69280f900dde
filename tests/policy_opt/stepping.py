"""Gradients to step along, and optimizers driven over them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st

from policy_opt import Optim
from policy_opt.optimizers import METHODS, Stepper
from policy_opt.optimizers.kappa import L1, L2, HalfSq, Huber, L1Threshold, Lp, Nuclear, Topk

VECTORS = Path(__file__).resolve().parent.parent / "vectors"
CONTENT = {name: json.loads((VECTORS / f"{name}.json").read_text()) for name in METHODS}
KAPPAS = (L1(), L2(), Lp(1.5), Lp(4.0), L1Threshold(0.1), L1Threshold(0.0), Huber(0.2), Topk(2), HalfSq(), Nuclear())
NORMS = (L1(), L2(), Lp(1.5), Lp(4.0), Topk(2), Nuclear())

numbers = st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3))
rates = st.sampled_from((0.0, 1e-3, 0.1))
decays = st.sampled_from((0.0, 0.1, 5.0))
betas = st.tuples(st.sampled_from((0.0, 0.5, 0.9)), st.sampled_from((0.0, 0.6, 0.99)))


def runs(least: int = 1):
    """(theta0 [D], grads [S, D]), with exact zeros and ties among them."""
    return st.tuples(st.integers(least, 5), st.integers(1, 5)).flatmap(
        lambda size: st.tuples(
            st.lists(numbers, min_size=size[0], max_size=size[0]),
            st.lists(st.lists(numbers, min_size=size[0], max_size=size[0]), min_size=size[1], max_size=size[1]),
        )
    )


fast = settings(max_examples=40, deadline=None)


def tensor(values, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def stepped(optim: Optim, theta0, grads, lr: float, seed: int = 0) -> tuple[torch.Tensor, Stepper]:
    """(theta after every step [S, D], the stepper)."""
    theta = torch.nn.Parameter(tensor(theta0))
    stepper = optim.build([("w", theta)], lr, seed)
    path = []
    for grad in grads:
        theta.grad = tensor(grad)
        stepper.step()
        path.append(theta.detach().clone())
    return torch.stack(path), stepper
