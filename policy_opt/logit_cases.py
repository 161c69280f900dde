"""Cases of golden numbers that give whole distributions: a softmax table plays the policy.

States are the table's rows, one action each. The old logits are the policy that is there when the rollout is
scored, the new ones the policy at the optimizer step; everything between is the recipe's parts and its loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from policy_opt.batch import Batch
from policy_opt.table import TableLearner, World
from policy_opt.terms import Loss, reports
from policy_opt.vectors import Trace


class Played(NamedTuple):
    """One step on a table."""

    batch: Batch
    """With everything that was scored."""
    reports: Mapping[str, Tensor]
    """What the surrogates say of themselves."""
    values: Mapping[str, Tensor]
    """Each term's value without coefficient, by name."""
    loss: Tensor
    grad_NM: Tensor
    """d loss / d new logits."""


def one_state_per_row(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """`Vectors.arrange`: N states as N rows of one token, each in a group of its own; other layouts as they are."""
    if "logits_new" not in inputs:
        return inputs
    rows = len(inputs["logits_new"])
    moved = {k: [[x] for x in v] if isinstance(v, list) and len(v) == rows else v for k, v in inputs.items()}
    kept = {k: inputs[k] for k in ("logits_new", "logits_old", "advantages_raw") if k in inputs}
    return {**moved, **kept, "mask": [[1]] * rows, "group": list(range(rows))}


def play(t: Trace) -> Played:
    """Score the case under the old logits, take the loss under the new ones."""
    old_NM, new_NM = (torch.tensor(t.inputs[k], dtype=torch.float64) for k in ("logits_old", "logits_new"))
    learner = TableLearner(World(tasks=len(old_NM), vocab=old_NM.shape[1], turns=1, actions=1))
    set_logits(learner, old_NM)
    needs = t.recipe.needs
    learner.prepare(t.recipe.models, needs, None)
    b = t.batch.over(**learner.score(t.batch, [n for n in needs if n.when == "rollout"]))
    set_logits(learner, new_NM)
    b = b.over(**learner.score(b, [n for n in needs if n.when == "step"]))
    for part in t.recipe.signals:
        b = part(b, t.ctx)
    live = [n for n in needs if n.when == "loss"]
    streams = learner.score(b, live)
    loss, cotangents = Loss.of(t.recipe.terms, b, t.ctx, torch.float64).cotangents(streams, b)
    learner.backward(b, live, lambda rows_R, _: {name: value[rows_R] for name, value in cotangents.items()})
    plain = Loss.of(
        [dataclasses.replace(term, coef=1.0) for term in t.recipe.terms if term.on], b, t.ctx, torch.float64
    )
    values = dict(zip((term.name for term in plain.terms), plain.values(streams, b), strict=True))
    grad = learner.tables["policy"].grad
    assert grad is not None
    return Played(b, reports(t.recipe.terms, streams, b), values, loss, grad[: len(old_NM), 0])


def set_logits(learner: TableLearner, logits_NM: Tensor) -> None:
    """Rows of the policy's table; its last row is not a state."""
    with torch.no_grad():
        learner.tables["policy"][: len(logits_NM), 0] = logits_NM
