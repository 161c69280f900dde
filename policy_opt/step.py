"""The step: one optimizer step on one mini-batch, by cotangents.

The loss is a function of per-token streams of the whole mini-batch. Its gradient with respect to them is pushed
through the model micro-batch by micro-batch, so the accumulated gradient does not depend on how rows are split,
padded, ordered or spread over processes.

Where no surrogate looks beyond its own row, the cotangents of some rows follow from those rows' live streams, and no
other forward is needed. Otherwise the streams of the whole mini-batch are evaluated first; while the weights have not
moved since the rollout was scored, that forward is the one that gave logp_old.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from policy_opt.batch import Batch
from policy_opt.errors import BatchError
from policy_opt.need import ENTROPY, Need
from policy_opt.part import Ctx, Part
from policy_opt.protocols import Learner
from policy_opt.terms import Loss, Term


@dataclass(frozen=True)
class Known:
    """Columns of the fresh batch that hold a quantity as of a policy version."""

    version: int = -1
    columns: Mapping[tuple, str] = field(default_factory=dict)
    """need.quantity -> column."""
    deferred: Mapping[str, str] = field(default_factory=dict)
    """Columns not computed yet, because the one step's own forward gives them: column -> stream."""


def check_finite(values: Mapping[str, Tensor], b: Batch, recipe: str) -> None:
    """BatchError where a number on the mask is NaN or infinite: names the tensor, its shape, a row, the recipe."""
    for name, value in values.items():
        bad = ~torch.isfinite(value) & _spread(b.mask_BT, value)
        if bad.any():
            where = tuple(bad.nonzero()[0].tolist())
            raise BatchError(
                f"{recipe}: `{name}` of shape {tuple(value.shape)} is {float(value[where])} at {where}, "
                f"on a token that is trained on; sampler and trainer disagree on what may be sampled, or weights are broken"
            )


def _spread(mask_BT: Tensor, value: Tensor) -> Tensor:
    return mask_BT.reshape(*mask_BT.shape, *[1] * (value.ndim - 2))


def score(learner: Learner, b: Batch, needs: Sequence[Need], recipe: str) -> dict[str, Tensor]:
    """Needs by name; equal quantities are asked for once."""
    if not needs:
        return {}
    first: dict[tuple, Need] = {}
    for need in needs:
        first.setdefault(need.quantity, need)
    values = learner.score(b, tuple(first.values()))
    missing = [n.name for n in first.values() if n.name not in values]
    if missing:
        raise BatchError(f"{recipe}: the learner returned no `{missing[0]}`")
    found = {need.name: values[first[need.quantity].name] for need in needs}
    check_finite({n: v for n, v in found.items() if v.shape[:2] == (b.B, b.T)}, b, recipe)
    return found


def optimize(
    terms: Sequence[Term],
    parts: Sequence[Part],
    b: Batch,
    ctx: Ctx,
    known: Known,
    lr_scale: float = 1.0,
) -> tuple[Batch, dict[str, Tensor], Loss, Mapping[str, float]]:
    """One optimizer step on b: (b with what the step added, streams, loss, the learner's numbers).

    parts: those that run at step time, with their needs scored under the weights as they are now.
    """
    assert ctx.learner is not None
    learner = ctx.learner
    timely = [n for p in (*parts, *(t.loss for t in terms if t.on)) for n in p.needs if n.when == "step"]
    for name, value in score(learner, b, timely, ctx.recipe).items():
        b = b.over(**{name: value})
    for part in parts:
        b = part(b, ctx)
    needs = _loss_needs(terms)
    loss = Loss.of(terms, b, ctx, b.logp_sampler_BT.dtype)
    if loss.per_row:
        def pull(rows_R: Tensor, live: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            some = b.rows(rows_R)
            if known.deferred:
                some = some.over(**{column: live[stream] for column, stream in known.deferred.items()})
            return loss.cotangents(_wanted(live, needs), some, rows_R)[1]
    else:
        whole = loss.cotangents(_streams(learner, b, needs, known, ctx), b)[1]

        def pull(rows_R: Tensor, live: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {name: value[rows_R] for name, value in whole.items()}

    observed = needs if ENTROPY in needs else (*needs, ENTROPY)
    streams = dict(learner.backward(b, observed, pull))
    check_finite(streams, b, ctx.recipe)
    if known.deferred:
        b = b.over(**{column: streams[stream] for column, stream in known.deferred.items()})
    return b, streams, loss, learner.step(lr_scale)


def _loss_needs(terms: Sequence[Term]) -> tuple[Need, ...]:
    found: dict[str, Need] = {}
    for term in terms:
        if term.on:
            found.update((n.name, n) for n in term.needs if n.when == "loss")
    return tuple(found.values())


def _wanted(live: Mapping[str, Tensor], needs: Sequence[Need]) -> dict[str, Tensor]:
    return {n.name: live[n.name] for n in needs}


def _streams(learner: Learner, b: Batch, needs: Sequence[Need], known: Known, ctx: Ctx) -> dict[str, Tensor]:
    """Streams of the whole mini-batch: from columns where the weights have not moved, else by a forward."""
    still = learner.version == known.version
    found = {n.name: b[known.columns[n.quantity]] for n in needs if still and n.quantity in known.columns}
    return found | score(learner, b, [n for n in needs if n.name not in found], ctx.recipe)
