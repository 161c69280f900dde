"""Rollouts one iteration ahead: how old a token is, what is too old, and what became of every episode.

The age of a token is counted in iterations: how often the policy had moved when an iteration began, since the
version that sampled the token. What an iteration plays and learns at once has age 0; what was played while the
iteration before it was learned has age 1; an episode that was cut off and gone on with has tokens of several ages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from policy_opt.batch import Batch, floating
from policy_opt.metrics import over_mask
from policy_opt.part import Ctx
from policy_opt.surrogates import ratio


class Size(NamedTuple):
    """How much a batch holds."""

    trajectories: int = 0
    """Episodes, each once whatever its segments."""
    tokens: int = 0
    """Sampled tokens."""
    groups: int = 0
    """Groups that have a row."""

    @classmethod
    def of(cls, b: Batch) -> Size:
        """The size of a batch."""
        return cls(int(b.once().sum()), int(b.mask_BT.sum()), b.index()[1] if b.B else 0)

    def plus(self, other: Size) -> Size:
        """Both together."""
        return Size(*(a + b for a, b in zip(self, other, strict=True)))

    def less(self, other: Size) -> Size:
        """What is in this one and not in the other, which is a part of it."""
        return Size(*(a - b for a, b in zip(self, other, strict=True)))


NOTHING = Size()


@dataclass
class Account:
    """What became of every episode of a run: sent = trained + rejected + dropped + in flight, exactly.

    An episode that is played in several stretches counts in each of them.
    """

    sent: int = 0
    """Episodes that were asked for."""
    arrived: Size = NOTHING
    """Played and handed over: trained + rejected + dropped."""
    trained: Size = NOTHING
    """Handed to the learner."""
    rejected: Size = NOTHING
    """Of groups that the curriculum did not accept."""
    dropped: Size = NOTHING
    """With a token that is too old."""

    @property
    def in_flight(self) -> int:
        """Episodes that are being played, or wait to be handed over."""
        return self.sent - self.arrived.trajectories

    def note(self, played: Batch, young: Batch, kept: Batch) -> None:
        """Count a batch as it arrived, without what is too old, and without what was rejected of that."""
        arrived, left, trained = Size.of(played), Size.of(young), Size.of(kept)
        self.arrived = self.arrived.plus(arrived)
        self.dropped = self.dropped.plus(arrived.less(left))
        self.rejected = self.rejected.plus(left.less(trained))
        self.trained = self.trained.plus(trained)

    def settle(self, other: Account) -> None:
        """Add an iteration's account to this one."""
        self.sent += other.sent
        for name in ("arrived", "trained", "rejected", "dropped"):
            setattr(self, name, getattr(self, name).plus(getattr(other, name)))

    def losses(self) -> dict[str, float]:
        """What was dropped as too old, by its usual names."""
        sizes = {"": self.dropped.trajectories, "_tokens": self.dropped.tokens, "_groups": self.dropped.groups}
        return {f"dropped_stale{unit}": float(size) for unit, size in sizes.items()}

    def totals(self) -> dict[str, float]:
        """Episodes over the run: played = trained + rejected + dropped; further ones are in flight."""
        names = {"played": self.arrived, "trained": self.trained, "rejected": self.rejected, "dropped": self.dropped}
        return {f"total_{name}": float(size.trajectories) for name, size in names.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Account:
        """Inverse of `state_dict`."""
        return cls(int(state["sent"]), *(Size(*state[name]) for name in ("arrived", "trained", "rejected", "dropped")))


@dataclass
class Sent:
    """The rollout that is under way."""

    jobs: int
    """Episodes."""
    version: int
    """Of the policy that plays them."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the curriculum logged when it chose them."""


class Ages:
    """How old tokens are and may be.

    Args:
        bound: largest age that is trained on, in iterations.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.versions: list[int] = []

    def begin(self, version: int) -> None:
        """An iteration begins with this version of the policy. Older ones than matter are forgotten."""
        if version not in self.versions:
            self.versions = [*self.versions, version][-(self.bound + 2) :]

    def of(self, b: Batch) -> Tensor:
        """Age of every token, `[B, T]` int64; 0 off the mask. Ages beyond bound + 1 count as that."""
        since_V = torch.tensor(self.versions, device=b.version_BT.device)
        age_BT = since_V.numel() - torch.searchsorted(since_V, b.version_BT.contiguous(), right=True)
        return torch.where(b.mask_BT, age_BT, 0)

    def young(self, b: Batch) -> Batch:
        """The trajectories without a token that is too old, whole; groups keep their other members."""
        old_B = (self.of(b) > self.bound).any(1)
        if not old_B.any():
            return b
        root_B = b.roots()
        spoilt_B = torch.zeros_like(old_B).index_put_((root_B[old_B],), old_B.new_ones(()))
        return b.rows((~spoilt_B[root_B]).nonzero().squeeze(1))

    def log(self, b: Batch, ctx: Ctx) -> None:
        """Ages of what is trained on: their mean and the largest."""
        age_BT = self.of(b)
        ctx.log("stale_mean", over_mask(floating(age_BT), b))
        ctx.log("stale_max", float(age_BT.max()) if age_BT.numel() else 0.0)


def drift(b: Batch) -> float:
    """KL of the sampler from the policy that is about to learn, k3 estimate over the sampled tokens, in nats."""
    gap_BT = torch.where(b.mask_BT, b["logp_old_BT"] - b.logp_sampler_BT, 0)
    return over_mask(ratio(gap_BT) - 1 - gap_BT, b)
