"""Muon for the hidden matrices, AdamW for embeddings and gains.

`torch.optim.Muon` orthogonalises one matrix at a time in bfloat16, which CPUs emulate; here equal shapes are
stacked and orthogonalised together in float32. Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with
the update scale 0.2·sqrt(max(rows, columns)) of Liu et al. 2025 (arXiv 2502.16982), so that both optimizers
share one learning rate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(g_NRC: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz: every matrix of the stack moves towards U·V^T of its singular value decomposition."""
    a, b, c = _COEFFICIENTS
    tall = g_NRC.shape[1] > g_NRC.shape[2]
    x = g_NRC.mT if tall else g_NRC
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates; every parameter is a matrix."""

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            stacks: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    stacks.setdefault(p.shape, []).append(p)
            for shape, params in stacks.items():
                update_NRC = orthogonalise(torch.stack([self._nesterov(p, group["momentum"]) for p in params]))
                scale = 0.2 * max(shape) ** 0.5
                for p, update in zip(params, update_NRC, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)

    def _nesterov(self, p: nn.Parameter, momentum: float) -> Tensor:
        buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
        assert p.grad is not None
        buffer.lerp_(p.grad, 1 - momentum)
        return torch.lerp(p.grad, buffer, momentum)


def optimizers(model: nn.Module, lr: float, weight_decay: float = 0.01) -> list[torch.optim.Optimizer]:
    """[Muon over the matrices inside the layers, AdamW over everything else]."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    ids = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [
        Muon(hidden, lr=lr, weight_decay=weight_decay),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
