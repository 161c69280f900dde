"""The step: one optimizer step on one mini-batch, by cotangents.

The loss is a function of per-token streams of the whole mini-batch. Its gradient with respect to them is
pushed through the model micro-batch by micro-batch, so the accumulated gradient does not depend on how rows
are split, padded, ordered or spread over processes.

Where no surrogate looks beyond its own row, the cotangents of some rows follow from those rows' live streams,
and no other forward is needed. Otherwise the streams of the whole mini-batch are evaluated first; while the
weights have not moved since the rollout was scored, that forward is the one that gave logp_old.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from policy_opt.batch import Batch
from policy_opt.errors import BatchError
from policy_opt.need import ENTROPY, Need
from policy_opt.part import Ctx, run
from policy_opt.protocols import Learner, Pull
from policy_opt.terms import Loss, Term, spread


@dataclass(frozen=True)
class Known:
    """Columns of the fresh batch that hold a quantity as of a policy version."""

    version: int = -1
    columns: Mapping[Any, str] = field(default_factory=dict)
    """need.quantity -> column."""
    deferred: Mapping[str, str] = field(default_factory=dict)
    """Columns not computed yet, because the one step's own forward gives them: column -> stream."""


@dataclass(frozen=True)
class Taken:
    """An optimizer step that was taken."""

    batch: Batch
    """The mini-batch with the columns that the step added."""
    streams: Mapping[str, Tensor]
    """Live values before the step, [B, T]."""
    loss: Loss
    numbers: Mapping[str, float]
    """What the learner says: grad_norm, ..."""


def check_finite(values: Mapping[str, Tensor], b: Batch, recipe: str) -> None:
    """BatchError where a number on the mask is NaN or infinite: names tensor, shape, place and recipe."""
    for name, value in values.items():
        bad = ~torch.isfinite(value) & spread(b.mask_BT, value)
        if bad.any():
            where = tuple(bad.nonzero()[0].tolist())
            raise BatchError(
                f"{recipe}: `{name}` of shape {tuple(value.shape)} is {float(value[where])} at {where}, on a "
                "token that is trained on; sampler and trainer ban different tokens, or weights are broken"
            )


def score(learner: Learner, b: Batch, needs: Sequence[Need], recipe: str) -> dict[str, Tensor]:
    """Needs by name; equal quantities are asked for once."""
    if not needs:
        return {}
    first: dict[Any, Need] = {}
    for need in needs:
        first.setdefault(need.quantity, need)
    values = learner.score(b, tuple(first.values()))
    missing = [need.name for need in first.values() if need.name not in values]
    if missing:
        raise BatchError(f"{recipe}: the learner was asked for `{missing[0]}` and returned {sorted(values)}")
    found = {need.name: values[first[need.quantity].name] for need in needs}
    check_shapes(found, b, recipe)
    check_finite(found, b, recipe)
    return found


def check_shapes(values: Mapping[str, Tensor], b: Batch, recipe: str) -> None:
    """BatchError where what the learner gave has another shape than its name says."""
    try:
        b.over(**values)
    except BatchError as error:
        raise BatchError(f"{recipe}: {error}") from None


def optimize(
    terms: Sequence[Term],
    timely: Sequence[tuple[str, Any]],
    b: Batch,
    ctx: Ctx,
    known: Known,
    lr_scale: float = 1.0,
) -> Taken:
    """One optimizer step on b.

    timely: (path, part) that run at step time, with their needs scored under the weights as they are now.
    """
    learner = ctx.learner
    assert learner is not None
    terms = [term for term in terms if term.on]
    asking = (*(part for _, part in timely), *(term.loss for term in terms))
    now = {need.name: need for part in asking for need in part.needs if need.when == "step"}
    b = b.over(**standing(tuple(now.values()), b, known, ctx))
    for path, part in timely:
        b = run(path, part, b, ctx)
    needs = tuple({n.name: n for term in terms for n in term.needs if n.when == "loss"}.values())
    loss = Loss.of(terms, b, ctx, b.logp_sampler_BT.dtype)
    pull = _pull_rows(loss, needs, known, ctx) if loss.per_row else _pull_whole(loss, needs, known, ctx)
    observed = needs if ENTROPY in needs else (*needs, ENTROPY)
    streams = dict(learner.backward(b, observed, pull))
    check_shapes(streams, b, ctx.recipe)
    check_finite(streams, b, ctx.recipe)
    if known.deferred:
        b = b.over(**{column: streams[stream] for column, stream in known.deferred.items()})
    return Taken(b, streams, loss, learner.step(lr_scale))


def _pull_rows(loss: Loss, needs: Sequence[Need], known: Known, ctx: Ctx) -> Pull:
    """Cotangents of some rows from their live streams alone."""

    def pull(rows_R: Tensor, live: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        some = loss.batch.rows(rows_R)
        check_shapes(live, some, ctx.recipe)
        if known.deferred:
            some = some.over(**{column: live[stream] for column, stream in known.deferred.items()})
        return loss.cotangents({need.name: live[need.name] for need in needs}, some, rows_R)[1]

    return pull


def standing(needs: Sequence[Need], b: Batch, known: Known, ctx: Ctx) -> dict[str, Tensor]:
    """Needs under the weights as they are: columns of the rollout while those have not moved, else scored."""
    learner = ctx.learner
    assert learner is not None
    held = {q: name for q, name in known.columns.items() if name in b} if learner.version == known.version else {}
    found = {need.name: b[held[need.quantity]] for need in needs if need.quantity in held}
    return found | score(learner, b, [need for need in needs if need.name not in found], ctx.recipe)


def _pull_whole(loss: Loss, needs: Sequence[Need], known: Known, ctx: Ctx) -> Pull:
    """Cotangents of the whole mini-batch: from columns while weights have not moved, else by a forward."""
    assert ctx.learner is not None
    whole = loss.cotangents(standing(needs, loss.batch, known, ctx), loss.batch)[1]

    def pull(rows_R: Tensor, live: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: value[rows_R] for name, value in whole.items()}

    return pull
