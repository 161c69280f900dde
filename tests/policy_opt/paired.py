"""Whole groups with columns for preference losses, and cotangents of a loss."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st

from policy_opt import Batch, Ctx
from policy_opt.terms import Loss, Term

quick = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 10**6)
CTX = Ctx()


def played(seed: int, groups: int = 3, size: int = 4, width: int = 6, **columns) -> Batch:
    """Whole groups with ids of their own, interior holes in the mask, a token in every row."""
    g = torch.Generator().manual_seed(seed)
    rows = groups * size
    mask = torch.rand(rows, width, generator=g) < 0.7
    mask[torch.arange(rows), torch.randint(width, (rows,), generator=g)] = True
    double = {"generator": g, "dtype": torch.float64}
    correct = torch.randint(2, (rows,), generator=g).double()
    given_columns = {
        "member_B": torch.arange(rows) % size,
        "reward_B": torch.randint(-2, 3, (rows,), generator=g).double(),
        "correct_B": correct,
        "logp_sampler_BT": -torch.rand(rows, width, **double),
        "logp_old_BT": -torch.rand(rows, width, **double),
        "logp_ref_BT": -torch.rand(rows, width, **double),
        "mismatched_BT": -torch.rand(rows, width, **double),
        "mismatched_ref_BT": -torch.rand(rows, width, **double),
        "rank_B": torch.randint(1, 5, (rows,), generator=g),
        "answer_B": torch.randint(-1, 3, (rows,), generator=g),
        "scores_BK": torch.rand(rows, 2, **double),
    }
    ids = torch.arange(groups).repeat_interleave(size) * 7 + 2
    return Batch.build(mask_BT=mask, group_B=ids, **{**given_columns, **columns})


def live(seed: int, b: Batch) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed + 1)
    return -2 * torch.rand(b.B, b.T, generator=g, dtype=torch.float64)


def pull(surrogate, b: Batch, logp_BT: torch.Tensor, agg=None) -> tuple[float, torch.Tensor]:
    """(loss, d loss / d logp); a surrogate per token or row is summed unless there is an aggregation."""
    from policy_opt.aggregate import ConstantSum

    loss = Loss.of((Term(surrogate, agg=agg or ConstantSum(1.0)),), b, CTX, torch.float64)
    value, found = loss.cotangents({"logp_BT": logp_BT}, b)
    return float(value), found.get("logp_BT", torch.zeros_like(logp_BT))


def disjoint(b: Batch) -> Batch:
    """Every row in one pair: (0, 1), (2, 3), ..."""
    return b.over(pairs_P2=torch.arange(b.B).reshape(-1, 2))


def signs(b: Batch) -> torch.Tensor:
    """+1 on preferred rows, -1 on the others, for disjoint pairs: [B, 1]."""
    return torch.tensor([1.0, -1.0]).double().repeat(b.B // 2)[:, None]
