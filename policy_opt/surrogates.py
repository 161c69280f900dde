"""Surrogates: the loss of a token, a row or a batch as a function of streams and columns.

Streams (`logp_BT`, `entropy_BT`, `values_BT`) carry the gradient; columns are constants. Positions outside the mask
are 0 in every stream. `scope` says how far a loss looks: a `row` surrogate depends on streams of its own row only, so
the step needs no forward beside the one with gradient; a `batch` surrogate sees several rows at once. `gives` is the
shape of the loss: BT (per token), B (per row) or nothing (a scalar).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from policy_opt.bank import REFERENCE, ModelSpec
from policy_opt.batch import Batch
from policy_opt.need import LOGP, LOGP_OLD, LOGP_REF, Need
from policy_opt.part import Part

Streams = Mapping[str, Tensor]

LOG_RATIO_LIMIT = 20.0
"""exp(20) = 4.9e8 is far beyond any trust region and far from overflow, in float32 too."""


def ratio(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio, clamped so that nothing overflows."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def straight_through(value: Tensor, path: Tensor) -> Tensor:
    """A tensor with the value of `value` and the gradient of log(path) = `path`: sg[value] * exp(path - sg[path])."""
    return value.detach() * (path - path.detach()).exp()


def sequence_log_ratio(s: Streams, b: Batch) -> Tensor:
    """Mean over a row's masked tokens of log-ratios; 0 for a row without any: [B]."""
    length_B = b.mask_BT.sum(1).clamp(min=1)
    return ((s["logp_BT"] - b["logp_old_BT"]) * b.mask_BT).sum(1) / length_B


@dataclass(frozen=True)
class Clip(Part):
    """PPO's clipped surrogate: max(-A rho, -A clip(rho, 1 - low, 1 + high)), per token (arXiv 1707.06347, Eq. 7)."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"
    low: float = 0.2
    """Width of the trust region below 1."""
    high: float = 0.2
    """Width above 1; larger than low is DAPO's clip-higher."""
    dual: float | None = None
    """Dual clip c > 1 (arXiv 1912.09729): where A < 0 the loss is at most -c A. None: off."""

    def __post_init__(self) -> None:
        if self.low < 0 or self.high < 0:
            raise ValueError(f"low and high are widths >= 0, not {self.low}, {self.high}")
        if self.dual is not None and self.dual <= 1:
            raise ValueError(f"dual must be above 1 (or None), not {self.dual}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return LOGP, LOGP_OLD

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"adv"})

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        rho_BT = ratio(s["logp_BT"] - b["logp_old_BT"])
        adv_BT = b.per_token("adv")
        loss_BT = torch.maximum(-adv_BT * rho_BT, -adv_BT * rho_BT.clamp(1 - self.low, 1 + self.high))
        if self.dual is None:
            return loss_BT
        return torch.where(adv_BT < 0, torch.minimum(loss_BT, -self.dual * adv_BT), loss_BT)

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        """Where the clip is strictly active (before dual clip), where the dual clip is, and the ratio: [B, T]."""
        rho_BT = ratio(s["logp_BT"] - b["logp_old_BT"])
        adv_BT = b.per_token("adv")
        clipped_BT = ((adv_BT > 0) & (rho_BT > 1 + self.high)) | ((adv_BT < 0) & (rho_BT < 1 - self.low))
        found = {"clip_frac": clipped_BT, "ratio": rho_BT}
        if self.dual is not None:
            before_BT = torch.maximum(-adv_BT * rho_BT, -adv_BT * rho_BT.clamp(1 - self.low, 1 + self.high))
            found["dual_clip_frac"] = (adv_BT < 0) & (before_BT > -self.dual * adv_BT)
        return found


@dataclass(frozen=True)
class K3(Part):
    """KL to the reference by the k3 estimator, differentiated: exp(x) - x - 1, x = logp_ref - logp; >= 0, per token."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"

    @property
    def needs(self) -> tuple[Need, ...]:
        return LOGP, LOGP_REF

    @property
    def models(self) -> Mapping[str, ModelSpec]:
        return {"ref": REFERENCE}

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        x_BT = (b["logp_ref_BT"] - s["logp_BT"]).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return x_BT.exp() - x_BT - 1
