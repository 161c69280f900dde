"""Surrogates: the loss of a token, a row or a batch as a function of streams and columns.

Streams (`logp_BT`, `entropy_BT`, `values_BT`) carry the gradient; columns are constants. Positions outside
the mask are 0 in every stream. `scope` says how far a loss looks: a `row` surrogate depends on streams of its
own row only, so the step needs no forward beside the one with gradient; a `batch` surrogate sees several rows
at once. `gives` is the shape of the loss: BT (per token), B (per row) or nothing (a scalar).

A surrogate may `report(streams, b)` what it did, for metrics and golden numbers: {name: [B, T] or [B]}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from policy_opt.bank import WITH_CRITIC, WITH_REFERENCE, ModelSpec
from policy_opt.batch import Batch
from policy_opt.need import ENTROPY, LOGP, LOGP_OLD, LOGP_REF, VALUES, VALUES_OLD, Need
from policy_opt.part import Part

Streams = Mapping[str, Tensor]

LOG_RATIO_LIMIT = 20.0
"""exp(20) = 4.9e8 is far beyond any trust region and far from overflow, in float32 too."""


LOG_PRODUCT_LIMIT = 80.0
"""For products of ratios, which go further by right; exp(80) = 5.5e34 is still a float32."""


def ratio(log_ratio: Tensor, limit: float = LOG_RATIO_LIMIT) -> Tensor:
    """exp of a log-ratio, clamped so that nothing overflows."""
    return log_ratio.clamp(-limit, limit).exp()


def ratio_product(log_BT: Tensor) -> Tensor:
    """Product of a row's ratios, from their logarithms (0 outside the mask): [B]."""
    return ratio(log_BT.sum(1), LOG_PRODUCT_LIMIT)


def log_ratio(s: Streams, b: Batch) -> Tensor:
    """log pi / pi_old of each token, 0 outside the mask: [B, T]."""
    return (s["logp_BT"] - b["logp_old_BT"]) * b.mask_BT


def mean_log_ratio(s: Streams, b: Batch) -> Tensor:
    """Mean over a row's masked tokens; 0 for a row without any: [B]."""
    return log_ratio(s, b).sum(1) / b.mask_BT.sum(1).clamp(min=1)


def clipped(rho: Tensor, adv: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)); widths are numbers, or tensors of rho's shape."""
    lowest: Any = 1 - low
    highest: Any = 1 + high
    return torch.maximum(-adv * rho, -adv * rho.clamp(lowest, highest))


def outside(rho: Tensor, adv: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Where the clip is strictly active: A > 0 above the upper bound, A < 0 below the lower one."""
    return ((adv > 0) & (rho > 1 + high)) | ((adv < 0) & (rho < 1 - low))


def straight_through(value: Tensor, s: Streams) -> Tensor:
    """sg[value] pi / sg[pi]: the value with the gradient of each token's own probability: [B, T]."""
    return value.detach() * (s["logp_BT"] - s["logp_BT"].detach()).exp()


def check_widths(clip_low: float, clip_high: float) -> None:
    """ValueError where a width of the trust region is negative."""
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"clip_low and clip_high are widths >= 0, not {clip_low}, {clip_high}")


def check_dual_clip(c: float | None) -> None:
    """ValueError where c is below 1."""
    if c is not None and not c >= 1:
        raise ValueError(f"dual_clip must be at least 1 (or None), not {c}")


def at_most(loss: Tensor, adv: Tensor, c: float | None) -> Tensor:
    """Dual clip: min(loss, -c A) where A < 0. None: the loss as it is."""
    return loss if c is None else torch.where(adv < 0, torch.minimum(loss, -c * adv), loss)


@dataclass(frozen=True)
class Clip(Part):
    """PPO's clipped surrogate per token: max(-A rho, -A clip(rho, 1 - low, 1 + high)).

    Schulman et al. 2017, arXiv 1707.06347, Eq. 7; dual clip: Ye et al. 2019, arXiv 1912.09729.
    """

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"
    clip_low: float = 0.2
    """Width of the trust region below 1."""
    clip_high: float = 0.2
    """Width above 1; larger than clip_low is DAPO's clip-higher."""
    dual_clip: float | None = None
    """c >= 1: where A < 0 the loss is at most -c A. None: off."""
    by: str = "adv"
    """Stem of the advantage, for a loss with several of them."""

    def __post_init__(self) -> None:
        check_widths(self.clip_low, self.clip_high)
        check_dual_clip(self.dual_clip)

    needs = LOGP, LOGP_OLD

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({self.by})

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        rho_BT, adv_BT = ratio(log_ratio(s, b)), b.per_token(self.by)
        return at_most(clipped(rho_BT, adv_BT, self.clip_low, self.clip_high), adv_BT, self.dual_clip)

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        rho_BT, adv_BT = ratio(log_ratio(s, b)), b.per_token(self.by)
        found = {"ratio": rho_BT, "clip_frac": outside(rho_BT, adv_BT, self.clip_low, self.clip_high)}
        if self.dual_clip is not None:
            loss_BT = clipped(rho_BT, adv_BT, self.clip_low, self.clip_high)
            found["dual_clip_frac"] = (adv_BT < 0) & (loss_BT > -self.dual_clip * adv_BT)
        return found


@dataclass(frozen=True)
class SequenceClip(Part):
    """GSPO: one length-normalised ratio per row, s = exp(mean_t log rho); a clipped row has no gradient.

    Zheng et al. 2025, arXiv 2507.18071.
    """

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "B"
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    product: bool = False
    """Product of the tokens' ratios (RLOO in TRL) instead of their geometric mean."""

    def __post_init__(self) -> None:
        check_widths(self.clip_low, self.clip_high)

    needs = LOGP, LOGP_OLD
    reads = frozenset({"adv_B"})

    def rho(self, s: Streams, b: Batch) -> Tensor:
        """The row's ratio, 1 for a row without tokens: [B]."""
        return ratio_product(log_ratio(s, b)) if self.product else ratio(mean_log_ratio(s, b))

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        return clipped(self.rho(s, b), b["adv_B"], self.clip_low, self.clip_high)

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        rho_B = self.rho(s, b)
        return {"ratio": rho_B, "clip_frac": outside(rho_B, b["adv_B"], self.clip_low, self.clip_high)}


@dataclass(frozen=True)
class SequenceTokenClip(Part):
    """GSPO-token: the value of the row's ratio, the gradient of the token: sg[s_i] * pi / sg[pi].

    With one advantage per row, value and gradient are GSPO's. arXiv 2507.18071, section on GSPO-token.
    """

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"
    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self) -> None:
        check_widths(self.clip_low, self.clip_high)

    needs = LOGP, LOGP_OLD
    reads = frozenset({"adv"})

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        rho_BT = straight_through(ratio(mean_log_ratio(s, b))[:, None], s)
        return clipped(rho_BT, b.per_token("adv"), self.clip_low, self.clip_high)

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        rho_B = ratio(mean_log_ratio(s, b))
        rho_BT = rho_B[:, None].expand(b.B, b.T)
        return {
            "ratio": rho_B,
            "clip_frac": outside(rho_BT, b.per_token("adv"), self.clip_low, self.clip_high),
        }


@dataclass(frozen=True)
class Reinforce(Part):
    """-A logp, per token."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"

    needs = (LOGP,)
    reads = frozenset({"adv"})

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        return -b.per_token("adv") * s["logp_BT"]


@dataclass(frozen=True)
class OnPolicy(Part):
    """-A exp(logp - sg[logp]), per token: the value of a ratio that is 1, the gradient of REINFORCE."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"

    needs = (LOGP,)
    reads = frozenset({"adv"})

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        return -b.per_token("adv") * (s["logp_BT"] - s["logp_BT"].detach()).exp()


@dataclass(frozen=True)
class Imitate(Part):
    """-logp per token: imitation of whatever the mask selects, for demonstrations and distilled repairs."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"

    needs = (LOGP,)

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        return -s["logp_BT"]


@dataclass(frozen=True)
class K3(Part):
    """KL to the reference by the k3 estimator, differentiated: exp(x) - x - 1 >= 0, x = logp_ref - logp."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"

    needs = LOGP, LOGP_REF
    models = WITH_REFERENCE

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        x_BT = (b["logp_ref_BT"] - s["logp_BT"]).clamp(max=LOG_RATIO_LIMIT)
        return x_BT.exp() - x_BT - 1


@dataclass(frozen=True)
class NegativeEntropy(Part):
    """-H per token: a positive coefficient keeps the policy spread out."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"

    needs = (ENTROPY,)

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        return -s["entropy_BT"]


@dataclass(frozen=True)
class ClippedValue(Part):
    """PPO's value loss: 1/2 max((V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2), per token."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"
    value_clip: float = 0.2
    """eps_v, in units of the return."""
    huber: float | None = None
    """Beyond this error the loss grows linearly: d (|e| - d / 2) in place of e^2 / 2. None: never."""

    needs = VALUES, VALUES_OLD
    reads = frozenset({"returns_BT"})
    models = WITH_CRITIC

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        value_BT, old_BT, goal_BT = s["values_BT"], b["values_old_BT"], b["returns_BT"]
        near_BT = value_BT.clamp(old_BT - self.value_clip, old_BT + self.value_clip)
        return torch.maximum(self.error(value_BT - goal_BT), self.error(near_BT - goal_BT))

    def error(self, e_BT: Tensor) -> Tensor:
        """e^2 / 2, or Huber's loss."""
        if self.huber is None:
            return 0.5 * e_BT.square()
        return torch.nn.functional.huber_loss(e_BT, torch.zeros_like(e_BT), reduction="none", delta=self.huber)


_CLIP = Clip()


@dataclass(frozen=True)
class EarlyStop(Part):
    """Another surrogate, without gradient in a step whose policy has gone too far from that of the rollout.

    Far: the token mean of rho - 1 - log rho (an estimate of KL(pi_old || pi), >= 0) is above kl_max.
    """

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "batch"
    loss: Any = _CLIP
    """The surrogate."""
    kl_max: float = 0.02
    """In nats per token."""

    @property
    def gives(self) -> str:
        """The shape of the inner loss."""
        return self.loss.gives

    @property
    def needs(self) -> tuple[Need, ...]:
        return (*self.loss.needs, *(need for need in (LOGP, LOGP_OLD) if need not in self.loss.needs))

    @property
    def reads(self) -> frozenset[str]:
        return self.loss.reads

    @property
    def facts(self) -> frozenset[str]:
        return self.loss.facts

    @property
    def models(self) -> Mapping[str, ModelSpec]:
        return self.loss.models

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        loss = self.loss(s, b)
        return loss.detach() if self.far(s, b) else loss

    def far(self, s: Streams, b: Batch) -> bool:
        """Is the step skipped?"""
        return float(self.gap(s, b).sum() / b.mask_BT.sum().clamp(min=1)) > self.kl_max

    def gap(self, s: Streams, b: Batch) -> Tensor:
        """rho - 1 - log rho, 0 outside the mask: [B, T]."""
        log_BT = log_ratio(s, b).detach()
        return ratio(log_BT) - 1 - log_BT

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        found = self.loss.report(s, b) if hasattr(self.loss, "report") else {}
        stopped_B = torch.full((b.B,), float(self.far(s, b)), device=b.mask_BT.device)
        return {**found, "approx_kl": self.gap(s, b), "stopped": stopped_B}
