"""Convex functions K of Lion-K: a sub-gradient per tensor, K's value, and the bound that weight decay lambda puts.

With decay, Lion-K minimises f(theta) + K*(lambda theta) / lambda. K* of a norm is the indicator of the dual unit
ball: dual(lambda theta) <= 1. Everything is per tensor; lists go through torch._foreach_* where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from policy_opt.part import Part


class Kappa(Part):
    """What every K has. The default bound is that of directions within [-1, 1]: max |theta|."""

    def gradient(self, zs: list[Tensor]) -> list[Tensor]:
        """A sub-gradient of K at every tensor, of its shape."""
        raise NotImplementedError

    def value(self, z: Tensor) -> Tensor:
        """K(z), 0-dim."""
        raise NotImplementedError

    def dual(self, theta: Tensor) -> Tensor | None:
        """0-dim: training keeps dual(theta) <= 1 / lambda; None: no bound."""
        return largest(theta)


@dataclass(frozen=True)
class L1(Kappa):
    """K = sum |z|: Lion. |theta| <= 1 / lambda in every coordinate."""

    stage: ClassVar[str] = "kappa"

    def gradient(self, zs: list[Tensor]) -> list[Tensor]:
        """sign(z), 0 at 0."""
        return list(torch._foreach_sign(zs))

    def value(self, z: Tensor) -> Tensor:
        """sum |z|."""
        return z.abs().sum()


@dataclass(frozen=True)
class L2(Kappa):
    """K = ||z||_2: normalised momentum. ||theta||_2 <= 1 / lambda."""

    stage: ClassVar[str] = "kappa"

    def gradient(self, zs: list[Tensor]) -> list[Tensor]:
        """z / ||z||_2, 0 at 0."""
        zs = scaled(zs)
        return list(torch._foreach_div(zs, positive(torch._foreach_norm(zs, 2))))

    def value(self, z: Tensor) -> Tensor:
        """||z||_2."""
        return z.norm()

    def dual(self, theta: Tensor) -> Tensor:
        """||theta||_2."""
        return theta.norm()


@dataclass(frozen=True)
class Lp(Kappa):
    """K = ||z||_p, p > 1. ||theta||_q <= 1 / lambda with 1/p + 1/q = 1."""

    stage: ClassVar[str] = "kappa"
    p: float = 2.0
    """Exponent."""

    def __post_init__(self) -> None:
        if not self.p > 1:
            raise ValueError(f"p must be above 1, not {self.p}; for p = 1 there is l1")

    def gradient(self, zs: list[Tensor]) -> list[Tensor]:
        """sign(z) (|z| / ||z||_p)^(p - 1), 0 at 0."""
        zs = scaled(zs)
        share = torch._foreach_div(torch._foreach_abs(zs), positive(torch._foreach_norm(zs, self.p)))
        return list(torch._foreach_mul(torch._foreach_sign(zs), torch._foreach_pow(share, self.p - 1)))

    def value(self, z: Tensor) -> Tensor:
        """||z||_p."""
        return z.norm(self.p)

    def dual(self, theta: Tensor) -> Tensor:
        """||theta||_q."""
        return theta.norm(self.p / (self.p - 1))


@dataclass(frozen=True)
class L1Threshold(Kappa):
    """K = sum max(|z| - e, 0). |theta| <= 1 / lambda, and a cost e ||theta||_1: sparsity."""

    stage: ClassVar[str] = "kappa"
    e: float = 0.01
    """Momenta up to e do not move their coordinate."""

    def __post_init__(self) -> None:
        if not self.e >= 0:
            raise ValueError(f"e must be >= 0, not {self.e}")

    def gradient(self, zs: list[Tensor]) -> list[Tensor]:
        """sign(z) where |z| > e, else 0."""
        return [z.sign() * (z.abs() > self.e) for z in zs]

    def value(self, z: Tensor) -> Tensor:
        """sum max(|z| - e, 0)."""
        return (z.abs() - self.e).clamp(min=0).sum()


@dataclass(frozen=True)
class Huber(Kappa):
    """K = sum of z^2 / (2e) up to |z| = e, |z| - e/2 beyond. |theta| <= 1 / lambda, and e lambda / 2 ||theta||^2."""

    stage: ClassVar[str] = "kappa"
    e: float = 0.01
    """Where the sign turns linear; e -> 0 is l1."""

    def __post_init__(self) -> None:
        if not self.e > 0:
            raise ValueError(f"e must be positive, not {self.e}; for e = 0 there is l1")

    def gradient(self, zs: list[Tensor]) -> list[Tensor]:
        """clip(z / e, -1, 1)."""
        found = list(torch._foreach_div(zs, self.e))
        torch._foreach_clamp_min_(found, -1.0)
        torch._foreach_clamp_max_(found, 1.0)
        return found

    def value(self, z: Tensor) -> Tensor:
        """sum of the Huber function."""
        size = z.abs()
        return torch.where(size <= self.e, size.square() / (2 * self.e), size - self.e / 2).sum()


@dataclass(frozen=True)
class Topk(Kappa):
    """K = sum of the k largest |z| of a tensor. |theta| <= 1 / lambda, and ||theta||_1 <= k / lambda."""

    stage: ClassVar[str] = "kappa"
    k: int = 1
    """Coordinates of a tensor that move; ties: the first."""

    def __post_init__(self) -> None:
        if not self.k >= 1:
            raise ValueError(f"k must be at least 1, not {self.k}")

    def gradient(self, zs: list[Tensor]) -> list[Tensor]:
        """sign(z) on the k largest |z|, else 0."""
        return [z.sign() * self.chosen(z.abs().flatten()).view_as(z) for z in zs]

    def chosen(self, size_N: Tensor) -> Tensor:
        """True at the k largest, the first ones among equals."""
        if self.k >= size_N.numel():
            return torch.ones_like(size_N, dtype=torch.bool)
        least = size_N.topk(self.k).values[-1]
        above_N, equal_N = size_N > least, size_N == least
        return above_N | (equal_N & (equal_N.cumsum(0) <= self.k - above_N.sum()))

    def value(self, z: Tensor) -> Tensor:
        """Sum of the k largest |z|."""
        return z.abs().flatten().topk(min(self.k, z.numel())).values.sum()

    def dual(self, theta: Tensor) -> Tensor:
        """max(max |theta|, ||theta||_1 / k)."""
        return torch.maximum(largest(theta), theta.abs().sum() / self.k)


@dataclass(frozen=True)
class HalfSq(Kappa):
    """K = ||z||^2 / 2: momentum SGD with an interpolated gradient, and an l2 penalty lambda / 2 ||theta||^2."""

    stage: ClassVar[str] = "kappa"

    def gradient(self, zs: list[Tensor]) -> list[Tensor]:
        """z."""
        return zs

    def value(self, z: Tensor) -> Tensor:
        """||z||^2 / 2."""
        return z.square().sum() / 2

    def dual(self, theta: Tensor) -> None:
        """No bound."""
        return None


@dataclass(frozen=True)
class Nuclear(Kappa):
    """K = sum of a matrix' singular values: Muon with weight decay. Spectral norm of theta <= 1 / lambda.

    A tensor of more axes is a matrix of its first axis by the rest; a vector is one column (so: l2). By an exact
    singular value decomposition, which is meant for small matrices.
    """

    stage: ClassVar[str] = "kappa"

    def gradient(self, zs: list[Tensor]) -> list[Tensor]:
        """U V^T over the singular values that are not 0."""
        return [self.polar(z) for z in scaled(zs)]

    def polar(self, z: Tensor) -> Tensor:
        """The orthogonal factor of one tensor."""
        u_MR, s_R, v_RN = torch.linalg.svd(matrix(z), full_matrices=False)
        rank_R = s_R > s_R[:1] * torch.finfo(z.dtype).eps * max(u_MR.shape[0], v_RN.shape[1])
        return ((u_MR * rank_R) @ v_RN).view_as(z)

    def value(self, z: Tensor) -> Tensor:
        """Sum of the singular values."""
        return torch.linalg.svdvals(matrix(z)).sum()

    def dual(self, theta: Tensor) -> Tensor:
        """Largest singular value."""
        return largest(torch.linalg.svdvals(matrix(theta)))


def matrix(z: Tensor) -> Tensor:
    """[first axis, the rest]; a vector or number is one column."""
    return z.reshape(z.shape[0], -1) if z.ndim else z.reshape(1, 1)


def largest(z: Tensor) -> Tensor:
    """max |z|, 0 of nothing."""
    return z.abs().max() if z.numel() else z.new_zeros(())


def positive(sizes: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """Divisors: 1 where there is 0."""
    return [torch.where(s > 0, s, torch.ones_like(s)) for s in sizes]


def scaled(zs: list[Tensor]) -> list[Tensor]:
    """Every tensor over its largest |z|, so that powers neither vanish nor overflow."""
    return list(torch._foreach_div(zs, positive([largest(z) for z in zs])))
