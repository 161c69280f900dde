"""Progress between iterations: how the mean reward of this batch stands against those before it, and what that says
of the last update.

    mu_t = mean reward of the trajectories of iteration t
    xi_t = clip(mu_t - mean(mu_(t-1) .. mu_(t-K)), -5, 5) / std(the same)

The window holds earlier iterations only, each once; std divides by K (or by K - 1: "sample") and is 1 where there are
fewer than two, or where it is below 1e-8. Wang et al. 2026, arXiv 2604.00860.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from policy_opt.advantages import groups
from policy_opt.baselines import share
from policy_opt.batch import Batch, floating
from policy_opt.part import Ctx, Part

LIMIT = 5.0
"""Largest difference of mean rewards that counts."""
Spread = Literal["population", "sample"]


class Progress(NamedTuple):
    """This iteration against the window."""

    mean: float
    """mu_his."""
    std: float
    """sigma_his."""
    xi: float


def progress(history: Sequence[float], now: float, spread: Spread = "population") -> Progress:
    """xi of a mean reward against a non-empty window of earlier ones."""
    window_K = torch.tensor(history, dtype=torch.float64)
    std = float(window_K.std(correction=int(spread == "sample"))) if window_K.numel() > 1 else 0.0
    std = std if std >= 1e-8 else 1.0
    # From the first one on: a constant window has that very mean, and no progress against it.
    mean = float(window_K[0] + (window_K - window_K[0]).mean())
    return Progress(mean, std, min(max(now - mean, -LIMIT), LIMIT) / std)


def mean_reward(b: Batch) -> float:
    """mu of a batch; a trajectory counts once."""
    return float(floating(b["reward_B"])[b.once()].double().mean())


def against(part: Retrospect | ProgressGate, b: Batch, ctx: Ctx) -> Progress | None:
    """Progress of a fresh batch against a part's window; None while that holds fewer than `warmup` iterations."""
    history = ctx.state(part).get("history", [])
    if len(history) < part.warmup:
        return None
    found = progress(history, mean_reward(b), part.spread)
    ctx.log("progress", found.xi)
    return found


def append(state: MutableMapping[str, Any], b: Batch, window: int) -> None:
    """Add this iteration's mean reward to a part's window, after it was used."""
    state["history"] = [*state.get("history", []), mean_reward(b)][-window:]


def check_window(window: int, warmup: int) -> None:
    """ValueError where the window can never hold enough."""
    if not 1 <= warmup <= window:
        raise ValueError(f"1 <= warmup <= window, not {warmup}, {window}")


@dataclass(frozen=True)
class Retrospect(Part):
    """The batch of the iteration before, its advantages replaced by what its update turned out to be worth.

        a_i    = G A_i / (sum_g |A| + eps)        A_i: the advantage it had, mean over the row's tokens
        adv_i  = clip(a_i xi_t, -limit, limit)
        w_retrospect_B = negative where xi_t < 0, else 1

    Draws nothing in the first `warmup` iterations, nor where xi < 0 and `negative` is 0. Log-probs are those stored
    when the batch was played. Terms of the step weight with `w_retrospect`.
    """

    stage: ClassVar[str] = "source"
    window: int = 8
    """K: iterations that the mean reward is compared with."""
    warmup: int = 8
    """Iterations before the first draw."""
    spread: Spread = "population"
    """sigma_his divides by K, as in the code; sample: by K - 1, as the paper has it."""
    negative: float = 0.1
    """lambda: weight of a step back. 0: only steps forward are reinforced."""
    limit: float = 10.0
    eps: float = 1e-6

    def check(self) -> None:
        check_window(self.window, self.warmup)
        if self.negative < 0 or self.limit <= 0 or self.eps <= 0:
            raise ValueError(f"negative >= 0, limit > 0, eps > 0, not {self.negative}, {self.limit}, {self.eps}")

    reads = frozenset({"reward_B", "adv"})

    def draw(self, fresh: Batch, ctx: Ctx) -> Batch | None:
        """The stored batch under the progress of the fresh one."""
        state = ctx.state(self)
        seen = against(self, fresh, ctx)
        if seen is None or "batch" not in state or (seen.xi < 0 and self.negative == 0):
            return None
        return self.judged(state["batch"], seen)

    def judged(self, before: Batch, seen: Progress) -> Batch:
        """A batch with what its update was worth as its advantage."""
        adv_B = (self.attribution(before) * seen.xi).clamp(-self.limit, self.limit)
        weight_B = torch.full_like(adv_B, self.negative if seen.xi < 0 else 1.0)
        adv = {"adv_BT": adv_B[:, None] * before.mask_BT} if "adv_BT" in before else {"adv_B": adv_B}
        return before.over(**adv, w_retrospect_B=weight_B)

    def attribution(self, b: Batch) -> Tensor:
        """a_i: each row's share of its group's update: [B]."""
        adv_BT = torch.where(b.mask_BT, b.per_token("adv"), 0)
        mean_B = adv_BT.sum(1) / b.mask_BT.sum(1).clamp(min=1)
        return share(groups(b), b["adv_B"] if "adv_BT" not in b else mean_B, self.eps)

    def observe(self, b: Batch, ctx: Ctx) -> None:
        """Store this iteration's batch and its mean reward."""
        state = ctx.state(self)
        append(state, b, self.window)
        state["batch"] = b


@dataclass(frozen=True)
class ProgressGate(Part):
    """A <- A clip(xi_t, low, high): this batch's advantages times this iteration's progress.

    With low < 0 an iteration that fell behind its window turns its advantages around. The first `warmup` iterations
    are left as they are.
    """

    stage: ClassVar[str] = "advantage"
    window: int = 8
    warmup: int = 8
    spread: Spread = "population"
    low: float = -2.0
    high: float = 2.0

    def check(self) -> None:
        check_window(self.window, self.warmup)
        if self.low > self.high:
            raise ValueError(f"low <= high, not {self.low}, {self.high}")

    reads = frozenset({"reward_B", "adv"})
    overwrites = frozenset({"adv"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        seen = against(self, b, ctx)
        if seen is None:
            return b
        gate = self.gate(seen)
        ctx.log("progress_gate", gate)
        name = "adv_BT" if "adv_BT" in b else "adv_B"
        return b.over(**{name: b[name] * gate})

    def gate(self, seen: Progress) -> float:
        """phi."""
        return min(max(seen.xi, self.low), self.high)

    def observe(self, b: Batch, ctx: Ctx) -> None:
        """Append this iteration's mean reward."""
        append(ctx.state(self), b, self.window)
