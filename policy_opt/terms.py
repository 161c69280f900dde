"""Terms: a loss is a sum of surrogates, each with its masks, aggregation and coefficient.

    loss = sum over terms of  coef * sum(c * w * surrogate(streams, columns))

with c from the aggregation (masks only) and w from credit parts (w_B, w_BT). `cotangents` is the gradient of
that with respect to the streams: what the golden vectors call d loss / d logp, and what training pushes
through the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from policy_opt.aggregate import SequenceMean
from policy_opt.batch import Batch
from policy_opt.errors import BatchError
from policy_opt.need import Need
from policy_opt.part import Ctx, Part
from policy_opt.surrogates import Streams


class Surrogate(Protocol):
    """A part with stage "surrogate"; see `policy_opt.surrogates`."""

    scope: str
    gives: str

    def __call__(self, s: Streams, b: Batch) -> Tensor: ...


class Aggregation(Protocol):
    """A part with stage "agg"."""

    def tokens(self, num_BT: Tensor, den_BT: Tensor) -> Tensor: ...
    def rows(self, num_BT: Tensor, den_BT: Tensor) -> Tensor: ...


class Controller(Protocol):
    """A part with stage "coef": a coefficient with a schedule or a feedback rule."""

    def value(self, ctx: Ctx) -> float: ...


_SEQUENCE_MEAN = SequenceMean()


@dataclass(frozen=True)
class Term:
    """One summand of the loss."""

    loss: Any
    """The surrogate."""
    num: str = "mask"
    """Tokens in the numerator: the mask column `<num>_BT`."""
    den: str = "mask"
    """Tokens in the denominator: the mask column `<den>_BT`."""
    agg: Any = _SEQUENCE_MEAN
    """How token losses become one number."""
    coef: Any = 1.0
    """A number, or a controller. A term with the plain number 0 is off: it needs and computes nothing."""
    name: str = "policy"
    """What options and metrics call it."""
    weights: tuple[str, ...] = ("w",)
    """Stems of weight columns that multiply the loss where they are there."""

    @property
    def on(self) -> bool:
        """Does it take part?"""
        return isinstance(self.coef, Part) or self.coef != 0

    @property
    def needs(self) -> tuple[Need, ...]:
        """What its surrogate asks for."""
        return self.loss.needs

    @property
    def reads(self) -> frozenset[str]:
        """Columns of surrogate and masks; weight columns are optional."""
        masks = {f"{name}_BT" for name in (self.num, self.den)}
        return self.loss.reads | frozenset(masks)

    def factor(self, ctx: Ctx) -> float:
        """The coefficient now."""
        return float(self.coef) if isinstance(self.coef, int | float) else self.coef.value(ctx)

    def coefficients(self, b: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(c_BT, c_B): weight of each token's loss, and of each row's where the surrogate is per row."""
        num_BT, den_BT = b[f"{self.num}_BT"].to(dtype), b[f"{self.den}_BT"].to(dtype)
        c_BT, c_B = self.agg.tokens(num_BT, den_BT), self.agg.rows(num_BT, den_BT)
        for stem in self.weights:
            if f"{stem}_BT" in b:
                c_BT = c_BT * b[f"{stem}_BT"]
            if f"{stem}_B" in b:
                c_BT, c_B = c_BT * b[f"{stem}_B"][:, None], c_B * b[f"{stem}_B"]
        return c_BT, c_B

    def value(self, s: Streams, b: Batch, c: tuple[Tensor, Tensor]) -> Tensor:
        """sum(c * surrogate), without coef; BatchError where the surrogate's shape is not what it gives."""
        loss = self.loss(s, b)
        shapes = {"BT": (b.B, b.T), "B": (b.B,), "": ()}
        if tuple(loss.shape) != shapes[self.loss.gives]:
            raise BatchError(
                f"surrogate {type(self.loss).__name__} of term `{self.name}` returned shape "
                f"{tuple(loss.shape)}, expected {shapes[self.loss.gives]}"
            )
        return loss if self.loss.gives == "" else (c[0 if self.loss.gives == "BT" else 1] * loss).sum()


Coefs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Loss:
    """The terms of one mini-batch, their coefficients fixed: evaluate it on all rows or on some."""

    terms: tuple[Term, ...]
    factors: tuple[float, ...]
    batch: Batch
    coefs: Coefs
    live: tuple[bool, ...]
    """Has the term any weight here? One without (no critic's targets yet, say) gives its model no gradient, so
    that no optimizer moves on momentum alone."""

    @classmethod
    def of(cls, terms: Sequence[Term], b: Batch, ctx: Ctx, dtype: torch.dtype) -> Loss:
        """Fix coefficients and controllers for a mini-batch."""
        terms = tuple(t for t in terms if t.on)
        coefs = [t.coefficients(b, dtype) for t in terms]
        live = tuple(
            t.loss.gives == "" or bool((c_BT if t.loss.gives == "BT" else c_B).any())
            for t, (c_BT, c_B) in zip(terms, coefs, strict=True)
        )
        return cls(terms, tuple(t.factor(ctx) for t in terms), b, coefs, live)

    @property
    def per_row(self) -> bool:
        """True where no surrogate looks beyond its own row."""
        return all(t.loss.scope == "row" for t in self.terms)

    def values(self, s: Streams, b: Batch, rows_R: Tensor | None = None) -> list[Tensor]:
        """Each term's value without coef: over all rows, or the share of rows_R in it (b: those rows)."""
        coefs = self.coefs if rows_R is None else [(c_BT[rows_R], c_B[rows_R]) for c_BT, c_B in self.coefs]
        clean = {name: masked(value, b) for name, value in s.items()}
        values = [t.value(clean, b, c) for t, c in zip(self.terms, coefs, strict=True)]
        return [value if live else value.detach() for value, live in zip(values, self.live, strict=True)]

    def cotangents(
        self, s: Streams, b: Batch, rows_R: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, {stream: d loss / d stream}); a stream that the loss does not depend on is left out."""
        leaves = {name: value.detach().requires_grad_() for name, value in s.items()}
        with torch.enable_grad():
            values = self.values(leaves, b, rows_R)
            total = torch.stack([f * v for f, v in zip(self.factors, values, strict=True)]).sum()
        if not total.requires_grad:
            return total, {}
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return total.detach(), {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}


def masked(value: Tensor, b: Batch) -> Tensor:
    """A stream with 0 outside the mask, whatever stood there (NaN included)."""
    return torch.where(spread(b.mask_BT, value), value, value.new_zeros(()))


def spread(mask_BT: Tensor, value: Tensor) -> Tensor:
    """The mask with as many axes as a [B, T, ...] value."""
    return mask_BT.reshape(*mask_BT.shape, *[1] * (value.ndim - 2))


def reports(terms: Sequence[Term], s: Streams, b: Batch) -> dict[str, Tensor]:
    """What the surrogates say of themselves (clip_frac, ratio, ...): {name: [B, T] or [B]}."""
    clean: Mapping[str, Tensor] = {name: masked(value, b) for name, value in s.items()}
    found: dict[str, Tensor] = {}
    for term in terms:
        if term.on and hasattr(term.loss, "report"):
            found.update(term.loss.report(clean, b))
    return found
