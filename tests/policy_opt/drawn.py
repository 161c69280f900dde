"""Random batches and streams, and the gradient of one surrogate."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st

from policy_opt import Batch, Ctx
from policy_opt.aggregate import TokenMean
from policy_opt.terms import Loss, Term

quick = settings(max_examples=25, deadline=None)
CTX = Ctx()
seeds = st.integers(0, 10**6)


def random_batch(seed: int, rows: int = 8, width: int = 6, groups: int = 3, **columns) -> Batch:
    """Interior and trailing holes in the mask, every row with a token; groups with gaps in their ids."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=g) < 0.7
    mask[torch.arange(rows), torch.randint(width, (rows,), generator=g)] = True
    double = {"generator": g, "dtype": torch.float64}
    given_columns = {
        "reward_B": torch.randint(-2, 3, (rows,), generator=g).double(),
        "logp_sampler_BT": -torch.rand(rows, width, **double),
        "logp_old_BT": -torch.rand(rows, width, **double),
        "logp_ref_BT": -torch.rand(rows, width, **double),
        "values_old_BT": torch.randn(rows, width, **double),
        "truncated_B": (torch.rand(rows, generator=g) < 0.3).double(),
    }
    ids = torch.randint(groups, (rows,), generator=g) * 7 + 2
    return Batch.build(mask_BT=mask, group_B=ids, **{**given_columns, **columns})


def stream(seed: int, b: Batch, scale: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed + 1)
    return -scale * torch.rand(b.B, b.T, generator=g, dtype=torch.float64)


def gradient(surrogate, b: Batch, logp_BT: torch.Tensor, agg=None) -> torch.Tensor:
    term = Term(surrogate, agg=agg or TokenMean())
    found = Loss.of((term,), b, CTX, torch.float64).cotangents({"logp_BT": logp_BT}, b)[1]
    return found.get("logp_BT", torch.zeros_like(logp_BT))
