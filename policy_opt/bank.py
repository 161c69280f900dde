"""The bank: named models and heads beside the policy, as data. The learner builds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Optim:
    """An optimizer by name, with its options; the learning rate is the trainer's unless given."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """Which update rule."""
    lr: float | None = None
    """Learning rate; None: the trainer's."""
    lr_scale: float = 1.0
    """Factor on the trainer's learning rate, where lr is None."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the moments (adam, adamw); the first one is SGD's momentum."""
    weight_decay: float = 0.0
    """Decoupled for adamw, L2 for the others."""

    def build(self, params, lr: float) -> torch.optim.Optimizer:
        """A torch optimizer over params (tensors or groups) at the trainer's learning rate `lr`."""
        rate = self.lr if self.lr is not None else lr * self.lr_scale
        if self.name == "sgd":
            return torch.optim.SGD(params, rate, momentum=self.betas[0], weight_decay=self.weight_decay)
        kind = torch.optim.AdamW if self.name == "adamw" else torch.optim.Adam
        return kind(params, rate, betas=self.betas, weight_decay=self.weight_decay)


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
