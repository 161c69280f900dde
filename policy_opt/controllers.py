"""Coefficients that change during a run: a schedule, or feedback from what the last steps did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from policy_opt.batch import Batch
from policy_opt.part import Ctx, Part


def current(value: Any, ctx: Ctx) -> float:
    """A number as it is, a controller's value now."""
    return float(value) if isinstance(value, int | float) else float(value.value(ctx))


@dataclass(frozen=True)
class Annealed(Part):
    """start + p (end - start), p = min(begin + step / iterations, 1): linear, then `end`."""

    stage: ClassVar[str] = "coef"
    start: float
    end: float
    iterations: int
    begin: float = 0.0
    """Progress p at iteration 0, for a run that goes on from another."""

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, not {self.iterations}")
        if not 0 <= self.begin <= 1:
            raise ValueError(f"begin is in [0, 1], not {self.begin}")

    def value(self, ctx: Ctx) -> float:
        """The coefficient in this iteration."""
        progress = min(self.begin + ctx.step / self.iterations, 1.0)
        return (1 - progress) * self.start + progress * self.end


@dataclass(frozen=True)
class InverseAnnealed(Part):
    """1 / max(1 - step / iterations, floor): the weight of a proximity term under a step size that falls to 0."""

    stage: ClassVar[str] = "coef"
    iterations: int
    """K, over which the step size falls."""
    floor: float = 1e-2
    """Smallest step size."""

    def __post_init__(self) -> None:
        if self.iterations < 1 or not 0 < self.floor <= 1:
            raise ValueError(f"iterations >= 1 and 0 < floor <= 1, not {self.iterations}, {self.floor}")

    def value(self, ctx: Ctx) -> float:
        """The coefficient in this iteration."""
        return 1 / max(1 - ctx.step / self.iterations, self.floor)


@dataclass(frozen=True)
class Dual(Part):
    """A multiplier that grows while a metric is above target: lambda <- lambda + rate (metric - target).

    With of="kl_ref" it is an adaptive KL coefficient, with a constraint's value a Lagrange multiplier.
    """

    stage: ClassVar[str] = "coef"
    target: float
    """Where the metric should be."""
    of: str = "kl_ref"
    """A metric of the optimizer step: kl, kl_ref, entropy, loss_<term>."""
    start: float = 0.1
    rate: float = 0.1
    """Step of the dual ascent."""
    limit: float = 10.0
    """Largest value."""

    def value(self, ctx: Ctx) -> float:
        """The multiplier now."""
        return float(ctx.state(self).get("lambda", self.start))

    def after_step(self, b: Batch, ctx: Ctx) -> None:
        """Move the multiplier; a step that did not measure the metric leaves it."""
        if self.of in ctx.step_metrics:
            moved = self.value(ctx) + self.rate * (ctx.step_metrics[self.of] - self.target)
            ctx.state(self)["lambda"] = min(max(moved, 0.0), self.limit)
            ctx.log("dual", ctx.state(self)["lambda"])
